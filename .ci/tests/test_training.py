"""Training resumes exactly; checkpoints are refused when anything is wrong with them."""

import math
import pickle
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from definitions import train_until
from test_data import Payload


@pytest.fixture(scope="module")
def stages(config):
    return config, replace(config, images_seen=320, seed=1)


@pytest.fixture(scope="module")
def training(nb, images):
    """load_or_train on the CPU, its state saved at every step."""
    return partial(nb.load_or_train, images=images, validation=images[:20], device="cpu", save_seconds=0)


@pytest.fixture(scope="module")
def trained(nb, config, images, tmp_path_factory):
    """A checkpoint of the first stage."""
    path = tmp_path_factory.mktemp("trained") / "model.pt"
    nb.train(config, images, images[:20], path=path, device="cpu")
    return path


@pytest.fixture(scope="module")
def whole(stages, training, tmp_path_factory):
    """A checkpoint of both, never interrupted."""
    path = tmp_path_factory.mktemp("whole") / "model.pt"
    training(stages, path=path, anew=True)
    return path


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))


def seen(history):
    return [entry["images"] for entry in history]


def test_training_learns_in_both_stages(nb, stages, trained, whole):
    """The second goes on from the weights and with the history of the first."""
    first, both = (nb.load_checkpoint(path, "cpu") for path in (trained, whole))
    bits = [entry["validation_bits"] for entry in both.history]
    assert bits[3] < 0.9 * math.log2(3) < bits[0] and bits[-1] < bits[3] == first.history[-1]["validation_bits"]
    assert (first.config, both.config) == stages and not same(first, both)
    assert seen(first.history) == seen(both.history)[:4] and seen(both.history) == [*range(160, 961, 160)]


@pytest.mark.parametrize("killed, calls", [("batch_at", 1), ("batch_at", 10), ("batch_at", 40), ("batch_at", 47),
                                           ("write_sum", 0), ("write_sum", 1)])
