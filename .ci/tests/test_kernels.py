"""The kernels' transition matrices, an exact rank test, and the coverage of intervals, on the 3x3 model."""

import pytest
import torch
from bounds import chi_square_bound, t_bound
from guides import guide_log_prob


def known_mask(*unknown):
    known = torch.ones(3, 3, dtype=torch.bool)
    known.view(-1)[list(unknown)] = False
    return known


def forced_chances(nb, monkeypatch, acceptance, states, forced, guide, redrawn, beta, look):
    """With what probability `redraw` accepts the proposals `forced` that differ from the states, all in one part.

    Both its decisions are left to the acceptance that it computes: its random numbers are made so small that all pass.
    """
    ratios, real = [], nb.draw_pixels

    def recorded(*arguments):
        ratios.append(acceptance(*arguments))
        return ratios[-1]

    def draw(walks, images, known, *rest, **options):
        images.copy_(forced)
        return real(walks, images, torch.ones_like(known), *rest, **options)

    guide.batch = len(states)
    with monkeypatch.context() as patch:
        patch.setattr(nb, "draw_pixels", draw)
        patch.setattr(nb, "uniform", lambda shape, *_: torch.zeros(shape, dtype=torch.float64))
        nb.redraw(nb.start(guide, states), guide, redrawn, beta, torch.Generator(), recorded, look)
    early, whole = ratios
    there, back = (nb.LOOSE + early).clamp(max=0), (nb.LOOSE - early).clamp(max=0)
    return there.exp() * (whole + back - there).clamp(max=0).exp()


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
            "no proposal ratio": lambda: right + run,  # j >= i: the pixels' own factors, which the proposal cancels
            "proposal ratio upside down": lambda: right + 2 * run,
            "later unknowns dropped": lambda: beta * (gain_p - gain_g),
            "beta on the unknowns": lambda: gain_p - gain_g + beta * (gain_g - run),
            "path without g": lambda: right - (1 - beta) * gain_g,
            "beta forgotten": lambda: right + (1 - beta) * gain_p,
        }[mistake]()
    return acceptance


MISTAKES = ["forward Gibbs", "last future factor dropped", "no proposal ratio", "later unknowns dropped",
            "beta on the unknowns"]


def transition_matrix(nb, monkeypatch, guide, support, known, redrawn, beta, mistake=None, look=1):
    """P[x, x'] of `redraw` of the pixels `redrawn` on the completions `support`, from the acceptance it computes.

    Every proposal is forced once for every state; its probability, under the guide told of all other pixels, comes from
    a full pass.
    """
    count, dropped = len(support), 0.0
    states = support.repeat_interleave(count, 0)
    forced = torch.where(redrawn, support.repeat(count, 1, 1), states)
    differs = (forced != states).flatten(1).any(1)
    twins = (support[None, :, redrawn] == support[:, None, redrawn]).all(-1).sum(1).repeat(count)  # the same proposal
    proposal = guide_log_prob(nb, guide, forced, ~redrawn).exp() / twins
    if mistake == "last future factor dropped":
        new, old = (nb.pixel_log_probs(guide.model, images[differs], 4096)[:, 2, 2] for images in (forced, states))
        dropped = (new - old) * (beta if known[2, 2] else 1)
    accepted, told = torch.ones(len(states), dtype=torch.float64), guide.told(support[:1], known[None])
    accepted[differs] = forced_chances(nb, monkeypatch, wrong_acceptance(nb, mistake, dropped), states, forced, told,
                                       redrawn, beta, look)
    source, target = torch.arange(count).repeat_interleave(count), nb.completion_codes(forced, known, 3)
    matrix = torch.zeros(count, count, dtype=torch.float64)
    matrix.index_put_((source, target), proposal * accepted, accumulate=True)
    matrix.index_put_((source, source), proposal * (1 - accepted), accumulate=True)
    return matrix


def tempered(nb, model, support, known, beta):
    terms = nb.pixel_log_probs(model, support, 4096)
    return torch.softmax(terms[:, ~known].sum(1) + beta * terms[:, known].sum(1), dim=0)


