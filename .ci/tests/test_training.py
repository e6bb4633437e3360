"""Training goes on exactly where it was interrupted; checkpoints are refused when anything is wrong with them."""

import contextlib
import copy
import math
import os
import pickle
import random
import threading
import types
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import train as by_two
from conftest import FALSE_ALARM, ROOT, Payload, random_images, same
from definitions import definitions
from scipy import stats


@pytest.fixture
def task(nb, config, images, recipe):
    """A function: a network, always the same, its loss, batches and validation batch; with an encoder a guide's."""
    def new(encoder=(), images=images, nb=nb, **sizes):
        torch.manual_seed(0)
        model = nb.PixelCNN(replace(config, **sizes))
        if not encoder:
            return model, nb.model_loss, nb.image_batches(model, images, recipe), [images[:20]]
        guide = nb.starting_guide(model.eval().requires_grad_(False), encoder)
        validation = [images[:20], nb.random_masks(20, *model.size, seed=0)]
        return guide, partial(nb.guide_loss, model), nb.fresh_batches(model, images, recipe), validation
    return new


def train(nb, task, recipe, path, stop=None, before=lambda step: None):
    """nb.train, its state saved after each step, interrupted before step `stop`; `before` is called with the others."""
    network, loss, batches, validation = task

    def asked(step):
        if step == stop:
            raise KeyboardInterrupt
        before(step)
        return batches(step)

    return nb.train(network, loss, asked, validation, recipe, path, save_seconds=0)


def stopped(nb, task, recipe, path, stop):
    """The path of the state of a training that was interrupted."""
    with pytest.raises(KeyboardInterrupt):
        train(nb, task, recipe, path, stop)
    return Path(f"{path}.state")


def test_training_learns_and_returns_and_writes_the_averaged_weights(nb, task, images, recipe, tmp_path):
    """The average is recomputed from the weights of each step; it is what is validated, every 15 steps and at the end.
    The control: the last weights. A missing network is trained, one that is there is read. A second training goes on
    with the history of the first."""
    model, *how = task()
    path, weights = tmp_path / "model.pt", []
    note = lambda step: weights.append(copy.deepcopy(model.state_dict()))
    averaged = train(nb, (model, *how), recipe, path, before=note)
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
    assert bits[-1] == nb.score(read, nb.model_loss, [images[:20]]) < 0.9 * math.log2(3) and bits[-1] < bits[0]
    for other in (tmp_path / "other.pt", path):
        assert same(nb.load_or_train(other, *task(), recipe), averaged)
    read.head.bias.zero_()
    nb.save_checkpoint(read, path)
    assert same(nb.load_or_train(path, *task(), recipe), read)
    twice = train(nb, (averaged, *how), recipe, tmp_path / "twice.pt").history
    assert twice[:3] == read.history and [entry["images"] for entry in twice[3:]] == [880, 1120, 1280]
    seconds = [entry["seconds"] for entry in twice]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("encoder", [(), (1,)])
def test_parts_of_a_batch_count_by_their_size(nb, task, recipe, tmp_path, monkeypatch, encoder):
    """Sixteen images in threes, the last alone: gradients, loss and validation are those of one piece. The control: the
    mean of the parts' losses, each counted alike, has other gradients."""
    network, loss, batches, validation = task(encoder)
    found, weights = {}, [*network.parameters()]
    nats = loss(network, *batches(0))
    losses = [loss(network, *part) for part in zip(*(x.split(3) for x in batches(0)))]
    whole, alike = (torch.cat([gradient.flatten() for gradient in torch.autograd.grad(value, weights)])
                    for value in (nats, sum(losses) / len(losses)))
    for p in weights:
        p.register_post_accumulate_grad_hook(lambda p: found.update({p: p.grad.flatten().clone()}))
    monkeypatch.setattr(nb, "in_parts", lambda model, *batch: zip(*(x.split(3) for x in batch)))
    trained = train(nb, (network, loss, batches, validation), replace(recipe, images=16), tmp_path / "model.pt")
    assert (torch.cat([found[p] for p in weights]) - whole).abs().max() < 1e-6
    assert (alike - whole).abs().max() > 1e-3
    bits = [trained.history[0][key] for key in ("train_bits", "validation_bits")]
    assert bits == pytest.approx([x.item() / nb.BIT for x in (nats, loss(trained, *validation))], rel=1e-6)


