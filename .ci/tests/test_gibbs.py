"""Gibbs sampling as it is called: what it returns, that its chains reach the table, and when they are believed."""

import math
from functools import partial

import arviz
import pytest
import torch
from conftest import either_guide, known_mask

KNOWN = known_mask(0, 1, 3)  # in two rows


@pytest.mark.parametrize("states, chains", [(100, 4), (101, 8), (9, 8), (4, 2)])
def test_r_hat_is_arvizs_split_r_hat(nb, states, chains):
    """Within 1e-6, for chains that agree and for chains that do not. The control: R-hat of ranks is another number."""
    generator = torch.Generator().manual_seed(states)
    values = torch.randn(states, chains, generator=generator, dtype=torch.float64)
    for found in (values, values + torch.arange(chains), values.exp() + torch.arange(states)[:, None]):
        assert nb.r_hat(found) == pytest.approx(float(arviz.rhat(found.T.numpy(), method="split")), abs=1e-6)
        if states > 9:
            assert abs(nb.r_hat(found) - float(arviz.rhat(found.T.numpy(), method="rank"))) > 1e-6


def test_chains_have_mixed_only_where_they_move_and_agree(nb):
    """It would see a pass without a number: chains that never move, alike or not, that are too few, or of which one
    quantity of two disagrees. (The control: independent draws pass.)"""
    values = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    assert nb.mixed(values, values**2)
    assert math.isnan(nb.r_hat(torch.ones(50, 8))) and nb.r_hat(torch.ones(50, 8) * torch.arange(8)) == math.inf
    same, apart = torch.ones(50, 8), values + 2 * (torch.arange(8) < 4)
    for refused in (same, same * torch.arange(8), values[:, :3], values[:3], apart):
        assert not nb.mixed(refused)
    assert not nb.mixed(values, apart) and not nb.mixed(apart, values)


@pytest.mark.parametrize("how", ["pixels", "model", "guide"])
def test_chains_reach_the_table_from_anywhere(nb, tiny, table, evidence, how):
    """Eight chains from the least probable completion, 150 sweeps, the first ten left out: within 0.1 in total
    variation of the table, and R-hat says so; known pixels and the start stay, and a seed is a chain. The controls:
    forward draws are further away, and another seed."""
    support, posterior, _ = nb.exact_posterior(*table, evidence[2], KNOWN)
    start = support[posterior.argmin()].repeat(8, 1, 1)
    sweep = (partial(nb.sweep_by_pixels, tiny, KNOWN) if how == "pixels" else
             partial(nb.sweep_at_once, tiny, either_guide(nb, tiny, how == "guide"), KNOWN, candidates=8))
    states = nb.gibbs(sweep, start, 150, seed=1)
    assert states.dtype == torch.uint8 and states.shape == (151, 8, 3, 3)
    assert (states[0] == support[posterior.argmin()]).all() and (states[:, :, KNOWN] == evidence[2][KNOWN]).all()
    short, other = (nb.gibbs(sweep, start, 5, seed=seed) for seed in (1, 2))
    assert torch.equal(short, states[:6]) and not torch.equal(other, short)
    kept = states[10:].flatten(0, 1)
    distance = nb.total_variation(nb.frequencies(kept, KNOWN, 3), posterior)
    assert distance < 0.1, distance
    assert nb.mixed(nb.log_prob(tiny, kept).view(-1, 8), nb.ink_of(states[10:], KNOWN))
    forward = nb.sample(tiny, len(kept), image=evidence[2], known=KNOWN)
    assert nb.total_variation(nb.frequencies(forward, KNOWN, 3), posterior) > 0.1
