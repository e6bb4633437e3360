"""Causality, normalisation, the agreement of one full pass with a cache and with what is drawn on it; and the guide's
network: it starts as the model, reads what is known and nothing else, and learns."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import FALSE_ALARM, either_guide, known_mask, meaningless_guide, random_images, same, strong
from scipy import stats

SIZES = [(1, 1, (1,)), (1, 5, (3, 1)), (5, 1, (1, 3)), (4, 3, (1, 7)), (6, 4, (1, 2, 5))]  # and dilations


@pytest.fixture(scope="module")
def model(nb):
    torch.manual_seed(1)
    return nb.PixelCNN(nb.Config()).eval().requires_grad_(False)


def guide_log_probs(model, guide, images, known, a=0.7, b=0.6):
    """log g of each pixel, 0 where known, by its definition: p^a q^b, normalised."""
    p, q = (F.log_softmax(x, dim=1) for x in (model(images), guide(images, context=guide.context(images, known))))
    log_g = F.log_softmax(a * p + b * q, dim=1).gather(1, images.long()[:, None])[:, 0]
    return log_g.masked_fill(known, 0)


def test_each_output_depends_on_all_pixels_before_it_and_on_no_other(nb):
    """Zeros: below 1e-9. The controls: mask B in the first layer leaks, a reversed order too, and convolutions alone
    have a blind spot, as the smallest model has (the pixel three rows up and ten columns on)."""
    thin = nb.PixelCNN(nb.Config(20, 20, 256, 4, 8, 8, mean_channels=4)).requires_grad_(False)
    image = random_images(1, 20, 20)[0]
    moved, after = nb.influence(thin, image), torch.ones(400, 400).triu(1) > 0
    assert nb.leak(moved) < 1e-9 < moved[after].min() and nb.leak(moved.T) > 1e-3
    leaky = copy.deepcopy(thin)
    leaky.first = nb.MaskedConv2d("B", 4, 8, 3, 3)
    assert nb.leak(nb.influence(leaky, image[:3])) > 1e-3
    thin.counts.matrix.weight.zero_()
    for block in thin.blocks:
        block.mean = None
    moved = nb.influence(thin, image)
    assert nb.leak(moved) < 1e-9 and moved[after].min() < 1e-9
    torch.manual_seed(0)
    moved = nb.influence(nb.SmallestPixelCNN(4), random_images(1, 14, 14, 4)[0])
    at = moved.view(14, 14, 14, 14)[:, :, 10, 2]
    assert nb.leak(moved) < 1e-9 and at[7, 12] < 1e-9 and at[9, 2] > 1e-5


def test_a_hidden_weight_is_not_used_and_gets_no_gradient(nb):
    """It would see weight * mask, which makes nan of an infinite gradient, and a mask that is written into weights."""
    layer = nb.MaskedConv2d("B", 2, 3, rows=2, reach=1)
    weight, kernel = layer.weight.detach().clone(), layer.kernel()
    kernel.backward(torch.where(layer.mask, 1.0, torch.inf).expand_as(kernel))
    assert (kernel[..., ~layer.mask] == 0).all() and torch.equal(layer.weight, weight)
    assert torch.equal(layer.weight.grad, layer.mask.float().expand_as(weight))


def test_probabilities_of_all_images_sum_to_one(table):
    """Within 1e-10; it would see any output that its own pixel or a later one moves."""
    assert abs(table[1].exp().sum().item() - 1) < 1e-10


def test_counts_and_running_means_equal_their_definitions(model):
    """Recomputed for one pixel from the sums in the text. It would see a sum that is shifted, and unclamped weights."""
    image, pixel = random_images(1) // 16, 300
    counts = torch.bincount(image.flatten()[:pixel].int(), minlength=256)
    t = model.counts(image.int()).flatten(1, 2)[0, pixel]
    assert torch.allclose(t, model.counts.matrix.weight @ torch.log1p(counts), atol=1e-5)
    mean = copy.deepcopy(model.blocks[1].mean).double()
    f = 8 * torch.randn(1, 28, 28, model.config.channels, dtype=torch.float64)
    k, v = mean.propose(f).flatten(1, 2)[0, : pixel + 1].chunk(2, dim=-1)
    assert (k > 8).any() and (k < -8).any()
    weights = torch.softmax(k.clamp(-8, 8), dim=0)
    assert torch.allclose(mean(f).flatten(1, 2)[0, pixel], mean.out((weights * v).sum(dim=0)))


@pytest.mark.parametrize("size", [None, *SIZES])
def test_a_cache_gives_what_one_pass_gives(nb, model, size):
    """By pixels, by rows, by turns, for the model and for its guide, which read the same cache, from half on with two
    of each image: within 1e-4 in float32 at full size, 1e-10 in float64; a piece read twice or left out is refused. It
    would see memory that is stale, of another place, image or network. The control: another norm is another network."""
    network, bound = (strong(nb, *size), 1e-10) if size else (copy.deepcopy(model), 1e-4)
    (height, width), images = network.size, random_images(2, *network.size, network.config.levels)
    guide, mask = meaningless_guide(nb, network), nb.uniforms(1, height, width) < 0.5
    context, row = guide.context(images, mask), torch.arange(height)[:, None].expand(height, width)
    whole = images, context, (plain := network(images)), guide(images, context=context)
    for known in (row < 0, row >= 0, (row % 3 == 0) | mask):
        cache, (seen, said, wanted, proposed) = nb.Cache(), whole
        for piece in cache.pieces(known):
            if piece[0].start == height // 2 and len(seen) == 2:
                cache.repeat(2)
                seen, said, wanted, proposed = (x.repeat_interleave(2, dim=0) for x in whole)
            assert (network(seen, cache) - wanted[:, :, *piece]).abs().max() < bound
            assert (guide(seen, cache, said) - proposed[:, :, *piece]).abs().max() < bound
            with pytest.raises(ValueError, match="^cache: expected each piece once"):
                network(seen, cache)  # once more
    with pytest.raises(TypeError):  # a guide is no model
        guide(images)
    if len([*(cache := nb.Cache()).pieces(row < 0)]) > 1:  # the last one now stands, the first was left out
        with pytest.raises(ValueError, match="^cache: expected each piece once"):
            network(images, cache)
    assert (nb.cached_logits(network, images, row >= 0) - plain).abs().max() < bound
    network.blocks[0].norm.weight[:9] *= 2
    assert (nb.cached_logits(network, images, row >= 0) - plain).abs().max() > 10 * bound


@pytest.mark.parametrize("together", [1000, 4])
def test_sample_equals_the_naive_loop_in_any_batch(nb, tiny, monkeypatch, together):
    """To the last pixel, also with known ones, which do not move what comes before them. It would see draws that depend
    on the batch. The control: another seed."""
    monkeypatch.setattr(nb, "draws_at_once", lambda model: together)
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
    variation. The control: another model, with logits divided by 1.5."""
    expected = 20_000 * table[1].exp()
    often = expected > 5
    flatter = copy.deepcopy(tiny)
    flatter.head.weight.div_(1.5)
    flatter.head.bias.div_(1.5)
    for model, right in ((tiny, True), (flatter, False)):
        drawn = nb.sample(model, 20_000, seed=11)
        off = 20_000 * nb.frequencies(drawn, torch.zeros(3, 3) > 0, 3) - expected
        square = (off**2 / expected)[often].sum()
        assert (square < stats.chi2.isf(FALSE_ALARM, int(often.sum()))) == right


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_draws_are_scored_as_one_pass_scores_them(nb, size, learned):
    """Thirty draws for an image, which part where they differ, in three masks: their log weights and log_weights within
    1e-10 of the definition, log p of all pixels - log g of the hidden ones; one number alone gives the same draw. It
    would see memory or a context that is of another draw or shared too long. The control: the scores of another draw."""
    model, (height, width, _) = strong(nb, *size), size
    guide, numbers = either_guide(nb, model, learned), nb.uniforms(0, 30, height, width)
    masks = nb.uniforms(1, 3, height, width) < 0.4
    masks[1, 1::2] = masks[2, 1:] = True  # rows that are read at once; nothing is drawn from the second on
    masks[:, 0, 0] = False
    for image, known in zip(random_images(3, height, width, 3), masks):
        draws, log_w = nb.draw(model, image, known, numbers, guide)
        alone = [nb.draw(model, image, known, number, guide) for number in numbers.split(1)]
        draws_alone, log_w_alone = map(torch.cat, zip(*alone))
        assert torch.equal(draws, draws_alone) and (draws != draws[:1]).any()
        assert (draws == image)[:, known].all()
        for scored, right in ((draws, True), ((draws + 1) % 3, False)):
            log_g = (guide_log_probs(model, guide, scored, known) if learned
                     else nb.pixel_log_probs(model, scored).masked_fill(known, 0)).sum(dim=(1, 2))
            expected = nb.log_prob(model, scored) - log_g
            assert (nb.log_weights(model, scored, known, guide) - expected).abs().max() < 1e-10
            off = [(x - expected).abs().max() for x in (log_w, log_w_alone)]
            if right or learned or known.any():  # else all log weights are 0
                assert max(off) < 1e-10 if right else min(off) > 1e-3


