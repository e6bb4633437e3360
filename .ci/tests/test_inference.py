"""Answers against enumeration on the 3x3 model.

Seeds are fixed. So that no result hangs on them, the statistical tests were repeated with their
seeds shifted, 20 times each, by `.ci/repeat_seeds.py`; a few have other bounds and more replicates since.
"""

import math

import pytest
import torch
from bounds import MANY, agree, t_bound
from one_pixel import one_pixel_check
from test_kernels import known_mask, tempered, wrong_acceptance


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


def sweep(nb, state, guide, generator, beta, longest, accept=None):
    """Redraw every unknown pixel once, in runs of up to `longest`; the share of changes accepted."""
    accept = nb.log_acceptance if accept is None else accept
    counts = [nb.redraw(state, guide, run, beta, generator, accept=accept)
              for run in nb.random_pieces(~guide.known, longest, generator)]
    return sum(accepted for _, accepted in counts) / max(sum(moved for moved, _ in counts), 1)


def left_invariant(nb, tiny, table, image, known, kernel, beta, n=10_000):
    """Whether draws of gamma_beta, the start being exact, are its draws after the kernel too."""
    support = nb.exact_posterior(*table, image, known)[0]
    target, generator = tempered(nb, tiny, support, known, beta), torch.Generator().manual_seed(3)
    starts = support[torch.multinomial(target, n, replacement=True, generator=generator)]
    guide = nb.Guide(tiny).told(image[None], known[None])
    particles = nb.start(guide, starts)
    kernel(particles, guide, generator)
    difference = particles.log_p - nb.pixel_log_probs(tiny, particles.images, 4096)
    assert difference.abs().max() < 1e-10, "the particles' bookkeeping is wrong"
    return agree(n * nb.frequencies(particles.images, known, 3), n * target)


@pytest.mark.parametrize("beta", [0.3, 1.0])
@pytest.mark.parametrize("unknown", [(0, 1, 2), (0, 3, 4), (1, 5, 6, 8)])
def test_every_kernel_leaves_its_target_invariant(nb, tiny, table, evidence, unknown, beta):
    """Detects a change of 4 to 6 % in total variation by one application of the kernel.

    Sweeps in single pixels and in runs, all unknown pixels at once (known ones between them), and tails.
    """
    known, image = known_mask(*unknown), evidence[1]
    for kernel in (lambda *now: sweep(nb, *now, beta, 1), lambda *now: sweep(nb, *now, beta, 3),
                   lambda state, guide, g: nb.redraw(state, guide, ~known, beta, g),
                   lambda state, guide, g: nb.move(state, guide, nb.Budget(tails=3), beta, g)):
        assert left_invariant(nb, tiny, table, image, known, kernel, beta)


@pytest.mark.parametrize("mistake", ["forward Gibbs", "later unknowns dropped", "no proposal ratio", "beta forgotten",
                                     "beta on the unknowns"])
def test_invariance_rejects_wrong_kernels(nb, tiny, table, evidence, mistake):
    known, beta = known_mask(0, 3, 4), 0.5

    def kernel(accept):
        def moves(state, guide, generator):
            nb.redraw(state, guide, nb.pixels_between(~known, 0, 4), beta, generator, accept=accept)
            sweep(nb, state, guide, generator, beta, 1, accept)
        return moves

    for name in (None, mistake):
        moves = kernel(wrong_acceptance(nb, name))
        assert left_invariant(nb, tiny, table, evidence[1], known, moves, beta) == (name is None)


def test_sweeps_move_from_one_image_to_the_whole_posterior(nb, tiny, table, evidence):
    """A kernel that rejects too much is invariant too; this must forget its start. Detects 4 to 5 % that have not."""
    known, image = known_mask(0, 1, 2), evidence[1]
    support, posterior, _ = nb.exact_posterior(*table, image, known)
    guide, generator = nb.Guide(tiny).told(image[None], known[None]), torch.Generator().manual_seed(1)
    particles = nb.start(guide, support[posterior.argmin()].expand(4000, -1, -1))
    assert min(sweep(nb, particles, guide, generator, 1.0, 2) for _ in range(60)) > 0.05
    assert agree(4000 * nb.frequencies(particles.images, known, 3), 4000 * posterior)


