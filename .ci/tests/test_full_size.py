"""The released networks, 28x28 pixels and 256 levels: two hidden pixels enumerated, and an exact rank test."""

import pytest
import torch
from bounds import t_bound
from guides import released_guide
from second_sampler import log_evidences, parallel_tempering
from surprise import surprise_z
from test_kernels import RANK_BOUND, rank_statistic, wrong_acceptance

pytestmark = pytest.mark.slow
NEAR = 1e-3  # nats, for float32
IMAGE, ROW, COLUMN = 5, 26, 11  # two neighbours in the last row of a digit
BOUND = t_bound(16)  # 8.4


@pytest.fixture(scope="module")
def model(nb, root):
    return nb.load_checkpoint(root / "checkpoints" / "small.pt", "cpu")


@pytest.fixture(scope="module")
def guide(nb, root, model):
    return released_guide(nb, root, model)


@pytest.fixture(scope="module")
def pair(nb, model, mnist):
    """(image, mask with two neighbours unknown, log p of all 65,536 pairs of levels given the rest, log p(known)).

    The digit is moved down by three rows, so that only two rows have to be evaluated for each pair.
    """
    image = mnist[2][IMAGE].roll(3, 0)
    known = torch.ones(28, 28, dtype=torch.bool)
    known[ROW, COLUMN : COLUMN + 2] = False
    fast = nb.FastNetwork(model)
    above = fast.new_cache(1)
    fast.rows(image[None, :ROW], above, 0)
    cache = [[part.repeat(256, *[1] * (part.ndim - 1)) for part in parts] for parts in above]  # all alike
    images, terms = image.repeat(256, 1, 1), []
    images[:, ROW, COLUMN + 1] = torch.arange(256)
    for level in range(256):
        images[:, ROW, COLUMN] = level
        log_probs = nb.gather_log_probs(fast.rows(images, cache, ROW), images[:, ROW:]).flatten(1)
        terms.append(log_probs[:, COLUMN:].sum(dim=1))
    terms = torch.stack(terms)
    total = terms.flatten().logsumexp(0)
    before = nb.pixel_log_probs(model, image[None])[0].flatten()[: ROW * 28 + COLUMN].sum()
    return image, known, terms - total, (before + total).item()


def test_samples_are_as_surprising_as_the_model_expects(nb, model):
    """z of 256 draws; it would see T = 0.95, or the last bit of 4 % of the ink flipped: a stale cache, for instance."""
    draws = nb.sample(model, 256, seed=3)
    generator = torch.Generator().manual_seed(0)
    hit = (draws > 1) & (torch.rand(draws.shape, generator=generator) < 0.04)
    assert abs(surprise_z(nb, model, draws)) < 4
    assert surprise_z(nb, model, nb.sample(model, 256, seed=3, temperature=0.95)) < -6
    assert surprise_z(nb, model, torch.where(hit, draws ^ 1, draws)) > 6


def test_draws_and_weights_do_not_depend_on_the_number_of_threads(nb, guide, mnist, monkeypatch):
    """To the last bit: which number was fast must not show. (The control: another seed.)"""
    known, before, found = torch.arange(784).view(28, 28) >= 5 * 28, torch.get_num_threads(), []
    told = guide.told(mnist[2][:1], known[None])
    monkeypatch.setattr(nb, "at_best_pace", lambda columns: columns)
    try:
        for threads, seed in ((1, 0), (2, 0), (1, 1)):
            torch.set_num_threads(threads)
            found.append(told.draw(mnist[2][0], 128, seed))
    finally:
        torch.set_num_threads(before)
    for one, two, other in zip(*found):
        assert torch.equal(one, two) and not torch.equal(one, other)


def z_of(log_probs, draws):
    """Largest |z| over log p of the pair and its two levels, for draws uint8 [replicates, n, h, w].

    The exact distribution turns each value into a number that is uniform for right draws (probability of less, and a
    random part of that of equal). So the means cannot hang on levels too rare to be drawn.
    """
    probs, generator = log_probs.exp(), torch.Generator().manual_seed(9)
    one, two = draws[..., ROW, COLUMN].long(), draws[..., ROW, COLUMN + 1].long()
    order = log_probs.flatten().argsort()
    found = []
    for share, value in ((probs.flatten()[order], order.argsort()[256 * one + two]),
                         (probs.sum(1), one), (probs.sum(0), two)):
        equal = torch.rand(value.shape, generator=generator, dtype=torch.float64) * share[value]
        means = ((share.cumsum(0) - share)[value] + equal).mean(dim=1)
        found.append((means.mean() - 0.5).abs() / (means.std() / len(means) ** 0.5))
    return torch.stack(found).max().item()  # nan if one is nan


@pytest.mark.parametrize("learned", [False, True])
def test_complete_meets_the_enumeration_of_two_pixels(nb, model, guide, pair, learned):
    """All 65,536 pairs: three quantities and E[Z-hat / Z] = 1, within 8.4 standard errors of 16 replicates."""
    image, known, log_probs, log_evidence = pair
    told = (guide if learned else nb.Guide(model)).told(image[None], known[None])
    generator = torch.Generator().manual_seed(3)
    draws, weights, _ = told.draw(image, 16 * 32, 3)
    budget = nb.Budget(replicates=16, initial=32, particles=8, tails=2)
    weights = weights.view(1, 16, 32)
    state, log_z, _ = nb.temper(told, draws.view(1, 16, 32, 28, 28), weights, budget, generator)
    nb.move(state, told, budget, 1.0, generator)
    ratio = (log_z[0] - log_evidence).exp()
    assert abs(ratio.mean() - 1) < BOUND * ratio.std() / 4
    assert z_of(log_probs, state.images.view(16, 8, 28, 28)) < BOUND


