"""smc and its Gibbs moves: all ways in which a small run can go, enumerated; then by chance, on the 3x3 model."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bounds import t_bound
from guides import guide_log_prob, known_mask, meaningless_guide


class Undecided(Exception):
    """A choice that was not made in advance: (the ways to go on from, the number of the option of each)."""


class Forced:
    """draw_levels and resample that choose as they are told, for all ways side by side, and the ways' log-probability.

    choices: int64 [ways] each, the number of an option."""

    def __init__(self, nb, choices, ways):
        self.nb, self.real, self.choices = nb, nb.draw_row, iter(choices)
        self.log_chance = torch.zeros(ways, dtype=torch.float64)

    def choose(self, options, log_chance):
        """options: [k, ...]; log_chance: [ways, k], -inf where one is impossible."""
        chosen = next(self.choices, None)
        if chosen is None:
            raise Undecided(*(log_chance > -math.inf).nonzero(as_tuple=True))
        self.log_chance += log_chance.gather(1, chosen[:, None])[:, 0]
        return options[chosen]

    def draw_row(self, walks, images, known, *rest, **options):
        # Who draws in each column: the same particles in all ways.
        self.free = iter((~known).view(len(self.log_chance), -1, known.shape[1])[0].T)
        return self.real(walks, images, known, *rest, **options)

    def draw_levels(self, logits, uniforms):
        free, levels = next(self.free), range(logits.shape[1])
        if not free.any():
            return torch.zeros(len(logits), dtype=torch.long)
        log_probs = torch.log_softmax(logits.double(), dim=1).unflatten(0, (len(self.log_chance), -1))
        options = torch.tensor([*itertools.product(*(levels if draws else [0] for draws in free))])
        log_chance = log_probs[:, free.nonzero()[:, 0], options[:, free]].sum(dim=2)
        return self.choose(options, log_chance).flatten()

    def multinomial(self, log_weights, count, fixed):
        """The first `fixed` go to particle 0, the others by weight."""
        values = [[0]] * fixed + [range(log_weights.shape[1])] * (count - fixed)
        options = torch.tensor([*itertools.product(*values)])
        return self.choose(options, torch.log_softmax(log_weights, dim=1)[:, options[:, fixed:]].sum(dim=2))

    def resample(self, log_weights, count, generators, reference=False):
        if reference:
            return self.multinomial(log_weights, count, 1)
        # Systematic: the share of the one random number for which all places fall where the option says.
        options = torch.tensor([*itertools.combinations_with_replacement(range(log_weights.shape[1]), count)])
        cdf = torch.nn.functional.pad(torch.softmax(log_weights, dim=1).cumsum(dim=1), (1, 0))
        cdf[:, -1] = 1
        low = (cdf[:, options] * count - torch.arange(count)).amax(dim=2).clamp(min=0)
        high = (cdf[:, options + 1] * count - torch.arange(count)).amin(dim=2).clamp(max=1)
        return self.choose(options, (high - low).clamp(min=0).log())


def plant(forced, patch, name, wrong):
    """wrong(forced, the right one, *its arguments) in place of a method of Particles or of a function."""
    owner = forced.nb.Particles if hasattr(forced.nb.Particles, name) else forced.nb
    right = getattr(owner, name)
    patch.setattr(owner, name, lambda *arguments, **options: wrong(forced, right, *arguments, **options))


def every_way(nb, compute, cases, mistake=None):
    """(case, int64 [ways]; log-probability given it; result) of every way in which compute(case) can go, with a
    mistake if one is to be planted: (what to replace, by what).

    KEPT is raised so that the power of a look depends on the particles."""
    case, choices = torch.arange(cases), []
    while True:
        forced = Forced(nb, choices, len(case))
        with pytest.MonkeyPatch.context() as patch:
            for name in ("draw_row", "draw_levels", "resample"):
                patch.setattr(nb, name, getattr(forced, name))
            patch.setattr(nb, "uniform_streams", lambda n, count, *_: torch.zeros(count, n, dtype=torch.float64))
            patch.setattr(nb, "in_batches", lambda function, count, *_: [function(slice(0, count))])
            patch.setattr(nb.np.random, "default_rng", lambda _: None)
            patch.setattr(nb, "KEPT", 0.9)
            if mistake:
                plant(forced, patch, *mistake)
            try:
                return case, forced.log_chance, compute(case)
            except Undecided as undecided:
                ways, option = undecided.args
        case, choices = case[ways], [*(chosen[ways] for chosen in choices), option]


def case_of(nb, height, hidden, learned):
    """(guide told of the evidence, its table: exact_posterior) of `hidden` rows above known ones: height x 1 pixels of
    2 levels, float64; the guide is the model alone, or with a meaningless network."""
    torch.manual_seed(0)
    config = nb.Config(height, 1, 2, embedding=3, channels=8, bottleneck=4, dilations=(1, 2), context=2)
    model, network = nb.PixelCNN(config).double().eval().requires_grad_(False), None
    for parameter in model.parameters():
        parameter.add_(0.5 * torch.randn_like(parameter))
    model.head.weight.mul_(2)
    if learned:
        network = nb.GuideNetwork.starting_from(model, (1,))
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        network.powers.copy_(torch.tensor([0.7, 0.6]))
    images, evidence = nb.all_images(model), torch.ones(height, 1, dtype=torch.uint8)
    known = torch.arange(height)[:, None] >= hidden
    table = nb.exact_posterior(images, nb.log_prob(model, images), evidence, known)
    return nb.Guide(model, network).told(evidence[None], known), table


# height, hidden rows, looks, copies, particles of a free run and of one with a reference
CASES = {"one look": (4, 2, {7: 1.0}, 1, 3, 3), "two looks": (5, 3, {5: 0.5, 10: 1.0}, 1, 3, 2),
         "copies": (4, 2, {7: 1.0}, 2, 3, 2), "copies, no look": (4, 2, {}, 2, 3, 2)}


def errors(nb, case, learned, mistake=None):
    """By how much three claims are off: the expectation of Z-hat and of every completion's part of it; with an exact
    posterior draw as reference E[Z / Z-hat] = 1; and picking one by weight then leaves the posterior as it is."""
    height, hidden, looks, copies, *sizes = CASES[case]
    guide, (support, posterior, log_z) = case_of(nb, height, hidden, learned)
    found = []
    for n, held in zip(sizes, (False, True)):
        def compute(case):
            images = support[case]
            return nb.smc(guide[torch.zeros_like(case)], images, n, case, images if held else None, looks, copies)

        way, log_chance, runs = every_way(nb, compute, len(support) if held else 1, mistake)
        chance = log_chance.exp() * (posterior[way] if held else 1)
        assert abs(chance.sum() - 1) < 1e-12 and (runs.draws[..., hidden:, :] == 1).all()
        codes = nb.completion_codes(runs.draws.flatten(0, 1), guide.known, 2)
        share = torch.softmax(runs.log_w, dim=1) if held else (runs.log_w - log_z).exp() / n
        found.append((codes.bincount((chance[:, None] * share).flatten(), len(support)) - posterior).abs().max().item())
        if held:
            found.append(abs((chance * (log_z - runs.log_z).exp()).sum() - 1).item())
    return dict(zip(("free", "move", "held"), found))


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_in_expectation_a_run_is_exact(nb, case, learned):
    """Within 1e-12, from the model alone and from a guide whose hints mean nothing. The controls: MISTAKES."""
    assert max(errors(nb, case, learned).values()) < 1e-12


def look_with(mistake):
    """Particles.look with a mistake in what it resamples by, in the mean that it adds, or in what it notes."""
    def look(forced, _, particles, promise, most, count):
        nb, factor, held = forced.nb, particles.log_factor, particles.reference is not None
        potential = nb.largest_power(promise, factor, most) * promise
        log_weights = potential + (getattr(particles, "mean", 0) if mistake == "not divided" else factor)
        index = nb.resample(log_weights, count, particles.generators, held)
        averaged = log_weights[:, 1:] if mistake == "reference" and held else log_weights
        among = count if mistake == "copies" else averaged.shape[1]
        particles.mean = averaged.logsumexp(1, keepdim=True) - math.log(among)
        particles.log_factor = particles.mean - (0 * potential if mistake == "forgotten" else potential)
        particles.pick(index)
        return index
    return "look", look


def resample_with(choose):
    """choose(forced, log weights, count) in place of multinomial resampling where there is a reference."""
    return "resample", lambda forced, right, log_weights, count, generators, reference=False: (
        choose(forced, log_weights, count) if reference else right(log_weights, count, generators))


def reference_not_copied(_, right, particles, times):
    r, n = particles.eve.shape
    if n == 1 or particles.reference is None:
        return right(particles, times)
    particles.pick((torch.arange(times - 1, n * times) // times).expand(r, -1))


def children(*kept):
    """Which of the reference's two children at the seam keep its rows. (Before it there are two particles.)"""
    def draw(forced, right, particles, walks):
        n, reference, row = particles.eve.shape[1], particles.reference, particles.row
        if n == 2 or reference is None:
            return right(particles, walks)

        def draw_row(walks, images, known, *rest, **options):
            for number in kept:
                known[number::n], images[number::n, row] = True, reference[:, row]
            return forced.draw_row(walks, images, known, *rest, **options)

        particles.reference = None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(forced.nb, "draw_row", draw_row)
            logits = right(particles, walks)
        particles.reference = reference
        return logits
    return "draw", draw


