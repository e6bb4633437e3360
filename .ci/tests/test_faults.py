"""What users and their machines do: wrong arguments, kill, fill up, fall silent. Each fault is made for real where it
can be."""

import multiprocessing
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, same
from definitions import notebook_cells

IMAGE = torch.zeros(3, 3, dtype=torch.uint8)
KNOWN = torch.arange(9).view(3, 3) > 1
TWO = IMAGE.expand(2, 3, 3)
HOW = dict(images=8, warmup=2, decay=2, batch_size=2)
(LOAD,) = [source for cell in notebook_cells() if "WEIGHTS = " in (source := "".join(cell["source"]))]
SETTINGS = dict(FAST=False, SAVE_DIR="checkpoints", TRAINING="short")
SHAPES = [TWO.float(), TWO[:, :2], TWO.int() + 300, TWO + 3, TWO.int() - 1, TWO > 0]


def train(nb, data=TWO, validation=TWO, **how):
    network, recipe = nb.tiny_model(), nb.Recipe(**HOW | how)
    nb.train(network, nb.model_loss, nb.image_batches(network, data, recipe), [validation], recipe, "weights.pt")


WRONG = [  # what it is called, what is wrong, and calls of the notebook, a model and that
    ("images", [*SHAPES, IMAGE, TWO[:0]], [
        lambda nb, model, x: nb.log_prob(model, x), lambda nb, model, x: nb.log_weights(model, x, KNOWN),
        lambda nb, model, x: nb.given_past(model, x, (0, 1)), lambda nb, model, x: nb.given_rest(model, x, (0, 1)),
        lambda nb, model, x: nb.sweep_by_pixels(model, KNOWN, x, None),
        lambda nb, model, x: nb.sweep_at_once(model, None, KNOWN, x, None)]),
    ("images(?=: .* got a (list|NoneType))", [TWO.tolist(), None], [lambda nb, model, x: nb.log_prob(model, x)]),
    ("batches", [*SHAPES, IMAGE, TWO[:0], TWO[:1]], [lambda nb, model, x: train(nb, x)]),
    ("validation", SHAPES, [lambda nb, model, x: train(nb, validation=x)]),
    ("digits", SHAPES, [lambda nb, model, x: nb.fresh_batches(model, x, nb.Recipe(**HOW))]),
    ("image", [*(x[0] for x in SHAPES), TWO, IMAGE.tolist()], [
        lambda nb, model, x: nb.sample(model, 3, image=x, known=KNOWN),
        lambda nb, model, x: nb.complete(model, x, KNOWN),
        lambda nb, model, x: nb.conditional(model, x, KNOWN, (0, 1))]),
    ("known", [IMAGE, KNOWN[:, :2], TWO > 0, KNOWN.tolist(), KNOWN.numpy()], [
        lambda nb, model, k: nb.sample(model, 3, image=IMAGE, known=k),
        lambda nb, model, k: nb.complete(model, IMAGE, k), lambda nb, model, k: nb.log_weights(model, TWO, k),
        lambda nb, model, k: nb.conditional(model, IMAGE, k, (0, 1)),
        lambda nb, model, k: nb.sweep_by_pixels(model, k, TWO, None),
        lambda nb, model, k: nb.sweep_at_once(model, None, k, TWO, None)]),
    ("known(?=: .* got a (ndarray|NoneType))", [KNOWN.numpy(), None], [
        lambda nb, model, k: nb.complete(model, IMAGE, k)]),
    ("image and known", [dict(image=IMAGE), dict(known=KNOWN)], [lambda nb, model, one: nb.sample(model, 3, **one)]),
    ("pixel", [(3, 0), [0, 3], (0, -1), (1.5, 2), (1.0, 2), (True, 1), (1,), (0, 1, 1), 1, None], [
        lambda nb, model, pixel: nb.given_past(model, TWO, pixel), lambda nb, model, pixel: nb.marginal(model, pixel),
        lambda nb, model, pixel: nb.given_rest(model, TWO, pixel),
        lambda nb, model, pixel: nb.conditional(model, IMAGE, KNOWN, pixel)]),
    ("pixel(?=: expected a hidden one)", [(2, 2)], [lambda nb, model, x: nb.conditional(model, IMAGE, KNOWN, x)]),
    ("n", [0, -1, 10.0], [
        lambda nb, model, n: nb.sample(model, n), lambda nb, model, n: nb.complete(model, IMAGE, ~KNOWN, n),
        lambda nb, model, n: nb.marginal(model, (1, 1), n)]),
    ("n", [0, 1, 19], [lambda nb, model, n: nb.complete(model, IMAGE, KNOWN, n),
                       lambda nb, model, n: nb.conditional(model, IMAGE, KNOWN, (0, 1), n)]),
    ("n", [1], [lambda nb, model, n: nb.marginal(model, (1, 1), n)]),
    ("sweeps", [0, -1, 2.0], [lambda nb, model, sweeps: nb.gibbs(None, TWO, sweeps)]),
    ("images", [torch.stack([IMAGE, IMAGE + 1])], [lambda nb, model, x: nb.sweep_at_once(model, None, KNOWN, x, None)]),
    ("candidates", [0, 1, 2.0], [lambda nb, model, some: nb.sweep_at_once(model, None, KNOWN, TWO, None, some)]),
    ("states in values", [3, 1], [lambda nb, model, states: nb.r_hat(torch.zeros(states, 8))]),
    ("rows, columns", [(10, 10, 3, 9), (3, 9, 10, 9), (-5, 3, 0, 4), (0, 4, 20, 29)], [lambda nb, model, sides: nb.all_but(*sides)]),
    ("batch_size", [3], [lambda nb, model, size: nb.fresh_batches(model, TWO, nb.Recipe(9, 0, 0, batch_size=size))]),
    ("recipe", [dict(images=1), dict(batch_size=0), dict(validate_every=0), dict(shift=-1)], [
        lambda nb, model, wrong: nb.Recipe(**HOW | wrong)]),
    ("dtype", [torch.float64, torch.int32, "bfloat16", ""], [lambda nb, model, dtype: train(nb, dtype=dtype)]),
    ("device", ["tpu", "mps", "cuda", "cuda:0", "", torch.device("cuda")], [
        lambda nb, model, device: nb.pick_device(device)]),
    *((name, ["no/drive"], [lambda nb, model, wrong, name=name: exec(LOAD, vars(nb) | SETTINGS | {name: wrong})])
      for name in ("SAVE_DIR", "TRAINING")),
    *((f"(?=.*{re.escape(f'{name}={value}')})config", [value],  # what is wrong is in the message
       [lambda nb, model, wrong, name=name: replace(model.config, **{name: wrong})])
      for name, value in dict(channels=0, levels=257, height=2.5, width=True, dilations=(1, 0), encoder=(0,),
                              embedding=1, mean_channels=-1).items())]


