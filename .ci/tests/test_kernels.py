"""The kernels' transition matrices, an exact rank test, and the coverage of intervals, on the 3x3 model."""

import pytest
import torch
from bounds import chi_square_bound


def known_mask(*unknown):
    known = torch.ones(3, 3, dtype=torch.bool)
    known.view(-1)[list(unknown)] = False
    return known


def forced_ratios(nb, monkeypatch, acceptance, forced, move):
    """The log ratios that move(accept) computes by `acceptance` when all its proposals are `forced`."""
    ratios = []

    def recorded(*arguments):
        ratios.append(acceptance(*arguments))
        return ratios[-1]

    with monkeypatch.context() as patch:
        patch.setattr(nb, "draw_pixels", lambda walks, *_: walks[0].images.copy_(forced))
        move(recorded)
    return ratios[0]


def matrix_of(nb, support, known, states, forced, proposal, log_ratios):
    """P[x, x'] from every proposal `forced` at every state, its probability, and the log ratios of those that differ."""
    accepted, count = torch.ones(len(states), dtype=torch.float64), len(support)
    accepted[(forced != states).flatten(1).any(1)] = log_ratios.clamp(max=0).exp()
    order = {code: number for number, code in enumerate(nb.completion_codes(support, known, 3).tolist())}
    target = torch.tensor([order[code] for code in nb.completion_codes(forced, known, 3).tolist()])
    source = torch.arange(count).repeat_interleave(count)
    matrix = torch.zeros(count, count, dtype=torch.float64)
    matrix.index_put_((source, target), proposal * accepted, accumulate=True)
    matrix.index_put_((source, source), proposal * (1 - accepted), accumulate=True)
    return matrix


def assert_reversible(matrix, pi):
    """Rows sum to 1, pi P = pi, and detailed balance, within 1e-12."""
    flow = pi[:, None] * matrix
    assert (matrix.sum(1) - 1).abs().max() < 1e-12
    assert (pi @ matrix - pi).abs().max() < 1e-12
    assert (flow - flow.T).abs().max() < 1e-12


def wrong_acceptance(nb, mistake, dropped=0.0):
    """log_acceptance, or with a mistake in it. dropped: what the last future factor has to say, to be left out."""
    def acceptance(beta, gain_p, gain_g, redrawn):
        right, run = nb.log_acceptance(beta, gain_p, gain_g, redrawn), redrawn[1] - redrawn[0]
        return {
            None: lambda: right,
            "forward Gibbs": lambda: torch.zeros_like(right),  # every proposal is accepted
            "last future factor dropped": lambda: right - dropped,
            "no proposal ratio": lambda: right + run,  # j >= i: the pixels' own factors, though the proposal cancels them
            "proposal ratio upside down": lambda: right + 2 * run,
            "later unknowns dropped": lambda: beta * (gain_p - gain_g),
            "beta on the unknowns": lambda: gain_p - gain_g + beta * (gain_g - run),
            "path without g": lambda: right - (1 - beta) * gain_g,
            "beta forgotten": lambda: right + (1 - beta) * gain_p,
        }[mistake]()
    return acceptance


MISTAKES = ["forward Gibbs", "last future factor dropped", "no proposal ratio", "later unknowns dropped",
            "beta on the unknowns"]


def transition_matrix(nb, monkeypatch, model, support, known, start, stop, beta, mistake=None):
    """P[x, x'] of `redraw` with the model as guide on the completions `support`, from the acceptance it computes.

    Every proposal is forced once for every state; its probability comes from the full pass.
    """
    run = nb.pixels_between(~known, start, stop)
    count = len(support)
    states = support.repeat_interleave(count, 0)
    forced = torch.where(run, support.repeat(count, 1, 1), states)
    twins = (support[None, :, run] == support[:, None, run]).all(-1).sum(1).repeat(count)  # same proposal, again
    terms = nb.pixel_log_probs(model, forced, 4096)
    proposal = terms[:, run].sum(1).exp() / twins
    last = (terms - nb.pixel_log_probs(model, states, 4096))[:, 2, 2][(forced != states).flatten(1).any(1)]
    wrong = wrong_acceptance(nb, mistake, last * (beta if known[2, 2] else 1))
    guide = nb.Guide(model).told(support[:1], known[None])
    ratios = forced_ratios(nb, monkeypatch, wrong, forced, lambda accept: nb.redraw(
        nb.start(guide, states), guide, run, beta, torch.Generator(), accept=accept))
    return matrix_of(nb, support, known, states, forced, proposal, ratios)


def tempered(nb, model, support, known, beta):
    terms = nb.pixel_log_probs(model, support, 4096)
    return torch.softmax(terms[:, ~known].sum(1) + beta * terms[:, known].sum(1), dim=0)


MOVES = [((0, 1, 2), 0, 1), ((0, 1, 2), 1, 2), ((0, 1, 2), 0, 3), ((0, 3, 4), 0, 4), ((0, 3, 4), 2, 5), ((1, 5, 6), 1, 7)]