def test_killed_anywhere_it_ends_with_the_same_weights(
        nb, stages, training, trained, whole, tmp_path, monkeypatch, killed, calls):
    """In the first stage's 40 steps, at the seam, in the second; between either's file and its SHA-256. The control:
    the first stage's weights are others."""
    path, real, left = tmp_path / "model.pt", getattr(nb, killed), iter(range(calls))

    def kill(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(nb, killed, kill)
        training(stages, path=path, anew=True)
    at_the_seam = killed == "batch_at" and calls == 40
    assert path.exists() == (killed == "write_sum" or calls >= 40)
    assert path.with_suffix(".state").exists() != at_the_seam
    model, history = training(stages, path=path, anew=True)
    assert model.config == stages[-1] and model.history == history and seen(history) == [*range(160, 961, 160)]
    assert same(model, nb.load_checkpoint(whole, "cpu")) and same(model, nb.load_checkpoint(path, "cpu"))
    assert not same(model, nb.load_checkpoint(trained, "cpu")) and not path.with_suffix(".state").exists()


def test_a_state_of_another_config_is_refused(nb, config, images, tmp_path):
    path = tmp_path / "model.pt"
    train_until(nb, 2, config, images, images[:20], path=path, device="cpu")
    with pytest.raises(ValueError, match="another config"):
        nb.train(replace(config, channels=12), images, images[:20], path=path, device="cpu")


def test_a_file_is_loaded_whatever_its_recipe_but_not_as_another_network(nb, stages, training, whole, capsys):
    wanted, before = nb.load_checkpoint(whole, "cpu"), whole.read_bytes()
    other = "model.pt was trained by another recipe: "
    for recipe, said in ((stages, ""), ([replace(stages[1], seed=2, decay=0.5)],
                                        f"{other}decay = 0.25\n{other}seed = 1\n")):
        model, history = training(recipe, path=whole)
        assert same(model, wanted) and model.config == stages[-1] and history == wanted.history
        assert capsys.readouterr().out == said
    for field, value in (("channels", 12), ("dilations", (2, 1)), ("first_mask", "B"), ("encoder", (1,))):
        for anew in (False, True):
            expected = rf"model.pt: expected the network of .*{field}={re.escape(repr(value))}"
            with pytest.raises(ValueError, match=expected):
                training([replace(stages[1], **{field: value})], path=whole, anew=anew)
    assert whole.read_bytes() == before


def test_a_missing_file_is_trained_by_the_short_recipe(nb, stages, training, trained, whole, tmp_path, capsys):
    """Without one by the first stage; `anew` begins from scratch, whatever is there."""
    short, path = replace(stages[0], images_seen=160), tmp_path / "model.pt"
    model, history = training(stages, path=path, short=short)
    assert model.config == short and seen(history) == [160]
    capsys.readouterr()
    assert same(training(stages, path=path, short=short)[0], model)
    said = capsys.readouterr().out
    assert "another recipe: images_seen = 160\n" in said and "another recipe: seed = 0\n" in said
    for _ in range(2):
        assert same(training(stages, path=path, short=short, anew=True)[0], nb.load_checkpoint(whole, "cpu"))
    assert same(training(stages, path=tmp_path / "other.pt")[0], nb.load_checkpoint(trained, "cpu"))


def test_an_epoch_sees_each_image_once_and_is_a_function_of_the_step(nb, config):
    images, steps = torch.arange(100), range(12)
    batches = torch.stack([nb.batch_at(images, config, step) for step in steps])
    first, second = batches.view(2, 96)
    assert len(first.unique()) == len(second.unique()) == 96 and not torch.equal(first, second)
    assert all(torch.equal(nb.batch_at(images, config, step), batches[step]) for step in (11, 0, 5))
    assert not torch.equal(nb.batch_at(images, replace(config, seed=1), 0), batches[0])


def test_training_on_fresh_batches_resumes_exactly(nb, config, images, tmp_path):
    """Stopped within a portion. The control: other batches give other weights."""
    torch.manual_seed(0)
    model, path = nb.PixelCNN(config).eval(), tmp_path / "model.pt"
    train = partial(nb.train, config, validation=images[:20], device="cpu")
    batches = nb.fresh_batches(model, images, config)
    train_until(nb, 13, config, batches, images[:20], path=path, device="cpu")
    resumed = train(nb.fresh_batches(model, images, config), path=path)[0]
    assert same(resumed, train(batches, path=tmp_path / "whole.pt")[0])
    assert not same(resumed, train(lambda step: batches(step + 1), path=tmp_path / "other.pt")[0])


@pytest.mark.parametrize("damage", [lambda b: b[:-100], lambda b: b[:100] + bytes([b[100] ^ 1]) + b[101:]])
def test_damaged_checkpoints_are_refused(nb, config, training, trained, tmp_path, damage):
    """By their SHA-256, also where they would be trained; were that right, by what is in them."""
    path = tmp_path / "model.pt"
    path.write_bytes(damage(trained.read_bytes()))
    path.with_name("SHA256SUMS").write_bytes(trained.with_name("SHA256SUMS").read_bytes())
    for anew in (False, True):
        with pytest.raises(ValueError, match="model.pt: SHA-256"):
            training([config], path=path, anew=anew)
    nb.write_sum(path, nb.sha256_of(path))
    with pytest.raises(ValueError, match="model.pt: expected config, weights and history"):
        nb.load_checkpoint(path, "cpu")


@pytest.mark.parametrize("edit, word", [
    (lambda s, _: s["weights"].pop("head.bias"), "head.bias"),
    (lambda s, _: s["weights"]["head.bias"].fill_(float("nan")), "finite"),
    (lambda s, _: s["config"].update(channels=12), "size mismatch"),
    (lambda s, _: s["config"].update(colour=1), "colour"),
    (lambda s, payload: s.update(history=payload), "history")])
def test_wrong_checkpoints_are_refused_by_name(nb, trained, tmp_path, edit, word):
    """And code in one is not run. The control: by pickle it would be."""
    saved, path, mark = torch.load(trained, weights_only=True), tmp_path / "model.pt", tmp_path / "mark"
    payload = Payload(mark)
    edit(saved, payload)
    torch.save(saved, path)
    nb.write_sum(path, nb.sha256_of(path))
    with pytest.raises(ValueError, match=f"(?s)model.pt: .*{word}"):
        nb.load_checkpoint(path, "cpu")
    assert not mark.exists()
    pickle.loads(pickle.dumps(payload))
    assert mark.exists()


def test_the_committed_checkpoints_load_and_match_their_sums(nb, root):
    """Neither the model's outputs nor, whatever the hint, those of the guide's h see their own pixel or a later one."""
    sums = nb.read_sums(root / "checkpoints" / "SHA256SUMS")
    assert set(sums) == {p.name for p in (root / "checkpoints").glob("*.pt")}
    for name in sums:
        network = nb.GuideNetwork if "guide" in name else nb.PixelCNN
        model = nb.load_checkpoint(root / "checkpoints" / name, "cpu", network)
        if "guide" in name:
            model.forward = partial(model.forward, hint=torch.randn(1, 2, 28, 128, dtype=torch.float64))
        for image in torch.randint(0, 256, (3, 2, 28)):
            assert (nb.largest_leak(nb.influence(model, image)) > 1e-9) == (model.config.first_mask == "B")