def test_the_forward_gibbs_is_rejected_and_the_tempered_sampler_is_not(nb, tiny, table, evidence):
    """Five completions and E[Z-hat / Z] = 1: detects 7.4 standard errors of 20 replicates, about 0.02 and 4 %."""
    budget = nb.Budget(replicates=20, initial=600, particles=300)
    case = tiny, evidence[4], known_mask(0, 1, 2)
    answer, told = nb.exact_posterior(*table, *case[1:]), nb.Guide(tiny).told(evidence[4:5], case[2][None])
    result = nb.tempered_against_table(told, answer, budget, seed=1)
    common = answer[1] > 0.01
    assert common.sum() == 5 and result["z"][common].abs().max() < t_bound(20)
    assert abs(result["evidence_ratio"] - 1) < t_bound(20) * result["evidence_stderr"]
    expected = 20_000 * answer[1][common]
    wrong = nb.frequencies(nb.forward_gibbs(*case, 20_000, seed=1), case[2], 3)
    assert ((20_000 * wrong[common] - expected) ** 2 / expected).sum() > 1000


def test_d_agrees_with_the_table_within_its_error(nb, tiny, table, evidence):
    """Detects 7.4 standard errors of 20 replicates; the control is C, which knows the other side."""
    known = torch.arange(9).view(3, 3) > 4
    exact = exact_pixel(nb, table, evidence[1], known, 4)
    budget = nb.Budget(replicates=20, initial=80, particles=20, exact_per_replicate=40)
    estimate = nb.conditional_given_future(tiny, evidence[1], (1, 1), budget, seed=2)
    assert estimate.status == "converged"
    assert ((estimate.probs - exact).abs() < t_bound(20) * estimate.stderr + 1e-6).all()
    past = nb.conditional_given_past(tiny, evidence[1], (1, 1))  # negative control
    assert ((past - exact).abs() > t_bound(20) * estimate.stderr + 1e-6).any()


def test_draws_and_evidence_of_complete_agree_with_the_table(nb, tiny, table, evidence):
    """Detects 5 % in total variation of the draws; the control repeats a single draw."""
    known = known_mask(0, 1, 2)
    _, posterior, exact = nb.exact_posterior(*table, evidence[1], known)
    completion = nb.complete(tiny, evidence[1], known, 3000, nb.Budget(20, 300), seed=3)
    assert completion.status == "converged" and completion.effective_draws <= 3000
    assert abs(completion.log_evidence - exact) < t_bound(20) * completion.log_evidence_stderr

    def distance(draws):
        return 0.5 * (nb.frequencies(draws, known, 3) - posterior).abs().sum()

    assert distance(completion.draws) < 0.05
    assert distance(completion.draws[:1]) > 0.05
    few = [nb.complete(tiny, evidence[1], known, 2, nb.Budget(8, 60), seed=s).draws for s in range(40)]
    assert distance(torch.cat(few)) < 0.25