def test_a_guide_starts_as_the_model_it_is_made_for(nb, tiny, table):
    """log g = log p within 1e-12 where hidden, 0 where known; its loss is the mean over all pixels, each image with its
    own mask. It would see weights that are not taken over, and powers that are not 1/2. The control: a context that
    says something."""
    images, guide = table[0][::500], nb.starting_guide(tiny, (1,)).requires_grad_(False)
    known = nb.uniforms(0, *images.shape) < 0.5
    for weight in (0.0, 0.1):
        guide.encoder.out.weight.add_(weight)
        log_g = guide_log_probs(tiny, guide, images, known, 0.5, 0.5)
        assert abs(nb.guide_loss(tiny, guide, images, known) + log_g.mean()) < 1e-12
        off = (log_g - nb.pixel_log_probs(tiny, images).masked_fill(known, 0)).abs().max()
        assert off > 1e-3 if weight else off < 1e-12


@pytest.mark.parametrize("hidden", [(0, 1, 4, 6), (3, 5, 8)])
def test_the_context_says_what_is_known_and_nothing_else(nb, tiny, evidence, hidden):
    """One pixel after the other gets another level: a hidden one never matters to the context, a known one always does;
    and whether it is known matters. A pixel's context moves its own logits and no earlier ones. It would see a guide
    that reads what it is to propose, or that has one context for all pixels."""
    one, known = torch.eye(9).view(9, 3, 3) == 1, known_mask(*hidden)
    guide = meaningless_guide(nb, tiny)
    context = guide.context
    for image in evidence:
        changed = torch.where(one, (image + 1) % 3, image)
        for images, masks, matters in ((changed, known, known.flatten()), (image.expand(9, 3, 3), known ^ one, True)):
            moved = (context(images, masks) - context(image[None], known)).abs().amax(dim=(1, 2, 3))
            assert ((moved > 1e-9) == matters).all()  # rounding
        said = torch.stack([context(image[None], known)[0]] * 10) + torch.eye(10, 9).view(10, 3, 3, 1)
        moved = guide(image.expand(10, 3, 3), context=said)
        moved = (moved - moved[9]).abs().amax(dim=1).flatten(1)[:9]
        assert moved.tril(-1).max() < 1e-9 < 1e-3 < moved.diagonal().min()


