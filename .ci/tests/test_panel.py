"""The panel of section 8, without a front end: what its buttons hide is what is completed."""

import pytest
import torch


@pytest.fixture
def panel(nb):
    torch.manual_seed(0)
    config = nb.Config(height=8, width=12, levels=3, embedding=4, channels=8, bottleneck=8, dilations=(1, 2), context=4)
    images = torch.randint(0, 3, (5, 8, 12), dtype=torch.uint8)
    return nb.CompletionPanel(nb.PixelCNN(config).eval(), images, nb.Budget(4, 8, 4, rounds=1))


def test_hidden_blocks_are_completed_and_the_others_kept(nb, panel, monkeypatch):
    seen = []
    monkeypatch.setattr(nb, "draw_completion", lambda *arguments: seen.append(arguments) or nb.plt.figure())
    for button in panel.blocks:
        button.value = False
    panel.blocks[4].value = True  # second row of blocks, second column
    panel.which.value = 3
    panel.run()
    image, known, completion = seen[0]
    expected = torch.ones(8, 12, dtype=torch.bool)
    expected[4:8, 4:8] = False
    assert torch.equal(known, expected) and torch.equal(image, panel.images[3])
    assert (completion.draws[:, known] == image[known]).all() and len(completion.draws) == 4
    assert not panel.button.disabled


def test_presets_press_their_buttons(nb, panel):
    for name, hides in nb.HIDDEN_PRESETS.items():
        panel.preset.value = name
        panel.show_preset()
        pressed = [hides(row, column) for row in range(2) for column in range(3)]
        assert [button.value for button in panel.blocks] == pressed


def test_nobody_is_there_in_a_test(nb):
    assert not nb.somebody_is_there()
