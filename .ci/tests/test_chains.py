"""Parallel tempering against enumeration, and what is said of chains against ArviZ."""

import math

import arviz
import numpy as np
import pytest
import torch

BETAS = [0.0, 0.3, 0.6, 1.0]


def chains_of(kind, seed):
    """float64 [chains, draws]: autocorrelated, with ties, with one chain apart, or drifting."""
    rng = np.random.default_rng(seed)
    chains, draws, memory = rng.integers(2, 7), int(rng.integers(8, 300)), rng.choice([-0.5, 0, 0.3, 0.9, 0.99])
    noise, values = rng.normal(size=(chains, draws)), np.zeros((chains, draws))
    for t in range(draws):
        values[:, t] = noise[:, t] + (memory * values[:, t - 1] if t else 0)
    if kind == "ties":
        values = np.round(values)
    if kind == "apart":
        values[0] += 20
    if kind == "drift":
        values += np.linspace(0, 5, draws)
    if kind == "stuck":  # each chain at a value of its own
        values = np.broadcast_to(rng.normal(size=(chains, 1)), values.shape).copy()
    return values


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["random", "ties", "apart", "drift", "stuck"])
def test_ess_mcse_and_split_rhat_agree_with_arviz(nb, kind):
    for seed in range(30):
        values = chains_of(kind, seed)
        ours, halves = torch.from_numpy(values), nb.split_chains(torch.from_numpy(values))
        for mine, theirs in ((nb.bulk_ess(ours), arviz.ess(values, method="bulk")),
                             (nb.chain_ess(halves), arviz.ess(values, method="mean")),
                             (nb.mcse_mean(ours), arviz.mcse(values, method="mean")),
                             (nb.rhat(halves), arviz.rhat(values, method="rank"))):
            assert mine == pytest.approx(float(theirs), rel=1e-6) or min(mine, theirs) > 1e9


def test_constant_chains_are_undetermined(nb):
    same = torch.ones(4, 40, dtype=torch.float64)
    assert all(math.isnan(f(same)) for f in (nb.bulk_ess, nb.chain_ess, nb.mcse_mean))


def worst_z(nb, tiny, table, image, known, rounds=400):
    """Largest |z| of the frequencies of completions and of log Z against the table, and the z of log Z."""
    support, posterior, log_evidence = nb.exact_posterior(*table, image, known)
    images, joints, evidences, _ = nb.parallel_tempering(tiny, image, known, BETAS, rounds, replicates=8, seed=1)
    assert (images[:, :, known] == image[known]).all()
    assert (joints.flatten() - nb.log_prob(tiny, images.flatten(0, 1), 4096)).abs().max() < 1e-10
    at_one = nb.pixel_log_probs(tiny, images[:, -1])[:, known].sum(1)
    assert (evidences[:, -1, -1] - at_one).abs().max() < 1e-10
    zs = []
    for completion, probability in zip(support, posterior):
        if probability > 0.02:
            hits = (images == completion).flatten(2).all(2).double()[:, 20:]
            zs.append(((hits.mean() - probability) / nb.mcse_mean(hits)).item())
    steps = torch.tensor(BETAS).double().diff()[:, None]
    stones = ((steps * evidences[:, :-1, 20:]).logsumexp(2) - math.log(rounds - 20)).sum(1)
    z_of_evidence = ((stones.mean() - log_evidence) / (stones.std() / 8 ** 0.5)).item()
    assert len(zs) >= 2
    return max(map(abs, zs)), z_of_evidence


@pytest.mark.parametrize("unknown", [(0, 1, 2), (1, 5, 6, 8)])
def test_parallel_tempering_agrees_with_the_table(nb, tiny, table, evidence, unknown):
    """Detects an error of 5 standard errors, about 0.05 for a completion of probability 0.3."""
    known = torch.ones(3, 3, dtype=torch.bool)
    known.view(-1)[list(unknown)] = False
    z, z_of_evidence = worst_z(nb, tiny, table, evidence[1], known)
    assert z < 5 and abs(z_of_evidence) < 6


@pytest.mark.parametrize("mistake", ["all swaps accepted", "swaps accepted the wrong way round"])
def test_wrong_swaps_are_rejected(nb, tiny, table, evidence, monkeypatch, mistake):
    known, right = torch.arange(9).view(3, 3) > 2, nb.swap_neighbours

    def wrong(order, betas, evidence, parity, generator):
        evidence = torch.zeros_like(evidence) if mistake == "all swaps accepted" else -evidence
        return right(order, betas, evidence, parity, generator)

    monkeypatch.setattr(nb, "swap_neighbours", wrong)
    assert worst_z(nb, tiny, table, evidence[1], known)[0] > 5


def test_a_beta_for_each_particle_moves_as_one_for_all(nb, tiny, evidence):

    known, image = torch.arange(9).view(3, 3) > 2, evidence[1]
    starts = nb.sample(tiny, 50, image=image, known=known, seed=3)
    results = []
    for beta in (0.4, torch.full((50,), 0.4, dtype=torch.float64)):
        particles = nb.Particles(tiny, starts.clone())
        nb.sweep(particles, known, beta, 2, torch.Generator().manual_seed(5))
        results.append(particles.images)
    assert torch.equal(*results) and not torch.equal(results[0], starts)


def test_gibbs_sampling_agrees_with_the_table(nb, tiny, table, evidence):
    """Detects an error of 5 standard errors, about 0.06 for a completion of probability 0.3."""
    known, generator = torch.arange(9).view(3, 3) > 2, torch.Generator().manual_seed(0)
    support, posterior, _ = nb.exact_posterior(*table, evidence[1], known)
    chains = []
    for start in nb.sample(tiny, 4, image=evidence[1], known=known, seed=2):
        chain = [start]
        for _ in range(400):
            chain.append(nb.gibbs_sweep(tiny, chain[-1], known, generator))
        chains.append(torch.stack(chain[20:]))
    images = torch.stack(chains)
    for completion, probability in zip(support, posterior):
        if probability > 0.02:
            hits = (images == completion).flatten(2).all(2).double()
            assert abs(hits.mean() - probability) < 5 * nb.mcse_mean(hits)
