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
(LOAD,) = [source for cell in notebook_cells() if (source := "".join(cell["source"])).startswith("WEIGHTS = ")]
SETTINGS = dict(FAST=False, SAVE_DIR="checkpoints", TRAINING="short")
CONFIG = dict(channels=0, levels=257, height=2.5, dilations=(1, 0), encoder=(0,), embedding=1, mean_channels=-1)


@pytest.mark.parametrize("name, call", [
    *(("images", lambda nb, model, x=x: nb.log_prob(model, x)) for x in (
        torch.zeros(1, 3, 3), IMAGE, TWO[:, :2], torch.full((1, 3, 3), 300), KNOWN[None], TWO.tolist())),
    *((name, lambda nb, model, x=x, y=y: nb.train(nb.tiny_model().requires_grad_(), x, y, nb.MODEL_RECIPE, "no/x.pt"))
      for name, x, y in (("batches", TWO, TWO), ("batches", TWO.float(), TWO), ("validation", TWO, TWO + 4),
                         ("validation", TWO, TWO[:0]))),
    ("image and known", lambda nb, model: nb.sample(model, 3, image=IMAGE)),
    ("image", lambda nb, model: nb.sample(model, 3, image=IMAGE + 3, known=KNOWN)),
    *(("known", lambda nb, model, k=k: nb.sample(model, 3, image=IMAGE, known=k)) for k in (
        IMAGE, KNOWN[:, :2], TWO > 0)),
    *((name, lambda nb, model, change=change: nb.gibbs(**dict(
        dict(model=model, image=IMAGE, known=KNOWN, sweeps=2, chains=2), **change)))
      for name, change in (("sweeps, chains", dict(sweeps=0)), ("sweeps, chains", dict(chains=0)),
                           ("known", dict(known=IMAGE)), ("image", dict(image=TWO)),
                           ("start", dict(start=TWO[:1])), ("start", dict(start=TWO + 3)))),
    ("guide", lambda nb, model: nb.gibbs(model, IMAGE, KNOWN, 1, 2, guide=nb.Guide(nb.tiny_model()))),
    *(("rows, candidates", lambda nb, model, how=how: nb.gibbs(model, IMAGE, KNOWN, 1, 2, guide=nb.Guide(model), **how))
      for how in (dict(rows=0), dict(candidates=1))),
    ("values", lambda nb, model: nb.r_hat(torch.zeros(3, 8))),
    *(("known", lambda nb, model, k=k: nb.complete(model, IMAGE, k)) for k in (KNOWN[:2], None, TWO > 0)),
    *(("image", lambda nb, model, x=x: nb.complete(model, x, KNOWN)) for x in (TWO, IMAGE.tolist())),
    *(("image", lambda nb, model, x=x: nb.conditional_given_past(model, x, (0, 1))) for x in (TWO, KNOWN)),
    ("image", lambda nb, model: nb.weighted_draws(nb.Guide(model), IMAGE + 3, KNOWN, 2)),
    ("known", lambda nb, model: nb.weighted_draws(nb.Guide(model), IMAGE, IMAGE, 2)),
    ("n", lambda nb, model: nb.sample(model, 0)),
    ("n", lambda nb, model: nb.complete(model, IMAGE, KNOWN, n=0)),
    ("n", lambda nb, model: nb.marginal(model, (1, 1), n=1)),
    *(("most", lambda nb, model, most=most: nb.complete(model, IMAGE, KNOWN, most=most)) for most in (0, 1)),
    ("pixel", lambda nb, model: nb.conditional(model, IMAGE, KNOWN, (2, 2))),
    ("known", lambda nb, model: nb.conditional(model, IMAGE, TWO > 0, (0, 0))),
    ("rows, columns", lambda nb, model: nb.all_but(10, 10, 3, 9)),
    ("batch_size", lambda nb, model: nb.fresh_batches(model, TWO, nb.Recipe(9, 0, 0, batch_size=3))),
    ("digits", lambda nb, model: nb.fresh_batches(model, TWO / 2, nb.MODEL_RECIPE)),
    *(("guide", lambda nb, model, guide=guide: nb.complete(model, IMAGE, KNOWN, guide=guide(nb, model))) for guide in (
        lambda nb, model: nb.Guide(nb.tiny_model()), lambda nb, model: model)),
    ("known(?=: .* ndarray)", lambda nb, model: nb.complete(model, IMAGE, KNOWN.numpy())),
    *(("pixel", lambda nb, model, ask=ask: getattr(nb, ask)(model, IMAGE, (3, 0))) for ask in (
        "conditional_given_past", "conditional_given_rest", "conditional_given_future")),
    *(("pixel", lambda nb, model, pixel=pixel: nb.marginal(model, pixel)) for pixel in ((0, -1), (1.5, 2), (1,), 1)),
    *(("device", lambda nb, model, device=device: nb.pick_device(device)) for device in ("tpu", "mps", "cuda")),
    *((name, lambda nb, model, wrong={name: "no/drive"}: exec(LOAD, vars(nb) | SETTINGS | wrong))
      for name in ("SAVE_DIR", "TRAINING")),
    *((f"(?=.*{re.escape(f'{name}={value}')})config",  # what is wrong is in the message
       lambda nb, model, name=name, value=value: replace(model.config, **{name: value}))
      for name, value in CONFIG.items())])
def test_wrong_arguments_are_refused_by_name(nb, tiny, monkeypatch, name, call):
    """It would see a wrong shape, type or number that is computed with, a fallback to the CPU in silence, an error from
    inside torch, and a training whose weights go where no Drive is mounted."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"^{name}: "):
        call(nb, tiny)


def test_a_torch_device_names_a_device(nb):
    """It would see a device refused that is one of those named."""
    assert nb.pick_device(torch.device("cpu")) == nb.pick_device("cpu") == torch.device("cpu")


def in_a_process(function, *arguments):
    """Start function(*arguments) in a fork with one thread (OpenMP's threads do not survive a fork)."""
    def run():
        torch.set_num_threads(1)
        function(*arguments)
    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def test_training_killed_at_random_ends_as_if_never_stopped(nb, config, recipe, images, tmp_path, monkeypatch):
    """Six SIGKILLs; the state is written at every step, so that many fall into a write. It would see a state that is
    not whole, and a training that begins anew: a kill costs the step that it falls into, no other."""
    monkeypatch.setattr(nb, "training_dtype", lambda device: torch.float32)
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
        nb.train(nb.PixelCNN(config), batches, [images[:20]], longer, tmp_path / name, save_seconds=0)

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
        assert run.returncode == 1 and {"conditional_given_rest", "train"} <= set(failed) and "influence" not in failed
    else:
        assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
