"""Answers against enumeration on the 3x3 model. Statistical bounds: false alarm below 1e-4 a test."""

import math

import pytest
import torch


def known_mask(*unknown):
    known = torch.ones(3, 3, dtype=torch.bool)
    known.view(-1)[list(unknown)] = False
    return known


@pytest.fixture(scope="module")
def evidence(nb, tiny):
    return nb.sample(tiny, 6, seed=5)


def exact_pixel(nb, table, image, known, pixel):
    """p(x_pixel | known) by enumeration."""
    images, posterior, _ = nb.exact_posterior(*table, image, known)
    return torch.stack([posterior[images[:, pixel // 3, pixel % 3] == level].sum() for level in range(3)])


def test_e_equals_the_table_at_every_pixel(nb, tiny, table, evidence):
    for image in evidence:
        for pixel in range(9):
            answer = nb.conditional_given_rest(tiny, image, divmod(pixel, 3))
            assert (answer - exact_pixel(nb, table, image, known_mask(pixel), pixel)).abs().max() < 1e-10


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
    assert ((estimate.probs - exact).abs() < 5 * estimate.stderr).all()
    uniform = torch.randint(0, 3, (4000, 3, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    wrong = nb.predictive(tiny, uniform, (1, 1))
    assert ((wrong.mean(0) - exact).abs() > 5 * wrong.std(0) / 4000 ** 0.5).any()


def test_counting_is_unbiased_and_noisier_than_rao_blackwell(nb, tiny):
    estimate = nb.marginal(tiny, (1, 1), n=4000, seed=1)
    counted, stderr = nb.counting_estimate(estimate.diagnostics["conditionals"], seed=2)
    assert ((counted - estimate.probs).abs() < 5 * stderr).all()
    assert (estimate.stderr < stderr).all()


def chi_square_after(nb, tiny, table, image, known, kernel, n=20_000):
    """Start from exact posterior draws, apply a kernel: (chi-square statistic, degrees of freedom)."""
    support, posterior, _ = nb.exact_posterior(*table, image, known)
    generator = torch.Generator().manual_seed(3)
    starts = support[torch.multinomial(posterior, n, replacement=True, generator=generator)]
    particles = nb.Particles(tiny, starts.clone())
    kernel(particles, generator)
    difference = particles.log_probs - nb.pixel_log_probs(tiny, particles.images, 4096)
    assert difference.abs().max() < 1e-10, "the particles' bookkeeping is wrong"
    order = nb.completion_codes(support, known, 3)
    expected = torch.zeros(len(support), dtype=torch.float64).index_put((order,), n * posterior)
    counts = torch.bincount(nb.completion_codes(particles.images, known, 3), minlength=len(support))
    often = expected > 5
    return ((counts - expected)[often] ** 2 / expected[often]).sum().item(), int(often.sum())


@pytest.mark.parametrize("unknown", [(0, 1, 2), (0, 3, 4), (1, 5, 6, 8)])
def test_every_kernel_leaves_the_posterior_invariant(nb, tiny, table, evidence, unknown):
    """Detects a change of about 2 % in total variation by one application of the kernel."""
    known, image = known_mask(*unknown), evidence[1]
    last = unknown[-1] + 1
    for kernel in (lambda p, g: nb.sweep(p, known, 1.0, 1, g), lambda p, g: nb.sweep(p, known, 1.0, 3, g),
                   lambda p, g: nb.regenerate(p, known, unknown[0], last, 1.0, g),
                   lambda p, g: nb.regenerate(p, known, unknown[1], last, 1.0, g)):
        statistic, freedom = chi_square_after(nb, tiny, table, image, known, kernel)
        assert statistic < freedom + 6 * (2 * freedom) ** 0.5 + 6


@pytest.mark.parametrize("mistake", ["forward Gibbs", "later unknowns dropped", "proposal counted twice"])
def test_invariance_rejects_wrong_kernels(nb, tiny, table, evidence, mistake, monkeypatch):
    known, right = known_mask(0, 1, 2), nb.log_acceptance

    def wrong(old, new, known, start, stop, beta):
        if mistake == "forward Gibbs":  # accept everything
            return torch.zeros(len(old), dtype=torch.float64)
        if mistake == "later unknowns dropped":
            return ((new - old)[:, known]).sum(1)
        return right(old, new, known, start, stop, beta) + (new - old).flatten(1)[:, start:stop].sum(1)

    monkeypatch.setattr(nb, "log_acceptance", wrong)
    statistic, freedom = chi_square_after(nb, tiny, table, evidence[1], known,
                                          lambda p, g: nb.sweep(p, known, 1.0, 1, g))
    assert statistic > freedom + 6 * (2 * freedom) ** 0.5 + 6


def test_the_forward_gibbs_is_rejected_and_the_tempered_sampler_is_not(nb, tiny, table, evidence):
    """z over replicates; detects a bias of a few per cent in the most probable completions."""
    budget = nb.Budget(replicates=20, particles=300, sweeps=2)
    result = nb.compare_with_table(tiny, evidence[1], known_mask(0, 1, 2), *table, budget, seed=1)
    common = result["table"] > 0.01
    assert result["z"][common].abs().max() < 6
    assert abs(result["evidence_ratio"] - 1) < 5 * result["evidence_stderr"]
    expected = 20_000 * result["table"][common]
    assert ((20_000 * result["wrong"][common] - expected) ** 2 / expected).sum() > 1000


def test_d_agrees_with_the_table_within_its_error(nb, tiny, table, evidence):
    known = torch.arange(9).view(3, 3) > 4
    exact = exact_pixel(nb, table, evidence[1], known, 4)
    budget = nb.Budget(replicates=10, particles=40)
    estimate = nb.conditional_given_future(tiny, evidence[1], (1, 1), budget, seed=2)
    assert estimate.status == "estimated"
    assert ((estimate.probs - exact).abs() < 7 * estimate.stderr + 1e-6).all()  # t with 9 degrees
    past = nb.conditional_given_past(tiny, evidence[1], (1, 1))  # negative control
    assert ((past - exact).abs() > 7 * estimate.stderr + 1e-6).any()


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
    first, second = (nb.complete(tiny, x, known, 6, nb.Budget(2, 8), seed=1) for x in (evidence[0], other))
    assert (first.draws[:, known] == evidence[0][known]).all()
    assert torch.equal(first.draws, second.draws) and first.log_evidence == second.log_evidence


def test_replicates_that_disagree_are_not_converged_and_have_no_error_bar(nb, tiny, evidence, monkeypatch):
    monkeypatch.setattr(nb, "MAX_LOG_EVIDENCE_SD", 0.0)
    completion = nb.complete(tiny, evidence[1], known_mask(0, 1, 2), 2, nb.Budget(4, 10))
    assert completion.status == "not converged" and completion.log_evidence_stderr is None
    assert any("log Z" in reason for reason in completion.diagnostics["reasons"])
    estimate = nb.conditional_given_future(tiny, evidence[1], (1, 1), nb.Budget(4, 10))
    assert estimate.status == "not converged" and estimate.stderr is None


def test_bad_masks_are_refused_by_name(nb, tiny, evidence):
    for bad in (torch.ones(3, 3), torch.ones(2, 3, dtype=torch.bool), None):
        with pytest.raises(ValueError, match="known: expected a bool tensor"):
            nb.complete(tiny, evidence[0], bad)
    with pytest.raises(ValueError, match="pixel: expected"):
        nb.conditional_given_rest(tiny, evidence[0], (3, 0))


def test_ess_and_resampling(nb):
    weights = torch.tensor([[0.5, 0.25, 0.25, 0.0]], dtype=torch.float64)
    assert abs(nb.ess(weights.log()).item() - 1 / (0.25 + 0.125)) < 1e-12
    index = nb.systematic_resample(weights.log(), torch.Generator().manual_seed(0))
    assert torch.bincount(index[0], minlength=4).tolist() == [2, 1, 1, 0]
    assert math.isnan(nb.rhat(torch.ones(3, 5)))