@pytest.mark.parametrize("encoder, stop, dtype", [
    ((), 13, None), ((), 40, None), ((1,), 13, None), ((), 27, torch.bfloat16)])
def test_interrupted_anywhere_it_ends_with_the_same_weights(nb, task, images, recipe, tmp_path, encoder, stop, dtype):
    """Among 40 steps; after them, where the file cannot be written; a guide within a portion of fresh batches. It would
    see a part of the state that is not kept. The control: other batches give other weights."""
    calm, path, recipe = tmp_path / "calm.pt", tmp_path / "model.pt", replace(recipe, dtype=dtype)
    whole = train(nb, task(encoder), recipe, calm)
    path.mkdir()  # in the file's way
    with pytest.raises(IsADirectoryError if stop == 40 else KeyboardInterrupt):
        train(nb, task(encoder), recipe, path, stop)
    path.rmdir()
    assert Path(f"{path}.state").exists()
    torch.nn.init.ones_((again := task(encoder))[0].head.weight)
    resumed = train(nb, again, recipe, path)
    assert same(resumed, whole) and same(nb.load_checkpoint(path, "cpu", type(resumed)), whole)
    assert {left.name for left in tmp_path.iterdir()} == {"calm.pt", "model.pt"}
    for entry in resumed.history + whole.history:
        del entry["seconds"]
    assert resumed.history == whole.history
    assert not same(train(nb, task(encoder, images.flip(0)), recipe, calm), whole)


def test_a_state_is_gone_on_from_in_its_own_precision(nb, task, recipe, tmp_path, monkeypatch):
    """With no dtype named, between a machine where that is bfloat16 and this one, both ways: all steps are made in the
    first's. It would see a training that changes its precision with its place. The control: the other's weights."""
    machines, whole, path = (nb.training_dtype, lambda recipe, device: torch.bfloat16), [], tmp_path / "model.pt"
    for machine in machines:
        monkeypatch.setattr(nb, "training_dtype", machine)
        whole.append(train(nb, task(), recipe, path))
    for first, second in (machines, machines[::-1]):
        monkeypatch.setattr(nb, "training_dtype", first)
        stopped(nb, task(), recipe, path, 13)
        monkeypatch.setattr(nb, "training_dtype", second)
        found = train(nb, task(), recipe, path)
        assert [same(found, other) for other in whole] == [machine is first for machine in machines]


@pytest.mark.parametrize("said, sizes, change, added", [
    ("model.pt.state: of", {"channels": 12}, {}, 0), ("model.pt.state: of", {"encoder": (1,)}, {}, 0),
    ("model.pt.state: of", {}, {"clip_norm": 2.0}, 0), ("model.pt.state: of", {}, {"dtype": torch.float32}, 0),
    ("^gradient norm is nan at step 5 of Recipe", {}, {}, math.nan)])
