"""Causality, normalisation, and the agreement of one full pass with a walk and with what is drawn on it."""

import copy
from dataclasses import replace

import pytest
import torch
from bounds import agree


def random_images(n, height=28, width=28, levels=256):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, levels, (n, height, width), generator=generator, dtype=torch.uint8)


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


def before(moved):
    """Of `influence`, the entries that must not be 0: at all pixels after the changed one."""
    return moved[torch.ones_like(moved).triu(1) > 0]


def leak(moved):
    """Its largest entry that must be 0, at the changed pixel or before it."""
    return moved.tril().max()


def test_each_output_depends_on_all_pixels_before_it_and_on_no_other(nb, model):
    """The first rows of two images; all rows of a thin network; zeros: below 1e-9. The controls: mask B in the
    first layer leaks, a reversed order too, and convolutions alone have a blind spot."""
    for image in random_images(2)[:, :3]:
        moved = nb.influence(model, image)
        assert leak(moved) < 1e-9 < before(moved).min() and leak(moved.T) > 1e-3
    thin = nb.PixelCNN(nb.Config(20, 20, 256, 4, 8, 8, context=4)).requires_grad_(False)
    image = random_images(1, 20, 20)[0]
    moved = nb.influence(thin, image)
    assert moved.shape == (400, 400) and leak(moved) < 1e-9 < before(moved).min()
    leaky = nb.PixelCNN(replace(thin.config, first_mask="B"))
    assert leak(nb.influence(leaky, image[:3])) > 1e-3
    with pytest.raises(ValueError, match="mask B"):
        nb.sample(leaky, 1)
    thin.counts.weight.zero_()
    for block in thin.blocks:
        block.mean = None
    moved = nb.influence(thin, image[:3])
    assert leak(moved) < 1e-9 and before(moved).min() < 1e-9


def test_the_smallest_model_leaks_nothing_and_has_a_blind_spot(nb):
    """The pixel three rows up and ten columns on never arrives; the one above does."""
    torch.manual_seed(0)
    moved = nb.influence(nb.SmallestPixelCNN(4), random_images(1, 14, 14, 4)[0])
    assert leak(moved) < 1e-9
    at = moved.view(14, 14, 14, 14)[:, :, 10, 2]
    assert at[7, 12] < 1e-9 and at[9, 2] > 1e-5


def test_a_hidden_weight_is_not_used_and_gets_no_gradient(nb):
    """Not even from an infinite one (weight * mask would give inf * 0 = nan); masking leaves the weight as it is."""
    layer = nb.MaskedConv2d("B", 2, 3, rows=2, reach=1)
    weight, kernel = layer.weight.detach().clone(), layer.kernel()
    kernel.backward(torch.where(layer.mask, 1.0, torch.inf).expand_as(kernel))
    gradient = layer.weight.grad.view_as(kernel)
    assert (kernel[..., ~layer.mask] == 0).all() and torch.equal(layer.weight, weight)
    assert (gradient[..., ~layer.mask] == 0).all() and (gradient[..., layer.mask] == 1).all()


def test_probabilities_of_all_images_sum_to_one(table):
    assert abs(table[1].exp().sum().item() - 1) < 1e-10


def test_counts_and_running_means_equal_their_definitions(nb, model):
    """Both summaries of the past, recomputed for one pixel from the sums in the text; weights are clamped."""
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
    (1, torch.float32, 1e-4, ()), (2, torch.float32, 1e-4, range(28)), (2, torch.float64, 1e-10, range(28)),
    (16, torch.float32, 1e-4, (0, 5, 6, 7, 20)), (2, torch.float64, 1e-10, (0, 5, 6, 7, 20))])
def test_a_walk_equals_the_plain_forward(nb, model, n, dtype, bound, by_rows):
    """Pixel by pixel, by rows, by turns. The control: another norm is another network."""
    network, images = copy.deepcopy(model).to(dtype), random_images(n)
    plain = network(images)
    assert plain.dtype == dtype and (nb.walked_logits(network, images, by_rows) - plain).abs().max() < bound
    network.blocks[1].norm.weight[:9] *= 2
    assert (nb.walked_logits(network, images, range(28)) - plain).abs().max() > 10 * bound


