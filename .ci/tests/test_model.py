"""Causality, normalisation, and the agreement of one full pass with rows and pixels below a cache."""

import copy
from dataclasses import replace

import pytest
import torch
from bounds import agree


@pytest.fixture(scope="module")
def model(nb):
    torch.manual_seed(1)
    return nb.PixelCNN(nb.Config()).eval().requires_grad_(False)


def random_images(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 28, 28), generator=generator, dtype=torch.uint8)


def before(moved):
    """Of `influence`, the entries that must not be 0: at all pixels after the changed one."""
    return moved[torch.ones_like(moved).triu(1) > 0]


def test_each_output_depends_on_all_pixels_before_it_and_on_no_other(nb, model):
    """The first rows of several images; all rows of a network as deep, but thin; zeros are rounding below 1e-9. The
    controls: mask B in the first layer leaks, a reversed order too, and convolutions alone have a blind spot."""
    for image in random_images(4)[:, :3]:
        moved = nb.influence(model, image)
        assert nb.largest_leak(moved) < 1e-9 < before(moved).min() and nb.largest_leak(moved.T) > 1e-3
    torch.manual_seed(1)
    thin = nb.PixelCNN(replace(model.config, embedding=4, channels=8, bottleneck=8, context=4))
    moved = nb.influence(thin, random_images(1)[0])
    assert moved.shape == (784, 784) and nb.largest_leak(moved) < 1e-9 < before(moved).min()
    leaky, alone = nb.PixelCNN(replace(thin.config, first_mask="B")), copy.deepcopy(thin)
    assert nb.largest_leak(nb.influence(leaky, image)) > 1e-3
    with pytest.raises(ValueError, match="mask B"):
        nb.sample(leaky, 1)
    torch.nn.init.zeros_(alone.counts.weight)
    for block in alone.blocks:
        block.mean = None
    moved = nb.influence(alone, image)
    assert nb.largest_leak(moved) < 1e-9 and before(moved).min() < 1e-9


def test_influence_is_what_a_changed_pixel_moves(nb, tiny, evidence):
    for pixel, row in enumerate(nb.influence(tiny, evidence[0], batch_size=4)):
        other = evidence[:1].clone()
        other.view(-1)[pixel] = (other.view(-1)[pixel] + 1) % 3
        assert ((tiny(other) - tiny(evidence[:1])).abs().amax(dim=1).flatten() - row).abs().max() < 1e-12
        assert pixel == 8 or row.max() > 0.1


def test_a_hidden_weight_is_not_used_and_gets_no_gradient(nb):
    """Not even from an infinite one (weight * mask would give inf * 0 = nan); masking leaves the weight as it is."""
    layer = nb.MaskedConv2d("B", 2, 3, rows=2, reach=1)
    before, kernel = layer.weight.detach().clone(), layer.kernel()
    kernel.backward(torch.where(layer.mask, 1.0, torch.inf).expand_as(kernel))
    gradient = layer.weight.grad.view_as(kernel)
    assert (kernel[..., ~layer.mask] == 0).all() and torch.equal(layer.weight, before)
    assert (gradient[..., ~layer.mask] == 0).all() and (gradient[..., layer.mask] == 1).all()


def test_probabilities_of_all_images_sum_to_one(table):
    assert abs(table[1].exp().sum().item() - 1) < 1e-10


@pytest.mark.parametrize("n, dtype, bound", [(1, torch.float32, 1e-4), (3, torch.float32, 1e-4),
                                             (64, torch.float32, 1e-4), (3, torch.float64, 1e-10)])
def test_the_fast_network_equals_the_plain_forward(nb, model, n, dtype, bound):
    """By whole images, by their first rows alone, and pixel by pixel; the images stay as they are."""
    network, images = copy.deepcopy(model).to(dtype), random_images(n)
    plain, before = network(images), images.clone()
    for logits in (nb.FastNetwork(network).logits(images), nb.cached_logits(network, images)):
        assert logits.dtype == dtype and (logits - plain).abs().max() < bound
    assert (nb.FastNetwork(network).logits(images[:, :5]) - plain[:, :, :5]).abs().max() < bound
    assert torch.equal(images, before)
    network.blocks[1].norm.weight[:9] *= 2  # negative control: another norm is another network
    assert (nb.FastNetwork(network).logits(images) - plain).abs().max() > 10 * bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_fast_network_is_nearly_the_same(nb, root, mnist, dtype):
    """log p of a digit differs by 0.25 nats (sd) or so: more than float32, less than a nat."""
    trained, digits = nb.load_checkpoint(root / "checkpoints" / "small.pt", "cpu"), mnist[2][:8]
    exact = nb.log_prob(trained, digits)
    for found in (nb.FastNetwork(trained, dtype).logits(digits), nb.cached_logits(trained, digits, dtype)):
        assert found.dtype == dtype
        off = nb.gather_log_probs(found.float(), digits).sum(dim=(1, 2)) - exact
        assert 1e-3 < off.std() < 1


