"""The released networks, 28x28 pixels and 256 levels: hidden pixels enumerated, Gibbs moves from exact draws."""

import copy
import math

import pytest
import torch
from bounds import MANY, errors_off, t_bound
from guides import released_guide

pytestmark = pytest.mark.slow
IMAGE, ROW, COLUMN = 5, 25, 11  # the last two pixels of a digit's stroke, one above the other


@pytest.fixture(scope="module")
def model(nb, root):
    return nb.load_checkpoint(root / "checkpoints" / "small.pt", "cpu")


@pytest.fixture(scope="module")
def guide(nb, root, model):
    return released_guide(nb, root, model)


@pytest.fixture(scope="module")
def pair(nb, model, mnist):
    """(image, mask with two neighbours hidden, log p of all 65,536 pairs of levels given the rest, log p(known)).

    The digit is moved down by three rows, so that only three rows have to be evaluated for each pair.
    """
    image = mnist[2][IMAGE].roll(3, 0)
    known = torch.ones(28, 28, dtype=torch.bool)
    known[ROW : ROW + 2, COLUMN] = False
    below = image[ROW + 1 :].repeat(256, 1, 1)
    below[:, 0, COLUMN] = torch.arange(256)
    terms = torch.zeros(256, 256, dtype=torch.float64)
    with torch.no_grad():
        above = nb.Walk(model, 1)
        above.rows(image[None, :ROW], 0)
        for level in range(256):
            walk, row = copy.deepcopy(above), image[None, ROW : ROW + 1].clone()
            row[0, 0, COLUMN] = level
            terms[level] += nb.gather_log_probs(walk.rows(row, ROW), row)[0, 0, COLUMN:].sum()
            walk.repeat(256)
            terms[level] += nb.gather_log_probs(walk.rows(below, ROW + 1), below).sum(dim=(1, 2))
    total = terms.flatten().logsumexp(0)
    before = nb.pixel_log_probs(model, image[None])[0].flatten()[: ROW * 28 + COLUMN].sum()
    return image, known, terms - total, (before + total).item()


@torch.no_grad()
def surprise_z(model, images):
    """z of the surprise of images [n, height, width]: standard normal for draws of the model.

    At each pixel the model says what surprise to expect, the entropy of its forecast, and its variance. For ancestral
    draws -log p(x_i | x_<i) less that entropy has mean 0 given the past, so the terms are uncorrelated (their sums are
    a martingale).
    """
    excess = variance = 0.0
    for batch in images.split(100):
        log_probs = torch.log_softmax(model(batch).double(), dim=1)
        probs, chosen = log_probs.exp(), log_probs.gather(1, batch.long().unsqueeze(1)).squeeze(1)
        entropy = -(probs * log_probs).sum(dim=1)
        excess += (-chosen - entropy).sum().item()
        variance += ((probs * log_probs**2).sum(dim=1) - entropy**2).sum().item()
    return excess / math.sqrt(variance)


def test_samples_are_as_surprising_as_the_model_expects(nb, model):
    """z of 256 draws; the control: the last bit of 4 % of the ink flipped (as a stale memory might)."""
    draws = nb.sample(model, 256, seed=3)
    generator = torch.Generator().manual_seed(0)
    hit = (draws > 1) & (torch.rand(draws.shape, generator=generator) < 0.04)
    assert abs(surprise_z(model, draws)) < 4
    assert surprise_z(model, torch.where(hit, draws ^ 1, draws)) > 6


def test_draws_and_weights_do_not_depend_on_the_number_of_threads(nb, guide, mnist):
    """To the last bit: which number was fast must not show. (The control: another seed.)"""
    row, before, found = torch.arange(28)[:, None].expand(28, 28), torch.get_num_threads(), []
    known = (row < 8) | (row >= 11)  # what is hidden has ink
    try:
        for threads, seed in ((1, 0), (2, 0), (1, 1)):
            torch.set_num_threads(threads)
            found.append(nb.weighted_draws(guide, mnist[2][0], known, 128, seed))
    finally:
        torch.set_num_threads(before)
    one, two, other = found
    for name in ("draws", "log_w", "log_p"):
        assert torch.equal(getattr(one, name), getattr(two, name))
        assert not torch.equal(getattr(one, name), getattr(other, name))


