"""What users' machines do: kill, fill up, fall silent. Each fault is made for real where it can be."""

import multiprocessing
import random
import resource
import signal
import socket
import threading
import time
import urllib.request
from dataclasses import replace

import pytest
import torch
from test_data import copies

forks = multiprocessing.get_context("fork")


def in_a_process(function, *arguments):
    """Start function(*arguments) in a fork with one thread (OpenMP's threads do not survive a fork)."""
    def run():
        torch.set_num_threads(1)
        function(*arguments)
    process = forks.Process(target=run)
    process.start()
    return process


def test_training_killed_at_random_moments_ends_as_if_never_stopped(
        nb, config, recipe, images, tmp_path, monkeypatch):
    """Both stages, up to 12 SIGKILLs; the state is written at every step, so that many fall into a write."""
    monkeypatch.setattr(nb, "training_dtype", lambda device: torch.float32)
    stages = [replace(recipe, images=960, seed=seed) for seed in (0, 1)]

    def run(name):
        torch.manual_seed(0)
        nb.train(nb.PixelCNN(config), images, images[:20], stages, tmp_path / name, save_seconds=0)

    begun = time.monotonic()
    in_a_process(run, "calm.pt").join(240)
    whole, rng, kills, code = time.monotonic() - begun, random.Random(0), 0, None
    while code is None:
        process = in_a_process(run, "killed.pt")
        process.join(rng.uniform(0, whole / 3) if kills < 12 else 240)
        kills += (code := process.exitcode) is None and kills < 12
        process.kill()
        process.join()
    assert code == 0 and kills >= 3, "it failed, or it ended before it was killed: the test tested nothing"
    a, b = (nb.load_checkpoint(tmp_path / name, "cpu") for name in ("calm.pt", "killed.pt"))
    assert [entry["images"] for entry in a.history] == [entry["images"] for entry in b.history]
    assert all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


def test_a_full_disk_leaves_the_old_file_and_says_so(nb, tmp_path):
    """A real limit on the size of files, in a process of its own; met by torch.save and by a plain write."""
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


def test_a_silent_network_ends_within_a_minute(nb, root, tmp_path, monkeypatch, capsys):
    """A server that accepts and never answers: the checkpoint will be trained, and MNIST's next source is asked. (It
    hangs up after 40 seconds, so that a program that would wait for ever fails.)"""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        end = threading.Timer(40, silent.close)
        end.start()
        address, begun = f"http://127.0.0.1:{silent.getsockname()[1]}", time.monotonic()
        nb.fetch_checkpoint(tmp_path / "mine" / "model.pt", address)
        said = capsys.readouterr().out
        assert "could not be fetched" in said and "timed out" in said and "trained" in said
        monkeypatch.setattr(nb, "MNIST_SOURCES", (lambda folder: urllib.request.urlopen(address), copies(root)))
        nb.load_mnist(tmp_path / "data")
        assert time.monotonic() - begun < 40 and not (tmp_path / "mine").exists()
        end.cancel()
    assert nb.unsound_files(tmp_path / "data" / "MNIST" / "raw") == [] and socket.getdefaulttimeout() is None


def test_a_checkpoint_is_fetched_with_its_hash(nb, config, tmp_path, capsys):
    """And where nobody is, no address, no such file or a damaged one, none is left and it says so."""
    served, path, other = (tmp_path / name / "model.pt" for name in ("served/checkpoints", "mine", "other"))
    nb.save_checkpoint(nb.PixelCNN(config), served)
    address = (tmp_path / "served").as_uri()
    nb.fetch_checkpoint(path, "")
    assert not path.parent.exists()
    nb.fetch_checkpoint(path, address + "/")
    assert path.read_bytes() == served.read_bytes() and nb.load_checkpoint(path, "cpu").config == config
    nb.fetch_checkpoint(path, "http://127.0.0.1:9")  # not asked
    assert capsys.readouterr().out == "" and path.read_bytes() == served.read_bytes()
    served.write_bytes(b"half of it")
    for address in ("http://127.0.0.1:9", "somewhere", address + "/nowhere", address):
        nb.fetch_checkpoint(other, address)
        assert "model.pt: could not be fetched" in capsys.readouterr().out
        assert not other.exists() and {*other.parent.glob("*")} <= {other.with_name("SHA256SUMS")}
