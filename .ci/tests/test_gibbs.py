"""Gibbs sampling as it is called: what it returns, that its chains reach the table, and when they are believed."""

import math

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


def test_chains_are_believed_only_where_they_move_and_agree(nb):
    """It would see a pass without a number: chains that never move, alike or not, that are too few, or of which one
    quantity of two disagrees. (The control: independent draws pass.)"""
    values = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    assert nb.chains_converged(values, values**2)
    assert math.isnan(nb.r_hat(torch.ones(50, 8))) and nb.r_hat(torch.ones(50, 8) * torch.arange(8)) == math.inf
    same, apart = torch.ones(50, 8), values + 2 * (torch.arange(8) < 4)
    for refused in (same, same * torch.arange(8), values[:, :3], values[:3], apart):
        assert not nb.chains_converged(refused)
    assert not nb.chains_converged(values, apart)


@pytest.mark.parametrize("blocks", [None, {"candidates": 8}, {"candidates": 8, "rows": 1}], ids=["pixels", "all", "bands"])
def test_chains_reach_the_table_from_anywhere(nb, tiny, table, evidence, blocks):
    """Eight chains from the least probable completion, 150 sweeps, the first ten left out: within 0.1 in total variation
    of the table, and R-hat says so. The control: forward draws are further away."""
    support, posterior, _ = nb.exact_posterior(*table, evidence[2], KNOWN)
    start = support[posterior.argmin()].repeat(8, 1, 1)
    guide = either_guide(nb, tiny, True) if blocks else None
    states = nb.gibbs(tiny, evidence[2], KNOWN, 150, 8, start, guide, seed=1, **blocks or {})
    assert states.dtype == torch.uint8 and states.shape == (151, 8, 3, 3)
    assert torch.equal(states[0], start) and (states[:, :, KNOWN] == evidence[2][KNOWN]).all()
    kept = states[10:].flatten(0, 1)
    distance = nb.total_variation(nb.frequencies(kept, KNOWN, 3), posterior)
    assert distance < 0.1, distance
    log_p = nb.log_prob(tiny, kept).view(-1, 8)
    assert nb.chains_converged(log_p, states[10:, :, ~KNOWN].double().mean(dim=2))
    other = nb.sample(tiny, len(kept), image=evidence[2], known=KNOWN)
    assert nb.total_variation(nb.frequencies(other, KNOWN, 3), posterior) > 0.1


@pytest.mark.parametrize("learned", [False, True])
def test_known_pixels_stay_whatever_the_start_holds_there_and_a_seed_is_a_chain(nb, tiny, evidence, learned):
    """Any mask. It would see a start whose known pixels count, hidden pixels of the image that are read, and seeds that
    do nothing."""
    guide = either_guide(nb, tiny, True) if learned else None
    known = known_mask(1, 4, 8)
    start = evidence[:4]

    def ask(image, start, seed=0):
        return nb.gibbs(tiny, image, known, 3, 4, start, guide, seed=seed)

    states = ask(evidence[5], start)
    assert (states[:, :, known] == evidence[5][known]).all()
    assert torch.equal(ask(torch.where(known, evidence[5], 0), torch.where(known, 0, start)), states)
    assert not torch.equal(ask(evidence[5], start, seed=1), states)