def test_a_batch_is_answered_as_its_images_one_by_one(nb, tiny, table, evidence):
    """Two masks, one of them a prefix's; each answer within its error of the table, in the order asked for."""
    masks = torch.stack([known_mask(0, 1, 2), known_mask(5, 6, 7, 8), known_mask(0, 4), known_mask(0, 1, 2)])
    together = nb.complete(tiny, evidence[:4], masks, 6, nb.Budget(initial=64), seed=9)
    shared = nb.complete(tiny, evidence[:4], masks[0], 6, nb.Budget(initial=64), seed=9)
    for number, (image, mask) in enumerate(zip(evidence, masks)):
        for answer, of in ((together[number], mask), (shared[number], masks[0])):
            exact = nb.exact_posterior(*table, image, of)[2]
            assert answer.status == ("exact" if of is mask and number == 1 else "converged")
            assert (answer.draws[:, of] == image[of]).all() and answer.draws.shape == (6, 3, 3)
            assert abs(answer.log_evidence - exact) < t_bound(8) * answer.log_evidence_stderr + 1e-9
    alone = nb.complete(tiny, evidence[0], masks[0], 6, nb.Budget(initial=64), seed=9)
    assert torch.equal(alone.draws, together[0].draws)


def test_no_error_is_less_than_what_the_draws_can_have_missed(nb):
    """Where all draws agree the stderr is span / N, of log Z 1 / N; where they do not, the jackknife's; `most` bounds N
    from above."""
    values = torch.randn(8, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = replicates_of(nb, torch.zeros(8), values)
    n = found.effective_draws
    assert 20 < n <= 400
    assert found.estimate(torch.ones(8), 2.0)[1] == 2.0 / n
    assert found.estimate(torch.ones(8), 2.0, 10)[1] == 0.2
    apart = torch.arange(8.0, dtype=torch.float64)
    mean, stderr = found.estimate(apart, 7.0)
    assert mean == 3.5 and abs(stderr - apart.std() / 8**0.5) < 1e-12
    assert found.mean_log_z()[1] < 1e-12 and found.log_evidence()[1] == 1 / n  # all Z-hats are equal


def test_a_particle_counts_once_after_several_sweeps(nb):
    """Eight replicates of 40 equal weights, after two sweeps: worth 160; 40 draws of the guide with the same Z-hat make
    it 1 / (1 / (4 * 160) + 1 / (4 * 320)): the weights of each half are halved."""
    found = replicates_of(nb, torch.zeros(8), torch.ones(8, 40))
    assert abs(found.worth_of_weights - 160) < 1e-4
    of_the_guide = nb.Replicates(found.draws, found.log_w, found.values, torch.zeros(40, dtype=torch.long))
    assert abs(of_the_guide.worth_of_weights - 320) < 1e-4
    assert abs(found.joined(of_the_guide).worth_of_weights - 1 / (1 / 640 + 1 / 1280)) < 1e-4


def test_what_is_resampled_keeps_its_place(nb):
    """The copies are those of the sorted indices; every particle with a copy stands where it stood."""
    log_weights = 2 * torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    here, there = (nb.systematic_resample(log_weights, torch.Generator().manual_seed(1), n) for n in (None, 40))
    assert (here.sort(dim=1).values == there).all() and not (here == there).all()
    places = torch.arange(40).expand(5, 40)
    copied = (there[:, :, None] == places[:, None]).any(dim=1)
    assert ((here == places) == copied).all()


def test_interrupted_it_returns_what_it_has(nb, tiny, evidence, monkeypatch):
    known, real, rounds = known_mask(0, 1, 2), nb.sample_round, []

    def interrupted(*arguments):
        rounds.append(len(rounds))
        if len(rounds) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(nb, "sample_round", interrupted)
    monkeypatch.setattr(nb, "MAX_LOG_EVIDENCE_SD", -1.0)
    answer = nb.complete(tiny, evidence[1], known, 4, nb.Budget(initial=32))
    assert len(rounds) == 2 and answer.status == "not converged" and "stopped" in answer.diagnostics["doubts"]
    assert (answer.draws[:, known] == evidence[1][known]).all() and answer.log_evidence_stderr is None


def replicates_of(nb, log_z, values, pixels=None):
    """Replicates with equal draws in each: values [r, k] for all summaries."""
    values = torch.as_tensor(values).double()
    r, k = values.shape
    draws = torch.zeros(r, k, 1, 1) if pixels is None else pixels
    return nb.Replicates(draws, torch.as_tensor(log_z).double()[:, None].expand(r, k) - math.log(k),
                         values.expand(3, r, k), 1 + (torch.arange(k) >= k // 2).long())


def test_each_doubt_is_raised_by_what_it_is_for_alone(nb):
    generator = torch.Generator().manual_seed(0)
    values, level = torch.randn(8, 40, generator=generator), torch.zeros(8)
    assert nb.doubts_about(replicates_of(nb, level, values)) == []
    assert nb.doubts_about(replicates_of(nb, level, torch.ones(8, 40))) == []  # nothing varies: known
    for log_z, changed, expected in (
            (1.2 * torch.randn(8, generator=generator), values, "log Z differs"),
            (level[:4], values[:4], "4 replicates, fewer"),
            (torch.tensor([2.0] + 7 * [0.0]), values, "replicates' weights are worth"),
            (level, values[:, :6], "draws' weights are worth 24"),  # 48, but each particle is there after two sweeps
            (level, values + 3 * torch.randn(8, 1, generator=generator), "effective draws by log joint"),
            (level, torch.arange(8.0)[:, None].expand(8, 40), "effective draws by mean level"),  # each stuck at its own
            (level, values + torch.arange(40) / 20, "a drift")):
        doubts = nb.doubts_about(replicates_of(nb, log_z, changed))
        assert any(expected in doubt for doubt in doubts), (expected, doubts)


def test_a_mode_that_some_replicates_miss_is_refused(nb):
    """Half the pixels black in some draws, in none of the others: seen by the pixels, if all summaries agree."""
    generator = torch.Generator().manual_seed(0)
    values, shape = torch.randn(8, 40, generator=generator), torch.zeros(8, 40, 4, 4)
    everywhere, some = shape.clone(), shape.clone()
    everywhere[:, ::2, :2], everywhere[:, 1::2, 2:] = 255, 255
    some[:4, :, :2], some[4:, :, 2:] = 255, 255
    assert nb.doubts_about(replicates_of(nb, torch.zeros(8), values, everywhere)) == []
    assert "effective draws by pixels" in str(nb.doubts_about(replicates_of(nb, torch.zeros(8), values, some)))


def test_the_jackknife_of_a_plain_mean_is_its_standard_error(nb):
    """And joined rounds weigh by Z-hat: exact values."""
    means = torch.randn(8, generator=torch.Generator().manual_seed(0)).double()
    found = replicates_of(nb, torch.zeros(8), means[:, None].expand(8, 3))
    mean, stderr = found.over(means)
    assert abs(mean - means.mean()) < 1e-12 and abs(stderr - means.std() / 8**0.5) < 1e-12
    other = replicates_of(nb, math.log(3) * torch.ones(8).double(), torch.ones(8, 5))
    joined = found.joined(other)
    assert (joined.log_z - math.log(2)).abs().max() < 1e-12
    assert (joined.within(joined.values[0]) - (means + 3) / 4).abs().max() < 1e-12


def test_first_betas_do_not_look_at_their_own_draws(nb):
    weights = 20 * torch.randn(2, 8, 100, generator=torch.Generator().manual_seed(0)).double()
    offset = torch.randn(2, 8, 100, generator=torch.Generator().manual_seed(1)).double() / 2
    betas = nb.first_betas(weights, 10, offset)
    for b in range(2):
        for r in range(8):
            others, added = (torch.cat([x[b, :r], x[b, r + 1 :]]) for x in (weights, offset))
            worth = [nb.ess(factor * betas[b, r] * others + added).mean() for factor in (1, 2**0.25)]
            assert worth[0] >= 10 > worth[1]  # the next one on the ladder would be too large
    changed = weights.clone()
    changed[0, 3] = 0
    again = nb.first_betas(changed, 10, offset)
    assert again[0, 3] == betas[0, 3] and (again[0, :3] != betas[0, :3]).all() and (again[1] == betas[1]).all()
    nothing = torch.zeros(1, 2, 5).double()
    assert (nb.first_betas(nothing, 3, nothing) == 1).all()
    out_of_reach = nb.first_betas(weights, 10, -20 * weights)  # worth 10 at no beta up to 1: the best is 1
    assert (out_of_reach == 1).all()


def test_one_hidden_pixel_of_a_larger_model(nb):
    """12x12 pixels, 16 levels, float32, all dilations: log Z within 8.4 standard errors of the exact one."""
    torch.manual_seed(3)
    model = nb.PixelCNN(nb.Config(height=12, width=12, levels=16, channels=32, bottleneck=16))
    with torch.no_grad():
        model.head.weight.mul_(8)
    model.eval().requires_grad_(False)
    image = nb.sample(model, 1, seed=2)[0]
    exact, completion, distance = one_pixel_check(nb, model, image, (5, 6), nb.Budget(replicates=16, initial=200))
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
    budget = nb.Budget(2, 16, 8, rounds=1)
    first, second = (nb.complete(tiny, x, known, 6, budget, seed=1) for x in (evidence[0], other))
    assert (first.draws[:, known] == evidence[0][known]).all()
    assert torch.equal(first.draws, second.draws) and first.log_evidence == second.log_evidence


def test_replicates_that_disagree_are_not_converged_and_have_no_error_bar(nb, tiny, evidence, monkeypatch):
    monkeypatch.setattr(nb, "MAX_LOG_EVIDENCE_SD", 0.0)
    completion = nb.complete(tiny, evidence[1], known_mask(0, 1, 2), 2, nb.Budget(8, 20, 10))
    assert completion.status == "not converged" and completion.log_evidence_stderr is None
    assert any("log Z" in doubt for doubt in completion.diagnostics["doubts"])
    estimate = nb.conditional_given_future(tiny, evidence[1], (1, 1), nb.Budget(8, 20, 10))
    assert estimate.status == "not converged" and estimate.stderr is None


def test_bad_masks_are_refused_by_name(nb, tiny, evidence):
    for bad in (torch.ones(3, 3), torch.ones(2, 3, dtype=torch.bool), None):
        with pytest.raises(ValueError, match="known: expected a bool tensor"):
            nb.complete(tiny, evidence[0], bad)
    with pytest.raises(ValueError, match="known: expected one mask or 6, got 2"):
        nb.complete(tiny, evidence, known_mask(0).expand(2, 3, 3))
    with pytest.raises(ValueError, match="known: expected one mask or 1, got 2"):
        nb.complete(tiny, evidence[0], known_mask(0).expand(2, 3, 3))
    with pytest.raises(ValueError, match="guide: expected one for this model"):
        nb.complete(tiny, evidence[0], known_mask(0), guide=nb.Guide(nb.tiny_model()))
    with pytest.raises(ValueError, match="pixel: expected"):
        nb.conditional_given_rest(tiny, evidence[0], (3, 0))


def test_ess_and_resampling(nb):
    """Exact values: detects any other formula."""
    weights = torch.tensor([[0.5, 0.25, 0.25, 0.0]], dtype=torch.float64)
    assert abs(nb.ess(weights.log()).item() - 1 / (0.25 + 0.125)) < 1e-12
    index = nb.systematic_resample(weights.log(), torch.Generator().manual_seed(0))
    assert torch.bincount(index[0], minlength=4).tolist() == [2, 1, 1, 0]
    more = nb.systematic_resample(weights.log(), torch.Generator().manual_seed(0), 8)
    assert torch.bincount(more[0], minlength=4).tolist() == [4, 2, 2, 0]


def test_an_impossible_budget_is_refused(nb):
    for wrong in (dict(initial=3, particles=4), dict(particles=0), dict(sweeps=1), dict(rounds=0)):
        with pytest.raises(ValueError, match="budget: expected"):
            nb.Budget(**wrong)
