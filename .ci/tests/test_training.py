"""Training goes on exactly where it was interrupted; checkpoints are refused when anything is wrong with them."""

import contextlib
import copy
import math
import pickle
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import ROOT, Payload, same


@pytest.fixture(autouse=True, params=[torch.float32])
def dtype(nb, monkeypatch, request):
    """In place of the measurement which of two is faster, as weights are compared bit by bit."""
    monkeypatch.setattr(nb, "training_dtype", lambda device: request.param)
    return request.param


@pytest.fixture(scope="module")
def stages(recipe):
    """Forty steps and twenty; no validation falls on the end of either."""
    return recipe, replace(recipe, images=320, seed=1)


@pytest.fixture
def network(nb, config):
    """A function that makes it, always the same; with an encoder a guide for one."""
    def new(encoder=(), **sizes):
        torch.manual_seed(0)
        model = nb.PixelCNN(replace(config, **sizes))
        return nb.starting_guide(model.eval().requires_grad_(False), encoder) if encoder else model
    return new


def train_until(nb, stop, model, batches, *arguments):
    """nb.train, interrupted as it asks for its batch number `stop`; its state is saved after each step."""
    left = iter(range(stop))

    def until(recipe, step):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return batches(recipe, step) if callable(batches) else nb.batch_at(batches, recipe, step)

    with contextlib.suppress(KeyboardInterrupt):
        nb.train(model, until, *arguments, save_seconds=0)


def test_training_learns_and_returns_and_writes_the_averaged_weights(nb, network, images, recipe, tmp_path):
    """The average is recomputed from the weights of each step; it is what is validated, every 15 steps and at the end.
    The control: the last weights."""
    model, path, weights = network(), tmp_path / "model.pt", []

    def batches(recipe, step):
        weights.append(copy.deepcopy(model.state_dict()))
        return nb.batch_at(images, recipe, step)

    averaged = nb.train(model, batches, images[:20], [recipe], path)
    mean = weights[0]
    for step, after in enumerate([*weights[1:], model.state_dict()]):
        decay = min(0.9, (step + 1) / (10 + step))
        mean = {name: decay * mean[name] + (1 - decay) * after[name] for name in mean}
    assert all(torch.allclose(x, mean[name], atol=1e-5) for name, x in averaged.state_dict().items())
    assert not torch.allclose(model.head.weight, mean["head.weight"], atol=1e-4)
    read = nb.load_checkpoint(path, "cpu")
    assert same(read, averaged) and read.history == averaged.history and read.config == model.config
    bits = [entry["validation_bits"] for entry in read.history]
    assert [entry["images"] for entry in read.history] == [240, 480, 640]
    assert bits[-1] == nb.validation_bits(read, images[:20]) < 0.9 * math.log2(3) and bits[-1] < bits[0]


def test_a_stage_begins_from_the_averaged_weights_with_fresh_optimisers(nb, network, images, stages, tmp_path):
    """Two stages at once are the second after the first. The control: from the weights that were not averaged."""
    path, train = tmp_path / "model.pt", partial(nb.train, batches=images, validation=images[:20])
    both = train(network(), stages=stages, path=path)
    model = network()
    first = train(model, stages=stages[:1], path=path)
    second = train(copy.deepcopy(first).requires_grad_(True), stages=stages[1:], path=path)
    assert same(second, both) and not same(train(model, stages=stages[1:], path=path), both)
    assert [entry["images"] for entry in both.history] == [240, 480, 720, 960]


@pytest.mark.parametrize("encoder, stop, dtype", [
    *(((), stop, torch.float32) for stop in (13, 40, 47)), ((1,), 13, torch.float32), ((), 47, torch.bfloat16)],
    indirect=["dtype"])
def test_interrupted_anywhere_it_ends_with_the_same_weights(nb, network, images, stages, tmp_path, encoder, stop):
    """In the first stage's 40 steps, at the seam, in the second; a guide within a portion of fresh batches. It would
    see a part of the state that is not kept. The control: other batches give other weights."""
    def batches():
        return nb.fresh_batches(network().eval(), images) if encoder else partial(nb.batch_at, images)

    calm, path = tmp_path / "calm.pt", tmp_path / "model.pt"
    whole = nb.train(network(encoder), batches(), images[:20], stages, calm)
    train_until(nb, stop, network(encoder), batches(), images[:20], stages, path)
    assert path.with_suffix(".state").exists() and not path.exists()
    torch.nn.init.ones_((again := network(encoder)).head.weight)
    resumed = nb.train(again, batches(), images[:20], stages, path)
    assert same(resumed, whole) and not path.with_suffix(".state").exists()
    for key in ("images", "train_bits", "validation_bits"):
        assert [entry[key] for entry in resumed.history] == [entry[key] for entry in whole.history]
    assert not same(nb.train(network(encoder), images.flip(0), images[:20], stages, calm), whole)


@pytest.mark.parametrize("said, sizes, change, added", [
    ("model.state", {"channels": 12}, {}, 0), ("model.state", {}, {"clip_norm": 2.0}, 0),
    ("at step 5 of Recipe", {}, {}, 1e4), ("at step 5 of Recipe", {}, {}, math.nan)])
def test_a_state_of_another_network_or_recipe_and_a_loss_that_is_no_number_stop_the_run(
        nb, network, images, stages, tmp_path, said, sizes, change, added):
    """It would see a training that goes on with what is not its own, or with nothing. The state is kept."""
    path = tmp_path / "model.pt"
    state = path.with_suffix(".state")
    train_until(nb, 5, network(), images, images[:20], stages, path)
    spoilt = torch.load(state, weights_only=True)
    spoilt["parts"][0]["head.bias"][0] += added
    torch.save(spoilt, state)
    kept = state.read_bytes()
    with pytest.raises((ValueError, FloatingPointError), match=said):
        nb.train(network(**sizes), images, images[:20], [stages[0], replace(stages[1], **change)], path)
    assert state.read_bytes() == kept and not path.exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], indirect=True)