MOVES = [((0, 1, 2), 0, 1), ((0, 1, 2), 1, 2), ((0, 1, 2), 0, 3), ((0, 3, 4), 0, 4), ((0, 3, 4), 2, 5),
         ((1, 5, 6), 1, 7)]


@pytest.mark.parametrize("beta, look", [(0.4, 1), (1.0, 0), (1.0, 4)])
@pytest.mark.parametrize("unknown, start, stop", MOVES)
def test_the_transition_matrix_keeps_its_target(nb, tiny, table, evidence, monkeypatch, unknown, start, stop, beta,
                                                look):
    """Rows sum to 1, pi P = pi within 1e-12: single pixels, runs, and runs over known pixels; decided early or not."""
    known = known_mask(*unknown)
    support, run = nb.exact_posterior(*table, evidence[1], known)[0], nb.pixels_between(~known, start, stop)
    matrix = transition_matrix(nb, monkeypatch, nb.Guide(tiny), support, known, run, beta, look=look)
    assert_reversible(matrix, tempered(nb, tiny, support, known, beta))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_transition_matrix_of_a_wrong_kernel_does_not(nb, tiny, table, evidence, monkeypatch, mistake):
    known = known_mask(0, 3, 4)
    support = nb.exact_posterior(*table, evidence[1], known)[0]
    pi = tempered(nb, tiny, support, known, 0.4)
    matrix = transition_matrix(nb, monkeypatch, nb.Guide(tiny), support, known, ~known_mask(0), 0.4, mistake)
    assert (pi @ matrix - pi).abs().max() > 1e-4