def test_a_state_of_another_network_or_recipe_and_a_loss_that_is_no_number_stop_the_run(
        nb, task, recipe, tmp_path, said, sizes, change, added):
    """It would see a training that goes on with what is not its own, or with nothing. The state is kept; untouched (the
    control) it is gone on from."""
    path = tmp_path / "model.pt"
    state = stopped(nb, task(), recipe, path, 5)
    sound = state.read_bytes()
    spoilt = torch.load(state, weights_only=True)
    spoilt["states"][0]["head.bias"][0] += added
    torch.save(spoilt, state)
    kept = state.read_bytes()
    with pytest.raises((ValueError, FloatingPointError), match=said):
        train(nb, task(**sizes), replace(recipe, **change), path)
    assert state.read_bytes() == kept and not path.exists()
    state.write_bytes(sound)
    train(nb, task(), recipe, path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("where", ["head.bias", "blocks.0.conv.weight"])
def test_where_float16_overflows_neither_optimiser_steps(nb, task, recipe, tmp_path, dtype, where):
    """One gradient of AdamW's or Muon's (a kernel's) is infinite in step 35: weights, average and both optimisers stay
    as they are, and the loss's scale is halved. The control: in float32 it is no overflow, and training stops."""
    model, *how = task()
    path, states = tmp_path / "model.pt", []  # after each number of steps
    note = lambda step: states.append(step and torch.load(Path(f"{path}.state"), weights_only=True)["states"])
    spoilt = dict(model.named_parameters())[where]
    spoilt.register_hook(lambda gradient: gradient + (torch.inf if len(states) == 36 else 0))
    stops = pytest.raises(FloatingPointError, match="gradient norm is inf at step 35 ")
    with stops if dtype == torch.float32 else contextlib.nullcontext():
        train(nb, (model, *how), replace(recipe, dtype=dtype), path, before=note)
    if dtype == torch.float16:
        kept, after, later = ([*weights.values(), *average.values(), *(
            x for optimiser in optimisers for state in optimiser["state"].values() for x in state.values())]
            for weights, average, *optimisers, scaler in states[35:38])
        assert all(map(torch.equal, kept, after)) and not any(map(torch.equal, after, later))
        assert states[36][4]["scale"] == states[35][4]["scale"] / 2


@pytest.mark.parametrize("encoder", [(), (1,)])
def test_two_processes_train_as_one_does(nb, task, recipe, tmp_path, monkeypatch, encoder):
    """What makes the released weights, as two threads and not compiled: the weights and the history are those of
    `train`. It would see a layer that is another one, a part of a batch, of the fresh draws, or a row that hides
    something, that is left out or counts twice. The control: without what the second finds they end elsewhere."""
    monkeypatch.setattr(torch.optim, "Muon", lambda matrices, rate, weight_decay: torch.optim.SGD(matrices, rate))
    expected, found = train(nb, task(encoder), recipe, tmp_path / "one.pt"), []  # Muon rounds, to bfloat16

    monkeypatch.setattr(torch, "compile", lambda loss, dynamic: loss)
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, cores: None)
    monkeypatch.setattr(by_two.Half, "parts", lambda self, *batch: by_two.parts_of(*batch)[self.rank :: 2])
    size = nb.count_parameters(expected)
    for folder, lost in (("two", False), ("lost", True)):
        options = types.SimpleNamespace(
            network="guide" if encoder else "model", one_core=False, folder=tmp_path / folder)
        weights, gradients, draws = torch.zeros(size), torch.zeros(size + 1), torch.zeros(128, 5, 4, dtype=torch.uint8)
        step, barrier = types.SimpleNamespace(value=0), threading.Barrier(2)
        lead, second = (by_two.Half(rank, other, options, (*task(encoder, nb=other), recipe), (
            weights, gradients.clone() if rank and lost else gradients, draws, types.SimpleNamespace(), step, barrier))
            for rank, other in enumerate(by_two.prepared(definitions()) for _ in range(2)))
        helping = threading.Thread(target=second.help)
        helping.start()
        lead.lead()
        helping.join(60)
        assert not helping.is_alive()
        network = nb.load_checkpoint(options.folder / ("guide.pt" if encoder else "pixelcnn.pt"), "cpu", type(expected))
        off = max((a - b).abs().max() for a, b in zip(network.parameters(), expected.parameters()))
        bits = [abs(entry["train_bits"] - other["train_bits"])
                for entry, other in zip(network.history, expected.history, strict=True)]
        found.append((off, max(bits)))
    assert max(found[0]) < 3e-3 < 1e-2 < min(found[1]), found


def test_muon_moves_kernels_as_the_matrices_that_they_are(nb, task, images, recipe):
    """Two steps equal those of a reference that keeps each kernel as a matrix. It would see a view without a gradient,
    or with an old one, or one that is not clipped. The control: by AdamW they end elsewhere."""
    model, loss, *_ = task()
    inside = {name: p for name, p in model.named_parameters()
              if p.ndim in (2, 4) and not name.startswith(("embed.", "head."))}
    assert {"first.weight", "blocks.1.conv.weight"} < set(inside)
    twins, wrong = ([torch.nn.Parameter(p.detach().flatten(1).clone()) for p in inside.values()] for _ in range(2))
    optimisers = [*nb.make_optimisers(model, recipe),
                  torch.optim.Muon(twins, recipe.matrix_rate, weight_decay=recipe.weight_decay),
                  torch.optim.AdamW(wrong, recipe.rate, (0.9, 0.98), weight_decay=recipe.weight_decay)]
    for batch, clip_norm in zip(images[:32].split(16), (1e-2, 1e-1)):
        model.zero_grad(set_to_none=False)
        loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        for p, *others in zip(inside.values(), twins, wrong):
            for other in others:
                other.grad = p.grad.flatten(1).clone()
        for optimiser in optimisers:
            optimiser.step()
    found = [p.flatten(1) for p in inside.values()]
    assert all(torch.allclose(p, twin, atol=1e-6) for p, twin in zip(found, twins))
    assert not any(torch.allclose(p, other, atol=1e-3) for p, other in zip(found, wrong))
    assert not any(map(torch.equal, model.parameters(), task()[0].parameters()))


