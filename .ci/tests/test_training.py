"""Training goes on exactly where it was interrupted; checkpoints are refused when anything is wrong with them."""

import contextlib
import copy
import math
import pickle
import random
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Payload, same


@pytest.fixture(autouse=True, params=[torch.float32])
def dtype(nb, monkeypatch, request):
    """In place of the measurement which of two is faster, as weights are compared bit by bit."""
    monkeypatch.setattr(nb, "training_dtype", lambda device: request.param)
    return request.param


@pytest.fixture
def network(nb, config):
    """A function that makes it, always the same; with an encoder a guide for one."""
    def new(encoder=(), **sizes):
        torch.manual_seed(0)
        model = nb.PixelCNN(replace(config, **sizes))
        return nb.starting_guide(model.eval().requires_grad_(False), encoder) if encoder else model
    return new


def data_of(nb, network, images, recipe):
    """The batches, a function of the step, and the validation batch of a model, or of a guide in training."""
    if network.config.encoder:
        masks = nb.random_masks(20, network.config, seed=0)
        return nb.fresh_batches(network.p.__self__, images, recipe), (images[:20], masks)
    return lambda step: [nb.batch_at(images, recipe, step)], (images[:20],)


def train(nb, network, images, recipe, path, stop=None, before=lambda step: None, **how):
    """nb.train, its state saved after each step, interrupted before step `stop`; `before` is called with the others."""
    batches, validation = data_of(nb, network, images, recipe)

    def asked(step):
        if step == stop:
            raise KeyboardInterrupt
        before(step)
        return batches(step)

    return nb.train(network, asked, validation, recipe, path, save_seconds=0, **how)


def test_training_learns_and_returns_and_writes_the_averaged_weights(nb, network, images, recipe, tmp_path):
    """The average is recomputed from the weights of each step; it is what is validated, every 15 steps and at the end.
    The control: the last weights. Plain images are the batches of batch_at."""
    model, path, weights = network(), tmp_path / "model.pt", []
    note = lambda step: weights.append(copy.deepcopy(model.state_dict()))
    averaged = train(nb, model, images, recipe, path, before=note)
    mean = weights[1]  # a copy after the first step
    for updates, after in enumerate([*weights[2:], model.state_dict()], 1):
        decay = min(0.9, (1 + updates) / (10 + updates))
        mean = {name: decay * mean[name] + (1 - decay) * after[name] for name in mean}
    assert all(torch.allclose(x, mean[name], atol=1e-5) for name, x in averaged.state_dict().items())
    assert not torch.allclose(model.head.weight, mean["head.weight"], atol=1e-4)
    read = nb.load_checkpoint(path, "cpu")
    assert same(read, averaged) and read.history == averaged.history and read.config == model.config
    bits = [entry["validation_bits"] for entry in read.history]
    assert [entry["images"] for entry in read.history] == [240, 480, 640]
    assert bits[-1] == nb.bits_of(read, images[:20]) < 0.9 * math.log2(3) and bits[-1] < bits[0]
    assert same(nb.train(network(), images, images[:20], recipe, path), averaged)


@pytest.mark.parametrize("encoder", [(), (1,)])
def test_parts_of_a_batch_count_by_their_size(nb, network, images, recipe, tmp_path, monkeypatch, encoder):
    """Sixteen images in threes, the last alone: gradients, loss and validation are those of one piece. The control: the
    mean of the parts' losses, each counted alike, has other gradients."""
    model, found = network(encoder), {}
    batches, validation = data_of(nb, model, images, recipe)
    loss = model.loss(*batches(0))
    losses = [model.loss(*part) for part in zip(*(x.split(3) for x in batches(0)))]
    whole, alike = (torch.cat([gradient.flatten() for gradient in torch.autograd.grad(nats, [*model.parameters()])])
                    for nats in (loss, sum(losses) / len(losses)))
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: found.update({p: p.grad.flatten().clone()}))
    monkeypatch.setattr(nb, "in_parts", lambda model, *batch: zip(*(x.split(3) for x in batch)))
    trained = train(nb, model, images, replace(recipe, images=16), tmp_path / "model.pt")
    assert (torch.cat([found[p] for p in model.parameters()]) - whole).abs().max() < 1e-6
    assert (alike - whole).abs().max() > 1e-3
    bits = [trained.history[0][key] for key in ("train_bits", "validation_bits")]
    assert bits == pytest.approx([loss.item() / nb.BIT, trained.loss(*validation).item() / nb.BIT], rel=1e-6)