def test_random_masks_depend_on_the_seed_alone_hide_something_and_come_in_quarters(nb):
    """In any size. Of 2,000 the share of each kind (G's top, D's past with its pixel, rectangles, single pixels) is
    within 0.045 of a quarter, and any number of single pixels is as likely. It would see a kind left out, and a guide
    that is trained on the same masks at each step, or on few pixels alone."""
    for height, width in ((28, 28), (2, 5), (1, 1)):
        masks = nb.random_masks(300, height, width, 7)
        assert masks.shape == (300, height, width) and (~masks).flatten(1).any(dim=1).all()
        assert torch.equal(masks, nb.random_masks(300, height, width, 7))
    hidden, place = ~nb.random_masks(2000, 28, 28, 0), torch.arange(784).view(28, 28)
    assert not torch.equal(hidden, ~nb.random_masks(2000, 28, 28, 8))
    top, past = ((hidden == kind).flatten(1).all(dim=1) for kind in (place < 392, place <= 406))
    box = hidden.any(dim=2)[:, :, None] & hidden.any(dim=1)[:, None]
    rectangle = (hidden == box).flatten(1).all(dim=1) & ~top
    single = ~(top | past | rectangle)
    shares = torch.stack([top, past, rectangle, single]).double().mean(dim=1)
    assert (shares - 1 / 4).abs().max() < 0.045, shares
    assert stats.kstest(hidden[single].flatten(1).double().mean(dim=1).numpy(), "uniform").pvalue > FALSE_ALARM
    assert (hidden[single].double().mean(dim=0) - 0.5).abs().max() < 0.15
    assert hidden[rectangle].any(dim=0)[1:-1, 1:-1].all() and not hidden[rectangle].all(dim=0).any()


