"""Section 8.7: the rectangle that a reader hides is completed. And pictures: files into images, images into files."""

import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw


@pytest.mark.parametrize("hidden", [(4, 7, 9, 10), (0, 0, 0, 0), (27, 27, 0, 27), (5, 6, 27, 27), (0, 27, 0, 27)])
def test_the_hidden_rectangle_is_completed_and_the_rest_kept(nb, cells, monkeypatch, hidden):
    """The cell with other numbers, as a reader changes it; a small model."""
    torch.manual_seed(0)
    model = nb.PixelCNN(nb.Config(levels=3, embedding=4, channels=8, bottleneck=8, dilations=(1, 2), context=4)).eval()
    images, shown, real, seen = torch.randint(0, 3, (5, 28, 28), dtype=torch.uint8), [], nb.complete, []
    monkeypatch.setattr(nb, "complete", lambda model, image, known, *rest: seen.append(
        (image, known, real(model, image, known, *rest))) or seen[-1][2])
    (source,) = (text for text in ("".join(cell["source"]) for cell in cells) if text.startswith("digit = 1 "))
    for name, number in zip(("digit", "first_row", "last_row", "first_column", "last_column"), (3, *hidden)):
        source, found = re.subn(rf"^{name} = \d+", f"{name} = {number}", source, flags=re.M)
        assert found == 1
    exec(source, dict(vars(nb), model=model, test_images=images, guide=None, budget=nb.Budget(4, 2, 2),
                      show=lambda figure, *_: shown.append(figure)))
    ((image, known, completion),), (figure,) = seen, shown
    top, bottom, left, right = hidden
    expected = torch.ones(28, 28, dtype=torch.bool)
    expected[top : bottom + 1, left : right + 1] = False
    assert torch.equal(known, expected) and torch.equal(image, images[3])
    assert (completion.draws[:, known] == image[known]).all() and len(completion.draws) == 4
    pictures = [axis.images[0].get_array() for axis in figure.axes]
    assert len(pictures) == 6 and (pictures[0] == images[3].numpy()).all()
    assert all((picture == nb.tinted(draw, known).numpy()).all()
               for picture, draw in zip(pictures[2:], completion.draws))
    assert completion.status in figure.get_supxlabel()
    nb.plt.close(figure)


# Pictures -----------------------------------------------------------------------------------------

def drawn_seven(size=280, ground=255, ink=0):
    """A seven on a plain ground, a grey picture."""
    picture = Image.new("L", (size, size), ground)
    points = [(x * size, y * size) for x, y in ((0.3, 0.25), (0.7, 0.25), (0.43, 0.75))]
    ImageDraw.Draw(picture).line(points, fill=ink, width=max(1, round(0.08 * size)), joint="curve")
    return picture


def as_read(nb, picture, folder):
    picture.save(folder / "digit.png")
    return nb.read_picture(folder / "digit.png")


def assert_a_seven_like_mnist(image):
    """The ink fits into 20x20 pixels and touches two of its sides; its centre of mass is in the middle; it is at the
    top on both sides, at the bottom in the middle alone."""
    assert image.dtype == torch.uint8 and image.shape == (28, 28) and image.max() > 250
    rows, columns = image.nonzero().T
    assert max(rows.max() - rows.min(), columns.max() - columns.min()) + 1 == 20
    ink, place = image.double() / image.sum(), torch.arange(28) + 0.5
    assert abs((ink.sum(1) * place).sum() - 14) <= 1 and abs((ink.sum(0) * place).sum() - 14) <= 1
    assert 20 < (image > 127).sum() < 200  # strokes, not ground
    box = image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert box[:4, :3].any() and box[:4, -3:].any()
    assert not box[-6:, -3:].any() and box[-3:, : box.shape[1] // 2 + 2].any()


@pytest.mark.parametrize("size", [20, 28, 280, 2000])
def test_a_picture_of_any_size_is_made_into_what_the_digits_are(nb, tmp_path, size):
    """The controls: upside down it is no seven, and two pixels off show for sure."""
    image = as_read(nb, drawn_seven(size), tmp_path)
    assert_a_seven_like_mnist(image)
    for wrong in (image.flip(0), image.roll(2, 0)):
        with pytest.raises(AssertionError):
            assert_a_seven_like_mnist(wrong)


def test_the_kind_of_picture_and_the_place_do_not_matter(nb, tmp_path):
    """Light on dark, on another ground, in colour, on a transparent ground, on a palette, in 16 bits (the ink
    a dark grey too); near a corner."""
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
    assert not torch.equal(as_read(nb, dark.rotate(90), tmp_path), image)


def test_a_photograph_stands_as_the_camera_was_held(nb, tmp_path):
    """Stored on its side, with the orientation that a camera notes; the control: without it."""
    held, sideways = Image.Exif(), drawn_seven().transpose(Image.Transpose.ROTATE_90)
    held[274] = 6  # turn by 90 degrees, clockwise
    sideways.save(tmp_path / "photo.png", exif=held)
    assert_a_seven_like_mnist(nb.read_picture(tmp_path / "photo.png"))
    with pytest.raises(AssertionError):
        assert_a_seven_like_mnist(as_read(nb, sideways, tmp_path))


def test_a_thin_line_and_a_dot_are_pictures_too(nb, tmp_path):
    """A one of a single column, and one dark pixel: no side becomes nothing."""
    line, dot = Image.new("L", (300, 300), 255), Image.new("L", (9, 9), 255)
    ImageDraw.Draw(line).line([(40, 20), (40, 280)], fill=0, width=3)
    dot.putpixel((4, 2), 0)
    for picture, wide in ((line, 1), (dot, 20)):
        image = as_read(nb, picture, tmp_path)
        assert (image > 0).any(dim=0).sum() == wide and (image > 0).any(dim=1).sum() == 20


@pytest.mark.parametrize("picture, word", [
    (None, "picture file"), (drawn_seven(), "picture file"), (Image.new("L", (50, 50), 255), "one colour"),
    (Image.new("RGBA", (50, 50)), "one colour"), (Image.new("L", (1, 1)), "one colour")])
def test_what_is_no_picture_of_a_digit_is_refused_by_name(nb, tmp_path, picture, word):
    """Missing, cut off after 200 bytes (only the second is longer), all white, all transparent, one pixel."""
    path = tmp_path / "mine.png"
    if picture is not None:
        picture.save(path)
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=f"path: .*{word}") as said:
        nb.read_picture(path)
    assert str(path) in str(said.value)
