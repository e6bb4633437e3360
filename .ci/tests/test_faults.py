"""What users and their machines do: wrong arguments, kill, fill up, fall silent. Each fault is made for real where it
can be."""

import multiprocessing
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, copied, same
from definitions import notebook_cells

IMAGE = torch.zeros(3, 3, dtype=torch.uint8)
KNOWN = torch.arange(9).view(3, 3) > 1
TWO = IMAGE.expand(2, 3, 3)
CONFIG = dict(channels=0, levels=257, height=2.5, dilations=(1, 0), encoder=(0,), embedding=1, first_mask="C")


@pytest.mark.parametrize("name, call", [
    *(("images", lambda nb, model, x=x: nb.log_prob(model, x)) for x in (
        torch.zeros(1, 3, 3), IMAGE, TWO[:, :2], torch.full((1, 3, 3), 300), KNOWN[None], TWO.tolist())),
    *(("batches", lambda nb, model, x=x: nb.train(nb.tiny_model(), x, TWO, [nb.Recipe(640, 0, 0)], "no/model.pt"))
      for x in (TWO, torch.zeros(64, 3, 3))),
    ("validation", lambda nb, model: nb.train(nb.tiny_model(), TWO, TWO + 4, [], "no/model.pt")),
    ("image and known", lambda nb, model: nb.sample(model, 3, image=IMAGE)),
    ("image", lambda nb, model: nb.sample(model, 3, image=IMAGE + 3, known=KNOWN)),
    *(("known", lambda nb, model, k=k: nb.sample(model, 3, image=IMAGE, known=k)) for k in (
        IMAGE, KNOWN[:, :2], TWO > 0)),
    *(("temperature", lambda nb, model, t=t: nb.sample(model, 3, temperature=t)) for t in (0, float("nan"))),
    *(("known", lambda nb, model, k=k: nb.complete(model, IMAGE, k)) for k in (KNOWN[:2], None, TWO > 0)),
    *(("image: expected one", lambda nb, model, x=x: nb.complete(model, x, KNOWN)) for x in (TWO, IMAGE.tolist())),
    ("image: expected one", lambda nb, model: nb.conditional_given_past(model, TWO, (0, 1))),
    ("n:", lambda nb, model: nb.complete(model, IMAGE, KNOWN, n=0)),
    ("n:", lambda nb, model: nb.marginal(model, (1, 1), n=1)),
    *(("most", lambda nb, model, most=most: nb.complete(model, IMAGE, KNOWN, most=most)) for most in (0, 1)),
    ("batch_size", lambda nb, model: nb.fresh_batches(model, TWO)(nb.Recipe(9, 0, 0, batch_size=3), 0)),
    ("guide", lambda nb, model: nb.complete(model, IMAGE, KNOWN, guide=nb.Guide(nb.tiny_model()))),
    *(("pixel", lambda nb, model, ask=ask: getattr(nb, ask)(model, IMAGE, (3, 0))) for ask in (
        "conditional_given_past", "conditional_given_rest", "conditional_given_future")),
    ("pixel", lambda nb, model: nb.marginal(model, (0, -1))),
    *(("device", lambda nb, model, device=device: nb.pick_device(device)) for device in ("tpu", "mps", "cuda")),
    *(("SAVE_DIR", lambda nb, model, source=source: exec(source, {**vars(nb), "FAST": False, "SAVE_DIR": "no/drive"}))
      for cell in notebook_cells() if (source := "".join(cell["source"])).startswith("WEIGHTS = ")),
    *((f"config: .*{name}", lambda nb, model, name=name, value=value: replace(model.config, **{name: value}))
      for name, value in CONFIG.items())])
