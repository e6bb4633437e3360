"""Parallel tempering and exact Gibbs sampling against enumeration."""

import pytest
import torch
from bounds import t_bound
from second_sampler import log_evidences, parallel_tempering, swap_neighbours
from test_inference import sweep
from test_kernels import known_mask, tempered

BETAS = [0.0, 0.3, 0.6, 1.0]


def z_of_chains(hits, probability):
    """z of the mean of independent chains, float64 [chains, rounds], against the truth."""
    means = hits.mean(dim=1)
    return ((means.mean() - probability) / (means.std() / len(means) ** 0.5)).item()


def worst_z(nb, tiny, table, image, known, swap=swap_neighbours, rounds=400):
    """Largest |z| of the frequencies of completions and of log Z against the table, and the z of log Z."""
    support, posterior, log_evidence = nb.exact_posterior(*table, image, known)
    images, values, evidences = parallel_tempering(nb, tiny, image, known, BETAS, rounds, 16, seed=1, swap=swap)
    assert (images[:, :, known] == image[known]).all()
    log_probs = nb.pixel_log_probs(tiny, images.flatten(0, 1), 4096)
    expected = log_probs.sum(dim=(1, 2)), log_probs[:, known].sum(1), images.flatten(0, 1).double().mean(dim=(1, 2))
    assert (values.flatten(1) - torch.stack(expected)).abs().max() < 1e-10
    assert (evidences[:, -1] - values[1]).abs().max() < 1e-10
    zs = []
    for completion, probability in zip(support, posterior):
        if probability > 0.02:
            hits = (images == completion).flatten(2).all(2).double()[:, 20:]
            zs.append(z_of_chains(hits, probability))
    ratio = (log_evidences(BETAS, evidences[..., 20:]) - log_evidence).exp()
    assert len(zs) >= 2
    return max(map(abs, zs)), 4 * (ratio.mean() - 1) / ratio.std()


@pytest.mark.parametrize("unknown", [(0, 1, 2), (1, 5, 6, 8)])
def test_parallel_tempering_agrees_with_the_table(nb, tiny, table, evidence, unknown):
    """Detects 8.4 standard errors of 16 chains, about 0.06 for a completion of probability 0.3, and in log Z."""
    z, z_of_evidence = worst_z(nb, tiny, table, evidence[1], known_mask(*unknown))
    assert z < t_bound(16) and abs(z_of_evidence) < t_bound(16)


@pytest.mark.parametrize("mistake", ["all swaps accepted", "swaps accepted the wrong way round"])
def test_wrong_swaps_are_rejected(nb, tiny, table, evidence, mistake):
    def wrong(nb, order, betas, evidence, parity, generator):
        evidence = torch.zeros_like(evidence) if mistake == "all swaps accepted" else -evidence
        return swap_neighbours(nb, order, betas, evidence, parity, generator)

    assert worst_z(nb, tiny, table, evidence[1], torch.arange(9).view(3, 3) > 2, wrong)[0] > t_bound(16)


def swaps_are_right(nb, tiny, table, evidence, monkeypatch, sign):
    """Are two images swapped with probability min(1, target of the pair swapped / target), to 1 part in a million?

    For all 729 pairs of completions at beta = 0.3 and 0.8; sign = -1 hands the evidence over with the wrong sign.
    """
    known, betas = known_mask(0, 1, 2), torch.tensor([0.3, 0.8], dtype=torch.float64)
    support = nb.exact_posterior(*table, evidence[1], known)[0]
    low, high = (tempered(nb, tiny, support, known, beta).log() for beta in betas)
    chance = (low[None] + high[:, None] - low[:, None] - high[None]).exp().clamp(max=1).flatten()
    terms, order = nb.pixel_log_probs(tiny, support)[:, known].sum(1), torch.arange(2 * 729).view(729, 2)
    pairs = torch.cartesian_prod(terms, terms).flatten()
    for factor, pick in ((1 - 1e-6, chance > 0), (1 + 1e-6, chance < 1 - 1e-9)):
        with monkeypatch.context() as patch:
            patch.setattr(nb, "uniform", lambda *_: factor * chance[:, None])
            swapped = (swap_neighbours(nb, order, betas, sign * pairs, 0, None) != order).all(1)
        if (swapped[pick] != (factor < 1)).any():
            return False
    return True


def test_swaps_are_in_detailed_balance_and_their_reverse_is_not(nb, tiny, table, evidence, monkeypatch):
    assert swaps_are_right(nb, tiny, table, evidence, monkeypatch, 1)
    assert not swaps_are_right(nb, tiny, table, evidence, monkeypatch, -1)


def test_a_beta_for_each_particle_moves_as_one_for_all(nb, tiny, evidence):
    known, image = torch.arange(9).view(3, 3) > 2, evidence[1]
    starts = nb.sample(tiny, 50, image=image, known=known, seed=3)
    results = []
    for beta in (0.4, torch.full((50,), 0.4, dtype=torch.float64)):
        guide = nb.Guide(tiny).told(image[None], known[None])
        particles = nb.start(guide, starts)
        sweep(nb, particles, guide, torch.Generator().manual_seed(5), beta, 2)
        results.append(particles.images)
    assert torch.equal(*results) and not torch.equal(results[0], starts)


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


def test_gibbs_sampling_agrees_with_the_table(nb, tiny, table, evidence):
    """Detects 12 standard errors of 8 chains, about 0.1 for a completion of probability 0.3."""
    known, generator = torch.arange(9).view(3, 3) > 2, torch.Generator().manual_seed(0)
    support, posterior, _ = nb.exact_posterior(*table, evidence[1], known)
    chains = []
    for start in nb.sample(tiny, 8, image=evidence[1], known=known, seed=2):
        chain = [start]
        for _ in range(250):
            chain.append(nb.gibbs_sweep(tiny, chain[-1], known, generator))
        chains.append(torch.stack(chain[20:]))
    images = torch.stack(chains)
    for completion, probability in zip(support, posterior):
        if probability > 0.02:
            hits = (images == completion).flatten(2).all(2).double()
            assert abs(z_of_chains(hits, probability)) < t_bound(8)
