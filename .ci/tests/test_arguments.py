"""Wrong shapes, types and ranges: a ValueError names the argument."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

IMAGE = torch.zeros(3, 3, dtype=torch.uint8)
KNOWN = torch.arange(9).view(3, 3) > 1
TWO = IMAGE.expand(2, 3, 3)


def train(nb, images, validation):
    return nb.train(nb.tiny_model(), images, validation, [nb.Recipe(640, 0, 0)], Path("none.pt"))


WRONG = [  # what is said, what is done
    ("images: .*float32", lambda nb, model: nb.log_prob(model, torch.zeros(1, 3, 3))),
    (r"images: .*uint8 \[3, 3\]", lambda nb, model: nb.log_prob(model, IMAGE)),
    (r"images: .*uint8 \[1, 2, 3\]", lambda nb, model: nb.bits_per_dim(model, IMAGE[None, :2])),
    ("images: .*300", lambda nb, model: nb.log_prob(model, torch.full((1, 3, 3), 300))),
    ("images: .*-1", lambda nb, model: nb.log_prob(model, torch.full((1, 3, 3), -1))),
    ("images: .*bool", lambda nb, model: nb.log_prob(model, KNOWN[None])),
    ("images: .*list", lambda nb, model: nb.pixel_log_probs(model, IMAGE.tolist())),
    ("batches: .*at least 64 images, got 2", lambda nb, model: train(nb, TWO, TWO)),
    ("batches: .*float32", lambda nb, model: train(nb, torch.zeros(64, 3, 3), TWO)),
    ("validation: .*4..4", lambda nb, model: train(nb, TWO, TWO + 4)),
    ("image and known", lambda nb, model: nb.sample(model, 3, image=IMAGE)),
    ("image and known", lambda nb, model: nb.sample(model, 3, known=KNOWN)),
    ("image: .*3..3", lambda nb, model: nb.sample(model, 3, image=IMAGE + 3, known=KNOWN)),
    ("known: .*uint8", lambda nb, model: nb.sample(model, 3, image=IMAGE, known=IMAGE)),
    (r"known: .*\[3, 2\]", lambda nb, model: nb.sample(model, 3, image=IMAGE, known=KNOWN[:, :2])),
    (r"image: .*\[1, 2, 3, 3\]", lambda nb, model: nb.sample(model, 2, image=TWO, known=KNOWN)),
    (r"known: expected one mask.*\[2, 3, 3\]", lambda nb, model: nb.sample(model, 2, image=IMAGE, known=TWO > 0)),
    *(("temperature: .*> 0", lambda nb, model, t=t: nb.sample(model, 3, temperature=t)) for t in (0, -1, float("nan"))),
    ("known: expected one mask", lambda nb, model: nb.complete(model, IMAGE, KNOWN[:2])),
    ("known: expected one mask", lambda nb, model: nb.complete(model, IMAGE, None)),
    (r"known: expected one mask.*\[2, 3, 3\]", lambda nb, model: nb.complete(model, IMAGE, TWO > 0)),
    (r"image: expected integers .*\[1, 2, 3, 3\]", lambda nb, model: nb.complete(model, TWO, KNOWN)),
    ("guide: expected one for this model", lambda nb, model: nb.complete(
        model, IMAGE, KNOWN, guide=nb.Guide(nb.tiny_model()))),
    *(("pixel: expected", lambda nb, model, ask=ask: getattr(nb, ask)(model, IMAGE, (3, 0))) for ask in (
        "conditional_given_past", "conditional_given_rest", "conditional_given_future")),
    ("pixel: expected", lambda nb, model: nb.marginal(model, (0, -1))),
    ("device: .*tpu", lambda nb, model: nb.pick_device("tpu")),
    *((f"config: .*{name}", lambda nb, model, name=name, value=value: replace(model.config, **{name: value}))
      for name, value in dict(channels=0, levels=257, height=2.5, dilations=(1, 0), encoder=(0,), embedding=1,
                              first_mask="C", width=None).items())]


@pytest.mark.parametrize("said, call", WRONG)
def test_wrong_arguments_are_refused_by_name(nb, tiny, said, call):
    with pytest.raises(ValueError, match=said):
        call(nb, tiny)
    assert not Path("none.pt").exists()
