"""Causality, normalisation, and the agreement of full, cached and suffix evaluation."""

import copy
from dataclasses import replace

import pytest
import torch
from bounds import agree
from surprise import surprise_z


@pytest.fixture(scope="module")
def model(nb):
    torch.manual_seed(1)
    return nb.PixelCNN(nb.Config()).eval().requires_grad_(False)


def random_images(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 28, 28), generator=generator, dtype=torch.uint8)


def test_no_output_depends_on_its_own_pixel_or_a_later_one(nb, model):
    assert nb.leaked_difference(model, random_images(10)) == 0


def test_the_causality_test_rejects_mask_b_in_the_first_layer(nb):
    leaky = nb.PixelCNN(replace(nb.Config(), first_mask="B"))
    assert nb.leaked_difference(leaky, random_images(3)) > 0


@pytest.mark.parametrize("pixel", [(0, 0), (0, 27), (14, 14), (27, 0), (27, 27)])
def test_the_receptive_field_is_the_whole_past(nb, model, pixel):
    field = nb.receptive_field(model, pixel).flatten()
    index = pixel[0] * 28 + pixel[1]
    assert (field[:index] > 0).all(), "blind spot"
    assert (field[index:] == 0).all(), "leak"


def test_the_mask_is_applied_in_forward_and_never_edits_the_weight(nb):
    layer = nb.MaskedConv2d("A", 3, 5, rows=3, reach=2)
    before = layer.weight.detach().clone()
    layer(torch.randn(2, 6, 6, 3)).sum().backward()
    assert torch.equal(layer.weight, before)
    hidden = layer.mask.expand(5, 3, -1, -1).flatten(1) == 0
    assert (layer.weight.grad[hidden] == 0).all() and (layer.weight[hidden] != 0).any()


def test_probabilities_of_all_images_sum_to_one(table):
    assert abs(table[1].exp().sum().item() - 1) < 1e-10


@pytest.mark.parametrize("n", [1, 3, 64])
def test_cached_logits_equal_full_logits_in_float32(nb, model, n):
    assert nb.cached_difference(model, random_images(n)) < 1e-4


def test_cached_logits_equal_full_logits_in_float64(nb, model):
    assert nb.cached_difference(copy.deepcopy(model).double(), random_images(3)) < 1e-10


@pytest.mark.parametrize("start", [0, 9 * 28 + 13])
@pytest.mark.parametrize("n, dtype, bound", [(1, torch.float32, 1e-4), (3, torch.float32, 1e-4),
                                             (64, torch.float32, 1e-4), (3, torch.float64, 1e-10)])
def test_logits_while_drawing_equal_a_full_pass_of_the_result(nb, model, n, dtype, bound, start):
    """With clamped pixels, different for each image, and whole known rows; also from mid-row on."""
    network = copy.deepcopy(model).to(dtype)
    images = random_images(n)
    known = torch.rand(n, 28, 28, generator=torch.Generator().manual_seed(1)) < 0.3
    known[:, 12:15] = True
    cache = nb.new_cache(network, n)
    network(images, cache)
    walk, asked = nb.Walk(network, images.clone(), cache), {}
    original = walk.logits
    walk.logits = lambda *pixel: asked.setdefault(pixel, original(*pixel).clone())
    nb.draw_pixels([walk], known, nb.uniform_streams(n, 784, 0, "cpu"), start, 784)
    full = network(walk.images)
    assert max((full[:, :, r, c] - logits).abs().max() for (r, c), logits in asked.items()) < bound
    assert len(asked) == 784 - start - 3 * 28
    kept = known | (torch.arange(784).view(28, 28) < start)
    assert torch.equal(walk.images[kept], images[kept])
    assert (walk.images[~kept] != images[~kept]).any()


@pytest.mark.parametrize("row", [0, 1, 5, 14, 27])
def test_suffix_evaluation_equals_a_full_pass(nb, model, row):
    double = copy.deepcopy(model).double()
    images, cache = random_images(3), nb.new_cache(double, 3)
    double(images, cache)
    images[:, row, 3] = 255 - images[:, row, 3]
    suffix = double(images, cache, row)
    assert (suffix - double(images)[:, :, row:]).abs().max() < 1e-10
    # The cache must have been brought up to date too: a later suffix reads it.
    assert (double(images, cache, 20) - double(images)[:, :, 20:]).abs().max() < 1e-10


def test_sample_equals_the_naive_loop(nb, tiny):
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(0, 3, (50, 3, 3), generator=generator, dtype=torch.uint8)  # must not matter
    assert torch.equal(nb.sample(tiny, 50, seed=3), nb.sample_naive(tiny, start, seed=3))


def test_sample_keeps_known_pixels_and_matches_a_naive_loop_with_them(nb, tiny):
    known = torch.tensor([[1, 0, 1], [1, 1, 1], [0, 0, 1]], dtype=torch.bool)
    image = torch.tensor([[2, 0, 1], [0, 1, 2], [0, 0, 1]], dtype=torch.uint8)
    drawn = nb.sample(tiny, 200, image=image, known=known, seed=5)
    assert (drawn[:, known] == image[known]).all()
    # One sweep of the forward conditional is that same draw, whatever the start: the common mistake.
    assert torch.equal(drawn, nb.forward_gibbs(tiny, 2 - image * known.byte(), known, 200, 1, 5)) is False
    start = torch.where(known, image, 1).to(torch.uint8)
    assert torch.equal(drawn, nb.forward_gibbs(tiny, start, known, 200, 1, 5))