def promise_sees_the_reference(_, right, particles, refresh=True):
    images, n = particles.images, particles.eve.shape[1]
    if particles.reference is not None:
        particles.images = images.clone()
        particles.images[::n, particles.row :] = particles.reference[:, particles.row :]
    found, particles.images = right(particles, refresh), images
    return found


def weights_without_g(_, right, particles, refresh=True):
    return right(particles, refresh) + particles.log_g


# name: (case, what is planted, which of the claims it breaks)
MISTAKES = {
    "promise in place of its ratio to the look before": ("two looks", look_with("not divided"), "free move held"),
    "that at the seam": ("copies", look_with("not divided"), "free move held"),
    "looks not divided out": ("one look", look_with("forgotten"), "free move held"),
    "mean not over all copies": ("copies", look_with("copies"), "free held"),
    "reference left out of the mean": ("one look", look_with("reference"), "held"),
    "reference resampled": ("one look", resample_with(lambda forced, w, n: forced.multinomial(w, n, 0)), "move held"),
    "systematic with a reference": ("one look", resample_with(
        lambda forced, w, n: forced.resample(w, n, None).index_fill(1, torch.tensor(0), 0)), "move held"),
    "power of the others only": ("one look", ("largest_power", lambda _, right, promise, before, most: right(
        promise[:, 1:], before[:, 1:], most)), "move held"),
    "reference not copied": ("copies, no look", ("multiply", reference_not_copied), "move held"),
    "none of its children kept": ("copies, no look", children(), "move held"),
    "all its children kept": ("copies, no look", children(0, 1), "move held"),
    "promise sees what is not drawn": ("one look", ("promise", promise_sees_the_reference), "move held"),
    "weights without g": ("one look", ("promise", weights_without_g), "free move held"),
    # Replaced by what is right, so that what is replaced is not the mistake:
    "no mistake in a look": ("two looks", look_with(None), ""),
    "one of its children kept": ("copies, no look", children(0), "")}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_break_what_they_should(nb, mistake):
    """By more than 1e-4, from the model alone; whatever else holds still holds within 1e-12."""
    case, planted, broken = MISTAKES[mistake]
    for claim, error in errors(nb, case, False, planted).items():
        assert error > 1e-4 if claim in broken.split() else error < 1e-12, claim


