"""The released networks, 28x28 pixels and 256 levels: hidden pixels enumerated, Gibbs moves from exact draws."""

import pytest
import torch
from calibrate import known_mask, released
from conftest import MANY, t_bound

pytestmark = pytest.mark.slow
ROW, COLUMN = 26, 25  # of two pixels at the foot of a digit, one above the other


@pytest.fixture(scope="module")
def networks(nb):
    return released(nb)


@pytest.fixture(scope="module")
def pair(nb, networks, mnist):
    """(image, mask with two neighbours hidden, log p of all 65,536 pairs of levels given the rest, log p(known)). The
    digit is moved into the lower right corner, so that for each pair three pixels have to be evaluated."""
    model, image, levels = networks[0], mnist[1][7].roll((2, 4), (0, 1)), torch.arange(256)
    known = torch.ones(28, 28, dtype=torch.bool)
    known[ROW:, COLUMN] = False
    found = []
    for upper in levels.split(16):
        images, cache, log_p = image[None], nb.Cache(), torch.zeros(1, dtype=torch.float64)
        for rows, columns in cache.pieces(known):
            new = {(ROW, COLUMN): upper, (ROW + 1, COLUMN): levels}.get((rows.start, columns.start))
            if new is not None:
                images, log_p = (x.repeat_interleave(len(new), dim=0) for x in (images, log_p))
                images[:, rows, columns] = new.repeat(len(images) // len(new)).view(-1, 1, 1)
                cache.repeat(len(new))
            with torch.no_grad():
                logits = model(images, cache)
            log_p = log_p + nb.gather_log_probs(logits, images[:, rows, columns]).sum(dim=(1, 2))
        found.append(log_p)
    log_p = torch.cat(found).view(256, 256)
    one, two = image[ROW:, COLUMN].tolist()
    assert abs(log_p[one, two] - nb.log_prob(model, image[None])) < 0.001
    total = log_p.flatten().logsumexp(0)
    return image, known, log_p - total, total.item()


@pytest.mark.parametrize("learned", [False, True])
def test_a_top_is_scored_as_a_plain_pass_scores_it(nb, networks, mnist, learned):
    """64 draws of 392 pixels: log w within 0.001 nats. It would see memory that goes stale on the way. The control: the
    scores of another draw."""
    (model, guide), known = networks, known_mask("top")
    guide = guide if learned else None
    found = nb.complete(model, mnist[1][0], known, 64, guide)
    log_w = nb.log_weights(model, found.draws, known, guide)
    assert (found.log_w - log_w).abs().max() < 0.001 < (found.log_w - log_w.roll(1)).abs().min()


def test_the_guides_weights_meet_an_exact_evidence(nb, networks, mnist):
    """Question F, whose log Z is a sum of the chain rule, by 512 draws of the guide: 392 hidden pixels, within 5
    errors. It would see a g that is not normalised, or is not what was drawn from. The control: p in place of p / g."""
    (model, guide), image, known = networks, mnist[1][0], ~known_mask("top")
    exact = nb.pixel_log_probs(model, image[None])[0][known].sum().item()
    draws, log_w = nb.draw_many(model, image, known, 512, 0, guide)
    assert nb.z_score((log_w - exact).exp(), 1) < MANY < nb.z_score((nb.log_prob(model, draws) - exact).exp(), 1)


def z_of(log_probs, draws, weights=None):
    """Largest |z| over log p of the pair and its two levels, for draws [n, h, w] and their weights [n], of mean 1. Each
    value becomes a number that is uniform for right draws, so that no mean hangs on levels too rare to be drawn."""
    probs, generator = log_probs.exp(), torch.Generator().manual_seed(9)
    one, two = draws[:, ROW, COLUMN].long(), draws[:, ROW + 1, COLUMN].long()
    weights = torch.ones(len(one), dtype=torch.float64) if weights is None else weights
    order = log_probs.flatten().argsort()
    found = []
    for share, value in ((probs.flatten()[order], order.argsort()[256 * one + two]),
                         (probs.sum(1), one), (probs.sum(0), two)):
        equal = torch.rand(value.shape, generator=generator, dtype=torch.float64) * share[value]
        means = weights * ((share.cumsum(0) - share)[value] + equal - 0.5)
        found.append(means.mean().abs() / (means.std() / len(means) ** 0.5))
    return torch.stack(found).max().item()  # nan if one is nan


def test_complete_meets_the_enumeration_of_one_pixel(nb, networks, mnist):
    """All 256 levels, by E: log Z within 4 standard errors, the draws within 0.15 in total variation. The controls: a
    log Z that is 0.4 nats less; the draws without their weights."""
    (model, guide), image, pixel = networks, mnist[1][11], (20, 14)  # at a stroke's edge; the guide is 0.33 off
    known = torch.ones(28, 28, dtype=torch.bool)
    known[pixel] = False
    probs = nb.given_rest(model, image[None], pixel)[0]
    exact = nb.log_prob(model, image[None]).item() - probs[int(image[pixel])].log().item()
    found = nb.complete(model, image, known, 1024, guide)
    wrong = [nb.z_score((found.log_w - log_z).exp(), 1) for log_z in (exact, exact - 0.4)]
    far = [nb.total_variation(found.draws[:, *pixel].bincount(w, 256) / w.sum(), probs)
           for w in (found.weights, torch.ones(1024, dtype=torch.float64))]
    value, error = found.log_z
    assert found.status == "converged" and abs(value - exact) < 4 * error
    assert wrong[0] < MANY < wrong[1]
    assert far[0] < 0.15 < far[1]


@pytest.mark.parametrize("learned", [False, True])
def test_weighted_draws_meet_the_enumeration_of_two_pixels(nb, networks, pair, learned):
    """All 65,536 pairs: three quantities and E[Z-hat / Z] = 1, within 5 standard errors of 1,024 draws. The controls: a
    table whose log p is half as much again; weights without g."""
    (model, guide), (image, known, log_probs, log_z) = networks, pair
    found = nb.complete(model, image, known, 1024, guide if learned else None, 3)
    sharper = (1.5 * log_probs).flatten().log_softmax(0).view_as(log_probs)
    wrong = [nb.z_score((log_w - log_z).exp(), 1) for log_w in (found.log_w, nb.log_prob(model, found.draws))]
    far = [z_of(table, found.draws, (found.log_w - log_z).exp()) for table in (log_probs, sharper)]
    assert wrong[0] < MANY < wrong[1]
    assert far[0] < MANY < far[1]


def test_gibbs_moves_meet_it_and_forward_gibbs_does_not(nb, networks, pair):
    """A move from exact draws must leave exact draws: pixel by pixel, and at once by the guide and by the model alone.
    The control: forward Gibbs is off by more than 5 errors."""
    (model, guide), (image, known, log_probs, _) = networks, pair
    generator = torch.Generator().manual_seed(1)
    codes = torch.multinomial(log_probs.exp().flatten(), 256, True, generator=generator)
    starts = image.repeat(256, 1, 1)
    starts[:, ROW, COLUMN], starts[:, ROW + 1, COLUMN] = codes // 256, codes % 256

    def right(images):
        return z_of(log_probs, images) < t_bound(len(images))

    assert right(starts)
    assert right(nb.sweep_by_pixels(model, known, starts[::16], generator))
    for who in (guide, None):
        moved = nb.sweep_at_once(model, who, known, starts, generator, 8)
        assert right(moved) and (moved != starts).any(dim=(1, 2)).double().mean() > 0.3
    assert not right(nb.sample(model, 1024, image=image, known=known, seed=2))