@pytest.mark.parametrize("beta", [0.4, 1.0])
@pytest.mark.parametrize("unknown, start, stop", MOVES)
def test_the_transition_matrix_keeps_its_target(nb, tiny, table, monkeypatch, unknown, start, stop, beta):
    """Rows sum to 1 and pi P = pi within 1e-12: single pixels, runs, and runs over known pixels."""
    known, image = known_mask(*unknown), nb.sample(tiny, 2, seed=5)[1]
    support = nb.exact_posterior(*table, image, known)[0]
    pi = tempered(nb, tiny, support, known, beta)
    matrix = transition_matrix(nb, monkeypatch, tiny, support, known, start, stop, beta)
    assert_reversible(matrix, pi)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_transition_matrix_of_a_wrong_kernel_does_not(nb, tiny, table, monkeypatch, mistake):
    known, image = known_mask(0, 3, 4), nb.sample(tiny, 2, seed=5)[1]
    support = nb.exact_posterior(*table, image, known)[0]
    pi = tempered(nb, tiny, support, known, 0.4)
    matrix = transition_matrix(nb, monkeypatch, tiny, support, known, 0, 1, 0.4, mistake)
    assert (pi @ matrix - pi).abs().max() > 1e-4


def rank_statistic(start, evidence, n, move, sites, seed, near=1e-12):
    """Chi-square of the ranks of n true images' evidence terms in chains through them (7 degrees of freedom for 7 steps).

    Gandy & Scott 2020: the images of start(index) are exact draws of the model, each its own evidence, at a random
    time of a chain. Step number t makes the moves move(state, site, generator) for the sites of sites[t]; all chains
    share them. Each move is reversible, so a chain goes on from its true image with the steps after it, and back
    with those before it, in reverse: given the sites the chains are independent and the ranks uniform. (With steps
    counted from the true image instead they are not, as sites that all chains share do not average out.) Evidence
    terms, evidence(state), that differ by at most `near` are equal: the same image in another batch.
    """
    generator = torch.Generator().manual_seed(seed)
    times, ranks = torch.randint(len(sites) + 1, (n,), generator=generator), []
    for time in range(len(sites) + 1):
        index = (times == time).nonzero()[:, 0]
        values = [evidence(start(index))]
        for steps in (sites[time:], [step[::-1] for step in sites[:time][::-1]]):
            state = start(index)
            for step in steps:
                for site in step:
                    move(state, site, generator)
                values.append(evidence(state))
        values = torch.stack(values)
        noise = torch.rand(values.shape, generator=generator, dtype=torch.float64)  # breaks ties
        below = (values < values[0] - near) | (((values - values[0]).abs() <= near) & (noise < noise[0]))
        ranks.append(below[1:].sum(dim=0))
    expected = n / (len(sites) + 1)
    return ((torch.cat(ranks).bincount(minlength=len(sites) + 1) - expected) ** 2 / expected).sum().item()


def rank_statistic_of_sites(nb, tiny, known, seed, n=4000, mistake=None):
    """Of two single-site moves a step on the 3x3 model, each at a random site."""
    images, unknown = nb.sample(tiny, n, seed=seed, batch_size=n), (~known.flatten()).nonzero()[:, 0]
    sites = unknown[torch.randint(len(unknown), (7, 2), generator=torch.Generator().manual_seed(seed + 1))].tolist()
    guide = nb.Guide(tiny).told(images[:1], known[None])  # the model alone: it serves all images
    return rank_statistic(
        lambda index: nb.start(guide, images[index]), lambda state: state.log_p[:, known].sum(1), n,
        lambda state, site, generator: nb.redraw(state, guide, nb.pixels_between(~known, site, site + 1), 1.0, generator,
                                                 accept=wrong_acceptance(nb, mistake)), sites, seed)


RANK_BOUND = chi_square_bound(7)  # 42


@pytest.mark.parametrize("unknown", [(0, 1, 2), (0, 4, 5, 7)])
def test_ranks_of_the_truth_are_uniform(nb, tiny, unknown):
    """Of the evidence term, 4,000 images: detects shares of the 8 ranks that are off by about an eighth of 0.125."""
    assert rank_statistic_of_sites(nb, tiny, known_mask(*unknown), seed=21) < RANK_BOUND


@pytest.mark.parametrize("mistake", ["forward Gibbs", "no proposal ratio"])
def test_the_rank_test_rejects_wrong_kernels(nb, tiny, mistake):
    """Four times the images, since with 4,000 the second mistake escapes some seeds."""
    assert rank_statistic_of_sites(nb, tiny, known_mask(0, 1, 2), seed=21, n=16_000, mistake=mistake) > RANK_BOUND


@pytest.mark.parametrize("replicates, t", [(20, 2.09), (4, 3.18)])
def test_intervals_cover(nb, tiny, table, replicates, t):
    """95 % intervals (t with replicates - 1 degrees) of log p(known) for 80 images: 66 to 80 must cover.

    Detects a true coverage below 0.66 in all but one of a thousand cases; the control's intervals are 0.35 times as wide.
    """
    known, covered, narrow = known_mask(0, 1, 4), 0, 0
    for seed in range(80):
        image = nb.sample(tiny, 1, seed=1000 + seed)[0]
        completion = nb.complete(tiny, image, known, 1, nb.Budget(replicates, 60, 30), seed=seed)
        stderr = nb.log_mean(completion.diagnostics["log_evidences"])[1]
        off = abs(completion.log_evidence - nb.exact_posterior(*table, image, known)[2])
        covered, narrow = covered + (off < t * stderr), narrow + (off < 0.35 * t * stderr)
    assert covered >= 66 > narrow