@pytest.mark.parametrize("first", [0, 9])
@pytest.mark.parametrize("n, dtype, bound", [(1, torch.float32, 1e-4), (3, torch.float32, 1e-4),
                                             (64, torch.float32, 1e-4), (3, torch.float64, 1e-10)])
def test_logits_while_drawing_equal_a_full_pass_of_the_result(nb, model, n, dtype, bound, first):
    """With clamped pixels, different for each image; from a later row on; known rows on the way by `rows`. The
    control: with the cache of three rows further up the logits are wrong."""
    network, images = copy.deepcopy(model).to(dtype), random_images(n)
    known = torch.rand(n, 28, 28, generator=torch.Generator().manual_seed(1)) < 0.3
    known[:, 12:15] = True
    fast, drawn, uniforms = nb.FastNetwork(network), images.clone(), nb.uniform_streams(n, 784, 0, "cpu")
    cache, kept = fast.new_cache(n), []
    if first > 0:
        fast.rows(images[:, :first], cache, 0)
    for row in range(first, 28):
        if row == 12:
            old = [[*part] for part in cache]
            kept.append(fast.rows(drawn[:, :15], cache, 12))
        elif row not in (13, 14):
            kept += nb.draw_row([(fast, cache, None)], drawn, known[:, row], uniforms, row)
    plain = network(drawn)
    assert (plain[:, :, first:] - torch.cat(kept, dim=2)).abs().max() < bound
    assert (plain[:, :, 15:] - fast.rows(drawn, old, 15)).abs().max() > 10 * bound
    stay = known | (torch.arange(28)[:, None] < first)
    assert torch.equal(drawn[stay], images[stay])
    assert (drawn[~stay] != images[~stay]).any()


@pytest.mark.parametrize("row", [1, 5, 14, 27])
def test_rows_below_others_equal_a_full_pass(nb, model, row):
    """In three pieces; the cache of one image serves many that are alike above. A copy of its lists is a snapshot: it
    gives the same, bit by bit, whatever goes on with the original, by rows or by pixels. The controls: alike they must
    be; the original has gone on."""
    double, images = copy.deepcopy(model).double(), random_images(3)
    images[:, :row] = images[0, :row]
    fast, full, middle = nb.FastNetwork(double), double(images), (row + 29) // 2
    cache, uniforms = fast.new_cache(), nb.uniform_streams(3, 784, 0, "cpu")
    assert (fast.rows(images[:1, :row], cache, 0) - full[:1, :, :row]).abs().max() < 1e-10
    kept = [[*part] for part in cache]
    pieces = [(images[:, :middle], row)] + [(images, middle)] * (middle < 28)
    found = torch.cat([fast.rows(part, cache, first) for part, first in pieces], dim=2)
    assert (found - full[:, :, row:]).abs().max() < 1e-10
    before = fast.rows(images, [[*part] for part in kept], row)
    for way in (lambda x, own: fast.rows(x[:, : row + 1], own, row),
                lambda x, own: nb.draw_row([(fast, own, None)], x, torch.zeros(3, 28) > 0, uniforms, row)):
        own = [[part[0].expand(3, -1, -1, -1), part[1].expand(3, -1)] for part in kept]
        way(255 - images, own)
        assert torch.equal(fast.rows(images, [[*part] for part in kept], row), before)
        assert (fast.rows(images, own, row) - before).abs().max() > 1e-3
    other, cache = 255 - images[:1], fast.new_cache()
    fast.rows(other[:, :row], cache, 0)
    assert (fast.rows(images, cache, row) - full[:, :, row:]).abs().max() > 1e-3


def test_sample_equals_the_naive_loop_in_any_batch(nb, tiny):
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(0, 3, (30, 3, 3), generator=generator, dtype=torch.uint8)  # must not matter
    many = nb.sample(tiny, 30, seed=9)
    assert torch.equal(many, nb.sample_naive(tiny, start, seed=9))
    assert torch.equal(many[:7], nb.sample(tiny, 7, seed=9))
    assert torch.equal(many, nb.sample(tiny, 30, seed=9, batch_size=4))