def sweep_matrix(nb, guide, table, known, pick="resample"):
    """P[x, x'] of a sweep by bands of one row, three candidates, over the hidden rows of `known`."""
    support = table[0]

    def compute(case):
        return nb.gibbs_sweep_by_bands(guide, support[case], known, [0] * len(case), 1, 3,
                                       lambda *arguments: getattr(nb, pick)(*arguments))

    case, log_chance, images = every_way(nb, compute, len(support))
    matrix = torch.zeros(len(support), len(support), dtype=torch.float64)
    codes = nb.completion_codes(images, guide.known, 2)
    return matrix.index_put_((case, codes), log_chance.exp(), accumulate=True)


@pytest.mark.parametrize("learned", [False, True])
def test_the_matrix_of_a_sweep_by_bands_keeps_the_posterior(nb, learned):
    """Within 1e-12: of two hidden rows of four, and of each band alone. The controls: bands chosen by what is in the
    first; picking evenly; leaving the reference out."""
    guide, table = case_of(nb, 4, 2, learned)
    place, posterior = torch.arange(4)[:, None], table[1]
    both, first, second = (sweep_matrix(nb, guide, table, known) for known in (place >= 2, place != 0, place != 1))
    wrong = [sweep_matrix(nb, guide, table, place >= 2, pick) for pick in ("pick_evenly", "pick_without_reference")]
    wrong.append(torch.where((table[0][:, 0] == 0), first, second))  # by what is in the first
    for matrix, right in [*((x, True) for x in (both, first, second)), *((x, False) for x in wrong)]:
        assert (matrix.sum(1) - 1).abs().max() < 1e-12 and (matrix >= 0).all()
        change = (posterior @ matrix - posterior).abs().max()
        assert change < 1e-12 if right else change > 1e-3
    assert (first - torch.eye(4)).abs().max() > 0.1  # it moves