def test_an_image_comes_out_the_same_in_any_batch(nb, tiny):
    many = nb.sample(tiny, 30, seed=9)
    assert torch.equal(many[:7], nb.sample(tiny, 7, seed=9))
    assert torch.equal(many, nb.sample(tiny, 30, seed=9, batch_size=4))


def test_sample_stops_where_it_is_told(nb, tiny):
    full, part = nb.sample(tiny, 40, seed=2), nb.sample(tiny, 40, seed=2, stop=(1, 1))
    assert torch.equal(full.flatten(1)[:, :4], part.flatten(1)[:, :4])
    assert (part.flatten(1)[:, 4:] == 0).all()


def test_sample_follows_the_model(nb, tiny, table):
    """Chi-square over all images with expectation > 5; detects a wrong distribution of about 2 % in TV."""
    images, log_probs = table
    for temperature in (1.0, 1.5):  # 1.5: negative control
        drawn = nb.sample(tiny, 20_000, seed=11, batch_size=5000, temperature=temperature)
        codes = (drawn.flatten(1).long() * 3 ** torch.arange(9)).sum(1)
        counts = torch.bincount(codes, minlength=len(images))
        assert agree(counts, 20_000 * log_probs.exp()) == (temperature == 1)


@pytest.mark.parametrize("images, word", [
    (torch.zeros(1, 28, 28), "float32"), (torch.zeros(28, 28, dtype=torch.uint8), "shape"),
    (torch.zeros(1, 27, 28, dtype=torch.uint8), "shape"), (torch.full((1, 28, 28), 300), "300"),
    (torch.full((1, 28, 28), -1), "-1"), (torch.zeros(1, 28, 28, dtype=torch.bool), "bool")])
def test_bad_images_are_refused_by_name(nb, model, images, word):
    with pytest.raises(ValueError, match=rf"images: .*{word}"):
        nb.log_prob(model, images)


def test_bad_arguments_of_sample_are_refused_by_name(nb, model):
    image, known = random_images(1)[0], torch.ones(28, 28, dtype=torch.bool)
    with pytest.raises(ValueError, match="image and known"):
        nb.sample(model, 1, image=image)
    with pytest.raises(ValueError, match="known: .*uint8"):
        nb.sample(model, 1, image=image, known=known.byte())
    with pytest.raises(ValueError, match="image: expected one or 3, got 2"):
        nb.sample(model, 3, image=image.expand(2, 28, 28), known=known)
    with pytest.raises(ValueError, match="known: expected one or 3, got 2"):
        nb.sample(model, 3, image=image, known=known.expand(2, 28, 28))
    with pytest.raises(ValueError, match="temperature"):
        nb.sample(model, 1, temperature=0)
    with pytest.raises(ValueError, match="stop"):
        nb.sample(model, 1, stop=(28, 0))
    with pytest.raises(ValueError, match="mask B"):
        nb.sample(nb.PixelCNN(replace(nb.Config(), first_mask="B")), 1)


def test_samples_are_as_surprising_as_the_model_expects(nb, tiny):
    """z of 4,000 draws; it would see a temperature of 0.9 or 3 % of the pixels moved by a level."""
    draws = nb.sample(tiny, 4000, seed=8)
    assert abs(surprise_z(nb, tiny, draws)) < 4
    assert surprise_z(nb, tiny, nb.sample(tiny, 4000, seed=8, temperature=0.9)) < -4
    moved = torch.rand(draws.shape, generator=torch.Generator().manual_seed(0)) < 0.03
    assert surprise_z(nb, tiny, torch.where(moved, (draws + 1) % 3, draws)) > 4


def test_counts_and_running_means_equal_their_definitions(model):
    """Both summaries of the past, recomputed for one pixel from the sums in the text."""
    image, pixel = random_images(1) // 16, 300
    expected = model.counts(torch.log1p(torch.bincount(image.flatten()[:pixel].int(), minlength=256).float()))
    for first_row in (0, 5):
        told = model.count_term(image, first_row).flatten(1, 2)[0, pixel - 28 * first_row]
        assert torch.allclose(told, expected, atol=1e-5) and not torch.allclose(told, 0.99 * expected, atol=1e-5)
    mean = copy.deepcopy(model.blocks[1].mean).double()
    h = torch.randn(1, 28, 28, model.config.channels, dtype=torch.float64)
    proposed = mean.propose(h)
    k, v = proposed.flatten(1, 2)[0, : pixel + 1].chunk(2, dim=-1)
    weights = torch.softmax(k.clamp(-8, 8), dim=0)
    assert torch.allclose(mean(proposed).flatten(1, 2)[0, pixel], (weights * v).sum(dim=0))


def test_without_gradients_the_same_is_computed(nb, model):
    """The block as the text has it, and multiplied out: in float64 equal up to rounding, also below a given row."""
    double, images = copy.deepcopy(model).double(), random_images(3)
    with torch.enable_grad():
        plain = double(images).detach()
    with torch.no_grad():
        assert (double(images) - plain).abs().max() < 1e-10
        cache = nb.new_cache(double, 3)
        double(images[:, :11], cache)
        assert (double(images, cache, 11) - plain[:, :, 11:]).abs().max() < 1e-10
        double.blocks[1].norm.weight[3] *= 1.01  # negative control: another norm is another network
        assert (double(images) - plain).abs().max() > 1e-6


def test_earlier_occurrences_are_counted(nb):
    levels = torch.randint(0, 4, (5, 50), generator=torch.Generator().manual_seed(0))
    expected = torch.stack([(levels[:, :i] == levels[:, i : i + 1]).sum(dim=1) for i in range(50)], dim=1)
    assert torch.equal(nb.count_earlier(levels), expected)