def test_sample_keeps_known_pixels_and_matches_a_naive_loop_with_them(nb, tiny):
    known = torch.tensor([[1, 0, 1], [1, 1, 1], [0, 0, 1]], dtype=torch.bool)
    image = torch.tensor([[2, 0, 1], [0, 1, 2], [0, 0, 1]], dtype=torch.uint8)
    drawn = nb.sample(tiny, 200, image=image, known=known, seed=5)
    assert (drawn[:, known] == image[known]).all()
    # One sweep of the forward conditional is that same draw, whatever the start: the common mistake.
    assert torch.equal(drawn, nb.forward_gibbs(tiny, torch.where(known, image, 1), known, 200, 1, 5))


def test_sample_stops_where_it_is_told(nb, tiny):
    full, part = nb.sample(tiny, 40, seed=2), nb.sample(tiny, 40, seed=2, stop=(1, 1))
    assert torch.equal(full.flatten(1)[:, :4], part.flatten(1)[:, :4])
    assert (part.flatten(1)[:, 4:] == 0).all()
    column = (torch.arange(3)[:, None].expand(3, 3) < 1).T  # the left one is known; not contiguous
    twos = torch.full((3, 3), 2, dtype=torch.uint8)
    part = nb.sample(tiny, 1, image=twos, known=column, stop=(1, 1))
    assert (part[0, 1:] == 2).all()


def test_sample_follows_the_model(nb, tiny, table):
    """Chi-square over all images with expectation > 5; detects a wrong distribution of about 2 % in TV."""
    images, log_probs = table
    for temperature in (1.0, 1.5):  # 1.5: negative control
        drawn = nb.sample(tiny, 20_000, seed=11, batch_size=5000, temperature=temperature)
        codes = (drawn.flatten(1).long() * 3 ** torch.arange(9)).sum(1)
        counts = torch.bincount(codes, minlength=len(images))
        assert agree(counts, 20_000 * log_probs.exp()) == (temperature == 1)


def test_counts_and_running_means_equal_their_definitions(nb, model):
    """Both summaries of the past, recomputed for one pixel from the sums in the text."""
    image, pixel = random_images(1) // 16, 300
    counts = nb.count_earlier(torch.nn.functional.one_hot(image.long(), 256))[0].flatten(0, 1)[pixel]
    assert torch.equal(counts, torch.bincount(image.flatten()[:pixel].int(), minlength=256))
    mean = copy.deepcopy(model.blocks[1].mean).double()
    h = torch.randn(1, 28, 28, model.config.channels, dtype=torch.float64)
    k, v = mean.propose(h).flatten(1, 2)[0, : pixel + 1].chunk(2, dim=-1)
    weights = torch.softmax(k.clamp(-8, 8), dim=0)
    expected = mean.out((weights * v).sum(dim=0))
    assert torch.allclose(mean(h).flatten(1, 2)[0, pixel], expected)


def test_a_network_in_half_precision_sums_in_float32(nb, model):
    """The running means under autocast: sums over 784 pixels would lose their last terms in bfloat16."""
    mean, h = model.blocks[1].mean, torch.randn(2, 28, 28, model.config.channels)
    with torch.autocast("cpu", torch.bfloat16):
        assert mean(h).dtype == torch.bfloat16
        k, v = mean.propose(h).float().chunk(2, dim=-1)
        weight = k.clamp(-8, 8).exp()
        expected = mean.out(mean.sums(weight * v) / mean.sums(weight))
        assert torch.equal(mean(h), expected)
        coarse = mean.out(mean.sums((weight * v).bfloat16()) / mean.sums(weight.bfloat16()))
        assert not torch.equal(mean(h), coarse)


def test_the_cells_that_define_the_model_are_enough_to_train_one(nb, cells):
    """Copied into a file with the imports, they train: nothing there needs a later section."""
    sources = ["".join(c["source"]) for c in cells if "define" in c["metadata"].get("tags", [])]
    first = next(k for k, source in enumerate(sources) if "class PixelCNN(nn.Module)" in source)
    place = {"__name__": "copied"}
    for source in (sources[0], *(s for s in sources[: first + 1] if "class Config" in s or "nn.Module" in s)):
        exec(source, place)
    torch.manual_seed(0)
    config = place["Config"](height=5, width=4, levels=3, embedding=4, channels=8, bottleneck=8, dilations=(1, 2))
    network = place["PixelCNN"](config)
    optimiser = torch.optim.AdamW(network.parameters(), 0.01)
    images, losses = torch.randint(0, 3, (16, 5, 1)).repeat(1, 1, 4), []
    for _ in range(30):
        losses.append(torch.nn.functional.cross_entropy(network(images), images))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < 0.7 * losses[0]