@pytest.mark.parametrize("encoder, stop, dtype", [
    ((), 13, torch.float32), ((), 40, torch.float32), ((1,), 13, torch.float32), ((), 27, torch.bfloat16)],
    indirect=["dtype"])
def test_interrupted_anywhere_it_ends_with_the_same_weights(nb, network, images, recipe, tmp_path, encoder, stop):
    """Among 40 steps; after them, where the file cannot be written; a guide within a portion of fresh batches. It would
    see a part of the state that is not kept. The control: other batches give other weights."""
    calm, path = tmp_path / "calm.pt", tmp_path / "model.pt"
    whole = train(nb, network(encoder), images, recipe, calm)
    path.mkdir()  # in the file's way
    with pytest.raises(IsADirectoryError if stop == 40 else KeyboardInterrupt):
        train(nb, network(encoder), images, recipe, path, stop)
    path.rmdir()
    assert Path(f"{path}.state").exists()
    torch.nn.init.ones_((again := network(encoder)).head.weight)
    resumed = train(nb, again, images, recipe, path)
    assert same(resumed, whole) and same(nb.load_checkpoint(path, "cpu", type(again)), whole)
    assert {left.name for left in tmp_path.iterdir()} == {"calm.pt", "model.pt"}
    for entry in resumed.history + whole.history:
        del entry["seconds"]
    assert resumed.history == whole.history
    assert not same(train(nb, network(encoder), images.flip(0), recipe, calm), whole)


@pytest.mark.parametrize("said, sizes, change, added", [
    ("model.pt.state", {"channels": 12}, {}, 0), ("model.pt.state", {}, {"clip_norm": 2.0}, 0),
    ("at step 5 of Recipe", {}, {}, 1e4), ("at step 5 of Recipe", {}, {}, math.nan)])
def test_a_state_of_another_network_or_recipe_and_a_loss_that_is_no_number_stop_the_run(
        nb, network, images, recipe, tmp_path, said, sizes, change, added):
    """It would see a training that goes on with what is not its own, or with nothing. The state is kept."""
    path = tmp_path / "model.pt"
    state = Path(f"{path}.state")
    with pytest.raises(KeyboardInterrupt):
        train(nb, network(), images, recipe, path, stop=5)
    spoilt = torch.load(state, weights_only=True)
    spoilt["states"][0]["head.bias"][0] += added
    torch.save(spoilt, state)
    kept = state.read_bytes()
    with pytest.raises((ValueError, FloatingPointError), match=said):
        train(nb, network(**sizes), images, replace(recipe, **change), path)
    assert state.read_bytes() == kept and not path.exists()


def test_a_guides_training_goes_on_for_no_other_model_or_data_nor_without_a_batch(nb, network, images, recipe, tmp_path):
    """It would see hours spent on a guide that is refused at the end, or untrained weights written as trained ones."""
    path = tmp_path / "guide.pt"
    with pytest.raises(KeyboardInterrupt):
        train(nb, network((1,)), images, recipe, path, stop=5)
    other = network().eval().requires_grad_(False)
    torch.nn.init.ones_(other.head.bias)
    with pytest.raises(ValueError, match="guide.pt.state: of another network"):
        train(nb, nb.starting_guide(other, (1,)), images, recipe, path)
    with pytest.raises(ValueError, match="guide.pt.state: of another network, recipe or validation set"):
        train(nb, network((1,)), images.flip(1), recipe, path)
    assert not path.exists() and train(nb, network((1,)), images, recipe, path)
    with pytest.raises(ValueError, match="recipe: expected images for at least one batch"):
        train(nb, network(), images, replace(recipe, images=recipe.batch_size - 1), tmp_path / "model.pt")
    assert not (tmp_path / "model.pt").exists()


def test_a_damaged_state_is_refused_by_name_and_kept(nb, network, images, recipe, tmp_path):
    """Cut off, or with a flipped bit in how it is packed or in a weight: it would see a training that goes on with other
    weights, or an error without the file's name. The controls: torch.load takes the last; as saved it is gone on from."""
    path = tmp_path / "model.pt"
    state = Path(f"{path}.state")
    with pytest.raises(KeyboardInterrupt):
        train(nb, network(), images, recipe, path, stop=5)
    sound = state.read_bytes()
    place = sound.index(torch.load(state, weights_only=True)["states"][0]["head.weight"].numpy().tobytes())
    method = sound.rindex(b"PK\1\2") + 10  # how a member is packed
    flips = (method, 1), (method, 8), (method - 2, 1), (place, 1)
    flipped = [sound[:at] + bytes([sound[at] ^ bit]) + sound[at + 1 :] for at, bit in flips]
    for damaged in (sound[:-100], *flipped):
        state.write_bytes(damaged)
        with pytest.raises(ValueError, match="model.pt.state: damaged"):
            train(nb, network(), images, recipe, path)
        assert state.read_bytes() == damaged and not path.exists()
    torch.load(state, weights_only=True)
    state.write_bytes(sound)
    train(nb, network(), images, recipe, path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], indirect=True)