def test_parallel_tempering_and_gibbs_meet_it_and_forward_gibbs_does_not(nb, model, pair):
    """Gibbs: a sweep from exact draws must leave exact draws. Forward "Gibbs" misses by more than 8.4 errors."""
    image, known, log_probs, _ = pair
    chains = parallel_tempering(nb, model, image, known, [0.0, 0.2, 1.0], 30, 16, 2, seed=5)[0]
    assert z_of(log_probs, chains[:, 6:]) < BOUND
    generator, swept = torch.Generator().manual_seed(1), []
    for code in torch.multinomial(log_probs.exp().flatten(), 64, True, generator=generator).tolist():
        start = image.clone()
        start[ROW, COLUMN], start[ROW, COLUMN + 1] = divmod(code, 256)
        swept.append(nb.gibbs_sweep(model, start, known, generator))
    assert z_of(log_probs, torch.stack(swept).view(16, 4, 28, 28)) < BOUND
    assert z_of(log_probs, nb.sample(model, 256, image=image, known=known, seed=2).view(16, 16, 28, 28)) > BOUND


def test_complete_agrees_with_parallel_tempering(nb, model, guide, mnist):
    """4x4 hidden pixels of a digit: three means and log Z, within 5 errors of 8 replicates and 8 chains. The control:
    draws of the forward "Gibbs", whose evidence term is off by more."""
    image, known, betas = mnist[2][1], torch.ones(28, 28, dtype=torch.bool), [0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0]
    known[12:16, 12:16] = False
    ours = nb.complete(model, image, known, 1, seed=30, guide=guide).diagnostics["replicates"]
    _, values, evidences = parallel_tempering(nb, model, image, known, betas, 40, seed=31)
    theirs = nb.Replicates(None, log_evidences(betas, evidences[..., 10:])[:, None], None, None)
    pairs = [(*ours.mean_log_z(), *theirs.mean_log_z())]
    for name, mine, means in zip(nb.SUMMARIES, ours.values, values[..., 10:].mean(dim=2)):
        pairs.append((*ours.over(ours.within(mine)), means.mean(), means.std() / len(means) ** 0.5))
    zs = [float((a - b) / (da**2 + db**2) ** 0.5) for a, da, b, db in pairs]
    print("complete against parallel tempering, in errors:", [round(z, 1) for z in zs])
    assert max(map(abs, zs)) < 5
    wrong = nb.evidence_log_probs(model, nb.sample(model, 64, image=image, known=known, seed=32), known)
    _, _, mean, error = pairs[2]  # of the evidence term
    assert abs(wrong.mean() - mean) > 5 * (error**2 + wrong.var() / len(wrong)) ** 0.5


def statistic_of(nb, guide, kernel, n=96, accept=None):
    """The rank statistic of the kernels "run" (of the model) and "block" (of the guide), hidden centre of 8x8."""
    images, accept = nb.sample(guide.model, n, seed=71), nb.log_acceptance if accept is None else accept
    known = torch.ones(28, 28, dtype=torch.bool)
    known[10:18, 10:18] = False
    places, unknown = torch.Generator().manual_seed(72), (~known.flatten()).nonzero()[:, 0]
    # At beta = 1 the guide drops out of the target, so that one serves all images.
    if kernel == "run":
        guide = nb.Guide(guide.model)
        sites = unknown[torch.randint(len(unknown), (7, 1), generator=places)].tolist()
    else:
        sites = torch.randint(10, 15, (7, 1, 2), generator=places).tolist()
    guide = guide.told(images[:1], known[None])

    def move(state, place, generator):
        where = torch.zeros(28, 28, dtype=torch.bool)
        if kernel == "run":
            where = nb.pixels_between(~known, place, place + 4)
        else:
            where[place[0] : place[0] + 4, place[1] : place[1] + 4] = True
        nb.redraw(state, guide, where, 1.0, generator, accept)
    return rank_statistic(lambda index: nb.start(guide, images[index]), lambda state: state.log_p[:, known].sum(1), n,
                          move, sites, 73, NEAR)


@pytest.mark.parametrize("kernel", ["run", "block"])
def test_ranks_of_the_truth_are_uniform_at_full_size(nb, guide, kernel):
    """Detects a kernel whose evidence term drifts from the truth's."""
    assert statistic_of(nb, guide, kernel) < RANK_BOUND


def test_the_rank_test_at_full_size_rejects_kernels_that_accept_everything(nb, guide):
    """(96 images are too few to see a block's proposal ratio forgotten or upside down; the 3x3 matrices show those.)"""
    wrong = wrong_acceptance(nb, "forward Gibbs")
    assert statistic_of(nb, guide, "run", 192, wrong) > RANK_BOUND  # with 96, one seed in nine was short of it
    assert statistic_of(nb, guide, "block", accept=wrong) > RANK_BOUND
