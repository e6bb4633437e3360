"""Pictures: a file that a reader draws or photographs becomes an image like MNIST's."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw


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
            and box[:4, :3].any() and box[:4, -3:].any()
            and not box[-6:, -3:].any() and box[-3:, : box.shape[1] // 2 + 2].any())


@pytest.mark.parametrize("size", [20, 28, 280, 2000])
def test_a_picture_of_any_size_is_made_into_what_the_digits_are(nb, tmp_path, size):
    """The controls: upside down it is no seven, and two pixels off show for sure."""
    image = as_read(nb, drawn_seven(size), tmp_path)
    assert is_a_seven_like_mnist(image)
    assert not is_a_seven_like_mnist(image.flip(0)) and not is_a_seven_like_mnist(image.roll(2, 0))


def test_the_kind_of_picture_and_the_place_do_not_matter(nb, tmp_path):
    """Light on dark, on another ground, in colour, on a transparent ground, on a palette, in 16 bits (the ink
    a dark grey too); near a corner; on its side, with the orientation that a camera notes. (The control: without.)"""
    dark = drawn_seven()
    grey, image = np.asarray(dark), as_read(nb, dark, tmp_path)
    see_through = np.zeros((*grey.shape, 4), dtype=np.uint8)
    see_through[..., 3] = 255 - grey
    colour = np.where(grey[..., None] == 0, np.uint8([200, 30, 30]), np.uint8([240, 240, 200]))
    for other in (Image.fromarray(255 - grey), drawn_seven(ground=200, ink=90), Image.fromarray(see_through),
                  Image.fromarray(colour), dark.convert("P"), dark.convert("1"),
                  Image.fromarray(grey.astype(np.uint16) * 257),
                  Image.fromarray((grey / 255 * 54_000 + 6_000).astype(np.uint16)),
                  *(Image.fromarray(np.roll(grey, shift, (0, 1))) for shift in ((-50, -60), (50, 60), (-50, 60)))):
        assert torch.equal(as_read(nb, other, tmp_path), image), other.mode
    held, sideways = Image.Exif(), dark.transpose(Image.Transpose.ROTATE_90)
    held[274] = 6  # turn by 90 degrees, clockwise
    assert torch.equal(as_read(nb, sideways, tmp_path, exif=held), image)
    assert not is_a_seven_like_mnist(as_read(nb, sideways, tmp_path))


def test_a_thin_line_and_a_dot_are_pictures_too(nb, tmp_path):
    """A one of a single column, and one dark pixel: no side becomes nothing."""
    line, dot = Image.new("L", (300, 300), 255), Image.new("L", (9, 9), 255)
    ImageDraw.Draw(line).line([(40, 20), (40, 280)], fill=0, width=3)
    dot.putpixel((4, 2), 0)
    for picture, wide in ((line, 1), (dot, 20)):
        image = as_read(nb, picture, tmp_path) > 0
        assert image.any(dim=0).sum() == wide and image.any(dim=1).sum() == 20


@pytest.mark.parametrize("picture, word", [
    (None, "picture file"), (drawn_seven(), "picture file"), (Image.new("L", (50, 50), 255), "one colour"),
    (Image.new("RGBA", (50, 50)), "one colour")])
def test_what_is_no_picture_of_a_digit_is_refused_by_name(nb, tmp_path, picture, word):
    """Missing, cut off after 200 bytes (only the second is longer), all white, all transparent."""
    path = tmp_path / "mine.png"
    if picture is not None:
        picture.save(path)
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=f"path: .*{word}.*") as said:
        nb.read_picture(path)
    assert str(path) in str(said.value)