@pytest.mark.parametrize("where", ["head.bias", "blocks.0.conv.weight"])
def test_where_float16_overflows_neither_optimiser_steps(nb, network, images, recipe, tmp_path, dtype, where):
    """One gradient of AdamW's or Muon's (a kernel's) is infinite in step 35: weights, average and both optimisers stay
    as they are, and the loss's scale is halved. The control: in float32 it is no overflow, and training stops."""
    model, path, states = network(), tmp_path / "model.pt", []  # after each number of steps
    note = lambda step: states.append(step and torch.load(Path(f"{path}.state"), weights_only=True)["states"])
    spoilt = dict(model.named_parameters())[where]
    spoilt.register_hook(lambda gradient: gradient + (torch.inf if len(states) == 36 else 0))
    stops = pytest.raises(FloatingPointError, match="gradient norm is inf at step 35 ")
    with stops if dtype == torch.float32 else contextlib.nullcontext():
        train(nb, model, images, recipe, path, before=note)
    if dtype == torch.float16:
        kept, after, later = ([*weights.values(), *average.values(), *(
            x for optimiser in optimisers for state in optimiser["state"].values() for x in state.values())]
            for weights, average, *optimisers, scaler in states[35:38])
        assert all(map(torch.equal, kept, after)) and not any(map(torch.equal, after, later))
        assert states[36][4]["scale"] == states[35][4]["scale"] / 2


def test_muon_moves_kernels_as_the_matrices_that_they_are(nb, network, images, recipe):
    """Two steps equal those of a reference that keeps each kernel as a matrix. It would see a view without a gradient,
    or with an old one, or one that is not clipped. The control: by AdamW they end elsewhere."""
    model = network()
    inside = {name: p for name, p in model.named_parameters()
              if p.ndim in (2, 4) and not name.startswith(("embed.", "head."))}
    assert {"first.weight", "blocks.1.conv.weight"} < set(inside)
    twins, wrong = ([torch.nn.Parameter(p.detach().flatten(1).clone()) for p in inside.values()] for _ in range(2))
    optimisers = [*nb.make_optimisers(model, recipe),
                  torch.optim.Muon(twins, recipe.matrix_rate, weight_decay=recipe.weight_decay),
                  torch.optim.AdamW(wrong, recipe.rate, (0.9, 0.98), weight_decay=recipe.weight_decay)]
    for batch, clip_norm in zip(images[:32].split(16), (1e-2, 1e-1)):
        model.zero_grad(set_to_none=False)
        model.loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        for p, *others in zip(inside.values(), twins, wrong):
            for other in others:
                other.grad = p.grad.flatten(1).clone()
        for optimiser in optimisers:
            optimiser.step()
    found = [p.flatten(1) for p in inside.values()]
    assert all(torch.allclose(p, twin, atol=1e-6) for p, twin in zip(found, twins))
    assert not any(torch.allclose(p, other, atol=1e-3) for p, other in zip(found, wrong))
    assert not any(map(torch.equal, model.parameters(), network().parameters()))


def test_learning_rates_rise_stay_and_fall(nb, recipe):
    """Of 40 steps four to rise and ten to fall: it would see a last step that is lost."""
    factors = [nb.rate_factor(recipe, step) for step in range(40)]
    assert factors[:4] == pytest.approx([0.25, 0.5, 0.75, 1]) and set(factors[3:31]) == {1.0}
    assert factors[30:] == pytest.approx([1 - k / 10 for k in range(10)])


def test_an_epoch_sees_each_image_once_and_is_a_function_of_the_step(nb, recipe):
    """It would see batches that depend on what was asked before, and epochs that repeat."""
    images, steps = torch.arange(100), range(12)
    batches = torch.stack([nb.batch_at(images, recipe, step) for step in steps])
    first, second = batches.view(2, 96)
    assert len(first.unique()) == len(second.unique()) == 96 and not torch.equal(first, second)
    assert all(torch.equal(nb.batch_at(images, recipe, step), batches[step]) for step in (11, 0, 5))
    assert not torch.equal(nb.batch_at(images, replace(recipe, seed=1), 0), batches[0])


