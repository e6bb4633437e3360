"""The guide's network: it starts as the model, reads what is known and nothing else, and learns."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import guide_log_prob, known_mask, meaningless_guide, same


def test_it_starts_as_the_model(nb, tiny, table):
    """log g = log p within 1e-12 where hidden, 0 where known: it would see weights that are not taken over. The
    control: a hint that says something."""
    images = table[0][::500]
    known = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    network = nb.starting_guide(tiny, (1,)).requires_grad_(False)
    expected = nb.pixel_log_probs(tiny, images).masked_fill(known, 0)

    def off():
        return (nb.guide_pixel_log_probs(nb.Guide(tiny, network), images, known) - expected).abs().max()

    assert off() < 1e-12
    network.encoder.hint.weight.add_(0.1)
    assert off() > 1e-3


@pytest.mark.parametrize("hidden", [(0, 1, 4, 6), (3, 5, 8)])
def test_the_hint_says_what_is_known_and_nothing_else(nb, tiny, evidence, hidden):
    """One pixel after the other gets another level: a hidden one never matters to the hint, a known one always does;
    and whether it is known matters. It would see a guide that reads what it is to propose."""
    one, known, hint = torch.eye(9).view(9, 3, 3) == 1, known_mask(*hidden), meaningless_guide(nb, tiny).network.hint

    def moves(image, images, masks):
        moved = hint(images, masks) - hint(image[None], known[None])
        return moved.abs().amax(dim=(1, 2, 3)) > 1e-9  # rounding

    for image in evidence:
        changed = torch.where(one, (image + 1) % 3, image)
        assert torch.equal(moves(image, changed, known.expand(9, 3, 3)), known.flatten())
        assert moves(image, image.expand(9, 3, 3), known ^ one).all()


def test_random_masks_depend_on_the_seed_alone_hide_something_and_come_in_their_shares(nb):
    """In any size. Of 2,000 the shares of G's, D's and other rows times columns (rectangles, say) are within 0.045, 4
    standard deviations: it would see a kind that is left out."""
    for size in ((28, 28), (2, 5), (1, 1)):
        config = nb.Config(*size)
        masks = nb.random_masks(300, config, 7)
        assert masks.shape == (300, *size) and (~masks).flatten(1).any(dim=1).all()
        assert torch.equal(masks, nb.random_masks(300, config, 7))
    hidden = ~nb.random_masks(2000, nb.Config(), 0)
    assert not torch.equal(hidden, ~nb.random_masks(2000, nb.Config(), 8))
    place = torch.arange(784).view(28, 28)
    top, future = ((hidden == kind).flatten(1).all(dim=1) for kind in (place < 392, place <= 406))
    product = hidden.any(dim=2, keepdim=True) & hidden.any(dim=1, keepdim=True)
    grid = (hidden == product).flatten(1).all(dim=1) & ~top
    shares = torch.stack([top, future, grid]).double().mean(dim=1)
    # Of the seven other kinds of 8.8 the top is one, four are the product of rows and columns; so is most of a band of
    # these five, and of a band of all up to a pixel where the band does not hold its row (two of three).
    expected = torch.tensor([2 / 8 + 1 / 56, 2 / 8, 1 / 8 + 4 / 56 + 5.6 / 56])
    assert (shares - expected).abs().max() < 0.045, (shares, expected)


def test_fresh_batches_are_half_draws_each_seen_in_one_step_and_half_digits(nb, config, images):
    """A function of the step, in whatever order it is asked; the draws are those of `sample`, portion by portion. It
    would see draws that come twice (they are memorised), and a resumed training that sees others."""
    torch.manual_seed(0)
    model = nb.PixelCNN(config).eval()  # nearly uniform: no image comes twice
    recipe = nb.Recipe(640, warmup=160, decay=160, batch_size=16)
    batch_of, again = (nb.fresh_batches(model, images, steps=3) for _ in range(2))
    batches = torch.stack([batch_of(recipe, step) for step in range(7)])
    draws, digits = (x.flatten(0, 1) for x in batches.chunk(2, dim=1))
    assert batches.shape == (7, 16, 5, 4) and len(draws.unique(dim=0)) == 7 * 8
    assert torch.equal(digits[24:48], nb.batch_at(images, replace(recipe, batch_size=24), 1))
    assert all(torch.equal(again(recipe, step), batches[step]) for step in (5, 0, 6, 4))
    assert torch.equal(draws[24:48], nb.sample(model, 24, seed=10**6 + 1))


def test_training_teaches_it_the_evidence(nb, tiny, table, evidence, tmp_path):
    """KL(posterior || g) of the 3x3 model after 100 steps is below half the model's, with which it starts: it would see
    a hint that is not learned. The loss falls; the checkpoint is read."""
    model = copy.deepcopy(tiny).float()
    images, path = nb.sample(tiny, 2000, seed=2), tmp_path / "guide.pt"
    recipe = nb.Recipe(3200, warmup=320, decay=800, batch_size=32, ema_decay=0.9, validate_every=50)
    start = nb.starting_guide(model, (1, 2))
    before = nb.validation_bits(start, images[:500])
    trained = nb.train(copy.deepcopy(start), nb.fresh_batches(model, images, steps=50), images[:500], [recipe], path)
    assert trained.history[-1]["validation_bits"] < trained.history[0]["validation_bits"] < before
    known, divergence = known_mask(0, 1, 2), torch.zeros(2)
    for image in evidence:
        support, posterior, _ = nb.exact_posterior(*table, image, known)
        log_g = torch.stack([guide_log_prob(nb, nb.Guide(model, x), support, known) for x in (start, trained)])
        divergence += (posterior * (posterior.log() - log_g)).sum(dim=1)
    assert divergence[1] < 0.5 * divergence[0]
    assert same(nb.load_checkpoint(path, "cpu", nb.GuideNetwork), trained)