def rank_statistic(start, evidence, n, move, sites, seed, near=1e-12):
    """Chi-square of the ranks of n true images' evidence terms in chains through them (7 steps: 7 degrees of freedom).

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
        lambda state, site, generator: nb.redraw(state, guide, nb.pixels_between(~known, site, site + 1), 1.0,
                                                 generator, accept=wrong_acceptance(nb, mistake)), sites, seed)


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
    """95 % intervals (t with replicates - 1 degrees) of log p(known) for 80 images, tempered: 66 to 80 must cover.

    Detects a true coverage below 0.66 in all but one of a thousand cases; the control's are 0.35 times as wide.
    """
    known, covered, narrow = known_mask(0, 1, 4), 0, 0
    for seed in range(80):
        image = nb.sample(tiny, 1, seed=1000 + seed)[0]
        guide, generator = nb.Guide(tiny).told(image[None], known[None]), torch.Generator().manual_seed(seed)
        draws, weights, _ = guide.draw(image, replicates * 60, seed)
        draws, weights = draws.view(1, replicates, 60, 3, 3), weights.view(1, replicates, 60)
        _, log_z, _ = nb.temper(guide, draws, weights, nb.Budget(particles=30), generator)
        log_evidence, stderr = nb.Replicates(None, log_z[0][:, None], None, None).mean_log_z()
        off = abs(log_evidence - nb.exact_posterior(*table, image, known)[2])
        covered, narrow = covered + (off < t * stderr), narrow + (off < 0.35 * t * stderr)
    assert covered >= 66 > narrow


def strange_network(nb, tiny):
    """h with random weights: hints of every kind."""
    torch.manual_seed(4)
    network = nb.GuideNetwork.starting_from(tiny, (1, 2))
    for parameter in network.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return network


@pytest.mark.parametrize("learned", [False, True])
def test_culled_draws_carry_their_weights(nb, tiny, table, evidence, learned):
    """log p - log g is that of whole passes, within 1e-10; E[Z-hat / Z] = 1 and E[Z-hat times a completion's share / Z]
    its probability, within 5.1 errors of 500 replicates of 10. The control: without the offset both are far off."""
    known = known_mask(0, 2, 4, 7)
    image, guide = evidence[1], nb.Guide(tiny, strange_network(nb, tiny) if learned else None)
    told = guide.told(image[None], known[None])
    draws, weights, offset, values = nb.draw_looking_ahead(told, image, 500, 10, 3)
    flat = draws.flatten(0, 1)
    assert (flat[:, known] == image[known]).all() and offset.std() > 0.1  # culling took place
    right = nb.log_prob(tiny, flat) - guide_log_prob(nb, guide, flat, known)
    assert (weights.flatten() - right).abs().max() < 1e-10
    assert (values[0].flatten() - nb.log_prob(tiny, flat)).abs().max() < 1e-10
    support, posterior, log_evidence = nb.exact_posterior(*table, image, known)
    codes = nb.completion_codes(flat, known, 3).view(500, 10)
    zs = []
    for log_w in (weights + offset, weights):
        ratios = (log_w - log_evidence).exp() / 10
        shares = torch.zeros(500, 81, dtype=torch.float64).scatter_add_(1, codes, ratios)
        shares = torch.cat([shares[:, nb.completion_codes(support, known, 3)], shares.sum(1, keepdim=True)], dim=1)
        truth = torch.cat([posterior, torch.ones(1, dtype=torch.float64)])
        z = 500**0.5 * (shares.mean(0) - truth) / shares.std(0)
        zs.append(z[truth > 0.02].abs().max())
    assert zs[0] < t_bound(500) < 10 < zs[1]


@pytest.mark.parametrize("learned", [False, True])
def test_culled_draws_are_tempered_without_bias(nb, tiny, table, evidence, learned):
    """400 replicates of twelve draws, culled, tempered and moved, ten kept of each: E[Z-hat / Z] = 1 and each
    completion's probability, within 5.1 errors: 3 to 10 % of Z. The control: what culling has multiplied by is not
    divided out.
    """
    known, image = known_mask(0, 2, 4, 7), evidence[1]
    guide = nb.Guide(tiny, strange_network(nb, tiny) if learned else None).told(image[None], known[None])
    answer, found = nb.exact_posterior(*table, image, known), []
    for draw in (nb.draw_looking_ahead, nb.without_offset):
        budget = nb.Budget(replicates=400, initial=12, particles=10, band=2)
        result = nb.tempered_against_table(guide, answer, budget, 3, draw)
        of_evidence = (result["evidence_ratio"] - 1) / result["evidence_stderr"]
        print(f"E[Z-hat / Z]: {result['evidence_ratio']:.3f} +- {result['evidence_stderr']:.3f}, largest |z| of a "
              f"completion {result['largest_z']:.1f}; {result['steps']} steps, culled by {result['culled']:.2f}")
        found.append(max(abs(of_evidence), result["largest_z"]))
        assert result["steps"] > 1 and (result["culled"] > 0.1) == (len(found) == 1)
    assert found[0] < t_bound(400) < 8 < found[1]


@pytest.mark.parametrize("learned", [False, True])
def test_what_the_walk_keeps_is_what_the_full_pass_says(nb, tiny, evidence, learned):
    """Logits of every factor in the rows redrawn, within 1e-10, with known pixels and rows among them."""
    known = known_mask(0, 1, 6, 8)
    network = strange_network(nb, tiny) if learned else None
    guide = nb.Guide(tiny, network).told(evidence[:1], known[None])
    images = evidence[:1].repeat(50, 1, 1)
    uniforms = torch.rand(9, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = guide.draw_rows(images, guide.new_cache(50), uniforms, 0, 3)
    assert len(images.unique(dim=0)) > 5
    whole = [tiny(images)] + ([network(images, guide.hint)] if learned else [])
    assert len(kept) == len(whole)
    for mine, full in zip(kept, whole):
        assert (mine - full).abs().max() < 1e-10


def test_bookkeeping_stays_right_through_moves_that_are_decided_early(nb, tiny, evidence):
    """log p and log g of every pixel after two sweeps are those of a fresh evaluation, within 1e-10."""
    known, generator = known_mask(0, 1, 3, 4), torch.Generator().manual_seed(1)
    for network in (None, strange_network(nb, tiny)):
        guide = nb.Guide(tiny, network).told(evidence[:1], known[None])
        guide.batch = 37
        state = nb.start(guide, guide.draw(evidence[0], 200, 1)[0])
        for look in (0, 1, 0, 2):
            for piece in nb.random_pieces(~known, 2, generator, rows=network is not None):
                moved, accepted = nb.redraw(state, guide, piece, 0.6, generator, look=look)
        assert moved > accepted > 0
        again = nb.start(guide, state.images)
        assert (state.log_p - again.log_p).abs().max() < 1e-10 and (state.log_g - again.log_g).abs().max() < 1e-10