def test_fresh_batches_are_half_draws_each_seen_in_one_step_and_half_digits(nb, config, images):
    """A function of the step, in whatever order it is asked; the draws are those of `sample`, portion by portion. It
    would see draws that come twice (they are memorised), and a resumed training that sees others."""
    torch.manual_seed(0)
    model = nb.PixelCNN(config).eval()  # nearly uniform: no image comes twice
    recipe = nb.Recipe(640, warmup=160, decay=160, batch_size=16)
    batch_of, again = (nb.fresh_batches(model, images, recipe, steps=3) for _ in range(2))
    batches, masks = map(torch.stack, zip(*map(batch_of, range(7))))
    draws, digits = (x.flatten(0, 1) for x in batches.chunk(2, dim=1))
    assert batches.shape == (7, 16, 5, 4) and len(draws.unique(dim=0)) == 7 * 8
    assert torch.equal(masks, torch.stack([nb.random_masks(16, 5, 4, step) for step in range(7)]))
    assert torch.equal(digits[24:48], nb.batch_at(images, replace(recipe, batch_size=24), 1))
    for step in (5, 0, 6, 4):
        assert all(map(torch.equal, again(step), (batches[step], masks[step])))
    assert torch.equal(draws[24:48], nb.sample(model, 24, seed=10**6 + 1))


def test_training_teaches_a_guide_the_evidence(nb, tiny, table, evidence, tmp_path):
    """KL(posterior || g) of the 3x3 model after 100 steps is below half the model's, with which it starts: it would see
    a context that is not learned. The loss, -log g of the hidden pixels as a mean over all, falls; the checkpoint is
    read."""
    model, known = copy.deepcopy(tiny).float(), known_mask(0, 1, 2)
    images, path, loss = nb.sample(tiny, 2000, seed=2), tmp_path / "guide.pt", partial(nb.guide_loss, model)
    recipe = nb.Recipe(6400, warmup=320, decay=1600, batch_size=64, ema_decay=0.9, validate_every=100)
    start, validation = nb.starting_guide(model, (1, 2)), (images[:500], nb.random_masks(500, 3, 3, 0))
    before = nb.score(start, loss, validation)
    batches = nb.fresh_batches(model, images, recipe, steps=50)
    trained = nb.train(copy.deepcopy(start), loss, batches, validation, recipe, path)
    assert trained.history[-1]["validation_bits"] < 0.95 * before
    divergence = torch.zeros(2)
    for image in evidence:
        support, posterior, _ = nb.exact_posterior(*table, image, known)
        log_p = nb.log_prob(model, support)
        log_g = log_p - torch.stack([nb.log_weights(model, support, known, guide) for guide in (start, trained)])
        divergence += (posterior * (posterior.log() - log_g)).sum(dim=1)
    assert divergence[1] < 0.5 * divergence[0]
    assert same(nb.load_checkpoint(path, "cpu", nb.GuideNetwork), trained)
