"""Causality, normalisation, and the agreement of one full pass with a walk and with what is drawn on it."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import FALSE_ALARM, random_images
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


def after(moved):
    """Of `influence`, the entries that must not be 0: at all pixels after the changed one."""
    return moved[torch.ones_like(moved).triu(1) > 0]


def leak(moved):
    """Its largest entry that must be 0, at the changed pixel or before it."""
    return moved.tril().max()


def test_each_output_depends_on_all_pixels_before_it_and_on_no_other(nb):
    """Zeros: below 1e-9. The controls: mask B in the first layer leaks, a reversed order too, and convolutions alone
    have a blind spot, as the smallest model has (the pixel three rows up and ten columns on)."""
    thin = nb.PixelCNN(nb.Config(20, 20, 256, 4, 8, 8, context=4)).requires_grad_(False)
    image = random_images(1, 20, 20)[0]
    moved = nb.influence(thin, image)
    assert moved.shape == (400, 400) and leak(moved) < 1e-9 < after(moved).min() and leak(moved.T) > 1e-3
    leaky = nb.PixelCNN(replace(thin.config, first_mask="B"))
    assert leak(nb.influence(leaky, image[:3])) > 1e-3
    with pytest.raises(ValueError, match="mask B"):
        nb.sample(leaky, 1)
    thin.counts.weight.zero_()
    for block in thin.blocks:
        block.mean = None
    moved = nb.influence(thin, image[:3])
    assert leak(moved) < 1e-9 and after(moved).min() < 1e-9
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


def test_counts_and_running_means_equal_their_definitions(nb, model):
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