@pytest.mark.parametrize("held", [False, True])
def test_resample_copies_in_proportion_to_the_weights(nb, held):
    """What the enumeration takes for granted: all values of the random numbers on a grid, within 2e-3. With a reference
    each place is drawn for itself and place 0 goes on; without, the counts are those of n w rounded down or up."""
    shares = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64)
    grid = (np.arange(1000) + 0.5) / 1000

    def numbers(u):
        return SimpleNamespace(random=lambda size=None: u if size is None else (u + 0.31 * np.arange(size)) % 1)

    index = torch.cat([nb.resample(shares.log(), 3, [numbers(u)], held) for u in grid])
    if held:
        assert (index[:, 0] == 0).all()
        for place in (1, 2):
            assert (index[:, place].bincount() / 1000 - shares).abs().max() < 2e-3
    else:
        counts = torch.nn.functional.one_hot(index, 4).sum(dim=1)
        assert (counts.double().mean(0) - 3 * shares).abs().max() < 2e-3
        assert (counts >= (3 * shares).floor()).all() and (counts <= (3 * shares).ceil()).all()


STATISTICAL = {"top row": (0, 1, 2), "two rows": (0, 1, 2, 3, 4, 5), "scattered": (0, 2, 4, 7),
               "every second row": (0, 1, 2, 6, 7, 8), "one pixel": (4,)}


def strong(nb, tiny):
    """A guide whose hints are strong and mean nothing."""
    return meaningless_guide(nb, tiny, 3, 0.15, [0.7, 0.6])


def case_3x3(nb, guide, table, image, mask):
    """As case_of."""
    known = known_mask(*STATISTICAL[mask])
    return guide.told(image[None], known), nb.exact_posterior(*table, image, known)


def largest_z(found):
    return max(found["largest_z"], found["evidence_z"])


@pytest.mark.parametrize("n", [3, 9])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("mask", STATISTICAL)
def test_runs_agree_with_the_table(nb, tiny, table, evidence, mask, learned, n):
    """E[Z-hat / Z] = 1 and each completion above 0.02, from 1,000 runs: detects 5.1 standard errors, 1 to 10 % of Z."""
    guide = meaningless_guide(nb, tiny, 3, 0.05, [0.7, 0.6]) if learned else nb.Guide(tiny)
    found = nb.runs_against_table(*case_3x3(nb, guide, table, evidence[4], mask), 1000, n)
    assert largest_z(found) < t_bound(1000), found


def test_runs_that_forget_their_looks_do_not(nb, tiny, table, evidence, monkeypatch):
    """Negative control, and a second one: the weights without log g."""
    case = case_3x3(nb, nb.Guide(tiny), table, evidence[4], "scattered")
    for mistake in (("look", lambda _, right, *rest: nb.look_that_forgets(*rest)), ("promise", weights_without_g)):
        with monkeypatch.context() as patch:
            plant(Forced(nb, [], 1), patch, *mistake)
            assert largest_z(nb.runs_against_table(*case, 1000, 12)) > 2 * t_bound(1000)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("learned", [False, True])
def test_what_a_run_reports_is_what_full_passes_say(nb, tiny, evidence, learned, held):
    """Within 1e-10, known pixels among the hidden ones: log p of every draw, with looks and copies; without them the
    log weights are log p - log g. With a reference, draw 0 is it."""
    known, guide = known_mask(0, 1, 4, 6, 8), strong(nb, tiny) if learned else nb.Guide(tiny)
    reference = torch.where(known, evidence, 2 - evidence) if held else None
    for options in ({}, dict(looks={}, copies=1)):
        found = nb.smc(guide.told(evidence, known), evidence, 7, range(6), reference, **options)
        draws = found.draws.flatten(0, 1)
        assert (found.log_p.flatten() - nb.log_prob(tiny, draws)).abs().max() < 1e-10
        assert (found.draws[:, :, known] == evidence[:, None, known]).all() and len(draws.unique(dim=0)) > 6
        assert not held or torch.equal(found.draws[:, 0], reference)
    log_g = torch.stack([guide_log_prob(nb, guide, x, known) for x in found.draws])
    assert (found.log_w - found.log_p + log_g).abs().max() < 1e-10