def test_all_weights_decay_but_a_guides_powers(nb, task, recipe):
    """One step by gradients of zero takes rate * weight_decay of a weight, of Muon's and of AdamW's (the controls), and
    nothing of the powers: it would see powers that are drawn to one value whatever the data say."""
    guide = task((1,))[0].requires_grad_(False)
    optimisers, before = nb.make_optimisers(guide, replace(recipe, weight_decay=0.5)), {}
    for name, p in guide.named_parameters():
        before[name], p.grad = p.add_(1).clone(), torch.zeros_like(p) if p.grad is None else p.grad
    for optimiser in optimisers:
        optimiser.step()
    rates = {"first.weight": recipe.matrix_rate, "encoder.out.weight": recipe.matrix_rate, "head.weight": recipe.rate,
             "norm.weight": recipe.rate, "position": recipe.rate, "powers": 0}
    for name, rate in rates.items():
        assert torch.allclose(guide.state_dict()[name], (1 - 0.5 * rate) * before[name], rtol=0, atol=1e-5), name


def test_learning_rates_rise_stay_and_fall(nb, task, images, recipe):
    """Of 40 steps four to rise and ten to fall; both optimisers step at them. It would see a last step that is lost,
    and rates that are not set."""
    factors = [nb.rate_factor(recipe, step) for step in range(40)]
    assert factors[:4] == pytest.approx([0.25, 0.5, 0.75, 1]) and set(factors[3:31]) == {1.0}
    assert factors[30:] == pytest.approx([1 - k / 10 for k in range(10)])
    model, loss, *_ = task()
    optimisers = nb.make_optimisers(model, recipe)
    for step in (38, 1):
        loss(model, images).backward()
        assert nb.update(model, optimisers, torch.amp.GradScaler("cpu", enabled=False), recipe, step)
        rates = [group["lr"] for optimiser in optimisers for group in optimiser.param_groups]
        assert rates == pytest.approx([factors[step] * rate for rate in (recipe.matrix_rate, recipe.rate, recipe.rate)])


def test_an_epoch_sees_each_image_once_and_is_a_function_of_the_step(nb, recipe):
    """It would see batches that depend on what was asked before, and epochs that repeat."""
    images, steps = torch.arange(100), range(12)
    batches = torch.stack([nb.batch_at(images, recipe, step) for step in steps])
    first, second = batches.view(2, 96)
    assert len(first.unique()) == len(second.unique()) == 96 and not torch.equal(first, second)
    assert all(torch.equal(nb.batch_at(images, recipe, step), batches[step]) for step in (11, 0, 5))
    assert not torch.equal(nb.batch_at(images, replace(recipe, seed=1), 0), batches[0])


def test_images_are_shifted_by_whole_pixels_while_the_rates_do_not_fall(nb, task, images, recipe):
    """Each of 2,500 images without a zero is one of the 25 that a move by -2..2 gives, zeros coming in, and all 25 come
    equally often. The last ten of 40 steps see the images of batch_at; the others these, each step moved in its own
    way, whatever was asked before. It would see a network that ends on what no digit looks like. The control: shift
    0."""
    ones, moves = random_images(2500, 7, 6, 200) + 1, [(down, right) for down in range(5) for right in range(5)]
    wide, found = torch.nn.functional.pad(ones, (2, 2, 2, 2)), nb.shifted(ones, 2, 7)
    often = torch.stack([(found == wide[:, down : down + 7, right : right + 6]).all(dim=(1, 2)).sum()
                         for down, right in moves])
    assert often.sum() == 2500 and ((often - 100) ** 2 / 100).sum() < stats.chi2.isf(FALSE_ALARM, 24)
    shifting, still = (nb.image_batches(task()[0], images, replace(recipe, shift=shift)) for shift in (1, 0))
    for step in (39, 30, 29, 28, 0):
        (found,), (plain,) = shifting(step), still(step)
        assert torch.equal(plain, nb.batch_at(images, recipe, step)) and torch.equal(found, plain) == (step >= 30)
        assert torch.equal(found, plain if step >= 30 else nb.shifted(plain, 1, step))
    assert not torch.equal(nb.shifted(images, 1, 28), nb.shifted(images, 1, 29))


