"""Wrong shapes, types and ranges: a ValueError names the argument."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from guides import known_mask

IMAGE, KNOWN = torch.zeros(3, 3, dtype=torch.uint8), known_mask(0, 1)
TWO = IMAGE.expand(2, 3, 3)


def runs(nb, model, seeds, reference=None):
    return nb.smc(nb.Guide(model).told(IMAGE[None], KNOWN), IMAGE[None], 4, seeds, reference)


def train(nb, model, images, validation):
    return nb.train(model.config, images, validation, path=Path("none.pt"), device="cpu")


WRONG = [  # what is said, what is done
    ("images: .*float32", lambda nb, model: nb.log_prob(model, torch.zeros(1, 3, 3))),
    (r"images: .*shape \[3, 3\]", lambda nb, model: nb.log_prob(model, IMAGE)),
    (r"images: .*shape \[1, 2, 3\]", lambda nb, model: nb.log_prob(model, IMAGE[None, :2])),
    ("images: .*300", lambda nb, model: nb.log_prob(model, torch.full((1, 3, 3), 300))),
    ("images: .*-1", lambda nb, model: nb.log_prob(model, torch.full((1, 3, 3), -1))),
    ("images: .*bool", lambda nb, model: nb.log_prob(model, KNOWN[None])),
    ("images: .*batch of 64, got 2", lambda nb, model: nb.batch_at(TWO, model.config, 0)),
    ("images: .*float32", lambda nb, model: train(nb, model, torch.zeros(64, 3, 3), TWO)),
    ("validation: .*4..4", lambda nb, model: train(nb, model, TWO, TWO + 4)),
    ("image and known", lambda nb, model: nb.sample(model, 3, image=IMAGE)),
    ("known: .*uint8", lambda nb, model: nb.sample(model, 3, image=IMAGE, known=IMAGE)),
    ("image: expected one or 3, got 2", lambda nb, model: nb.sample(model, 3, image=TWO, known=KNOWN)),
    ("known: expected one or 3, got 2", lambda nb, model: nb.sample(model, 3, image=IMAGE, known=TWO > 0)),
    ("temperature", lambda nb, model: nb.sample(model, 3, temperature=0)),
    ("stop", lambda nb, model: nb.sample(model, 3, stop=(3, 0))),
    ("known: expected a bool tensor", lambda nb, model: nb.complete(model, IMAGE, KNOWN[:2])),
    ("known: expected a bool tensor", lambda nb, model: nb.complete(model, IMAGE, None)),
    (r"known: expected one mask \[h, w\], got \[2, 3, 3\]", lambda nb, model: nb.complete(model, IMAGE, TWO > 0)),
    (r"image: expected integers .* of shape \[1, 2, 3, 3\]", lambda nb, model: nb.complete(model, TWO, KNOWN)),
    ("guide: expected one for this model", lambda nb, model: nb.complete(
        model, IMAGE, KNOWN, guide=nb.Guide(nb.tiny_model()))),
    ("pixel: expected", lambda nb, model: nb.conditional_given_rest(model, IMAGE, (3, 0))),
    ("seeds: expected 1, one an image, got 2", lambda nb, model: runs(nb, model, [1, 2])),
    ("reference: expected the known pixels of images", lambda nb, model: runs(nb, model, [1], IMAGE[None] + 1)),
    *((f"config: .*{name}", lambda nb, model, name=name, value=value: replace(model.config, **{name: value}))
      for name, value in dict(channels=0, levels=1, height=2.5, dilations=(1, 0), first_mask="C", width=None).items()),
    *(("budget: expected", lambda nb, model, name=name, value=value: nb.Budget(**{name: value}))
      for name, value in dict(particles=0, runs=1, rounds=0).items())]


@pytest.mark.parametrize("said, call", WRONG)
def test_wrong_arguments_are_refused_by_name(nb, tiny, said, call):
    with pytest.raises(ValueError, match=said):
        call(nb, tiny)