def test_wrong_arguments_are_refused_by_name(nb, tiny, monkeypatch, name, call):
    """It would see a wrong shape, type or number that is computed with, a fallback to the CPU in silence, an error from
    inside torch, and a training whose weights go where no Drive is mounted."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"^{name}"):
        call(nb, tiny)


def in_a_process(function, *arguments):
    """Start function(*arguments) in a fork with one thread (OpenMP's threads do not survive a fork)."""
    def run():
        torch.set_num_threads(1)
        function(*arguments)
    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def test_training_killed_at_random_moments_ends_as_if_never_stopped(
        nb, config, recipe, images, tmp_path, monkeypatch):
    """Both stages, six SIGKILLs; the state is written at every step, so that many fall into a write. It would see a
    state that is not whole."""
    monkeypatch.setattr(nb, "training_dtype", lambda device: torch.float32)
    stages = [replace(recipe, images=960, seed=seed) for seed in (0, 1)]

    def run(name):
        torch.manual_seed(0)
        nb.train(nb.PixelCNN(config), images, images[:20], stages, tmp_path / name, save_seconds=0)

    begun = time.monotonic()
    in_a_process(run, "calm.pt").join(240)
    whole, kills = time.monotonic() - begun, 0
    for share in (0.31, 0.23, 0.17, 0.29, 0.11, 0.19, 10):
        process = in_a_process(run, "killed.pt")
        process.join(share * whole + 60 * (share > 1))
        kills += process.exitcode is None
        process.kill()
        process.join()
    assert 3 <= kills <= 6, "it ended before it was killed (the test tested nothing), or it did not go on"
    assert same(*(nb.load_checkpoint(tmp_path / name, "cpu") for name in ("calm.pt", "killed.pt")))


def test_a_full_disk_leaves_the_old_file_and_says_so(nb, tmp_path):
    """A real limit on the size of files, in a process of its own: it would see an old file that is lost to half a new
    one, written by torch.save or plainly."""
    path = tmp_path / "file.pt"
    nb.save_atomically({"a": 1}, path)

    def write():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        for contents in (bytes(100_000), {"a": torch.zeros(100_000)}):
            with pytest.raises((OSError, RuntimeError), match="."):
                nb.save_atomically(contents, path)

    process = in_a_process(write)
    process.join(60)
    assert process.exitcode == 0 and torch.load(path, weights_only=True) == {"a": 1}
    assert [*tmp_path.iterdir()] == [path]


def test_a_silent_network_ends_within_a_minute(nb, tmp_path, monkeypatch, capsys):
    """A server that accepts and never answers, and hangs up after 40 seconds: it would see a program that waits for it
    in place of training the checkpoint, or of asking MNIST's next source."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        end = threading.Timer(40, silent.close)
        end.start()
        address, begun = f"http://127.0.0.1:{silent.getsockname()[1]}", time.monotonic()
        nb.fetch_checkpoint(tmp_path / "mine" / "model.pt", address)
        assert "timed out" in capsys.readouterr().out and not (tmp_path / "mine").exists()
        monkeypatch.setattr(nb, "MNIST_SOURCES", (lambda folder: urllib.request.urlopen(address), copied))
        nb.load_mnist(tmp_path / "data")
        assert time.monotonic() - begun < 40
        end.cancel()
    assert nb.unsound_files(tmp_path / "data" / "MNIST" / "raw") == [] and socket.getdefaulttimeout() is None


def test_a_checkpoint_is_fetched_with_its_hash(nb, config, tmp_path, capsys):
    """It would see a file that is fetched though one is here, and what is left of one that is damaged, or of an address
    where nobody is."""
    served, path, other = (tmp_path / name / "model.pt" for name in ("served/checkpoints", "mine", "other"))
    nb.save_checkpoint(nb.PixelCNN(config), served)
    address = (tmp_path / "served").as_uri()
    nb.fetch_checkpoint(path, address + "/")
    assert path.read_bytes() == served.read_bytes() and nb.load_checkpoint(path, "cpu").config == config
    nb.fetch_checkpoint(path, "http://127.0.0.1:9")  # not asked
    nb.fetch_checkpoint(other, "")
    assert capsys.readouterr().out == "" and path.read_bytes() == served.read_bytes()
    served.write_bytes(b"half of it")
    for address in ("http://127.0.0.1:9", "somewhere", address):
        nb.fetch_checkpoint(other, address)
        assert "model.pt: could not be fetched" in capsys.readouterr().out and not other.exists()


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
        assert run.returncode == 1 and {"conditional_given_rest", "train"} <= set(failed) and "weighted_draws" not in failed
    else:
        assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]


def test_where_compiling_fails_training_goes_on_without(nb, config, recipe, images, tmp_path, monkeypatch):
    """It would see a run that ends for want of a compiler, or that trains something else. (The control: without what
    `train` sets, the broken compiler's error comes through.)"""
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    def trained(compiled):
        torch.manual_seed(0)
        return nb.train(nb.PixelCNN(config), images, images[:20], [recipe], tmp_path / "model.pt", compiled)

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile(function, backend=broken))
    with torch._dynamo.config.patch(suppress_errors=False):
        with pytest.raises(Exception, match="no compiler here"):
            torch.compile(nb.PixelCNN(config).loss)(images[:8], 0)
        torch._dynamo.reset()
        assert same(trained(compiled=True), trained(compiled=False))


@torch._dynamo.config.patch(suppress_errors=False)
def test_the_guides_whole_loss_compiles(nb, config, images):
    """Encoder, hint and the model that it multiplies, with gradients. It would see a step that cannot be compiled, and
    masks, which stay on the host, that are frozen into it."""
    torch._dynamo.reset()
    network = nb.starting_guide(nb.PixelCNN(config).eval().requires_grad_(False), (1,))
    for parameter in network.parameters():  # so that the hint says something
        parameter.data += 0.1 * torch.randn_like(parameter)
    compiled = torch.compile(network.loss, backend="aot_eager")  # the kernels, which take minutes, aside
    for step in (1, 2, 3):
        found = []
        for loss in (compiled, network.loss):
            network.zero_grad()
            nats = loss(images[:8], step)
            nats.backward()
            found.append(torch.cat([nats[None], *(p.grad.flatten() for p in network.parameters())]))
        assert (found[0] - found[1]).abs().max() < 1e-5
