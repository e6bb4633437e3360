"""Answers against enumeration on the 3x3 model; weights and Gibbs moves in every way in which a few draws can go."""

import math
from dataclasses import replace
from functools import partial

import arviz
import numpy as np
import pytest
import torch
from conftest import MANY, either_guide, known_mask, strong, t_bound

PLACE = torch.arange(9).view(3, 3)


def exact_pixel(nb, table, image, known, pixel):
    """p(x_pixel | known) by enumeration."""
    images, posterior, _ = nb.exact_posterior(*table, image, known)
    return torch.stack([posterior[images[:, pixel // 3, pixel % 3] == level].sum() for level in range(3)])


def test_a_c_and_e_equal_the_table_at_every_pixel(nb, tiny, table, evidence):
    """Within 1e-10, six images at once; A is B at the first pixel; a pixel may be a list. It would see a
    neighbour in a pixel's place, and images that change places. The control: E without the factors j > i is C."""
    for pixel in range(9):
        place = divmod(pixel, 3)
        past, rest = nb.given_past(tiny, evidence, place), nb.given_rest(tiny, evidence, place)
        assert past.dtype == rest.dtype == torch.float64
        exact_past, exact_rest = (torch.stack([exact_pixel(nb, table, image, known, pixel) for image in evidence])
                                  for known in (PLACE < pixel, PLACE != pixel))
        assert (past - exact_past).abs().max() < 1e-10 and (rest - exact_rest).abs().max() < 1e-10
        assert pixel == 8 or ((past - exact_rest).abs().amax(dim=1) > 1e-4).all()
        for ask, found in ((nb.given_past, past), (nb.given_rest, rest)):
            assert torch.equal(ask(tiny, evidence, list(place)), found)


@pytest.mark.parametrize("pixel", [0, 4, 8])
def test_b_agrees_with_the_table_within_its_error(nb, tiny, table, evidence, pixel):
    """Detects a bias of 5 standard errors at n = 4000; that of the first pixel is exact but for rounding. The
    control: C, which knows a past."""
    exact = exact_pixel(nb, table, evidence[0], PLACE < 0, pixel)
    probs, error = nb.marginal(tiny, divmod(pixel, 3), n=4000, seed=1)
    assert ((probs - exact).abs() <= MANY * error + 1e-10).all() and (error < 0.02).all()
    assert (error > 1e-15).any() == (pixel > 0)  # equal terms may differ in their last bit, by their place in a vector
    if pixel:
        assert ((nb.given_past(tiny, evidence[:1], divmod(pixel, 3))[0] - exact).abs() > MANY * error).any()


@pytest.mark.parametrize("known, pixel, learned", [
    (PLACE > 5, 5, False), (PLACE > 5, 5, True), (known_mask(1, 3, 4, 6), 4, True), (PLACE < 3, 4, False),
    (PLACE != 4, 4, False)], ids=["D", "D by a guide", "some", "a prefix", "E"])
def test_d_agrees_with_the_table_within_its_error(nb, tiny, table, evidence, monkeypatch, known, pixel, learned):
    """40 answers, whatever their status: their mean within 5.9 of its standard errors (the control: the pixel given its
    past alone); in the mean square they are off as much as they say. It would see a mask read in another order, picks
    without weights, an error of the draws alone or of the picks alone (by the guide there are four times as many), and
    the status of other draws. With one pixel hidden D is E."""
    monkeypatch.setattr(nb, "PICKED", 96 if learned else 24)
    exact, place = exact_pixel(nb, table, evidence[5], known, pixel), divmod(pixel, 3)
    guide = either_guide(nb, tiny, learned)
    answers = [nb.conditional(tiny, evidence[5], known, place, 512, guide, seed) for seed in range(40)]
    probs, errors = zip(*(nb.mean_of_picked(*answer) for answer in answers))
    status = [found.status for found, _ in answers]
    assert [nb.complete(tiny, evidence[5], known, 512, guide, seed).status for seed in range(40)] == status
    assert learned == (len(set(status)) > 1)
    probs, errors = torch.stack(probs), torch.stack(errors)
    bound = t_bound(40) * probs.std(dim=0) / 40**0.5 + 1e-10
    assert ((probs.mean(dim=0) - exact).abs() < bound).all()
    assert ((nb.given_past(tiny, evidence[5:], place)[0] - exact).abs() > bound).any()
    if (~known).sum() == 1:
        assert (probs - exact).abs().max() < 1e-10 and errors.max() < 1e-10
    else:
        assert 0.4 < (probs - exact).square().mean() / errors.square().mean() < 2


@pytest.mark.parametrize("learned", [False, True])
def test_any_mask_is_completed_and_log_z_and_the_mean_are_those_of_the_table(nb, tiny, table, learned):
    """47 masks (with a meaningless guide 11), all pixels and none among them: log Z within 1e-10 where no known pixel
    follows a hidden one, else within 5 stated errors, and so the mean of the hidden pixels' levels times 1, 2, 3 ...;
    known pixels stay. (Whatever the status: k-hat refuses some of these right answers.) It would see a mask that is
    turned or read in another order. The control: weights without g, of which at most a quarter come so near."""
    guide, near = either_guide(nb, tiny, learned), []
    for number in range(0, 512, 51 if learned else 11):
        known = (number >> PLACE & 1) == 1
        image = nb.sample(tiny, 1, seed=number)[0]
        answer = nb.complete(tiny, image, known, 4000, guide, seed=number)
        assert answer.draws.shape == (4000, 3, 3) and answer.draws.dtype == torch.uint8
        assert (answer.draws[:, known] == image[known]).all()
        support, posterior, exact = nb.exact_posterior(*table, image, known)
        (log_z, error), exact_draws = answer.log_z, known.flatten().int().diff().max() <= 0
        assert abs(log_z - exact) < (1e-10 if exact_draws else 5 * error), number
        values, listed = (x[:, ~known].double() @ torch.arange(1.0, 1 + (~known).sum()).double()
                          for x in (answer.draws, support))
        mean, mean_error = answer.mean(values)
        assert abs(mean - posterior @ listed) <= 5 * mean_error + 1e-10, number
        if not exact_draws:
            without_g = answer._replace(log_w=nb.log_prob(tiny, answer.draws))
            near.append(abs(without_g.log_z[0] - exact) < 5 * error)
    assert sum(near) <= 0.25 * len(near) and len(near) > 7


@pytest.mark.parametrize("n", [1, 5, 300])
def test_exact_draws_have_equal_weights_however_many(nb, tiny, evidence, n):
    """Every prefix, any guide: they are converged, and what `sample` draws. It would see
    weights that differ by a rounding, of which few are refused. The control: a known pixel after a hidden one."""
    guide = either_guide(nb, tiny, True)
    for last in range(10):
        found = nb.complete(tiny, evidence[1], PLACE < last, n, guide, seed=2)
        assert found.status == "converged" and len(found.log_w.unique()) == 1
        assert torch.equal(found.draws, nb.sample(tiny, n, image=evidence[1], known=PLACE < last, seed=2))
    assert len(nb.complete(tiny, evidence[1], PLACE != 7, 300).log_w.unique()) > 1


def weighted(nb, log_w):
    """A Weighted of draws that do not matter."""
    log_w = torch.as_tensor(log_w, dtype=torch.float64)
    return nb.Weighted(torch.zeros(len(log_w), 1, 1, dtype=torch.uint8), log_w)


@pytest.mark.parametrize("effective", [256, 64, 12, 1])
def test_errors_are_those_of_weighted_draws(nb, effective):
    """Of 256 draws `effective` have the weight e^-3, the others 0: log Z, its error, ESS, the mean and its error are
    those of `effective` equal draws, within 1e-9. It would see any other formula."""
    found = weighted(nb, torch.where(torch.arange(256) < effective, -3.0, -math.inf))
    log_z, error = found.log_z
    assert abs(log_z - math.log(effective / 256) + 3) < 1e-9 and abs(found.ess - effective) < 1e-9
    assert abs(error - (1 / effective - 1 / 256) ** 0.5) < 1e-9
    values = torch.randn(256, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, error = found.mean(values)
    counted = values[:effective]
    spread = counted.std(dim=0, correction=0) * (256 / 255 / effective) ** 0.5
    assert (mean - counted.mean(dim=0)).abs().max() < 1e-9 and (error - spread).abs().max() < 1e-9


def test_errors_are_as_large_as_they_say(nb, tiny, table, evidence):
    """Of log Z and of a mean level, 100 answers of 256 draws: in the mean square they are off as much as they say, by a
    factor of 0.4 to 2. The control: the spread of one weight, and the error of a mean without weights."""
    known, rows = known_mask(0, 1, 3), []
    support, posterior, exact = nb.exact_posterior(*table, evidence[2], known)
    exact_mean = posterior @ nb.ink_of(support, known)
    for seed in range(100):
        found = nb.complete(tiny, evidence[2], known, 256, seed=seed)
        values = nb.ink_of(found.draws, known)
        (log_z, error), (mean, mean_error) = found.log_z, found.mean(values)
        rows.append([log_z - exact, mean - exact_mean, error, mean_error, 16 * error, values.std() / 16])
    off, stated, wrong = torch.tensor(rows, dtype=torch.float64).square().mean(dim=0).split(2)
    assert ((0.4 < off / stated) & (off / stated < 2)).all()
    assert not ((0.4 < off / wrong) & (off / wrong < 2)).any(), off / wrong


@pytest.mark.parametrize("n", [25, 100, 1000, 4000])
@pytest.mark.parametrize("tail", ["normal", "t", "Pareto", "bounded"])
def test_k_hat_is_arvizs(nb, n, tail):
    """Within 1e-6, of log weights about 700. The control: with twice as many in the tail it is another number."""
    numbers = np.random.default_rng(n)
    log_w = 700 + dict(normal=numbers.normal(size=n) * 2, t=numbers.standard_t(3, n), bounded=numbers.random(n),
                       Pareto=0.8 * numbers.exponential(size=n))[tail]
    found = weighted(nb, log_w).k_hat
    with np.errstate(over="ignore"):  # inside arviz
        right, other = (arviz.psislw(log_w, reff)[1] for reff in (1, 0.25))  # 3 sqrt(n / reff), if below n / 5
    assert abs(found - right) < 1e-6 and (n < 225 or abs(found - other) > 1e-3)


def pareto(k, n):
    """Log weights: the quantiles of a Pareto distribution of shape k."""
    return [-k * math.log((i + 0.5) / n) for i in range(n)]


@pytest.mark.parametrize("log_w, converged", [
    ([-5.0], True), ([-5.0] * 3, True), ([0.0] * 21 + [-math.inf] * 200, True), ([0.0] * 19 + [-math.inf] * 200, False),
    ([0.0] * 18 + [-1e-9], False), ([0.0, -1e-9] * 11, True), (pareto(0.5, 2000), True), (pareto(0.9, 2000), False),
    ([4.0] + [0.0] * 99, False), ([-math.inf] * 99 + [0.0], False)])
def test_only_answers_with_enough_draws_and_no_heavy_tail_are_believed(nb, monkeypatch, log_w, converged):
    """Equal weights, at least 20 effective draws and a k-hat of at most 0.7. It would see a rule that asks for one of
    these, and a pass without a number. The controls: without a limit each is believed, with none each is refused."""
    found = weighted(nb, log_w)
    assert found.status == ("converged" if converged else "not converged")
    assert converged or (found.ess < 20) != (found.k_hat > 0.7)  # one reason alone
    with monkeypatch.context() as patch:
        patch.setattr(nb, "MIN_ESS", 0)
        patch.setattr(nb, "MAX_K_HAT", math.inf)
        assert found.status == "converged"
    for limit, never in (("MIN_ESS", math.inf), ("MAX_K_HAT", math.nan)):
        with monkeypatch.context() as patch:
            patch.setattr(nb, limit, never)
            assert found.status == ("converged" if len(set(log_w)) == 1 else "not converged")


def test_no_two_parts_of_an_answer_and_no_two_seeds_share_a_draw_or_a_number(nb, config, monkeypatch):
    """Seeds 0, 1 and 2, on a model of which no draw comes twice by chance: what `sample` and `complete` draw, and all
    numbers behind them, behind the picks of `conditional`, and behind Gibbs sweeps. It would see picks by numbers that
    made the draws, which they would favour, and seeds that overlap. The control: the same seed."""
    model = nb.PixelCNN(replace(config, levels=256)).eval().requires_grad_(False)
    image, known, draw, numbers = torch.zeros(5, 4, dtype=torch.uint8), nb.raster(model) > 9, nb.uniforms, []
    monkeypatch.setattr(nb, "uniforms", lambda *arguments: numbers.append(draw(*arguments)) or numbers[-1])
    start, picks = image.repeat(3, 1, 1), lambda seed: nb.conditional(model, image, known, (2, 1), 40, seed=seed)
    sweep = partial(nb.sweep_at_once, model, None, known, candidates=9)
    for ask, least in (
            (lambda seed: nb.sample(model, 50, seed=seed), 1000), (lambda seed: picks(seed)[1], 824),
            (lambda seed: nb.complete(model, image, known, 40, seed=seed).draws, 800),
            (lambda seed: nb.gibbs(sweep, start, 3, seed)[1:].flatten(0, 1), 1449)):
        numbers.clear()
        draws = [ask(seed) for seed in range(3)]
        used = torch.cat([part.flatten() for part in numbers])
        assert len(used.unique()) == len(used) == 3 * least
        if least in (800, 1000):
            assert len(torch.cat(draws).unique(dim=0)) == sum(map(len, draws))
        assert torch.equal(ask(1), draws[1])


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("hidden", [(0, 1, 2), (0, 3, 6, 7), (8,)])
def test_evidence_that_cannot_be_is_said_to_be_so(nb, evidence, hidden, learned):
    """A level of probability 0 at any one of the known pixels, or for question E: it would see an answer that is not a
    number. The control: without it the image is answered."""
    model, known = nb.tiny_model(), known_mask(*hidden)
    model.head.bias[2] = -math.inf
    image, guide = evidence[1].clamp(max=1), either_guide(nb, model, learned)
    assert nb.complete(model, image, known, 20, guide).log_z[0] > -math.inf
    for place in PLACE[known]:
        with pytest.raises(ValueError, match="impossible evidence"):
            nb.complete(model, torch.where(PLACE == place, 2, image), known, 20, guide)
    assert nb.given_rest(model, image[None], (1, 1))[0, 2] == 0
    with pytest.raises(ValueError, match="impossible evidence"):
        nb.given_rest(model, torch.stack([image, torch.full_like(image, 2)]), (1, 1))


# Every way, enumerated: 4x1 pixels of 2 levels -------------------------------------------------------

class EveryWay:
    """draw_categorical that draws the digits of code, int64 [m], for m images side by side, each with k draws;
    log_chance: of all that was drawn. mistake: of the logits of a pick among candidates."""

    def __init__(self, code, candidates=0, mistake=None):
        self.code, self.log_chance = code.clone(), torch.zeros(len(code), dtype=torch.float64)
        self.candidates, self.mistake = candidates, mistake

    def draw_categorical(self, logits, uniforms):
        options = logits.shape[1]
        if self.mistake and options == self.candidates:
            logits = self.mistake(logits)
        powers = options ** torch.arange(uniforms.numel() // len(self.code) + 1)
        chosen = self.code[:, None] // powers[:-1] % options
        self.code //= powers[-1]
        log_probs = logits.double().log_softmax(1).repeat_interleave(uniforms.numel() // len(logits), dim=0)
        self.log_chance += log_probs.gather(1, chosen.view(-1, 1)).view(chosen.shape).sum(dim=1)
        return chosen.view_as(uniforms)


@pytest.fixture(params=[False, True], ids=["model", "guide"])
def case(nb, request):
    """(model, guide, known, table), float64, the upper two pixels hidden; the guide is None, or means nothing."""
    model = strong(nb, 4, 1, (1, 2), levels=2)
    model.head.weight.mul_(2)
    known, images = torch.arange(4)[:, None] >= 2, nb.all_images(model)
    table = nb.exact_posterior(images, nb.log_prob(model, images), torch.ones(4, 1, dtype=torch.uint8), known)
    return model, either_guide(nb, model, request.param), known, table


def test_in_expectation_over_every_way_the_mean_weight_is_z(nb, case, monkeypatch):
    """Three draws, 64 ways, within 1e-12: E[Z-hat] = Z, and each completion's part of it is its probability. Detects a
    weight without g, a chance that is not what was drawn from, draws that share a beginning too long. The control: p in
    place of p / g."""
    model, guide, known, (support, posterior, log_z) = case
    total, z_hat = torch.zeros(2, dtype=torch.float64)
    parts, wrong = torch.zeros(2, 4, dtype=torch.float64)
    for code in torch.arange(64).split(1):
        ways = EveryWay(code)
        monkeypatch.setattr(nb, "draw_categorical", ways.draw_categorical)
        found = nb.Weighted(*nb.draw_many(model, support[0], known, 3, 0, guide))
        assert not ways.code.any() and (found.draws[:, known] == 1).all()
        total += ways.log_chance.exp().item()
        z_hat += (ways.log_chance + found.log_z[0] - log_z).exp().item()
        for sums, log_w in ((parts, found.log_w), (wrong, nb.log_prob(model, found.draws))):
            weights = (ways.log_chance + log_w - log_z).exp() / 3
            sums += weights.sum() * nb.frequencies(found.draws, known, 2, weights)
    assert abs(total - 1) < 1e-12 and abs(z_hat - 1) < 1e-12 and (parts - posterior).abs().max() < 1e-12
    assert abs(wrong.sum() - 1) > 0.1


def matrix(nb, monkeypatch, case, sweep, ways, candidates=0, mistake=None):
    """P[x, x'] of a sweep of images [m, h, w], from every state in so many ways, which are all."""
    _, _, known, (support, _, _) = case
    states = torch.arange(4).repeat_interleave(ways)
    every = EveryWay(torch.arange(ways).repeat(4), candidates, mistake)
    with monkeypatch.context() as patch:
        patch.setattr(nb, "draw_categorical", every.draw_categorical)
        moved = sweep(images=support[states], generator=torch.Generator())
    assert not every.code.any() and (moved[:, known] == 1).all()  # no two ways are the same
    codes, found = moved[:, ~known].long() @ torch.tensor([1, 2]), torch.zeros(4, 4, dtype=torch.float64)
    found.index_put_((states, codes), every.log_chance.exp(), accumulate=True)
    assert (found.sum(dim=1) - 1).abs().max() < 1e-12
    return found


def test_gibbs_moves_keep_the_posterior(nb, case, monkeypatch):
    """Within 1e-12, in every way that they can go: a sweep pixel by pixel, and one of all hidden pixels at once with 2
    or 3 candidates. The controls, mistakes that change it by 1e-3: forward conditionals; candidates picked evenly; what
    is there left out, or weighed without g."""
    model, guide, known, (_, posterior, _) = case

    def change(found):
        return (posterior @ found - posterior).abs().max()

    def at_once(candidates, mistake=None):
        sweep = partial(nb.sweep_at_once, model, guide, known, candidates=candidates)
        return matrix(nb, monkeypatch, case, sweep, 4 ** (candidates - 1) * candidates, candidates, mistake)

    def by_pixels():
        return matrix(nb, monkeypatch, case, partial(nb.sweep_by_pixels, model, known), 4)

    for right in (by_pixels(), at_once(2), at_once(3)):
        assert change(right) < 1e-12 and (right - torch.eye(4)).abs().max() > 0.1  # it moves
    for mistake in (torch.zeros_like, lambda logits: logits.index_fill(1, torch.tensor(0), -math.inf)):
        assert change(at_once(3, mistake)) > 1e-3
    monkeypatch.setattr(nb, "log_weights", lambda model, images, *_: nb.log_prob(model, images))
    assert change(at_once(2)) > 1e-3 and change(at_once(3)) > 1e-3
    monkeypatch.setattr(nb, "given_rest", nb.given_past)
    assert change(by_pixels()) > 1e-3
