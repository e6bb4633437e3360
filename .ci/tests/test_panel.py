"""The widgets of section 8, made by the notebook's own cell, without a front end: what they hide is completed."""

import pytest
import torch


@pytest.fixture
def panel(nb, cells, monkeypatch):
    """(its widget, its images, what is displayed): the cell as it runs where somebody is there."""
    torch.manual_seed(0)
    config = nb.Config(levels=3, embedding=4, channels=8, bottleneck=8, dilations=(1, 2), context=4)
    images, shown = torch.randint(0, 3, (5, 28, 28), dtype=torch.uint8), []
    monkeypatch.setattr("ipywidgets.widgets.interaction.display", shown.append)
    texts = ("".join(cell["source"]) for cell in cells)
    (source,) = (text for text in texts if text.startswith("if somebody_is_there():"))
    exec(source, dict(vars(nb), somebody_is_there=lambda: True, model=nb.PixelCNN(config).eval(), test_images=images,
                      guide=None, budget=nb.Budget(4, 8, 4, rounds=1)))
    return shown.pop(), images, shown


@pytest.fixture
def seen(nb, monkeypatch):
    """What `complete` is asked and answers: (image, known, Completion)."""
    real, found = nb.complete, []

    def recorded(model, image, known, *rest):
        found.append((image, known, real(model, image, known, *rest)))
        return found[-1][2]

    monkeypatch.setattr(nb, "complete", recorded)
    return found


def test_the_hidden_rectangle_is_completed_and_the_rest_kept(nb, panel, seen):
    widget, images, shown = panel
    image_slider, rows, columns = widget.children[:3]
    image_slider.value, rows.value, columns.value = 3, (4, 7), (9, 10)
    assert not seen  # nothing runs before the button is pressed
    widget.manual_button.click()
    image, known, completion = seen[0]
    expected = torch.ones(28, 28, dtype=torch.bool)
    expected[4:8, 9:11] = False
    assert torch.equal(known, expected) and torch.equal(image, images[3])
    assert (completion.draws[:, known] == image[known]).all() and len(completion.draws) == 4
    (figure,) = shown
    pictures = [axis.images[0].get_array() for axis in figure.axes]
    assert len(pictures) == 6 and (pictures[0] == images[3].numpy()).all()
    assert all((picture == nb.tinted(draw, known).numpy()).all()
               for picture, draw in zip(pictures[2:], completion.draws))
    assert completion.status in figure.get_supxlabel() and not nb.plt.get_fignums()
    assert not widget.manual_button.disabled


@pytest.mark.parametrize("hidden", [((0, 0), (0, 0)), ((27, 27), (0, 27)), ((5, 6), (27, 27)), ((0, 27), (0, 27))])
def test_every_rectangle_can_be_hidden(nb, panel, monkeypatch, hidden):
    seen, widget = [], panel[0]
    monkeypatch.setattr(nb, "complete", lambda model, image, known, *rest: seen.append(known) or nb.Completion(
        image.expand(4, -1, -1), 4, 0.0, 0.0, "exact", [], {}))
    for slider, ends in zip(widget.children[1:3], hidden):
        slider.value = ends
    widget.manual_button.click()
    ((top, bottom), (left, right)), places = hidden, torch.arange(28)
    inside = ((places >= top) & (places <= bottom))[:, None] & ((places >= left) & (places <= right))
    assert torch.equal(seen[0], ~inside)


def test_nobody_is_there_in_a_test(nb):
    assert not nb.somebody_is_there()
