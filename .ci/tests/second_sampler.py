"""Parallel tempering: a second sampler, without guide, weights and resampling; it shares the moves with the first.

One chain at each 0 = beta_0 < ... < beta_M = 1; the guide is the model alone, so that gamma_beta tempers the evidence
term L. In each round the chain at beta = 0 is drawn afresh, all are moved, and neighbours exchange images.
"""
import math

import torch


def swap_neighbours(nb, order, betas, evidence, parity, generator):
    """Let the chains at temperatures t and t + 1 exchange their images, t = parity, parity + 2, ..., with probability
    min(1, exp((beta_{t+1} - beta_t) (L_t - L_{t+1}))).

    order: int64 [replicates, temperatures], the particle at each temperature -> the new order; evidence: float64
    [particles], of each particle.
    """
    low, order = torch.arange(parity, len(betas) - 1, 2), order.clone()
    below, above = order[:, low], order[:, low + 1]
    ratio = betas.diff()[low] * (evidence[below] - evidence[above])
    swapped = nb.uniform(ratio.shape, generator, order.device).log() < ratio
    order[:, low] = torch.where(swapped, above, below)
    order[:, low + 1] = torch.where(swapped, below, above)
    return order


def parallel_tempering(nb, model, image, known, betas, rounds, replicates=8, longest_run=6, seed=0,
                       swap=swap_neighbours):
    """Chains at all temperatures that exchange images. betas: increasing, from 0 to 1.

    Returns (images at beta = 1, uint8 [replicates, rounds, h, w]; their SUMMARIES, float64 [3, replicates, rounds];
    evidence term at each temperature [replicates, temperatures, rounds]).
    """
    generator, count = torch.Generator().manual_seed(seed), replicates * len(betas)
    guide, betas = nb.Guide(model).told(image[None], known[None]), torch.tensor(betas).double()
    particles = nb.start(guide, guide.draw(image, count, seed)[0])
    order, found = torch.arange(count).view(replicates, -1), []
    for number in range(rounds):
        fresh = particles[order[:, 0]]
        nb.redraw(fresh, guide, ~known, 0.0, generator)
        particles[order[:, 0]] = fresh
        beta = betas.repeat(replicates)[order.flatten().argsort()]  # of each particle
        for run in nb.random_pieces(~known, longest_run, generator):
            nb.redraw(particles, guide, run, beta, generator)
        evidence = particles.log_p[:, known].sum(dim=1)
        order = swap(nb, order, betas, evidence, number % 2, generator)
        coldest = particles[order[:, -1]]
        found.append((coldest.images, nb.summaries(coldest, known), evidence[order]))
    images, values, evidences = zip(*found)
    return torch.stack(images, 1), torch.stack(values, 2), torch.stack(evidences, 2)


def log_evidences(betas, evidences):
    """log Z of each replicate, float64 [replicates]: sum over t of log E_{beta_t} exp((beta_{t+1} - beta_t) L_t)."""
    steps = torch.tensor(betas).double().diff()[:, None]
    return ((steps * evidences[:, :-1]).logsumexp(2) - math.log(evidences.shape[2])).sum(dim=1)