def test_a_run_does_not_depend_on_the_others(nb, tiny, evidence, monkeypatch):
    """Six at once, as many as CPU_PIXELS allows, each alone: the same draws, the weights within 1e-12. (The control:
    other seeds.)"""
    told, real, batches = strong(nb, tiny).told(evidence, known_mask(0, 1, 2, 4)), nb.in_batches, []
    together, other = (nb.smc(told, evidence, 9, seeds) for seeds in (range(5, 11), range(6)))
    monkeypatch.setattr(nb, "in_batches", lambda *arguments: batches.append(arguments[2]) or real(*arguments))
    for pixels in (4 * 9 * 9, 1):
        monkeypatch.setattr(nb, "CPU_PIXELS", pixels)
        parts = nb.smc(told, evidence, 9, range(5, 11))
        assert torch.equal(parts.draws, together.draws) and torch.equal(parts.eve, together.eve)
        assert (parts.log_w - together.log_w).abs().max() < 1e-12
    assert batches == [4, 1] and not torch.equal(together.draws, other.draws)


def test_kin_of_one_eve_share_the_rows_above_the_first_look_and_others_do_not(nb):
    """6x6 pixels of 16 levels, where no prefix is drawn twice. The control: siblings as draws of their own, with which
    there are more lineages than prefixes."""
    torch.manual_seed(1)
    model = nb.PixelCNN(nb.Config(6, 6, 16, embedding=4, channels=8, bottleneck=8, dilations=(1, 2), context=4))
    model.double().eval().requires_grad_(False)
    known, image = torch.arange(6)[:, None].expand(6, 6) >= 4, nb.sample(model, 1, seed=1)
    found = nb.smc(nb.Guide(model).told(image, known), image, 40, [3])
    prefixes = found.draws[0, :, :1].flatten(1).unique(dim=0, return_inverse=True)[1]

    def same(x):
        return x[:, None] == x

    share = torch.softmax(found.log_w[0], dim=0)
    lineages = 1 / prefixes.bincount(share).square().sum().item()
    assert torch.equal(same(found.eve[0]), same(prefixes)) and abs(found.lineages - lineages) < 1e-9
    found.eve = torch.arange(40)[None]
    assert not torch.equal(same(found.eve[0]), same(prefixes)) and found.lineages > 1.2 * lineages


def test_looks_stand_inside_the_hidden_rows_and_before_known_ones(nb):
    rows = torch.arange(28)[:, None].expand(28, 28)
    assert list(nb.look_rows(rows >= 14, nb.LOOKS)) == [5, 7, 10, 12]
    assert list(nb.look_rows((rows < 10) | (rows >= 18), nb.LOOKS)) == [13, 14, 16]
    assert list(nb.look_rows(rows % 2 == 0, nb.LOOKS))[0] > 1
    for known in (rows < 14, rows >= 1, rows >= 0, rows < 0):
        assert nb.look_rows(known, nb.LOOKS) == {}


def test_a_look_uses_the_largest_power_that_keeps_enough(nb):
    """A fifth stays effective, and at the next larger power would not; the most where all do; the best where none
    does."""
    generator = torch.Generator().manual_seed(0)
    promise, before = (scale * torch.randn(5, 100, generator=generator).double() for scale in (60, 0.3))
    power = nb.largest_power(promise, before, 1.0)
    sizes = [nb.ess(times * power * promise + before) for times in (1, 2**0.25)]
    assert (sizes[0] >= 20).all() and (sizes[1] < 20).all() and (power < 1).all()
    assert (nb.largest_power(0 * promise, before, 0.25) == 0.25).all()
    power = nb.largest_power(promise, 100 * before, 0.5)
    sizes = torch.stack([nb.ess(0.5 * 2 ** (-k / 4) * promise + 100 * before) for k in range(41)])
    assert (sizes < 20).all() and (nb.ess(power * promise + 100 * before) == sizes.amax(dim=0)).all()
