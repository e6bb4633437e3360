"""Training resumes exactly; checkpoints are refused when anything is wrong with them."""

import math
import pickle
from dataclasses import replace

import pytest
import torch
from definitions import train_until
from test_data import Payload


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    # Columns repeat, so that there is something to learn.
    return torch.randint(0, 3, (100, 5, 1), generator=generator, dtype=torch.uint8).repeat(1, 1, 4)


@pytest.fixture(scope="module")
def trained(nb, config, images, tmp_path_factory):
    path = tmp_path_factory.mktemp("trained") / "model.pt"
    nb.train(config, images, images[:20], path=path, device="cpu")
    return path


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))


def test_training_learns(nb, trained):
    history = nb.load_checkpoint(trained, "cpu").history
    assert history[-1]["validation_bits"] < 0.9 * math.log2(3) < history[0]["validation_bits"]
    assert history[-1]["images"] == 640


@pytest.mark.parametrize("stop", [1, 10, 37])
def test_an_interrupted_run_ends_with_the_same_weights(nb, config, images, trained, tmp_path, stop):
    path = tmp_path / "model.pt"
    train_until(nb, stop, config, images, images[:20], path=path, device="cpu")
    assert not path.exists()
    resumed, _ = nb.train(config, images, images[:20], path=path, device="cpu")
    assert same(resumed, nb.load_checkpoint(trained, "cpu"))
    fresh, _ = nb.train(replace(config, seed=1), images, images[:20], path=tmp_path / "other.pt", device="cpu")
    assert not same(resumed, fresh)  # negative control: the comparison can fail


def test_a_state_of_another_config_is_refused(nb, config, images, tmp_path):
    path = tmp_path / "model.pt"
    train_until(nb, 2, config, images, images[:20], path=path, device="cpu")
    with pytest.raises(ValueError, match="another config"):
        nb.train(replace(config, channels=12), images, images[:20], path=path, device="cpu")


def test_training_goes_on_from_weights_alone(nb, config, images, trained, tmp_path):
    start = nb.load_checkpoint(trained, "cpu")
    more, history = nb.train(replace(config, images_seen=160), images, images[:20], path=tmp_path / "more.pt",
                             device="cpu", initial=start)
    assert history[:-1] == start.history and history[-1]["images"] == 640 + 160
    assert history[-1]["seconds"] > start.history[-1]["seconds"]
    bits = [nb.bits_per_dim(m, images).mean() for m in (start, more)]
    assert bits[1] < 1.05 * bits[0]


def test_load_or_train_loads_what_matches_and_trains_what_does_not(nb, config, images, trained, tmp_path, capsys):
    loaded, history = nb.load_or_train(config, images, images[:20], path=trained, device="cpu")
    assert same(loaded, nb.load_checkpoint(trained, "cpu")) and history[-1]["images"] == 640
    path = tmp_path / "model.pt"
    path.write_bytes(trained.read_bytes())
    (tmp_path / "SHA256SUMS").write_bytes(trained.with_name("SHA256SUMS").read_bytes())
    assert "another" not in capsys.readouterr().out
    recipe = replace(config, images_seen=160)
    model, _ = nb.load_or_train(recipe, images, images[:20], path=path, device="cpu")
    assert same(model, loaded) and model.config == config  # the weights stay; what made them is said
    assert "another recipe:\n{'images_seen': 640}" in capsys.readouterr().out
    model, history = nb.load_or_train(recipe, images, images[:20], path=path, device="cpu", anew=True)
    assert history[-1]["images"] == 160 and model.config == recipe
    for other in (dict(channels=12), dict(dilations=(2, 1)), dict(first_mask="B")):
        model, _ = nb.load_or_train(replace(recipe, **other), images, images[:20], path=path, device="cpu")
        assert model.config == replace(recipe, **other)
        assert "another network" in capsys.readouterr().out


def test_devices(nb):
    assert nb.pick_device("cpu").type == "cpu" and nb.pick_device().type in ("cpu", "cuda")
    with pytest.raises(ValueError, match="mps.*float64"):
        nb.pick_device("mps")


def test_fewer_images_than_a_batch_are_refused(nb, config, images, tmp_path):
    with pytest.raises(ValueError, match="images: expected at least one batch of .*, got 3"):
        nb.train(config, images[:3], images[:3], path=tmp_path / "model.pt", device="cpu")


def test_training_stops_when_the_loss_is_no_longer_a_number(nb, config, images, tmp_path):
    with pytest.raises(FloatingPointError, match="step"):
        nb.train(replace(config, learning_rate=1e30, matrix_learning_rate=1e30), images, images[:20],
                 path=tmp_path / "m.pt", device="cpu")
    assert not (tmp_path / "m.pt").exists()


def broken(path, tmp_path, change):
    copy = tmp_path / "model.pt"
    copy.write_bytes(change(bytearray(path.read_bytes())))
    (tmp_path / "SHA256SUMS").write_bytes(path.with_name("SHA256SUMS").read_bytes())
    return copy


@pytest.mark.parametrize("change", [lambda b: b[:-100], lambda b: b[:1000] + bytes([b[1000] ^ 1]) + b[1001:],
                                    lambda b: b""])
def test_damaged_checkpoints_are_refused(nb, trained, tmp_path, change):
    with pytest.raises(ValueError, match="model.pt: SHA-256"):
        nb.load_checkpoint(broken(trained, tmp_path, change), "cpu")


def rewritten(nb, trained, tmp_path, edit):
    saved = torch.load(trained, weights_only=True)
    edit(saved)
    path = tmp_path / "model.pt"
    torch.save(saved, path)
    (tmp_path / "SHA256SUMS").write_text(f"{nb.sha256_of(path)}  model.pt\n")
    return path


@pytest.mark.parametrize("edit, word", [
    (lambda s: s["weights"].pop("head.bias"), "head.bias"), (lambda s: s.pop("weights"), "weights"),
    (lambda s: s["weights"]["head.bias"].fill_(float("nan")), "finite"),
    (lambda s: s["config"].update(channels=12), "size mismatch"), (lambda s: s["config"].update(colour=1), "colour")])
def test_wrong_checkpoints_are_refused_by_name(nb, trained, tmp_path, edit, word):
    with pytest.raises(ValueError, match=f"(?s)model.pt: .*{word}"):
        nb.load_checkpoint(rewritten(nb, trained, tmp_path, edit), "cpu")


def test_code_in_a_checkpoint_is_not_run(nb, tmp_path):
    path, mark = tmp_path / "model.pt", tmp_path / "mark"
    payload = Payload(open, str(mark), "w")
    torch.save(dict(config={}, weights={}, history=payload), path)
    (tmp_path / "SHA256SUMS").write_text(f"{nb.sha256_of(path)}  model.pt\n")
    with pytest.raises(ValueError, match="model.pt"):
        nb.load_checkpoint(path, "cpu")
    assert not mark.exists()
    pickle.loads(pickle.dumps(payload))  # negative control: the payload does leave a mark
    assert mark.exists()


def test_the_committed_checkpoints_load_and_match_their_sums(nb, root):
    sums = nb.read_sums(root / "checkpoints" / "SHA256SUMS")
    assert set(sums) == {p.name for p in (root / "checkpoints").glob("*.pt")}
    for name in sums:
        network = nb.GuideNetwork if "guide" in name else nb.PixelCNN
        model = nb.load_checkpoint(root / "checkpoints" / name, "cpu", network)
        assert nb.leaked_difference(model, torch.randint(0, 256, (3, 28, 28))) == 0 or model.config.first_mask == "B"