@pytest.mark.parametrize("name, call, wrong", [
    (name, call, wrong) for name, wrongs, calls in WRONG for call in calls for wrong in wrongs])
def test_wrong_arguments_are_refused_by_name(nb, tiny, tmp_path, monkeypatch, name, call, wrong):
    """It would see a wrong shape, type or number that is computed with, a fallback to the CPU in silence, an error from
    inside torch, and a training whose weights go where no Drive is mounted."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"^{name}: "):
        call(nb, tiny, wrong)
    assert not [*tmp_path.iterdir()]


def test_any_device_that_is_there_is_taken(nb, monkeypatch):
    """By name, by number, as a torch.device; "auto" is the card, if there is one. The control of the above."""
    assert nb.pick_device(torch.device("cpu")) == nb.pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert nb.pick_device("cuda:0") == torch.device("cuda:0") and nb.pick_device().type == "cuda"


def in_a_process(function, *arguments):
    """Start function(*arguments) in a fork with one thread (OpenMP's threads do not survive a fork)."""
    def run():
        torch.set_num_threads(1)
        function(*arguments)
    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def test_training_killed_at_random_ends_as_if_never_stopped(nb, config, recipe, images, tmp_path):
    """Six SIGKILLs; the state is written at every step, so that many fall into a write. It would see a state that is
    not whole, and a training that begins anew: a kill costs the step that it falls into, no other."""
    longer = replace(recipe, images=1920)
    steps = longer.images // longer.batch_size

    def begun(name):
        log = tmp_path / f"{name}.steps"
        return [int(step) for step in log.read_text().split()] if log.exists() else []

    def run(name):
        def batches(step):
            with (tmp_path / f"{name}.steps").open("a") as log:
                log.write(f"{step}\n")
            return [nb.batch_at(images, longer, step)]
        torch.manual_seed(0)
        nb.train(nb.PixelCNN(config), nb.model_loss, batches, [images[:20]], longer, tmp_path / name, save_seconds=0)

    in_a_process(run, "calm.pt").join(240)
    for share, milliseconds in ((0.1, 0), (0.2, 4), (0.35, 1), (0.5, 7), (0.6, 2), (0.7, 5)):
        process = in_a_process(run, "killed.pt")
        while process.is_alive() and int(share * steps) not in begun("killed.pt"):
            time.sleep(0.001)
        time.sleep(milliseconds / 1000)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it ended before it was killed"
    in_a_process(run, "killed.pt").join(240)
    assert begun("calm.pt") == [*range(steps)] == sorted({*begun("killed.pt")})
    assert len(begun("killed.pt")) <= steps + 6, "it began anew"
    assert same(*(nb.load_checkpoint(tmp_path / name, "cpu") for name in ("calm.pt", "killed.pt")))


def test_a_full_disk_leaves_the_old_file_and_says_so(nb, tmp_path):
    """A real limit on the size of files, in a process of its own: it would see an old file that is lost to half a new
    one, or half a one that is left beside it."""
    path = tmp_path / "file.pt"
    nb.save_atomically({"a": 1}, path)

    def write():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        with pytest.raises((OSError, RuntimeError), match="."):
            nb.save_atomically({"a": torch.zeros(100_000)}, path)

    process = in_a_process(write)
    process.join(60)
    assert process.exitcode == 0 and torch.load(path, weights_only=True) == {"a": 1}
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None or torch.version.cuda is not None,
                    reason="the pretended device needs a C++ compiler (g++) and torch without CUDA's own")
@pytest.mark.parametrize("planted", [False, True])
def test_every_function_works_on_a_card_as_on_a_cpu(planted):
    """On a pretended one. It would see a tensor left on the other device, another answer, and a state that only one
    device goes on from. (The control: images that are not moved to the card.)"""
    command = [sys.executable, ROOT / ".ci" / "tools" / "gpu_drill.py", *["--planted"] * planted]
    run = subprocess.run(command, capture_output=True, text=True)
    failed = [line.split(": FAILED")[0] for line in run.stdout.splitlines() if ": FAILED" in line]
    if planted:
        assert run.returncode == 1 and {"given_rest", "train"} <= set(failed) and "influence" not in failed
    else:
        assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