def walk_and_part(nb, network, images, times, place, by_rows, hint=None):
    """Logits of a Walk through images [m * times, h, w], where up to `place` each of m stands for `times` of them.
    by_rows: {row: the row after the last} of what is read at once."""
    walk, row = nb.Walk(network, len(images) // times, hint), 0
    found = torch.zeros(len(images), network.config.levels, *images.shape[1:], dtype=torch.float64)
    while row < images.shape[1]:
        end = by_rows.get(row, row + 1)
        for column in range(1 if row in by_rows else images.shape[2]):
            if (row, column) == place:
                walk.repeat(times)
            some = images if (row, column) >= place else images[::times]
            if row in by_rows:
                logits, columns = walk.rows(some[:, row:end], row), slice(None)
            else:
                logits, columns = walk.pixel(row, column)[:, :, None, None], slice(column, column + 1)
                walk.take(some[:, row, column].long())
            found[:, :, row:end, columns] = logits.repeat_interleave(len(images) // len(some), dim=0)
        row = end
    return found


@pytest.mark.parametrize("hints", [0, 1, 2])
@pytest.mark.parametrize("height, width, dilations, place, by_rows", [
    (1, 1, (1,), (0, 0), {}), (1, 5, (3, 1), (0, 3), {}), (5, 1, (1, 3), (2, 0), {0: 2}), (5, 1, (3,), (4, 0), {}),
    (4, 3, (1, 7), (1, 0), {}), (4, 3, (1, 7), (1, 2), {2: 4}), (6, 4, (2, 1), (3, 0), {0: 3, 3: 6}),
    (6, 4, (2, 1), (3, 1), {0: 2, 5: 6}), (6, 4, (1, 2, 5), (3, 0), {0: 1, 1: 3})])
def test_a_walk_of_which_each_becomes_many_equals_the_plain_forward(
        nb, height, width, dilations, place, by_rows, hints):
    """Two become six in the middle of a row or where one begins, and then differ; in odd sizes, by dilations wider than
    the image; without a hint, with one for all, with one of each. Nothing that the caller handed over changes. The
    controls: images that differ before they part; no hint in place of one."""
    network = strong(nb, height, width, dilations, encoder=(1,) if hints else ())
    images, evidence = random_images(6, height, width, 3), random_images(2, height, width, 3)
    early = torch.arange(height * width).view(height, width) < place[0] * width + place[1]
    alike = torch.where(early, images[::3].repeat_interleave(3, dim=0), images)
    hint = network.hint(evidence, evidence < 2)[:hints] if hints else None
    told = [hint.repeat_interleave(6 // hints, dim=0)] if hints else []
    handed = [alike, *network.state_dict().values(), *([hint] if hints else [])]
    kept, plain = copy.deepcopy(handed), network(alike, *told)
    assert (walk_and_part(nb, network, alike, 3, place, by_rows, hint) - plain).abs().max() < 1e-10
    assert all(map(torch.equal, handed, kept)) and torch.equal(network(alike, *told), plain)
    if hints:
        assert (walk_and_part(nb, network, alike, 3, place, by_rows, 0 * hint) - plain).abs().max() > 1e-3
    if early.any():
        off = walk_and_part(nb, network, images, 3, place, by_rows, hint) - network(images, *told)
        assert off.abs().max() > 1e-3


@pytest.mark.parametrize("together", [1000, 4])
def test_sample_equals_the_naive_loop_in_any_batch(nb, tiny, monkeypatch, together):
    """To the last pixel, also with known pixels: what comes before them is drawn as if they were not known. The
    control: other seeds give other draws."""
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
    """Chi-square over all images with expectation > 5; detects a wrong distribution of about 2 % in TV."""
    images, log_probs = table
    for temperature in (1.0, 1.5):  # 1.5: negative control
        drawn = nb.sample(tiny, 20_000, seed=11, temperature=temperature)
        counts = 20_000 * nb.frequencies(drawn, torch.zeros(3, 3) > 0, 3)
        assert agree(counts, 20_000 * log_probs.exp()) == (temperature == 1)


@pytest.mark.parametrize("guided", [False, True])
def test_a_drawing_scores_what_it_drew_as_a_plain_pass_does(nb, tiny, evidence, guided):
    """Five draws for each of six evidences, which part where they differ; log p of all pixels, log g of the hidden ones
    alone. They are the draws that thirty evidences give. The control: the scores of another image."""
    network = strong(nb, 3, 3, (1, 2), encoder=(1, 2)) if guided else None
    guide, uniforms = nb.Guide(tiny, network), nb.uniform_streams(30, 9, 0)
    masks = torch.rand(6, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.4
    masks[:, 0], masks[2:4, 1], masks[0] = True, True, True  # rows that are read, at first and at last; all of one
    kept = evidence.clone()
    drawing = nb.Drawing(tiny, evidence, masks, uniforms, network).finish()
    each = [x.repeat_interleave(5, dim=0) for x in (evidence, masks)]
    alone = nb.Drawing(tiny, *each, uniforms, network).finish()
    assert torch.equal(drawing.images, alone.images) and torch.equal(drawing.images[each[1]], each[0][each[1]])
    assert torch.equal(evidence, kept) and (drawing.images != each[0]).any()
    for images, right in ((drawing.images, True), (drawing.images.roll(1, dims=0), False)):
        off_p = (drawing.log_p - nb.log_prob(tiny, images)).abs().max()
        off_g = (drawing.log_g - nb.guide_pixel_log_probs(guide, images, each[1]).sum(dim=(1, 2))).abs().max()
        assert max(off_p, off_g) < 1e-10 if right else min(off_p, off_g) > 1e-3
