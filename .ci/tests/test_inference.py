"""Answers against enumeration on the 3x3 model.

Seeds are fixed. So that no result hangs on them, the statistical tests were repeated with their
seeds shifted, 20 times each, by `.ci/tools/repeat_seeds.py`; a few have other bounds and more runs since.
"""

import math

import pytest
import torch
from bounds import MANY, t_bound
from guides import known_mask
from one_pixel import one_pixel_check


def exact_pixel(nb, table, image, known, pixel):
    """p(x_pixel | known) by enumeration."""
    images, posterior, _ = nb.exact_posterior(*table, image, known)
    return torch.stack([posterior[images[:, pixel // 3, pixel % 3] == level].sum() for level in range(3)])


def test_e_equals_the_table_at_every_pixel(nb, tiny, table, evidence):
    for image in evidence:
        log_probs = nb.pixel_log_probs(tiny, image[None])[0].flatten()
        for pixel in range(9):
            answer = nb.conditional_given_rest(tiny, image, divmod(pixel, 3))
            assert (answer - exact_pixel(nb, table, image, known_mask(pixel), pixel)).abs().max() < 1e-10
            # log p(known): the factors before the pixel, and the sum over its levels of all from it on.
            log_z = log_probs[:pixel].sum() + nb.log_joint_of_levels(tiny, image, divmod(pixel, 3)).logsumexp(0)
            assert abs(log_z - nb.exact_posterior(*table, image, known_mask(pixel))[2]) < 1e-10


def test_the_table_rejects_e_with_its_future_factors_dropped(nb, tiny, table, evidence):
    """Negative control: without the factors j > i, E is C."""
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
    uniform = torch.randint(0, 3, (4000, 3, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    wrong = nb.predictive(tiny, uniform, (1, 1))
    assert ((wrong.mean(0) - exact).abs() > MANY * wrong.std(0) / 4000 ** 0.5).any()


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


def test_the_forward_gibbs_is_rejected(nb, tiny, table, evidence):
    """By the table, chi-square of 20,000 over five completions. (That runs are not: test_smc.)"""
    known = known_mask(0, 1, 2)
    _, posterior, _ = nb.exact_posterior(*table, evidence[4], known)
    common = posterior > 0.01
    expected = 20_000 * posterior[common]
    wrong = nb.frequencies(nb.forward_gibbs(tiny, evidence[4], known, 20_000, seed=1), known, 3)
    assert common.sum() == 5 and ((20_000 * wrong[common] - expected) ** 2 / expected).sum() > 1000


def test_d_agrees_with_the_table_within_its_error(nb, tiny, table, evidence):
    """Detects 5.6 standard errors of 60 runs; the control is C, which knows the other side."""
    exact = exact_pixel(nb, table, evidence[1], torch.arange(9).view(3, 3) > 4, 4)
    estimate = nb.conditional_given_future(tiny, evidence[1], (1, 1), nb.Budget(runs=60), seed=2)
    assert estimate.status == "converged" and estimate.diagnostics["means"].shape == (60, 3)
    assert ((estimate.probs - exact).abs() < t_bound(60) * estimate.stderr + 1e-6).all()
    past = nb.conditional_given_past(tiny, evidence[1], (1, 1))  # negative control
    assert ((past - exact).abs() > t_bound(60) * estimate.stderr + 1e-6).any()


def test_d_at_the_first_and_last_pixel_needs_no_runs(nb, tiny, evidence):
    first = nb.conditional_given_future(tiny, evidence[0], (0, 0))
    assert first.status == "exact" and torch.equal(first.probs, nb.conditional_given_rest(tiny, evidence[0], (0, 0)))
    last = nb.conditional_given_future(tiny, evidence[0], (2, 2), seed=1)
    assert torch.equal(last.probs, nb.marginal(tiny, (2, 2), seed=1).probs)


def test_draws_and_evidence_of_complete_agree_with_the_table(nb, tiny, table, evidence):
    """Detects 5 % in total variation of the draws; the control repeats a single draw."""
    known = known_mask(0, 1, 2)
    _, posterior, exact = nb.exact_posterior(*table, evidence[1], known)
    completion = nb.complete(tiny, evidence[1], known, 3000, nb.Budget(300, 20), seed=3)
    assert completion.status == "converged" and completion.effective_draws <= 3000
    assert abs(completion.log_evidence - exact) < t_bound(20) * completion.log_evidence_stderr

    def distance(draws):
        return 0.5 * (nb.frequencies(draws, known, 3) - posterior).abs().sum()

    assert distance(completion.draws) < 0.05
    assert distance(completion.draws[:1]) > 0.05
    few = [nb.complete(tiny, evidence[1], known, 2, nb.Budget(60), seed=s).draws for s in range(40)]
    assert distance(torch.cat(few)) < 0.25


def same_answer(one, other):
    return (torch.equal(one.draws, other.draws) and one.status == other.status
            and abs(one.log_evidence - other.log_evidence) < 1e-12)


@pytest.mark.parametrize("hidden, status", [((0, 1, 2), "converged"), ((5, 6, 7, 8), "exact"), ((0, 4), "converged")])
def test_a_batch_is_answered_as_its_images_one_by_one(nb, tiny, table, evidence, hidden, status):
    """One of the masks is a prefix's. Image k as alone with seed + k (the control: with the same seed), each answer
    within its error of the table, in the order asked for."""
    known = known_mask(*hidden)
    together = nb.complete(tiny, evidence[:4], known, 6, seed=9)
    for number, (image, answer) in enumerate(zip(evidence, together)):
        exact = nb.exact_posterior(*table, image, known)[2]
        assert answer.status == status
        assert (answer.draws[:, known] == image[known]).all() and answer.draws.shape == (6, 3, 3)
        assert abs(answer.log_evidence - exact) < t_bound(8) * (answer.log_evidence_stderr or 1e-9)
        assert same_answer(answer, nb.complete(tiny, image, known, 6, seed=9 + number))
    assert not same_answer(together[2], nb.complete(tiny, evidence[2], known, 6, seed=9))


def test_images_that_passed_are_left_out_of_the_rounds(nb, tiny, evidence):
    """Each as alone, to the last bit of the draws, 1e-12 of the weights; some need more rounds than others."""
    known, guide, seeds, budget = known_mask(0, 1, 2), nb.Guide(tiny), [7, 8, 9, 10, 11, 12], nb.Budget(5, rounds=3)

    def rounds(images, seeds):
        found = [None] * len(images)
        nb.run_rounds(guide, images, known, seeds, budget, nb.tqdm(range(3), disable=True), found)
        return found

    together = rounds(evidence, seeds)
    assert len({found.rounds for found in together}) > 1
    for image, seed, found in zip(evidence, seeds, together):
        alone = rounds(image[None], [seed])[0]
        assert found.rounds == alone.rounds and torch.equal(found.draws, alone.draws)
        assert (found.log_w - alone.log_w).abs().max() < 1e-12


def found_of(nb, log_z, values, pixels=None, line=None):
    """A Found of equally weighted draws with log p = values [r, k], all blank unless pixels are given."""
    values = torch.as_tensor(values).double()
    r, k = values.shape
    return nb.Found(torch.zeros(r, k, 1, 1) if pixels is None else pixels,
                    torch.as_tensor(log_z).double()[:, None].expand(r, k), values,
                    torch.arange(k).expand(r, k) if line is None else line)


def test_no_error_is_less_than_what_the_draws_can_have_missed(nb):
    """Where all runs agree the stderr is 2 span / N, of log Z 2 / N; where they do not, the jackknife's; `most` bounds N
    from above."""
    values = torch.randn(8, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = found_of(nb, torch.zeros(8), values)
    n = found.effective_draws
    assert 20 < n <= 400
    assert found.estimate(torch.ones(8), 2.0)[1] == 2 * 2.0 / n
    assert found.estimate(torch.ones(8), 2.0, 10)[1] == 0.4
    apart = torch.arange(8.0, dtype=torch.float64)
    mean, stderr = found.estimate(apart, 7.0)
    assert mean == 3.5 and abs(stderr - apart.std() / 8**0.5) < 1e-12
    assert found.log_evidence()[1] == 2 / n  # all Z-hats are equal
    spread = found_of(nb, apart / 4, values)
    without = torch.stack([torch.cat([apart[:k], apart[k + 1 :]]).div(4).logsumexp(0) for k in range(8)])
    assert abs(spread.log_evidence()[1] - 7 * without.std() / 8**0.5) < 1e-12


def test_descendants_of_one_particle_count_as_one_lineage(nb):
    """Exact values: eight runs of 40 equal weights are 320, four siblings each 80, after a second round 160; a
    line of 21 of 40."""
    level, values = torch.zeros(8), torch.ones(8, 40)
    siblings = found_of(nb, level, values, line=(torch.arange(40) // 4).expand(8, 40))
    assert abs(found_of(nb, level, values).lineages - 320) < 1e-9
    assert abs(siblings.lineages - 80) < 1e-9 and abs(siblings.joined(siblings).lineages - 160) < 1e-9
    one = found_of(nb, torch.zeros(1), torch.ones(1, 40), line=torch.arange(40).clamp(min=20)[None])
    assert abs(one.lineages - 1 / ((21 / 40) ** 2 + 19 / 1600)) < 1e-9


def test_interrupted_it_returns_what_it_has(nb, tiny, evidence, monkeypatch):
    """In the second round; of a batch, None for what was not begun, and what had passed stays; before anything is
    found, the interrupt itself."""
    known, real, calls = known_mask(0, 1, 2), nb.smc, []

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(nb, "smc", interrupted)
    monkeypatch.setattr(nb, "MIN_RUNS", 9)  # it does not pass
    for images in (evidence[1], evidence[1:4]):
        calls.clear()
        answer = nb.complete(tiny, images, known, 4, nb.Budget(32))
        first, *others = answer if images.ndim == 3 else [answer]
        assert len(calls) == 2 and first.status == "not converged" and "stopped" in first.diagnostics["doubts"]
        assert (first.draws[:, known] == evidence[1][known]).all() and first.log_evidence_stderr is None
        assert others == [None] * len(others) and first.diagnostics["found"].rounds == 1
    calls[:] = [None]
    with pytest.raises(KeyboardInterrupt):
        nb.complete(tiny, evidence[1], known)
    calls.clear()
    monkeypatch.setattr(nb, "MIN_RUNS", 8)
    answered, *others = nb.complete(tiny, evidence[1:4], known, 4)
    assert answered.status == "converged" and others == [None, None]


def test_each_doubt_is_raised_by_what_it_is_for_alone(nb):
    generator = torch.Generator().manual_seed(0)
    values, level = torch.randn(8, 40, generator=generator), torch.zeros(8)
    stuck = torch.arange(8.0)[:, None].expand(8, 40)  # each run at its own value
    assert nb.doubts_about(found_of(nb, level, values)) == []
    assert nb.doubts_about(found_of(nb, level, torch.ones(8, 40))) == []  # nothing varies: known
    for changed, expected in (
            (found_of(nb, torch.linspace(-1.7, 1.7, 8), torch.ones(8, 40)), "log Z differs by sd 1.19"),
            (found_of(nb, level[:4], values[:4]), "4 runs, fewer than 8"),
            (found_of(nb, torch.tensor([2.0] + 7 * [0.0]), torch.ones(8, 40)), "the runs' weights are worth 3.4 of 8"),
            (found_of(nb, level, values, line=(torch.arange(40) // 20).expand(8, 40)), "16 effective draws"),
            (found_of(nb, level, stuck), "7 effective draws"),
            (found_of(nb, level, values, stuck[:, :, None, None]), "7 effective draws")):
        doubts = nb.doubts_about(changed)
        assert len(doubts) == 1 and expected in doubts[0], (expected, doubts)


def test_a_mode_that_some_runs_miss_is_refused(nb):
    """Half the pixels black in some draws, in none of the others: seen by the pixels, if log p and log Z agree."""
    generator = torch.Generator().manual_seed(0)
    values, shape = torch.randn(8, 40, generator=generator), torch.zeros(8, 40, 4, 4)
    everywhere, some = shape.clone(), shape.clone()
    everywhere[:, ::2, :2], everywhere[:, 1::2, 2:] = 255, 255
    some[:4, :, :2], some[4:, :, 2:] = 255, 255
    assert nb.doubts_about(found_of(nb, torch.zeros(8), values, everywhere)) == []
    found = found_of(nb, torch.zeros(8), values, some)
    assert found.worth(found.draws.flatten(2)) < nb.MIN_EFFECTIVE <= min(found.worth(found.log_p), found.lineages)
    (doubt,) = nb.doubts_about(found)
    assert "effective draws" in doubt


def test_the_jackknife_of_a_plain_mean_is_its_standard_error(nb):
    """And joined rounds weigh by Z-hat: exact values."""
    means = torch.randn(8, generator=torch.Generator().manual_seed(0)).double()
    found = found_of(nb, torch.zeros(8), means[:, None].expand(8, 3))
    mean, stderr = found.over(means)
    assert abs(mean - means.mean()) < 1e-12 and abs(stderr - means.std() / 8**0.5) < 1e-12
    joined = found.joined(found_of(nb, math.log(3) * torch.ones(8).double(), torch.ones(8, 3)))
    assert joined.rounds == 2 and (joined.log_z - math.log(2)).abs().max() < 1e-12
    assert (joined.within(joined.log_p) - (means + 3) / 4).abs().max() < 1e-12


@pytest.mark.parametrize("runs, t", [(20, 2.09), (4, 3.18)])
def test_intervals_cover(nb, tiny, table, runs, t):
    """95 % intervals (t with runs - 1 degrees) of p(known) for 80 images, from runs of eight: 66 to 80 must cover.

    Detects a true coverage below 0.66 in all but one of a thousand cases; the control's are 0.35 times as wide.
    """
    known, covered, narrow = known_mask(0, 1, 4), 0, 0
    for seed in range(80):
        image = nb.sample(tiny, 1, seed=1000 + seed)[0]
        told = nb.Guide(tiny).told(image[None], known[None])[torch.zeros(runs, dtype=torch.long)]
        found = nb.smc(told, image.expand(runs, -1, -1), 8, range(100 * seed, 100 * seed + runs))
        ratio = (found.log_z - nb.exact_posterior(*table, image, known)[2]).exp()
        off, stderr = abs(ratio.mean() - 1), ratio.std() / runs**0.5
        covered, narrow = covered + int(off < t * stderr), narrow + int(off < 0.35 * t * stderr)
    assert covered >= 66 > narrow, (covered, narrow)


def test_one_hidden_pixel_of_a_larger_model(nb):
    """12x12 pixels, 16 levels, float32, all dilations: log Z within 8.4 standard errors of the exact one."""
    torch.manual_seed(3)
    model = nb.PixelCNN(nb.Config(height=12, width=12, levels=16, channels=32, bottleneck=16))
    with torch.no_grad():
        model.head.weight.mul_(8)
    model.eval().requires_grad_(False)
    image = nb.sample(model, 1, seed=2)[0]
    exact, completion, distance = one_pixel_check(nb, model, image, (5, 6), nb.Budget(200, 16))
    assert completion.status == "converged"
    assert abs(completion.log_evidence - exact) < t_bound(16) * completion.log_evidence_stderr + 1e-3
    assert distance < 0.1


def test_special_masks_are_exact(nb, tiny, table, evidence):
    image = evidence[2]
    whole = nb.complete(tiny, image, known_mask(), 3)
    assert whole.status == "exact" and (whole.draws == image).all()
    assert abs(whole.log_evidence - nb.log_prob(tiny, image[None]).item()) < 1e-10
    nothing = nb.complete(tiny, image, torch.zeros(3, 3, dtype=torch.bool), 5, seed=4)
    assert nothing.log_evidence == 0 and torch.equal(nothing.draws, nb.sample(tiny, 5, seed=4))
    prefix = torch.arange(9).view(3, 3) < 5
    half = nb.complete(tiny, image, prefix, 5)
    assert half.status == "exact"
    assert abs(half.log_evidence - nb.exact_posterior(*table, image, prefix)[2]) < 1e-10


def test_completion_keeps_the_known_pixels_and_ignores_the_others(nb, tiny, evidence):
    known = known_mask(1, 4)
    other = torch.where(known, evidence[0], 2 - evidence[0])
    budget = nb.Budget(8, 2, 1)
    first, second = (nb.complete(tiny, x, known, 6, budget, seed=1) for x in (evidence[0], other))
    assert (first.draws[:, known] == evidence[0][known]).all()
    assert torch.equal(first.draws, second.draws) and first.log_evidence == second.log_evidence


def test_a_budget_is_spent_only_where_it_may_help(nb, tiny, evidence, monkeypatch):
    """The sd of log Z may fall like one over the root of the rounds, and lineages grow like them; no faster."""
    def rounds(budget=4, **limits):
        with monkeypatch.context() as changed:
            for name, limit in limits.items():
                changed.setattr(nb, name, limit)
            answer = nb.complete(tiny, evidence[1], known_mask(0, 1, 2), 2, nb.Budget(10, rounds=budget))
            found = answer.diagnostics["found"]
            return found.rounds, found.log_z.std().item(), found.lineages

    (one, sd, _), (all_four, _, lineages) = rounds(), rounds(MIN_RUNS=9)
    assert one == 1 and all_four == 4  # it passes at once; what more rounds may cure or not, as nine runs, is tried
    assert rounds(MIN_RUNS=9, MAX_SD=0.49 * sd)[0] == 1 < rounds(16, MIN_RUNS=9, MAX_SD=0.49 * sd)[0]
    assert rounds(MIN_EFFECTIVE=4 * lineages)[0] < 4


def test_runs_that_disagree_are_not_converged_and_have_no_error_bar(nb, tiny, evidence, monkeypatch):
    monkeypatch.setattr(nb, "MAX_SD", 0.0)
    completion = nb.complete(tiny, evidence[1], known_mask(0, 1, 2), 2, nb.Budget(10))
    assert completion.status == "not converged" and completion.log_evidence_stderr is None
    assert completion.diagnostics["found"].rounds == 1  # more cannot help
    assert any("log Z" in doubt for doubt in completion.diagnostics["doubts"])
    estimate = nb.conditional_given_future(tiny, evidence[1], (1, 1), nb.Budget(10))
    assert estimate.status == "not converged" and estimate.stderr is None


def test_evidence_that_cannot_be_is_said_to_be_so_and_spoils_nothing(nb, evidence):
    """A level of probability 0 among the known pixels, above, between and below the hidden ones: an error, in a batch a
    remark; the other images are answered as alone."""
    model = nb.tiny_model()
    model.head.bias[2] = -math.inf
    images = evidence[:3].clamp(max=1)
    for unknown in ((0, 1, 2), (0, 1, 2, 3, 4, 5), (0, 3, 6, 7)):
        known, wrong = known_mask(*unknown), images.clone()
        wrong[1, 2, 2] = 2
        with pytest.raises(ValueError, match="impossible evidence"):
            nb.complete(model, wrong[1], known)
        answers = nb.complete(model, wrong, known, 4, seed=3)
        assert answers[1].status == "not converged" and "impossible evidence" in answers[1].remarks
        assert answers[1].log_evidence == -math.inf and answers[1].log_evidence_stderr is None
        for k in (0, 2):
            assert "impossible evidence" not in answers[k].remarks
            assert same_answer(answers[k], nb.complete(model, images[k], known, 4, seed=3 + k))


def test_without_a_guide_it_says_that_one_would_do_better(nb, tiny, evidence):
    network = nb.GuideNetwork.starting_from(tiny, (1,))
    for guide, said in ((None, True), (nb.Guide(tiny, network), False)):
        answer = nb.complete(tiny, evidence[0], known_mask(0, 1, 2), 1, guide=guide)
        assert ("a guide would do better" in answer.remarks) == said


def test_bad_masks_are_refused_by_name(nb, tiny, evidence):
    for bad in (torch.ones(3, 3), torch.ones(2, 3, dtype=torch.bool), None):
        with pytest.raises(ValueError, match="known: expected a bool tensor"):
            nb.complete(tiny, evidence[0], bad)
    for images in (evidence, evidence[0]):
        with pytest.raises(ValueError, match=r"known: expected one mask for all images, got \[2, 3, 3\]"):
            nb.complete(tiny, images, known_mask(0).expand(2, 3, 3))
    with pytest.raises(ValueError, match="guide: expected one for this model"):
        nb.complete(tiny, evidence[0], known_mask(0), guide=nb.Guide(nb.tiny_model()))
    with pytest.raises(ValueError, match="pixel: expected"):
        nb.conditional_given_rest(tiny, evidence[0], (3, 0))


def test_ess_and_log_mean(nb):
    """Exact values: detects any other formula."""
    weights = torch.tensor([[0.5, 0.25, 0.25, 0.0]], dtype=torch.float64)
    assert abs(nb.ess(weights.log()).item() - 1 / (0.25 + 0.125)) < 1e-12
    assert abs(nb.log_mean(weights.log()).item() + math.log(4)) < 1e-12


def test_an_impossible_budget_is_refused(nb):
    for wrong in (dict(particles=0), dict(runs=1), dict(rounds=0)):
        with pytest.raises(ValueError, match="budget: expected"):
            nb.Budget(**wrong)
