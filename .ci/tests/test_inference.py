"""Answers against enumeration on the 3x3 model.

Seeds are fixed. So that no result hangs on them, the statistical tests were repeated with their
seeds shifted, 20 times each, by `.ci/tools/repeat_seeds.py`; a few have other bounds and more runs since.
"""

import math

import pytest
import torch
from bounds import MANY, errors_off, t_bound
from guides import known_mask


def exact_pixel(nb, table, image, known, pixel):
    """p(x_pixel | known) by enumeration."""
    images, posterior, _ = nb.exact_posterior(*table, image, known)
    return torch.stack([posterior[images[:, pixel // 3, pixel % 3] == level].sum() for level in range(3)])


def test_e_equals_the_table_at_every_pixel(nb, tiny, table, evidence):
    """The control: without the factors j > i, E is C."""
    for image in evidence:
        log_probs = nb.pixel_log_probs(tiny, image[None])[0].flatten()
        for pixel in range(9):
            answer = nb.conditional_given_rest(tiny, image, divmod(pixel, 3))
            assert (answer - exact_pixel(nb, table, image, known_mask(pixel), pixel)).abs().max() < 1e-10
            # log p(known): the factors before the pixel, and the sum over its levels of all from it on.
            log_z = log_probs[:pixel].sum() + nb.log_joint_of_levels(tiny, image, divmod(pixel, 3)).logsumexp(0)
            assert abs(log_z - nb.exact_posterior(*table, image, known_mask(pixel))[2]) < 1e-10
    wrong = nb.conditional_given_past(tiny, evidence[0], (1, 1))
    assert (wrong - exact_pixel(nb, table, evidence[0], known_mask(4), 4)).abs().max() > 1e-3


def test_a_and_c_equal_the_table(nb, tiny, table, evidence):
    nothing = torch.zeros(3, 3, dtype=torch.bool)
    first = nb.marginal(tiny, (0, 0))
    assert first.status == "exact" and first.stderr is None
    assert (first.probs - exact_pixel(nb, table, evidence[0], nothing, 0)).abs().max() < 1e-10
    past = torch.arange(9).view(3, 3) < 5
    answer = nb.conditional_given_past(tiny, evidence[1], (1, 2))
    assert (answer - exact_pixel(nb, table, evidence[1], past, 5)).abs().max() < 1e-10


def test_b_agrees_with_the_table_within_its_error(nb, tiny, table, evidence):
    """Detects a bias of 5 standard errors at n = 4000; the control uses prefixes that are not the model's."""
    exact = exact_pixel(nb, table, evidence[0], torch.zeros(3, 3, dtype=torch.bool), 4)
    estimate = nb.marginal(tiny, (1, 1), n=4000, seed=1)
    assert ((estimate.probs - exact).abs() < MANY * estimate.stderr).all()
    assert estimate.terms.shape == (4000, 3) and torch.equal(estimate.terms.mean(dim=0), estimate.probs)
    uniform = torch.randint(0, 3, (4000, 3, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    wrong = nb.predictive(tiny, uniform, (1, 1))
    assert ((wrong.mean(0) - exact).abs() > MANY * wrong.std(0) / 4000 ** 0.5).any()


@pytest.mark.parametrize("unknown", [(0, 1, 2), (0, 2, 4, 7)])
def test_weighted_draws_and_row_by_row_agree_with_the_table(nb, tiny, table, evidence, monkeypatch, unknown):
    """E[Z-hat / Z] = 1, and each completion's part of it above 0.02: detects 5 standard errors of 20,000 draws and of
    150 runs of eight. The controls: each draw with the weight of the next; rows whose draws are picked evenly."""
    known = known_mask(*unknown)
    _, posterior, log_z = nb.exact_posterior(*table, evidence[1], known)

    def largest_z(draws, shares):
        """draws [runs, n, 3, 3] with their shares of Z-hat / Z, [runs, n]."""
        runs = len(shares)
        codes = nb.completion_codes(draws.flatten(0, 1), known, 3).view(runs, -1)
        joint = torch.zeros(runs, len(posterior), dtype=torch.float64).scatter_add_(1, codes, shares)
        parts = torch.cat([(joint - posterior)[:, posterior > 0.02], joint.sum(dim=1, keepdim=True) - 1], dim=1)
        return (runs**0.5 * parts.mean(dim=0) / parts.std(dim=0)).abs().max()

    def by_rows():
        found = [nb.row_by_row(tiny, evidence[1], known, 8, seed) for seed in range(150)]
        draws, log_w = zip(*found)
        return largest_z(torch.stack(draws), (torch.tensor(log_w).double() - log_z).exp()[:, None].repeat(1, 8) / 8)

    draws, log_w = nb.weighted_draws(tiny, evidence[1], known, 20_000, seed=3)
    shares = (log_w - log_z).exp()[:, None]
    assert largest_z(draws[:, None], shares) < MANY < largest_z(draws[:, None], shares.roll(1, 0))
    assert by_rows() < t_bound(150)
    pick = nb.pick_by_weight
    monkeypatch.setattr(nb, "pick_by_weight", lambda draws, log_w, *rest: pick(draws, 0 * log_w, *rest))
    assert by_rows() > t_bound(150)


@pytest.mark.parametrize("conditional, right", [("conditional_given_rest", True), ("conditional_given_past", False)])
def test_the_matrix_of_a_gibbs_sweep_keeps_the_posterior(nb, tiny, table, evidence, monkeypatch, conditional, right):
    """pi P = pi within 1e-12, every target forced from every state; a sweep of forward conditionals is off by 1e-3."""
    known = known_mask(1, 5)
    support, posterior, _ = nb.exact_posterior(*table, evidence[1], known)
    monkeypatch.setattr(nb, "conditional_given_rest", getattr(nb, conditional))
    matrix = torch.zeros(9, 9, dtype=torch.float64)
    for row, state in enumerate(support):
        for column, target in enumerate(support):
            levels, chances = iter(target[~known]), []

            def forced(log_probs, _):
                chances.append(log_probs[0, (level := next(levels)).long()])
                return level[None]

            monkeypatch.setattr(nb, "draw_levels", forced)
            assert (nb.gibbs_sweep(tiny, state, known, torch.Generator()) == target).all()
            matrix[row, column] = sum(chances).exp()
    assert (matrix.sum(1) - 1).abs().max() < 1e-12
    change = (posterior @ matrix - posterior).abs().max()
    assert change < 1e-12 if right else change > 1e-3


def test_d_agrees_with_the_table_within_its_error(nb, tiny, table, evidence):
    """Detects 5.6 standard errors of 60 runs; the control is C, which knows the other side."""
    exact = exact_pixel(nb, table, evidence[1], torch.arange(9).view(3, 3) > 4, 4)
    estimate = nb.conditional_given_future(tiny, evidence[1], (1, 1), nb.Budget(runs=60), seed=2)
    assert estimate.status == "converged" and estimate.terms.shape == (60, 3) and estimate.doubts == []
    probs, spread = estimate.found.over(estimate.terms)
    assert torch.equal(probs, estimate.probs) and (estimate.stderr >= spread).all()
    assert ((estimate.probs - exact).abs() < t_bound(60) * spread + 1e-6).all()
    past = nb.conditional_given_past(tiny, evidence[1], (1, 1))  # negative control
    assert ((past - exact).abs() > t_bound(60) * spread + 1e-6).any()


def test_d_at_the_first_and_last_pixel_needs_no_runs(nb, tiny, evidence):
    first = nb.conditional_given_future(tiny, evidence[0], (0, 0))
    assert first.status == "exact" and torch.equal(first.probs, nb.conditional_given_rest(tiny, evidence[0], (0, 0)))
    last = nb.conditional_given_future(tiny, evidence[0], (2, 2), seed=1)
    assert torch.equal(last.probs, nb.marginal(tiny, (2, 2), seed=1).probs)


def test_draws_and_evidence_of_complete_agree_with_the_table(nb, tiny, table, evidence):
    """Detects 5 % in total variation of the draws and 5.6 standard errors of log Z. The controls: a single draw; a log Z
    that is 0.2 nats less."""
    known = known_mask(0, 1, 2)
    _, posterior, exact = nb.exact_posterior(*table, evidence[1], known)
    completion = nb.complete(tiny, evidence[1], known, 3000, nb.Budget(100, 60), seed=3)
    assert completion.status == "converged" and completion.effective_draws <= 3000
    log_z = completion.found.log_z
    assert errors_off(log_z, exact) < t_bound(60) < errors_off(log_z, exact - 0.2)

    def distance(draws):
        return 0.5 * (nb.frequencies(draws, known, 3) - posterior).abs().sum()

    assert distance(completion.draws) < 0.05
    assert distance(completion.draws[:1]) > 0.05
    few = [nb.complete(tiny, evidence[1], known, 2, nb.Budget(60), seed=s).draws for s in range(40)]
    assert distance(torch.cat(few)) < 0.25


@pytest.mark.parametrize("hidden, status", [((0, 1, 2), "converged"), ((5, 6, 7, 8), "exact"), ((0, 4), "converged")])
def test_an_answer_depends_on_the_known_pixels_and_the_seed_alone(nb, tiny, table, evidence, hidden, status):
    """One of the masks is a prefix's, where log Z is exact; else within 5.6 standard errors of the table. The control: a
    log Z that is 0.5 nats less."""
    known, image = known_mask(*hidden), evidence[1]
    other = torch.where(known, image, 2 - image)
    answer, same, later = (nb.complete(tiny, x, known, 60, nb.Budget(40, 60), seed)
                           for x, seed in ((image, 10), (other, 10), (image, 110)))
    exact = nb.exact_posterior(*table, image, known)[2]
    assert answer.status == status and (answer.draws[:, known] == image[known]).all()
    if status == "exact":
        assert abs(answer.log_evidence - exact) < 1e-9
    else:
        log_z = answer.found.log_z
        assert errors_off(log_z, exact) < t_bound(60) < errors_off(log_z, exact - 0.5)
    assert torch.equal(same.draws, answer.draws) and same.log_evidence == answer.log_evidence
    assert not torch.equal(later.draws, answer.draws)


def found_of(nb, log_z, values, pixels=None, eve=None):
    """A Found of equally weighted draws with log p = values [r, k], all blank unless pixels are given."""
    values = torch.as_tensor(values).double()
    r, k = values.shape
    return nb.Found(torch.zeros(r, k, 1, 1) if pixels is None else pixels,
                    torch.as_tensor(log_z).double()[:, None].expand(r, k), values, torch.zeros(r, k),
                    torch.arange(k).expand(r, k) if eve is None else eve)


def test_no_error_is_less_than_what_the_draws_can_have_missed(nb):
    """Where all runs agree the stderr is 2 span / N, of log Z 2 / N; where they do not, the jackknife's. N: at most 20
    effective draws; `most` bounds it from above."""
    values = torch.randn(8, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, kin = (found_of(nb, torch.zeros(8), values, eve=(torch.arange(50) // size).expand(8, 50)) for size in (1, 25))
    n = 20
    assert found.effective_draws > 20 and abs(kin.log_evidence()[1] - 2 / 16) < 1e-12
    assert found.estimate(torch.ones(8), 2.0)[1] == 2 * 2.0 / n
    assert found.estimate(torch.ones(8), 2.0, 10)[1] == 0.4
    apart = torch.arange(8.0, dtype=torch.float64)
    mean, stderr = found.estimate(apart, 7.0)
    assert mean == 3.5 and abs(stderr - apart.std() / 8**0.5) < 1e-12
    assert found.log_evidence()[1] == 2 / n  # all Z-hats are equal
    spread = found_of(nb, apart / 4, values)
    without = torch.stack([torch.cat([apart[:k], apart[k + 1 :]]).div(4).logsumexp(0) for k in range(8)])
    assert abs(spread.log_evidence()[1] - 7 * without.std() / 8**0.5) < 1e-12


def test_what_the_guide_seldom_proposes_counts_as_missed(nb):
    """Exact values. Runs of 40 expect 20, 1/2 and 1/20 proposals of a half of the posterior whose p / g is 1, 40 and 400
    times Z, and miss it with probability e to the minus that; so the error of log Z is at least 0.93 for 1/2, where it
    was 0.1. Two rounds of 20 are runs of 20."""
    for ratio, rounds, expected in ((1, 1, 20), (40, 1, 1 / 2), (400, 1, 1 / 20), (40, 2, 1 / 4)):
        found = found_of(nb, torch.zeros(8), torch.full((8, 40), math.log(ratio)))
        found.rounds = rounds
        low = -math.log1p(-math.exp(-expected))
        assert abs(found.seldom_proposed() - low) < 1e-6 and abs(found.log_evidence()[1] - max(0.1, low)) < 1e-6


def test_descendants_of_one_particle_count_as_one_lineage(nb):
    """Exact values: eight runs of 40 equal weights are 320, four siblings each 80, after a second round 160; kin of 21
    of 40."""
    level, values = torch.zeros(8), torch.ones(8, 40)
    siblings = found_of(nb, level, values, eve=(torch.arange(40) // 4).expand(8, 40))
    assert abs(found_of(nb, level, values).lineages - 320) < 1e-9
    assert abs(siblings.lineages - 80) < 1e-9 and abs(siblings.joined(siblings).lineages - 160) < 1e-9
    one = found_of(nb, torch.zeros(1), torch.ones(1, 40), eve=torch.arange(40).clamp(min=20)[None])
    assert abs(one.lineages - 1 / ((21 / 40) ** 2 + 19 / 1600)) < 1e-9


def test_each_doubt_is_raised_by_what_it_is_for_alone(nb):
    """The last: half the pixels black in the draws of some runs, in none of the others, while log p and log Z agree. In
    every second draw of each run they are no doubt."""
    generator = torch.Generator().manual_seed(0)
    values, level = torch.randn(8, 40, generator=generator), torch.zeros(8)
    stuck = torch.arange(8.0)[:, None].expand(8, 40)  # each run at its own value
    halves = torch.zeros(2, 4, 4)  # two pictures: the upper half black, the lower
    halves[0, :2], halves[1, 2:] = 255, 255
    in_each_run, in_half_of_the_runs = halves[torch.arange(40).expand(8, 40) % 2], halves[(stuck < 4).long()]
    assert nb.doubts_about(found_of(nb, level, values, in_each_run)) == []
    assert nb.doubts_about(found_of(nb, level, values)) == []
    assert nb.doubts_about(found_of(nb, level, torch.ones(8, 40))) == []  # nothing varies: known
    for changed, expected in (
            (found_of(nb, level[:4], values[:4]), "4 runs, fewer than 8"),
            (found_of(nb, level, values, eve=(torch.arange(40) // 20).expand(8, 40)), "16.0 effective draws"),
            (found_of(nb, level, stuck), "7.0 effective draws"),
            (found_of(nb, level, values, in_half_of_the_runs), "effective draws")):
        doubts = nb.doubts_about(changed)
        assert len(doubts) == 1 and expected in doubts[0], (expected, doubts)


def test_the_jackknife_of_a_plain_mean_is_its_standard_error(nb):
    """And joined rounds weigh by Z-hat: exact values."""
    means = torch.randn(8, generator=torch.Generator().manual_seed(0)).double()
    found = found_of(nb, torch.zeros(8), means[:, None].expand(8, 3))
    mean, stderr = found.over(means)
    assert abs(mean - means.mean()) < 1e-12 and abs(stderr - means.std() / 8**0.5) < 1e-12
    joined = found.joined(found_of(nb, math.log(3) * torch.ones(8).double(), torch.ones(8, 3)))
    assert joined.rounds == 2 and (joined.log_z - math.log(2)).abs().max() < 1e-12
    assert (joined.within(joined.log_p) - (means + 3) / 4).abs().max() < 1e-12


def test_special_masks_are_exact(nb, tiny, evidence):
    image = evidence[2]
    whole = nb.complete(tiny, image, known_mask(), 3)
    assert whole.status == "exact" and (whole.draws == image).all()
    assert abs(whole.log_evidence - nb.log_prob(tiny, image[None]).item()) < 1e-10
    nothing = nb.complete(tiny, image, torch.zeros(3, 3, dtype=torch.bool), 5, seed=4)
    assert nothing.log_evidence == 0 and torch.equal(nothing.draws, nb.sample(tiny, 5, seed=4))


def test_rounds_decide_and_as_many_fresh_ones_answer(nb, tiny, evidence, monkeypatch):
    """Half of the budget may decide. A larger budget begins with the same rounds; what passes at once is answered by the
    second round, which the verdict has not seen. Lineages grow like the rounds, no faster: else it ends."""
    def answer(most=8, **limits):
        with monkeypatch.context() as changed:
            for name, limit in limits.items():
                changed.setattr(nb, name, limit)
            return nb.complete(tiny, evidence[1], known_mask(0, 1, 2), 2, nb.Budget(10, rounds=most))

    given, refused = answer(), answer(MIN_RUNS=9)
    assert given.status == "converged" and given.found.rounds == 1
    assert refused.status == "not converged" and refused.found.rounds == 4
    for name in ("draws", "log_w", "log_p", "log_g"):
        assert torch.equal(getattr(refused.found, name)[:, 10:20], getattr(given.found, name))
        assert torch.equal(getattr(refused.found, name)[:, :20], getattr(answer(4, MIN_RUNS=9).found, name))
    first = nb.Found(**{name: x[:, :10] for name, x in vars(refused.found).items() if name != "rounds"})
    later = answer(MIN_EFFECTIVE=first.effective_draws + 1)
    assert later.status == "converged" and later.found.rounds == 2
    assert torch.equal(later.found.draws, refused.found.draws[:, 20:40])
    assert answer(MIN_EFFECTIVE=4 * refused.found.lineages).found.rounds < 4


def test_what_is_not_converged_has_no_error_bar(nb, tiny, evidence, monkeypatch):
    monkeypatch.setattr(nb, "MIN_EFFECTIVE", 10**6)
    completion = nb.complete(tiny, evidence[1], known_mask(0, 1, 2), 2, nb.Budget(10))
    estimate = nb.conditional_given_future(tiny, evidence[1], (1, 1), nb.Budget(10))
    for answer, stderr in ((completion, completion.log_evidence_stderr), (estimate, estimate.stderr)):
        assert answer.status == "not converged" and stderr is None and answer.found.rounds == 1  # more cannot help
        assert any("effective draws" in doubt for doubt in answer.doubts)


@pytest.mark.parametrize("unknown", [(0, 1, 2), (0, 1, 2, 3, 4, 5), (0, 3, 6, 7), (6, 7), (8,)])
def test_evidence_that_cannot_be_is_said_to_be_so(nb, evidence, unknown):
    """A level of probability 0 at any one of the known pixels, above, between and below the hidden ones, or all before
    them; and for question E. The control: without it the image is answered."""
    model, known = nb.tiny_model(), known_mask(*unknown)
    model.head.bias[2] = -math.inf
    image = evidence[1].clamp(max=1)
    assert nb.complete(model, image, known, 4).status in ("converged", "exact")
    for row, column in known.nonzero().tolist():
        wrong = image.clone()
        wrong[row, column] = 2
        with pytest.raises(ValueError, match="impossible evidence"):
            nb.complete(model, wrong, known)
    with pytest.raises(ValueError, match="impossible evidence"):
        nb.conditional_given_rest(model, torch.full_like(image, 2), (1, 1))


def test_ess_and_log_mean(nb):
    """Exact values: detects any other formula."""
    weights = torch.tensor([[0.5, 0.25, 0.25, 0.0]], dtype=torch.float64)
    assert abs(nb.ess(weights.log()).item() - 1 / (0.25 + 0.125)) < 1e-12
    assert abs(nb.log_mean(weights.log()).item() + math.log(4)) < 1e-12