def z_of(log_probs, draws, weights=None):
    """Largest |z| over log p of the pair and its two levels, for draws uint8 [n, h, w]; their weights [n], of mean 1,
    are equal if not given.

    The exact distribution turns each value into a number that is uniform for right draws (probability of less, and a
    random part of that of equal). So the means cannot hang on levels too rare to be drawn.
    """
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


def test_complete_meets_the_enumeration_of_one_pixel(nb, model, guide, mnist):
    """All 256 levels, by E: log Z within 5 standard errors, the draws within 0.15 in total variation. The controls: a
    log Z that is 0.4 nats less; the draws without their weights."""
    image, pixel = mnist[2][3], (14, 18)  # at the edge of the stroke: 1.6 nats of doubt
    known = torch.ones(28, 28, dtype=torch.bool)
    known[pixel] = False
    probs = nb.conditional_given_rest(model, image, pixel)
    exact = nb.log_prob(model, image[None]).item() - probs[int(image[pixel])].log().item()
    answer = nb.complete(model, image, known, 1, guide)
    found = answer.found

    def distance(log_w):
        return nb.distance_between(found.draws[:, *pixel].bincount(log_w.softmax(0), 256), probs)

    wrong = [errors_off(found.log_w, log_z).item() for log_z in (exact, exact - 0.4)]
    far = [distance(log_w) for log_w in (found.log_w, torch.zeros_like(found.log_w))]
    print("log Z off by", wrong, "errors, the draws by", far)
    assert answer.status == "converged" and abs(answer.log_evidence - exact) < 4 * answer.log_evidence_stderr
    assert wrong[0] < MANY < wrong[1]
    assert far[0] < 0.15 < far[1]


@pytest.mark.parametrize("learned", [False, True])
def test_weighted_draws_meet_the_enumeration_of_two_pixels(nb, model, guide, pair, learned):
    """All 65,536 pairs: three quantities and E[Z-hat / Z] = 1, within 5 standard errors of 1,024 draws. The controls: a
    table whose log p is half as much again; weights without g."""
    image, known, log_probs, log_evidence = pair
    found = nb.weighted_draws(guide if learned else nb.Guide(model), image, known, 1024, 3)
    sharper = (1.5 * log_probs).flatten().log_softmax(0).view_as(log_probs)
    wrong = [errors_off(log_w, log_evidence).item() for log_w in (found.log_w, found.log_p)]
    far = [z_of(table, found.draws, (found.log_w - log_evidence).exp()) for table in (log_probs, sharper)]
    print("log Z off by", wrong, "errors, the draws by", far, "effective", nb.ess(found.log_w))
    assert wrong[0] < MANY < wrong[1]
    assert far[0] < MANY < far[1]


def test_gibbs_moves_meet_it_and_forward_gibbs_does_not(nb, model, guide, pair):
    """A move from exact draws must leave exact draws: pixel by pixel, by a band of two rows, by bands of one. The
    control: forward Gibbs is off by more than 5 errors."""
    image, known, log_probs, _ = pair
    generator = torch.Generator().manual_seed(1)
    codes = torch.multinomial(log_probs.exp().flatten(), 256, True, generator=generator)
    starts = image.repeat(256, 1, 1)
    starts[:, ROW, COLUMN], starts[:, ROW + 1, COLUMN] = codes // 256, codes % 256

    def right(images):
        z = z_of(log_probs, images)
        print(len(images), "draws:", z)
        return z < t_bound(len(images))

    assert right(starts)
    assert right(torch.stack([nb.gibbs_sweep(model, start, known, generator) for start in starts[::16]]))
    for who, rows in ((guide, 2), (nb.Guide(model), 1)):
        moved = nb.gibbs_sweep_by_bands(who, starts, known, 5, rows)
        assert right(moved) and (moved != starts).any(dim=(1, 2)).double().mean() > 0.3
    assert not right(nb.sample(model, 1024, image=image, known=known, seed=2))