@pytest.mark.parametrize("edit, word", [
    (lambda saved, mark: saved["weights"].pop("head.bias"), "head.bias"),
    (lambda saved, mark: saved["weights"]["head.bias"].fill_(math.nan), "finite"),
    (lambda saved, mark: saved["config"].update(channels=12), "size mismatch"),
    (lambda saved, mark: saved["config"].update(colour=1), "colour"),
    (lambda saved, mark: saved.update(history="none"), "history that is no list"),
    (lambda saved, mark: saved.update(history=Payload(mark)), "io.open"),
    (None, "expected config, weights and history of a PixelCNN")])
def test_damaged_and_wrong_checkpoints_are_refused_by_name(nb, network, tmp_path, edit, word):
    """By what is in them (the last is cut off); code in one is not run. The controls: by pickle it would be, and the
    file as it was saved is read, alone in another folder."""
    path, mark = tmp_path / "model.pt", tmp_path / "mark"
    nb.save_checkpoint(network(), other := tmp_path / "other" / "model.pt")
    other.rename(path)
    assert same(nb.load_checkpoint(path, "cpu"), network())
    saved = torch.load(path, weights_only=True)
    if edit:
        edit(saved, mark)
        torch.save(saved, path)
    else:
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"(?s)model.pt: .*{word}"):
        nb.load_checkpoint(path, "cpu")
    assert not mark.exists()
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()


def test_no_flipped_bit_changes_a_weight(nb, network, tmp_path):
    """A hundred at random places: refused by name, or read as it was; and those that make a tensor a folder of the zip,
    in whose place torch.load leaves what is in memory: refused. The control: torch.load takes most."""
    path, chance, refused, taken = tmp_path / "model.pt", random.Random(0), 0, 0
    nb.save_checkpoint(network(), path)
    contents = path.read_bytes()
    places = [(chance.randrange(len(contents)), chance.randrange(8)) for _ in range(100)]
    folders = [(contents.rindex(name.encode()) - 8, 4) for name in zipfile.ZipFile(path).namelist()]
    for place, bit in places + folders:
        path.write_bytes(contents[:place] + bytes([contents[place] ^ 1 << bit]) + contents[place + 1:])
        try:
            assert same(nb.load_checkpoint(path, "cpu"), network()) and (place, bit) not in folders, (place, bit)
        except ValueError as error:
            assert "model.pt: " in str(error)
            refused += 1
            with contextlib.suppress(Exception):
                torch.load(path, weights_only=True)
                taken += 1
    assert refused > 80 and taken > 60


def test_what_is_of_another_network_is_refused(nb, network, images, recipe, tmp_path):
    """A checkpoint of another Config or kind, a guide of another model. The controls: their own, also in float64."""
    path, model = tmp_path / "model.pt", network()
    nb.save_checkpoint(model, path)
    assert same(nb.load_or_train(path, network(), images, images, recipe), model)
    with pytest.raises(ValueError, match=r"model.pt: expected .*channels=12, .* got one of .*channels=8, "):
        nb.load_or_train(path, network(channels=12), images, images, recipe)
    with pytest.raises(ValueError, match="(?s)model.pt: expected .* of a GuideNetwork; .*encoder"):
        nb.load_checkpoint(path, "cpu", nb.GuideNetwork)
    guide = nb.starting_guide(model, (1,))
    assert nb.Guide(copy.deepcopy(model).double(), copy.deepcopy(guide).double())
    torch.nn.init.ones_((other := network()).head.bias[:1])
    with pytest.raises(ValueError, match="^network: expected one made for this model"):
        nb.Guide(other, guide)


def test_the_committed_checkpoints_load_and_see_no_future(nb):
    """Neither the model's outputs nor, whatever the context, those of its guide move with their own pixel or a later
    one. The control: mask B first."""
    folder = ROOT / "checkpoints"
    model = nb.load_checkpoint(folder / "pixelcnn.pt", "cpu")
    guide = nb.load_checkpoint(folder / "guide.pt", "cpu", nb.GuideNetwork)
    assert nb.Guide(model, guide) and sorted(path.name for path in folder.iterdir()) == ["guide.pt", "pixelcnn.pt"]
    assert not any(net.training or any(p.requires_grad for p in net.parameters()) for net in (model, guide))
    context, leaky = torch.randn(1, 2, 28, 128, dtype=torch.float64), copy.deepcopy(model)
    guide.forward = lambda images, own=guide.double().forward: own(images, context=context)
    leaky.first = nb.MaskedConv2d("B", model.config.embedding, model.config.channels, 3, 3)
    moved = [nb.leak(nb.influence(network, torch.randint(0, 256, (2, 28)))) for network in (model, guide, leaky)]
    assert max(moved[:2]) < 1e-9 < moved[2]