@pytest.mark.parametrize("edit, word", [
    (lambda saved, mark: saved["weights"].pop("head.bias"), "head.bias"),
    (lambda saved, mark: saved["weights"]["head.bias"].fill_(math.nan), "finite"),
    (lambda saved, mark: saved["config"].update(channels=12), "size mismatch"),
    (lambda saved, mark: saved["config"].update(colour=1), "colour"),
    (lambda saved, mark: saved.update(history=Payload(mark)), "io.open"),
    (None, "expected config, weights and history of a PixelCNN")])
def test_damaged_and_wrong_checkpoints_are_refused_by_name(nb, task, tmp_path, edit, word):
    """By what is in them (the last is cut off); code in one is not run. The controls: by pickle it would be, and the
    file as it was saved is read, alone in another folder."""
    path, mark = tmp_path / "model.pt", tmp_path / "mark"
    nb.save_checkpoint(task()[0], other := tmp_path / "other" / "model.pt")
    other.rename(path)
    assert same(nb.load_checkpoint(path, "cpu"), task()[0])
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


def test_no_flipped_bit_changes_a_weight(nb, task, tmp_path):
    """A hundred at random places: refused by name, or read as it was; and those that make a tensor a folder of the zip,
    in whose place torch.load leaves what is in memory: refused. The control: torch.load takes most."""
    path, chance, refused, taken = tmp_path / "model.pt", random.Random(0), 0, 0
    nb.save_checkpoint(task()[0], path)
    contents = path.read_bytes()
    places = [(chance.randrange(len(contents)), chance.randrange(8)) for _ in range(100)]
    folders = [(contents.rindex(name.encode()) - 8, 4) for name in zipfile.ZipFile(path).namelist()]
    for place, bit in places + folders:
        path.write_bytes(contents[:place] + bytes([contents[place] ^ 1 << bit]) + contents[place + 1:])
        try:
            assert same(nb.load_checkpoint(path, "cpu"), task()[0]) and (place, bit) not in folders, (place, bit)
        except ValueError as error:
            assert "model.pt: " in str(error)
            refused += 1
            with contextlib.suppress(Exception):
                torch.load(path, weights_only=True)
                taken += 1
    assert refused > 80 and taken > 60


def test_what_is_of_another_network_is_refused(nb, task, recipe, tmp_path):
    """A checkpoint of another Config or kind. The control: its own."""
    path = tmp_path / "model.pt"
    nb.save_checkpoint(task()[0], path)
    assert same(nb.load_or_train(path, *task(), recipe), task()[0])
    with pytest.raises(ValueError, match=r"model.pt: expected .*channels=12, .* got one of .*channels=8, "):
        nb.load_or_train(path, *task(channels=12), recipe)
    with pytest.raises(ValueError, match="(?s)model.pt: expected .* of a GuideNetwork; .*encoder"):
        nb.load_or_train(path, *task((1,)), recipe)


def test_the_committed_checkpoints_load_and_see_no_future(nb):
    """Neither the model's outputs nor, whatever the context, those of its guide move with their own pixel or a later
    one. The control: mask B first."""
    folder = ROOT / "checkpoints"
    model = nb.load_checkpoint(folder / "pixelcnn.pt", "cpu")
    guide = nb.load_checkpoint(folder / "guide.pt", "cpu", nb.GuideNetwork)
    assert replace(guide.config, encoder=()) == model.config and guide.config.encoder
    assert sorted(path.name for path in folder.iterdir()) == ["guide.pt", "pixelcnn.pt"]
    assert not any(net.training or any(p.requires_grad for p in net.parameters()) for net in (model, guide))
    context, leaky = torch.randn(1, 2, 28, 128, dtype=torch.float64), copy.deepcopy(model)
    guide.forward = lambda images, own=guide.double().forward: own(images, context=context)
    leaky.first = nb.MaskedConv2d("B", model.config.embedding, model.config.channels, 3, 3)
    moved = [nb.leak(nb.influence(network, torch.randint(0, 256, (2, 28)))) for network in (model, guide, leaky)]
    assert max(moved[:2]) < 1e-9 < moved[2]
