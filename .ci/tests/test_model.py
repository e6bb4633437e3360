"""Causality, normalisation, the agreement of one full pass with a walk and with what is drawn on it; and the guide's
network: it starts as the model, reads what is known and nothing else, and learns."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import FALSE_ALARM, guide_log_prob, known_mask, meaningless_guide, random_images, same
from scipy import stats


@pytest.fixture(scope="module")
def model(nb):
    torch.manual_seed(1)
    return nb.PixelCNN(nb.Config()).eval().requires_grad_(False)


def strong(nb, height, width, dilations, encoder=()):
    """A network in which everything matters, and a hint, if it has an encoder, means nothing: float64."""
    torch.manual_seed(0)
    network = nb.PixelCNN(nb.Config(height, width, 3, 4, 12, 8, dilations, context=4)).double()
    network = nb.starting_guide(network, encoder) if encoder else network
    for parameter in network.requires_grad_(False).parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    return network


def leak(moved):
    """Of `influence` the largest entry that must be 0, at the changed pixel or before it."""
    return moved.tril().max()


def test_each_output_depends_on_all_pixels_before_it_and_on_no_other(nb):
    """Zeros: below 1e-9. The controls: mask B in the first layer leaks, a reversed order too, and convolutions alone
    have a blind spot, as the smallest model has (the pixel three rows up and ten columns on)."""
    thin = nb.PixelCNN(nb.Config(20, 20, 256, 4, 8, 8, context=4)).requires_grad_(False)
    image = random_images(1, 20, 20)[0]
    moved, after = nb.influence(thin, image), torch.ones(400, 400).triu(1) > 0
    assert leak(moved) < 1e-9 < moved[after].min() and leak(moved.T) > 1e-3
    leaky = nb.PixelCNN(replace(thin.config, first_mask="B"))
    assert leak(nb.influence(leaky, image[:3])) > 1e-3
    with pytest.raises(ValueError, match="mask B"):
        nb.sample(leaky, 1)
    thin.counts.weight.zero_()
    for block in thin.blocks:
        block.mean = None
    moved = nb.influence(thin, image)
    assert leak(moved) < 1e-9 and moved[after].min() < 1e-9
    torch.manual_seed(0)
    moved = nb.influence(nb.SmallestPixelCNN(4), random_images(1, 14, 14, 4)[0])
    at = moved.view(14, 14, 14, 14)[:, :, 10, 2]
    assert leak(moved) < 1e-9 and at[7, 12] < 1e-9 and at[9, 2] > 1e-5


def test_a_hidden_weight_is_not_used_and_gets_no_gradient(nb):
    """It would see weight * mask, which makes nan of an infinite gradient, and a mask that is written into weights."""
    layer = nb.MaskedConv2d("B", 2, 3, rows=2, reach=1)
    weight, kernel = layer.weight.detach().clone(), layer.kernel()
    kernel.backward(torch.where(layer.mask, 1.0, torch.inf).expand_as(kernel))
    gradient = layer.weight.grad.view_as(kernel)
    assert (kernel[..., ~layer.mask] == 0).all() and torch.equal(layer.weight, weight)
    assert (gradient[..., ~layer.mask] == 0).all() and (gradient[..., layer.mask] == 1).all()


def test_probabilities_of_all_images_sum_to_one(table):
    """Within 1e-10; it would see any output that its own pixel or a later one moves."""
    assert abs(table[1].exp().sum().item() - 1) < 1e-10


def test_counts_and_running_means_equal_their_definitions(model):
    """Recomputed for one pixel from the sums in the text. It would see a sum that is shifted, and unclamped weights."""
    image, pixel = random_images(1) // 16, 300
    counts = torch.bincount(image.flatten()[:pixel].int(), minlength=256)
    t = model.counts(image).flatten(1, 2)[0, pixel]
    assert torch.allclose(t, model.counts.weight @ torch.log1p(counts), atol=1e-5)
    mean = copy.deepcopy(model.blocks[1].mean).double()
    f = 8 * torch.randn(1, 28, 28, model.config.channels, dtype=torch.float64)
    k, v = mean.propose(f).flatten(1, 2)[0, : pixel + 1].chunk(2, dim=-1)
    assert (k > 8).any() and (k < -8).any()
    weights = torch.softmax(k.clamp(-8, 8), dim=0)
    assert torch.allclose(mean(f).flatten(1, 2)[0, pixel], mean.out((weights * v).sum(dim=0)))


@pytest.mark.parametrize("n, dtype, bound, by_rows", [
    (1, torch.float32, 1e-4, ()), (2, torch.float64, 1e-10, range(28)), (16, torch.float32, 1e-4, (0, 5, 6, 7, 20))])
def test_a_walk_equals_the_plain_forward(nb, model, n, dtype, bound, by_rows):
    """Pixel by pixel, by rows, by turns: it would see memory that is stale or of another place. The control: another
    norm is another network."""
    network, images = copy.deepcopy(model).to(dtype), random_images(n)
    plain = network(images)
    assert plain.dtype == dtype and (nb.walked_logits(network, images, by_rows) - plain).abs().max() < bound
    network.blocks[1].norm.weight[:9] *= 2
    assert (nb.walked_logits(network, images, range(28)) - plain).abs().max() > 10 * bound


@pytest.mark.parametrize("together", [1000, 4])
def test_sample_equals_the_naive_loop_in_any_batch(nb, tiny, monkeypatch, together):
    """To the last pixel, also with known ones, which do not move what comes before them. It would see draws that depend
    on the batch. The control: another seed."""
    monkeypatch.setattr(nb, "side_by_side", lambda model: together)
    start = random_images(30, 3, 3, 3)  # must not matter
    many = nb.sample(tiny, 30, seed=9)
    assert many.dtype == torch.uint8 and torch.equal(many, nb.sample_naive(tiny, start, seed=9))
    assert torch.equal(many[:7], nb.sample(tiny, 7, seed=9)) and not torch.equal(many, nb.sample(tiny, 30, seed=8))
    known = torch.tensor([[1, 0, 1], [1, 1, 1], [0, 0, 1]], dtype=torch.bool)
    image = torch.tensor([[2, 0, 1], [0, 1, 2], [0, 0, 1]], dtype=torch.uint8)
    drawn = nb.sample(tiny, 30, image=image, known=known, seed=5)
    assert (drawn[:, known] == image[known]).all()
    assert torch.equal(drawn, nb.sample_naive(tiny, torch.where(known, image, start), known, seed=5))


def test_sample_follows_the_model(nb, tiny, table):
    """Chi-square over all images with expectation > 5: detects a distribution that is off by about 2 % in total
    variation. The control: temperature 1.5."""
    expected = 20_000 * table[1].exp()
    often = expected > 5
    for temperature in (1.0, 1.5):
        drawn = nb.sample(tiny, 20_000, seed=11, temperature=temperature)
        off = 20_000 * nb.frequencies(drawn, torch.zeros(3, 3) > 0, 3) - expected
        square = (off**2 / expected)[often].sum()
        assert (square < stats.chi2.isf(FALSE_ALARM, int(often.sum()))) == (temperature == 1)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("m", [6, 1])
@pytest.mark.parametrize("height, width, dilations", [
    (1, 1, (1,)), (1, 5, (3, 1)), (5, 1, (1, 3)), (4, 3, (1, 7)), (6, 4, (1, 2, 5))])
def test_a_drawing_scores_what_it_drew_as_a_plain_pass_does(nb, height, width, dilations, m, guided):
    """Five draws for each of m evidences, which part where they differ, in odd sizes, by dilations wider than the
    image: log p of all pixels, log g of the hidden ones alone, within 1e-10. It would see memory or hints that are of
    another image or shared too long. The control: the scores of another image."""
    model = strong(nb, height, width, dilations)
    network = strong(nb, height, width, dilations, encoder=(1, 2)) if guided else None
    evidence, uniforms = random_images(6, height, width, 3)[:m], nb.uniform_streams(5 * m, height * width, 0)
    masks = torch.rand(6, height, width, generator=torch.Generator().manual_seed(0)) < 0.4
    masks[:, ::3] |= height > 1  # rows that are read at once
    masks[5] = True
    each = [x.repeat_interleave(5, dim=0) for x in (evidence, masks[:m])]
    drawing = nb.Drawing(model, evidence, masks[:m], uniforms, network).finish()
    alone = nb.Drawing(model, *each, uniforms, network).finish()
    assert torch.equal(drawing.images, alone.images) and torch.equal(drawing.images[each[1]], each[0][each[1]])
    assert len(drawing.images[:5].unique(dim=0)) > 1
    for images, right in ((drawing.images, True), ((drawing.images + 1) % 3, False)):
        off_p = (drawing.log_p - nb.log_prob(model, images)).abs().max()
        log_g = nb.guide_pixel_log_probs(nb.Guide(model, network), images, each[1]).sum(dim=(1, 2))
        off_g = (drawing.log_g - log_g).abs().max()
        assert max(off_p, off_g) < 1e-10 if right else min(off_p, off_g) > 1e-3


def test_a_guide_starts_as_the_model(nb, tiny, table):
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
    """In any size. Of 2,000 the shares of G's and D's are within 0.045, 4 standard deviations: it would see either left
    out, and a guide that is trained on the same masks at each step."""
    for size in ((28, 28), (2, 5), (1, 1)):
        config = nb.Config(*size)
        masks = nb.random_masks(300, config, 7)
        assert masks.shape == (300, *size) and (~masks).flatten(1).any(dim=1).all()
        assert torch.equal(masks, nb.random_masks(300, config, 7))
    hidden = ~nb.random_masks(2000, nb.Config(), 0)
    assert not torch.equal(hidden, ~nb.random_masks(2000, nb.Config(), 8))
    place = torch.arange(784).view(28, 28)
    top, future = ((hidden == kind).flatten(1).all(dim=1) for kind in (place < 392, place <= 406))
    shares = torch.stack([top, future]).double().mean(dim=1)
    assert (shares - torch.tensor([2 / 8 + 1 / 56, 2 / 8])).abs().max() < 0.045, shares


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


def test_training_teaches_a_guide_the_evidence(nb, tiny, table, evidence, tmp_path):
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
