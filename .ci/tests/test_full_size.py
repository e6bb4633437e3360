"""The released networks, 28x28 pixels and 256 levels: hidden pixels enumerated, Gibbs moves from exact draws."""

import copy

import pytest
import torch
from calibrate import hidden_mask, released
from conftest import MANY, guide_log_prob, t_bound

pytestmark = pytest.mark.slow
IMAGE, ROW, COLUMN = 5, 25, 11  # the last two pixels of a digit's stroke, one above the other


@pytest.fixture(scope="module")
def guide(nb):
    return released(nb)[1]


@pytest.fixture(scope="module")
def pair(nb, guide, mnist):
    """(image, mask with two neighbours hidden, log p of all 65,536 pairs of levels given the rest, log p(known)). The
    digit is moved down by three rows, so that only three have to be evaluated for each pair."""
    image = mnist[1][IMAGE].roll(3, 0)
    known = torch.ones(28, 28, dtype=torch.bool)
    known[ROW : ROW + 2, COLUMN] = False
    terms = torch.zeros(256, 256, dtype=torch.float64)
    with torch.no_grad():
        above = nb.Cache(guide.model, 1)
        for row in range(ROW):
            guide.model(image[None], above, row)
        for level in range(256):
            images, cache = image.repeat(256, 1, 1), copy.copy(above)
            images[:, ROW, COLUMN], images[:, ROW + 1, COLUMN] = level, torch.arange(256)
            for row in range(ROW, 28):
                if row == ROW + 1:
                    cache.repeat(256)
                seen = images[: 1 if row == ROW else 256]
                terms[level] += nb.gather_log_probs(guide.model(seen, cache, row), seen[:, row, None]).sum(dim=(1, 2))
    total = terms.flatten().logsumexp(0)
    before = nb.pixel_log_probs(guide.model, image[None])[0, :ROW].sum()
    return image, known, terms - total, (before + total).item()


@pytest.mark.parametrize("learned", [False, True])
def test_a_top_is_scored_as_a_plain_pass_scores_it(nb, guide, mnist, learned):
    """64 draws of 392 pixels: log p and log g within 0.001 nats. It would see memory that goes stale on the way. The
    control: the scores of another draw."""
    guide, known = guide if learned else nb.Guide(guide.model), hidden_mask("top")
    found = nb.weighted_draws(guide, mnist[1][0], known, 64)
    log_p = nb.log_prob(guide.model, found.draws)
    log_w = log_p - guide_log_prob(nb, guide, found.draws, known)
    off = torch.stack([(found.log_p - log_p).abs().max(), (found.log_w - log_w).abs().max()])
    assert off.max() < 0.001 < (found.log_p - log_p.roll(1)).abs().min()


def test_the_guides_weights_meet_an_exact_evidence(nb, guide, mnist):
    """Question F, whose log Z is a sum of the chain rule, by 512 draws of the guide: 392 hidden pixels, within 5
    standard errors. It would see a g that is not normalised, or is not what was drawn from. The control: p for p / g."""
    image, known = mnist[1][0], ~hidden_mask("top")
    exact = nb.pixel_log_probs(guide.model, image[None])[0][known].sum().item()
    found = nb.weighted_draws(guide, image, known, 512)
    assert nb.z_score(found.log_w, exact) < MANY < nb.z_score(found.log_p, exact)


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


def test_complete_meets_the_enumeration_of_one_pixel(nb, guide, mnist):
    """All 256 levels, by E: log Z within 5 standard errors, the draws within 0.15 in total variation. The controls: a
    log Z that is 0.4 nats less; the draws without their weights."""
    image, pixel = mnist[1][11], (20, 14)  # at a stroke's edge: 1.6 nats of doubt, and the guide is 0.33 off
    known = torch.ones(28, 28, dtype=torch.bool)
    known[pixel] = False
    probs = nb.conditional_given_rest(guide.model, image, pixel)
    exact = nb.log_prob(guide.model, image[None]).item() - probs[int(image[pixel])].log().item()
    answer = nb.complete(guide.model, image, known, 1, guide)
    found = answer.found
    wrong = [nb.z_score(found.log_w, log_z) for log_z in (exact, exact - 0.4)]
    shares = (found.draws[:, *pixel].bincount(weights, 256) for weights in (found.log_w.softmax(0), None))
    far = [nb.total_variation(share / share.sum(), probs) for share in shares]
    assert answer.status == "converged" and abs(answer.log_evidence - exact) < 4 * answer.log_evidence_stderr
    assert wrong[0] < MANY < wrong[1]
    assert far[0] < 0.15 < far[1]


@pytest.mark.parametrize("learned", [False, True])
def test_weighted_draws_meet_the_enumeration_of_two_pixels(nb, guide, pair, learned):
    """All 65,536 pairs: three quantities and E[Z-hat / Z] = 1, within 5 standard errors of 1,024 draws. The controls: a
    table whose log p is half as much again; weights without g."""
    image, known, log_probs, log_evidence = pair
    found = nb.weighted_draws(guide if learned else nb.Guide(guide.model), image, known, 1024, 3)
    sharper = (1.5 * log_probs).flatten().log_softmax(0).view_as(log_probs)
    wrong = [nb.z_score(log_w, log_evidence) for log_w in (found.log_w, found.log_p)]
    far = [z_of(table, found.draws, (found.log_w - log_evidence).exp()) for table in (log_probs, sharper)]
    assert wrong[0] < MANY < wrong[1]
    assert far[0] < MANY < far[1]


def test_gibbs_moves_meet_it_and_forward_gibbs_does_not(nb, guide, pair):
    """A move from exact draws must leave exact draws: pixel by pixel, by a band of two rows, by bands of one. The
    control: forward Gibbs is off by more than 5 errors."""
    image, known, log_probs, _ = pair
    generator = torch.Generator().manual_seed(1)
    codes = torch.multinomial(log_probs.exp().flatten(), 256, True, generator=generator)
    starts = image.repeat(256, 1, 1)
    starts[:, ROW, COLUMN], starts[:, ROW + 1, COLUMN] = codes // 256, codes % 256

    def right(images):
        return z_of(log_probs, images) < t_bound(len(images))

    assert right(starts)
    assert right(nb.sweep_by_pixels(guide.model, starts[::16], known, generator))
    for who, rows in ((guide, 2), (nb.Guide(guide.model), 1)):
        moved = nb.sweep_by_blocks(who, starts, known, generator, rows, 8)
        assert right(moved) and (moved != starts).any(dim=(1, 2)).double().mean() > 0.3
    assert not right(nb.sample(guide.model, 1024, image=image, known=known, seed=2))