@pytest.mark.parametrize("where", ["head.bias", "blocks.0.down.weight"])
def test_where_float16_overflows_neither_optimiser_steps(nb, network, images, recipe, tmp_path, dtype, where):
    """One gradient of AdamW's or Muon's is infinite in step 35: weights, average and both optimisers stay as they are,
    and the loss's scale is halved. The control: in float32 it is no overflow, and training stops."""
    model, path, states = network(), tmp_path / "model.pt", [None]  # after each number of steps

    def batches(recipe, step):
        if step:
            states.append(torch.load(path.with_suffix(".state"), weights_only=True)["parts"])
        return nb.batch_at(images, recipe, step)

    spoilt = dict(model.named_parameters())[where]
    spoilt.register_hook(lambda gradient: gradient + (torch.inf if len(states) == 36 else 0))
    train = partial(nb.train, model, batches, images[:20], [recipe], path, save_seconds=0)
    if dtype == torch.float32:
        with pytest.raises(FloatingPointError, match="gradient norm is inf at step 35 "):
            train()
        return
    train()
    before, after, later = ([*part[0].values(), *part[1].values(), *(
        x for k in (2, 3) for state in part[k]["state"].values() for x in state.values())] for part in states[35:38])
    assert all(map(torch.equal, before, after)) and not any(map(torch.equal, after, later))
    assert states[36][4]["scale"] == states[35][4]["scale"] / 2


def test_learning_rates_rise_stay_and_fall(nb, recipe):
    """Of 40 steps four to rise and ten to fall: it would see a last step that is lost, or stages that run together."""
    factors = [nb.rate_factor(recipe, step) for step in range(40)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1]) and set(factors[4:31]) == {1.0}
    assert factors[30:] == pytest.approx([1 - k / 10 for k in range(10)])


def test_an_epoch_sees_each_image_once_and_is_a_function_of_the_step(nb, recipe):
    """It would see batches that depend on what was asked before, and epochs that repeat."""
    images, steps = torch.arange(100), range(12)
    batches = torch.stack([nb.batch_at(images, recipe, step) for step in steps])
    first, second = batches.view(2, 96)
    assert len(first.unique()) == len(second.unique()) == 96 and not torch.equal(first, second)
    assert all(torch.equal(nb.batch_at(images, recipe, step), batches[step]) for step in (11, 0, 5))
    assert not torch.equal(nb.batch_at(images, replace(recipe, seed=1), 0), batches[0])


def test_interrupted_between_hash_and_file_nothing_is_refused_later(nb, network, images, recipe, tmp_path, monkeypatch):
    """Training goes on from its state: it would see a file that is written before its hash, and then refused."""
    path, save = tmp_path / "model.pt", nb.save_atomically

    def killed(contents, place):
        if place == path:
            raise KeyboardInterrupt
        save(contents, place)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(nb, "save_atomically", killed)
        nb.train(network(), images, images[:20], [recipe], path, save_seconds=0)
    assert path.name in nb.read_sums(path) and path.with_suffix(".state").exists() and not path.exists()
    assert same(nb.train(network(), images, images[:20], [recipe], path), nb.load_checkpoint(path, "cpu"))


@pytest.mark.parametrize("edit, word", [
    (lambda saved, mark: saved["weights"].pop("head.bias"), "head.bias"),
    (lambda saved, mark: saved["weights"]["head.bias"].fill_(math.nan), "finite"),
    (lambda saved, mark: saved["config"].update(channels=12), "size mismatch"),
    (lambda saved, mark: saved["config"].update(colour=1), "colour"),
    (lambda saved, mark: saved.update(history=Payload(mark)), "io.open"),
    (None, "expected config, weights and history of a PixelCNN")])
def test_damaged_and_wrong_checkpoints_are_refused_by_name(nb, network, tmp_path, edit, word):
    """By their SHA-256; were that right, by what is in them (the last is cut off), and code in one is not run. The
    control: by pickle it would be."""
    path, mark = tmp_path / "model.pt", tmp_path / "mark"
    nb.save_checkpoint(network(), path)
    saved = torch.load(path, weights_only=True)
    if edit:
        edit(saved, mark)
        torch.save(saved, path)
    else:
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.pt: SHA-256"):
        nb.load_checkpoint(path, "cpu")
    nb.write_sum(path, nb.sha256_of(path))
    with pytest.raises(ValueError, match=f"(?s)model.pt: .*{word}"):
        nb.load_checkpoint(path, "cpu")
    assert not mark.exists()
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()


def test_the_committed_checkpoints_load_and_match_their_sums(nb):
    """Neither the model's outputs nor, whatever the hint, those of the guide see their own pixel or a later one. (The
    control: mask B.)"""
    sums = nb.read_sums(ROOT / "checkpoints" / "SHA256SUMS")
    assert set(sums) == {path.name for path in (ROOT / "checkpoints").glob("*.pt")}
    for name in sums:
        network = nb.GuideNetwork if "guide" in name else nb.PixelCNN
        model = nb.load_checkpoint(ROOT / "checkpoints" / name, "cpu", network)
        assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
        if "guide" in name:
            hint = torch.randn(1, 2, 28, 128, dtype=torch.float64)
            model.forward = lambda images, own=model.double().forward: own(images, hint)
        moved = nb.influence(model, torch.randint(0, 256, (2, 28)))
        assert (moved.tril().max() > 1e-9) == (model.config.first_mask == "B")
