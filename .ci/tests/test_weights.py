"""Weighted draws and Gibbs moves: every way in which a few draws can go, enumerated."""

import math

import pytest
import torch
from conftest import MANY, either_guide


class EveryWay:
    """draw_levels that draws the digits of code, int64 [m], for m images side by side, each with k draws; log_chance:
    of all that was drawn. mistake: of the logits of a pick among candidates."""

    def __init__(self, code, candidates=0, mistake=None):
        self.code, self.log_chance = code.clone(), torch.zeros(len(code), dtype=torch.float64)
        self.candidates, self.mistake = candidates, mistake

    def draw_levels(self, logits, uniforms):
        options = logits.shape[1]
        if self.mistake and options == self.candidates:
            logits = self.mistake(logits)
        chosen = torch.empty(len(self.code), uniforms.numel() // len(self.code), dtype=torch.long)
        for draw in range(chosen.shape[1]):
            chosen[:, draw] = self.code % options
            self.code //= options
        log_probs = logits.double().log_softmax(1).repeat_interleave(uniforms.numel() // len(logits), dim=0)
        self.log_chance += log_probs.gather(1, chosen.view(-1, 1)).view(chosen.shape).sum(dim=1)
        return chosen.view_as(uniforms)


@pytest.fixture(params=[False, True], ids=["model", "guide"])
def case(nb, request):
    """(guide, known, table): 4x1 pixels of 2 levels, float64, the upper two hidden; the guide is the model alone, or
    means nothing."""
    torch.manual_seed(0)
    config = nb.Config(4, 1, 2, embedding=3, channels=8, bottleneck=4, dilations=(1, 2), context=2)
    model = nb.PixelCNN(config).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.5 * torch.randn_like(parameter))
    model.head.weight.mul_(2)
    known, images = torch.arange(4)[:, None] >= 2, nb.all_images(model)
    table = nb.exact_posterior(images, nb.log_prob(model, images), torch.ones(4, 1, dtype=torch.uint8), known)
    return either_guide(nb, model, request.param), known, table


def test_in_expectation_over_every_way_the_mean_weight_is_z(nb, case, monkeypatch):
    """Three draws, 64 ways, within 1e-12: E[Z-hat] = Z, and each completion's part of it is its probability. Detects a
    weight without g, a chance that is not what was drawn from, draws that share a walk too long. The control: p in
    place of p / g."""
    guide, known, (support, posterior, log_z) = case
    total, mean, parts, wrong = 0.0, 0.0, torch.zeros(4, dtype=torch.float64), 0.0
    for code in torch.arange(64).split(1):
        ways = EveryWay(code)
        monkeypatch.setattr(nb, "draw_levels", ways.draw_levels)
        found = nb.weighted_draws(guide, support[0], known, 3)
        chance = ways.log_chance.exp().item()
        total += chance
        mean += chance * math.exp(nb.log_mean(found.log_w) - log_z)
        wrong += chance * math.exp(nb.log_mean(found.log_p) - log_z)
        parts += nb.frequencies(found.draws, known, 2, chance * (found.log_w - log_z).exp() / 3)
        assert not ways.code.any() and (found.draws[:, known] == 1).all()
    assert abs(total - 1) < 1e-12
    assert abs(mean - 1) < 1e-12 and (parts - posterior).abs().max() < 1e-12
    assert abs(wrong - 1) > 0.1


@pytest.mark.parametrize("conditional, right", [("conditional_given_rest", True), ("conditional_given_past", False)])
def test_a_gibbs_sweep_pixel_by_pixel_keeps_the_posterior(nb, case, monkeypatch, conditional, right):
    """Within 1e-12, in every way that it can go. The control: a sweep of forward conditionals is off by 1e-3."""
    guide, known, (support, posterior, _) = case
    monkeypatch.setattr(nb, "conditional_given_rest", getattr(nb, conditional))
    after = torch.zeros(4, dtype=torch.float64)
    for start, probability in zip(support, posterior):
        for code in torch.arange(4).split(1):
            ways = EveryWay(code)
            monkeypatch.setattr(nb, "draw_levels", ways.draw_levels)
            moved = nb.gibbs_sweep(guide.model, start, known, torch.Generator())
            after += probability * ways.log_chance.exp() * nb.frequencies(moved[None], known, 2)
    change = (after - posterior).abs().max()
    assert abs(after.sum() - 1) < 1e-12 and (change < 1e-12 if right else change > 1e-3)


def without_the_present(logits):
    return logits.index_fill(1, torch.tensor(0), -math.inf)


def test_a_gibbs_move_keeps_the_posterior(nb, case, monkeypatch):
    """Within 1e-12, in every way that it can go: all hidden rows at once with 3 candidates; a sweep by bands of one row
    with 2 or 3. Planted mistakes change it: picked evenly; what is there left out, or weighed without g; bands
    chosen by what is in the first."""
    guide, known, (support, posterior, _) = case
    place = torch.arange(4)[:, None]

    def change(found):
        return (posterior @ found - posterior).abs().max()

    def matrix(ways, move, candidates, mistake=None):
        """P[x, x'] of a move of images [m, h, w], from every state in every way that it can go."""
        states = torch.arange(4).repeat_interleave(ways)
        every = EveryWay(torch.arange(ways).repeat(4), candidates, mistake)
        with monkeypatch.context() as patch:
            patch.setattr(nb, "draw_levels", every.draw_levels)
            moved = move(support[states])
        assert not every.code.any() and (moved[:, known] == 1).all()  # no two ways are the same
        codes, found = moved[:, ~known].long() @ torch.tensor([1, 2]), torch.zeros(4, 4, dtype=torch.float64)
        found.index_put_((states, codes), every.log_chance.exp(), accumulate=True)
        assert (found.sum(dim=1) - 1).abs().max() < 1e-12  # these are all
        return found

    def sweep(candidates, mistake=None, mask=known):
        # For each band, one pixel of 2 levels: its fresh candidates, then the pick.
        ways = (2 ** (candidates - 1) * candidates) ** int((~mask).sum())
        return matrix(ways, lambda images: nb.gibbs_sweep_by_bands(guide, images, mask, 0, 1, candidates), candidates,
                      mistake)

    def whole(mistake=None):
        return matrix(4**2 * 3, lambda images: nb.redraw(guide, images, known, 3, 0), 3, mistake)

    first, second = (sweep(3, mask=place != row) for row in (0, 1))
    for right in (whole(), sweep(2), sweep(3), first, second):
        assert change(right) < 1e-12 and (right - torch.eye(4)).abs().max() > 0.1  # it moves
    for mistake in (torch.zeros_like, without_the_present):
        assert change(whole(mistake)) > 1e-3 and change(sweep(3, mistake)) > 1e-3
    assert change(torch.where(support[:, 0] == 0, first, second)) > 1e-3
    log_g = nb.guide_pixel_log_probs
    monkeypatch.setattr(nb, "guide_pixel_log_probs", lambda *arguments: 0 * log_g(*arguments))
    assert change(whole()) > 1e-3 and change(sweep(3)) > 1e-3


def test_the_weights_count_and_pick_by_their_shares(nb):
    """Exact values of ess and log_mean: detects any other formula. 20,000 picks: shares within 5 standard errors."""
    shares = torch.tensor([0.5, 0.25, 0.25, 0.0], dtype=torch.float64)
    assert abs(nb.ess(shares.log() + 700) - 1 / (0.25 + 0.125)) < 1e-9
    assert abs(nb.log_mean(shares.log() - 900) + 900 + math.log(4)) < 1e-9
    found = nb.Found(torch.arange(4, dtype=torch.uint8).view(4, 1, 1), shares.log() + 700, shares)
    picked = nb.pick_by_weight(found, 20_000, 1).flatten().long().bincount(minlength=4) / 20_000
    assert ((picked - shares).abs() <= MANY * (shares * (1 - shares) / 20_000) ** 0.5).all()
