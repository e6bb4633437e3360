"""Answers against enumeration on the 3x3 model; weights and Gibbs moves in every way in which a few draws can go."""

import itertools
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import MANY, either_guide, known_mask, strong, t_bound

PLACE = torch.arange(9).view(3, 3)


def exact_pixel(nb, table, image, known, pixel):
    """p(x_pixel | known) by enumeration."""
    images, posterior, _ = nb.exact_posterior(*table, image, known)
    return torch.stack([posterior[images[:, pixel // 3, pixel % 3] == level].sum() for level in range(3)])


def test_a_c_and_e_equal_the_table_at_every_pixel(nb, tiny, table, evidence):
    """Within 1e-10; A is B at the first pixel. It would see a pixel's neighbour in its place. The control: E without
    the factors j > i is C."""
    for pixel in range(9):
        place = divmod(pixel, 3)
        for image in evidence:
            exact = exact_pixel(nb, table, image, PLACE != pixel, pixel)
            past = nb.conditional_given_past(tiny, image, place)
            assert (past - exact_pixel(nb, table, image, PLACE < pixel, pixel)).abs().max() < 1e-10
            assert (nb.conditional_given_rest(tiny, image, place) - exact).abs().max() < 1e-10
            assert pixel == 8 or (past - exact).abs().max() > 1e-4
    first = nb.marginal(tiny, (0, 0))
    assert first.status == "exact" and first.stderr is None
    assert (first.probs - exact_pixel(nb, table, image, PLACE < 0, 0)).abs().max() < 1e-10


def test_b_agrees_with_the_table_within_its_error(nb, tiny, table, evidence):
    """Detects a bias of 5 standard errors at n = 4000. The control: prefixes that are not the model's."""
    exact, estimate = exact_pixel(nb, table, evidence[0], PLACE < 0, 4), nb.marginal(tiny, (1, 1), n=4000, seed=1)
    assert estimate.status == "sampled" and ((estimate.probs - exact).abs() < MANY * estimate.stderr).all()
    uniform = torch.randint(0, 3, (4000, 3, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    wrong = nb.predictive(tiny, uniform, (1, 1))
    assert ((wrong.mean(dim=0) - exact).abs() > MANY * wrong.std(dim=0) / 4000**0.5).any()


def test_d_agrees_with_the_table_within_its_error(nb, tiny, table, evidence, monkeypatch):
    """40 answers: their mean within 5.9 of its standard errors (the control: C, which knows the other side); their own
    errors, without the floor, are as large in the mean square as they say. At the first pixel D is E, at the last B."""
    monkeypatch.setattr(nb, "LEAST_ERROR", 0.0)
    exact = exact_pixel(nb, table, evidence[5], PLACE > 5, 5)
    answers = [nb.conditional_given_future(tiny, evidence[5], (1, 2), most=512, seed=seed) for seed in range(40)]
    assert {answer.status for answer in answers} == {"converged"}
    probs, stderr = (torch.stack([getattr(answer, name) for answer in answers]) for name in ("probs", "stderr"))
    bound = t_bound(40) * probs.std(dim=0) / 40**0.5
    assert ((probs.mean(dim=0) - exact).abs() < bound).all()
    assert ((nb.conditional_given_past(tiny, evidence[5], (1, 2)) - exact).abs() > bound).any()
    assert 0.4 < (probs - exact).square().mean() / stderr.square().mean() < 2
    first, last = (nb.conditional_given_future(tiny, evidence[5], pixel, seed=1) for pixel in ((0, 0), (2, 2)))
    assert first.status == "exact" and torch.equal(first.probs, nb.conditional_given_rest(tiny, evidence[5], (0, 0)))
    assert torch.equal(last.probs, nb.marginal(tiny, (2, 2), seed=1).probs)


@pytest.mark.parametrize("known, status", [
    (PLACE != 4, "exact"), (PLACE < 4, "exact"), (PLACE < 3, "sampled"), (known_mask(1, 3, 4, 6), "converged"),
    (PLACE > 6, "converged")])
def test_a_pixel_given_any_others_agrees_with_the_table_within_its_error(nb, tiny, table, evidence, known, status):
    """40 answers about the middle pixel: their mean within 5.9 of its standard errors; those of independent draws state
    errors as large in the mean square as they are. It would see a mask read in another order, and an error of one draw
    in place of 24. The control: the pixel given its past."""
    exact = exact_pixel(nb, table, evidence[5], known, 4)
    answers = [nb.conditional(tiny, evidence[5], known, (1, 1), most=512, seed=seed) for seed in range(40)]
    assert {answer.status for answer in answers} == {status}
    probs = torch.stack([answer.probs for answer in answers])
    bound = t_bound(40) * probs.std(dim=0) / 40**0.5 + 1e-10
    assert ((probs.mean(dim=0) - exact).abs() < bound).all()
    past = (nb.conditional_given_past(tiny, evidence[5], (1, 1)) - exact).abs()
    assert (past > bound).any() != torch.equal(known, PLACE < 4)
    if status == "sampled":
        stderr = torch.stack([answer.stderr for answer in answers])
        assert 0.4 < (probs - exact).square().mean() / stderr.square().mean() < 2


@pytest.mark.parametrize("learned", [False, True])
def test_any_mask_is_completed_and_its_evidence_is_that_of_the_table(nb, tiny, table, monkeypatch, learned):
    """74 masks (with a meaningless guide 11), all pixels and none among them: within 1e-10 where no known pixel follows
    a hidden one, else within 5 stated errors. It would see a mask that is turned or read in another order. The control:
    weights without g, of which at most a quarter come so near."""
    monkeypatch.setattr(nb, "draws_at_once", lambda model: 512 if learned else 128)
    guide, near = either_guide(nb, tiny, learned), []
    for number in range(0, 512, 51 if learned else 7):
        known = (number >> PLACE & 1) == 1
        image = nb.sample(tiny, 1, seed=number)[0]
        answer = nb.complete(tiny, image, known, 2, guide, seed=number)
        assert answer.draws.shape == (2, 3, 3) and answer.draws.dtype == torch.uint8
        assert (answer.draws[:, known] == image[known]).all()
        exact = nb.exact_posterior(*table, image, known)[2]
        if answer.status == "exact":
            assert abs(answer.log_evidence - exact) < 1e-10 and answer.log_evidence_stderr == 0
            assert torch.equal(answer.draws, nb.sample(tiny, 2, image=image, known=known, seed=number))
            continue
        bound = 5 * answer.log_evidence_stderr
        assert answer.status == "converged" and abs(answer.log_evidence - exact) < bound, number
        near.append(abs(nb.log_mean(answer.found.log_p) - exact) < bound)
    assert sum(near) <= 0.25 * len(near) and len(near) > 7


def test_the_draws_follow_the_posterior(nb, tiny, table, evidence, monkeypatch):
    """300 draws, within 0.13 in total variation of the table, even if all were picked as copies of the least probable.
    It would see moves that are wrong, and the first left out. The control: moves that pick evenly."""
    known = known_mask(0, 1, 3, 4)
    support, posterior, _ = nb.exact_posterior(*table, evidence[2], known)

    def distance():
        draws = nb.complete(tiny, evidence[2], known, 300, most=640, seed=3).draws
        return nb.total_variation(nb.frequencies(draws, known, 3), posterior)

    assert distance() < 0.13
    worst, pick = support[posterior.argmin()], nb.draw_categorical
    monkeypatch.setattr(nb, "pick_by_weight", lambda found, n, seed: worst.repeat(n, 1, 1))
    assert distance() < 0.13
    monkeypatch.setattr(nb, "draw_categorical", lambda x, u: pick(x if x.shape[1] == 3 else 0 * x, u))
    assert distance() > 0.3


def test_a_pilot_decides_and_fresh_draws_answer(nb, tiny, evidence, monkeypatch):
    """The pilot has two batches at least, the answer twice as many as the pilot, and log Z is the answer's alone; a
    larger `most` begins with the same pilot. It would see draws that decide and answer."""
    monkeypatch.setattr(nb, "draws_at_once", lambda model: 32)

    def answer(most):
        found = nb.complete(tiny, evidence[1], known_mask(0, 1, 2), 3, most=most, seed=8)
        return found, [len(part.log_w) // 32 for part in (found.pilot, found.found) if part]

    given, sizes = answer(320)
    assert sizes == [2, 4] and given.status == "converged" and given.log_evidence == nb.log_mean(given.found.log_w)
    monkeypatch.setattr(nb, "MIN_PILOT", 10**6)
    (short, short_sizes), (long, long_sizes) = answer(127), answer(320)  # whole batches, 127 draws at most
    assert short_sizes == [3] and long_sizes == [10]
    assert torch.equal(short.pilot.log_w, long.pilot.log_w[:96])
    monkeypatch.setattr(nb, "MIN_PILOT", nb.ess(long.pilot.log_w[: 32 * 6]) - 1e-6)
    assert answer(320)[1] == [6, 12]


def test_no_two_parts_of_an_answer_and_no_two_seeds_share_a_draw_or_a_number(nb, config, monkeypatch):
    """Seeds 0, 1 and 2, on a model of which no draw comes twice by chance: what `sample` draws; pilots and answers, and
    all numbers behind them, their picks and moves. It would see an answer that takes draws of the pilot, which it would
    favour, candidates that were seen before, and seeds that overlap. The control: the same seed."""
    model = nb.PixelCNN(replace(config, levels=256)).eval().requires_grad_(False)
    image, known, draw, numbers = torch.zeros(5, 4, dtype=torch.uint8), nb.raster(model) > 9, nb.uniforms, []
    monkeypatch.setattr(nb, "uniforms", lambda *arguments: numbers.append(draw(*arguments)) or numbers[-1])

    def completed(seed):
        answer = nb.complete(model, image, known, 40, most=64, seed=seed)
        return torch.cat([answer.pilot.draws, answer.found.draws])

    for ask in (lambda seed: nb.sample(model, 50, seed=seed), completed):
        numbers.clear()
        draws = torch.cat([ask(seed) for seed in range(3)])
        used = torch.cat([part.flatten() for part in numbers])
        assert len(draws.unique(dim=0)) == len(draws) and len(used.unique()) == len(used) >= draws.numel()
        assert torch.equal(ask(0), draws[: len(draws) // 3])


@pytest.mark.parametrize("limit", ["MIN_PILOT", "MIN_ANSWER"])
def test_what_is_not_converged_has_no_error_bar(nb, tiny, evidence, monkeypatch, limit):
    """Neither log Z nor D; its draws are completions all the same. It would see a refusal given as an answer."""
    monkeypatch.setattr(nb, limit, 10**6)
    answer, known = nb.complete(tiny, evidence[1], PLACE > 4, 7, most=64), PLACE > 4
    assert answer.status == "not converged" and answer.log_evidence_stderr is None
    assert (answer.found is None) == (limit == "MIN_PILOT") and answer.log_evidence < 0
    assert (answer.draws[:, known] == evidence[1][known]).all() and len(answer.draws.unique(dim=0)) > 1
    estimate = nb.conditional_given_future(tiny, evidence[1], (1, 1), most=64)
    assert estimate.status == "not converged" and estimate.stderr is None and abs(estimate.probs.sum() - 1) < 1e-12


@pytest.mark.parametrize("effective, stderr", [
    (256, 0.1), (64, (1 / 64 - 1 / 256) ** 0.5), (12, (1 / 12 - 1 / 256) ** 0.5), (8, None)])
def test_the_error_of_log_z_is_that_of_weighted_draws_and_never_less_than_a_tenth(
        nb, tiny, evidence, monkeypatch, effective, stderr):
    """Exact numbers: of 256 draws `effective` have equal weights, the others 0; those of the pilot must not matter. It
    would see any other formula; no error is below 0.1."""
    draw, batch = nb.weighted_draws, itertools.count()

    def given(guide, image, known, n, seed):
        weighted = torch.arange(n) < (64 if next(batch) % 2 == 0 else effective)  # a pilot, what answers
        return draw(guide, image, known, n, seed)._replace(log_w=torch.where(weighted, -3.0, -math.inf).double())

    monkeypatch.setattr(nb, "weighted_draws", given)
    answer = nb.complete(tiny, evidence[1], PLACE > 4, 1, most=128)
    assert abs(answer.log_evidence - math.log(effective / 256) + 3) < 1e-9
    error = answer.log_evidence_stderr
    assert error is None if stderr is None else abs(error - stderr) < 1e-9
    error = nb.conditional_given_future(tiny, evidence[1], (1, 1), most=128).stderr
    assert error is None if stderr is None else (error >= 0.1).all()


@pytest.mark.parametrize("hidden", [(0, 1, 2), (5, 6, 7, 8), (0, 4)])
def test_an_answer_depends_on_the_known_pixels_and_the_seed_alone(nb, tiny, evidence, hidden):
    """It would see hidden pixels that are read. The controls: another known pixel, and another seed."""
    image, known, guide = evidence[1], known_mask(*hidden), either_guide(nb, tiny, True)
    answer = partial(nb.complete, tiny, known=known, n=60, guide=guide, most=320)
    given, same = answer(image, seed=10), answer(torch.where(known, image, 2 - image), seed=10)
    assert torch.equal(same.draws, given.draws) and same.log_evidence == given.log_evidence
    assert answer(torch.where(PLACE == 3, (image + 1) % 3, image), seed=10).log_evidence != given.log_evidence
    assert not torch.equal(answer(image, seed=11).draws, given.draws)


@pytest.mark.parametrize("hidden", [(0, 1, 2), (0, 3, 6, 7), (8,)])
def test_evidence_that_cannot_be_is_said_to_be_so(nb, evidence, hidden):
    """A level of probability 0 at any one of the known pixels, or for question E: it would see an answer that is not a
    number. The control: without it the image is answered."""
    model, known = nb.tiny_model(), known_mask(*hidden)
    model.head.bias[2] = -math.inf
    image = evidence[1].clamp(max=1)
    assert nb.complete(model, image, known, 4, most=64).log_evidence > -math.inf
    for place in PLACE[known]:
        with pytest.raises(ValueError, match="impossible evidence"):
            nb.complete(model, torch.where(PLACE == place, 2, image), known, most=64)
    with pytest.raises(ValueError, match="impossible evidence"):
        nb.conditional_given_rest(model, torch.full_like(image, 2), (1, 1))


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
    """(guide, known, table), float64, the upper two pixels hidden; the guide is the model alone, or means nothing."""
    model = strong(nb, 4, 1, (1, 2), levels=2)
    model.head.weight.mul_(2)
    known, images = torch.arange(4)[:, None] >= 2, nb.all_images(model)
    table = nb.exact_posterior(images, nb.log_prob(model, images), torch.ones(4, 1, dtype=torch.uint8), known)
    return either_guide(nb, model, request.param), known, table


def test_in_expectation_over_every_way_the_mean_weight_is_z(nb, case, monkeypatch):
    """Three draws, 64 ways, within 1e-12: E[Z-hat] = Z, and each completion's part of it is its probability. Detects a
    weight without g, a chance that is not what was drawn from, draws that share a beginning too long. The control: p in
    place of p / g."""
    guide, known, (support, posterior, log_z) = case
    total, parts, wrong = torch.zeros(3, 4, dtype=torch.float64)
    for code in torch.arange(64).split(1):
        ways = EveryWay(code)
        monkeypatch.setattr(nb, "draw_categorical", ways.draw_categorical)
        found = nb.weighted_draws(guide, support[0], known, 3)
        assert not ways.code.any() and (found.draws[:, known] == 1).all()
        for sums, log_w in ((total, 0 * found.log_w + log_z), (parts, found.log_w), (wrong, found.log_p)):
            sums += nb.frequencies(found.draws, known, 2, (ways.log_chance + log_w - log_z).exp() / 3)
    assert abs(total.sum() - 1) < 1e-12 and (parts - posterior).abs().max() < 1e-12
    assert abs(wrong.sum() - 1) > 0.1


@pytest.mark.parametrize("conditional, right", [("conditional_given_rest", True), ("conditional_given_past", False)])
def test_a_gibbs_sweep_pixel_by_pixel_keeps_the_posterior(nb, case, monkeypatch, conditional, right):
    """Within 1e-12, in every way that it can go. The control: a sweep of forward conditionals is off by 1e-3."""
    guide, known, (support, posterior, _) = case
    monkeypatch.setattr(nb, "conditional_given_rest", getattr(nb, conditional))
    after = torch.zeros(4, dtype=torch.float64)
    for (start, probability), code in itertools.product(zip(support, posterior), torch.arange(4).split(1)):
        ways = EveryWay(code)
        monkeypatch.setattr(nb, "draw_categorical", ways.draw_categorical)
        moved = nb.sweep_by_pixels(guide.model, start[None], known, torch.Generator())
        after += probability * ways.log_chance.exp() * nb.frequencies(moved, known, 2)
    change = (after - posterior).abs().max()
    assert abs(after.sum() - 1) < 1e-12 and (change < 1e-12 if right else change > 1e-3)


def test_a_gibbs_move_keeps_the_posterior(nb, case, monkeypatch):
    """Within 1e-12, in every way that it can go: all hidden rows at once with 3 candidates; a sweep by bands of one row
    with 2 or 3. The controls, mistakes that change it: picked evenly; what is there left out, or weighed without g;
    bands chosen by what is in the first."""
    guide, known, (support, posterior, _) = case
    place = torch.arange(4)[:, None]

    def change(found):
        return (posterior @ found - posterior).abs().max()

    def matrix(ways, move, candidates, mistake=None):
        """P[x, x'] of a move of images [m, h, w], from every state in every way that it can go."""
        states = torch.arange(4).repeat_interleave(ways)
        every = EveryWay(torch.arange(ways).repeat(4), candidates, mistake)
        with monkeypatch.context() as patch:
            patch.setattr(nb, "draw_categorical", every.draw_categorical)
            moved = move(support[states])
        assert not every.code.any() and (moved[:, known] == 1).all()  # no two ways are the same
        codes, found = moved[:, ~known].long() @ torch.tensor([1, 2]), torch.zeros(4, 4, dtype=torch.float64)
        found.index_put_((states, codes), every.log_chance.exp(), accumulate=True)
        assert (found.sum(dim=1) - 1).abs().max() < 1e-12  # these are all
        return found

    def sweep(candidates, mistake=None, mask=known):
        # For each band, one pixel of 2 levels: its fresh candidates, then the pick.
        ways = (2 ** (candidates - 1) * candidates) ** int((~mask).sum())
        move = partial(nb.sweep_by_blocks, known=mask, generator=torch.Generator(), rows=1, candidates=candidates)
        return matrix(ways, lambda images: move(guide, images), candidates, mistake)

    def whole(mistake=None):
        return matrix(4**2 * 3, lambda images: nb.redraw(guide, images, known, 3, torch.Generator()), 3, mistake)

    first, second = (sweep(3, mask=place != row) for row in (0, 1))
    for right in (whole(), sweep(2), sweep(3), first, second):
        assert change(right) < 1e-12 and (right - torch.eye(4)).abs().max() > 0.1  # it moves
    for mistake in (torch.zeros_like, lambda logits: logits.index_fill(1, torch.tensor(0), -math.inf)):
        assert change(whole(mistake)) > 1e-3 and change(sweep(3, mistake)) > 1e-3
    assert change(torch.where(support[:, 0] == 0, first, second)) > 1e-3
    log_g = nb.guide_pixel_log_probs
    monkeypatch.setattr(nb, "guide_pixel_log_probs", lambda *arguments: 0 * log_g(*arguments))
    assert change(whole()) > 1e-3 and change(sweep(3)) > 1e-3


def test_draws_are_picked_by_their_shares(nb):
    """20,000 picks: detects shares that are off by 5 standard errors, or weights that are not in logs."""
    shares = torch.tensor([0.5, 0.25, 0.25, 0.0], dtype=torch.float64)
    found = nb.WeightedDraws(torch.arange(4, dtype=torch.uint8).view(4, 1, 1), shares.log() + 700, shares)
    picked = nb.pick_by_weight(found, 20_000, 1).flatten().long().bincount(minlength=4) / 20_000
    assert ((picked - shares).abs() <= MANY * (shares * (1 - shares) / 20_000) ** 0.5).all()
