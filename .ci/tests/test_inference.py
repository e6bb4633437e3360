"""Answers against enumeration on the 3x3 model."""

import math

import pytest
import torch
from conftest import MANY, either_guide, known_mask, t_bound

PLACE = torch.arange(9).view(3, 3)


def exact_pixel(nb, table, image, known, pixel):
    """p(x_pixel | known) by enumeration."""
    images, posterior, _ = nb.exact_posterior(*table, image, known)
    return torch.stack([posterior[images[:, pixel // 3, pixel % 3] == level].sum() for level in range(3)])


@pytest.fixture
def batches(nb, monkeypatch):
    """batches(size): from now on so many draws at once."""
    return lambda size: monkeypatch.setattr(nb, "side_by_side", lambda model: size)


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
    exact = exact_pixel(nb, table, evidence[0], PLACE < 0, 4)
    estimate = nb.marginal(tiny, (1, 1), n=4000, seed=1)
    assert estimate.status == "converged" and ((estimate.probs - exact).abs() < MANY * estimate.stderr).all()
    uniform = torch.randint(0, 3, (4000, 3, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    wrong = nb.predictive(tiny, uniform, (1, 1))
    assert ((wrong.mean(dim=0) - exact).abs() > MANY * wrong.std(dim=0) / 4000**0.5).any()


def test_d_agrees_with_the_table_within_its_error(nb, tiny, table, evidence, monkeypatch, batches):
    """40 answers: their mean within 5.9 of its standard errors (the control: C, which knows the other side); their own
    errors, without the floor, are as large in the mean square as they say. At the first pixel D is E, at the last B."""
    batches(256)
    monkeypatch.setattr(nb, "least_error", lambda found: 0.0)
    exact = exact_pixel(nb, table, evidence[5], PLACE > 5, 5)
    answers = [nb.conditional_given_future(tiny, evidence[5], (1, 2), seed) for seed in range(40)]
    assert {answer.status for answer in answers} == {"converged"}
    probs, stderr = (torch.stack([getattr(answer, name) for answer in answers]) for name in ("probs", "stderr"))
    bound = t_bound(40) * probs.std(dim=0) / 40**0.5
    assert ((probs.mean(dim=0) - exact).abs() < bound).all()
    assert ((nb.conditional_given_past(tiny, evidence[5], (1, 2)) - exact).abs() > bound).any()
    assert 0.4 < (probs - exact).square().mean() / stderr.square().mean() < 2
    first, last = (nb.conditional_given_future(tiny, evidence[5], pixel, seed=1) for pixel in ((0, 0), (2, 2)))
    assert first.status == "exact" and torch.equal(first.probs, nb.conditional_given_rest(tiny, evidence[5], (0, 0)))
    assert torch.equal(last.probs, nb.marginal(tiny, (2, 2), seed=1).probs)


@pytest.mark.parametrize("learned", [False, True])
def test_any_mask_is_completed_and_its_evidence_is_that_of_the_table(nb, tiny, table, batches, learned):
    """74 masks (with a meaningless guide 11), all pixels and none among them: within 1e-10 where no known pixel follows a hidden
    one, else within 5 stated errors. It would see a mask that is turned or read in another order. The control: weights
    without g, of which at most a quarter come so near."""
    batches(512 if learned else 128)
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


def test_the_draws_follow_the_posterior(nb, tiny, table, evidence, batches, monkeypatch):
    """300 draws, within 0.13 in total variation of the table; within 0.2 even if all were picked as copies of the least
    probable. It would see moves that are left out or wrong. The control: moves that pick evenly."""
    batches(64)
    known = known_mask(0, 1, 2)
    support, posterior, _ = nb.exact_posterior(*table, evidence[5], known)

    def distance():
        draws = nb.complete(tiny, evidence[5], known, 300, seed=3).draws
        return nb.distance_between(nb.frequencies(draws, known, 3), posterior)

    assert distance() < 0.13
    worst, draw = support[posterior.argmin()], nb.draw_levels
    monkeypatch.setattr(nb, "pick_by_weight", lambda found, n, seed: worst.repeat(n, 1, 1))
    assert distance() < 0.2
    monkeypatch.setattr(nb, "draw_levels", lambda logits, u: draw(logits if logits.shape[1] == 3 else 0 * logits, u))
    assert distance() > 0.3


def test_a_pilot_decides_and_fresh_draws_answer(nb, tiny, evidence, batches, monkeypatch):
    """It would see an answer that takes draws of the pilot, which it would favour. The pilot has two batches at least,
    the answer as many as the pilot, four at least; a larger `most` begins with the same pilot."""
    batches(32)
    draw, seeds = nb.weighted_draws, []
    monkeypatch.setattr(nb, "weighted_draws", lambda *arguments: seeds.append(tuple(arguments[-1])) or draw(*arguments))

    def answer(most):
        seeds.clear()
        found = nb.complete(tiny, evidence[1], known_mask(0, 1, 2), 3, most=most, seed=8)
        parts = [part for part in (found.pilot, found.found) if part]
        assert len(set(seeds)) == len(seeds) == sum(len(part.log_w) for part in parts) // 32
        return found, [len(part.log_w) // 32 for part in parts]

    given, sizes = answer(320)
    assert sizes == [2, 4] and given.status == "converged" and given.log_evidence == nb.log_mean(given.found.log_w)
    monkeypatch.setattr(nb, "MIN_PILOT", 10**6)
    (short, short_sizes), (long, long_sizes) = answer(96), answer(320)
    assert short_sizes == [3] and long_sizes == [10]
    assert torch.equal(short.pilot.log_w, long.pilot.log_w[:96])
    monkeypatch.setattr(nb, "MIN_PILOT", nb.ess(long.pilot.log_w[: 32 * 6]) - 1e-6)
    assert answer(320)[1] == [6, 6]


@pytest.mark.parametrize("limit", ["MIN_PILOT", "MIN_ANSWER"])
def test_what_is_not_converged_has_no_error_bar(nb, tiny, evidence, batches, monkeypatch, limit):
    """Neither log Z nor D; its draws are completions all the same. It would see a refusal given as an answer."""
    batches(32)
    monkeypatch.setattr(nb, limit, 10**6)
    known = PLACE > 4
    answer = nb.complete(tiny, evidence[1], known, 7)
    assert answer.status == "not converged" and answer.log_evidence_stderr is None
    assert (answer.found is None) == (limit == "MIN_PILOT") and answer.log_evidence < 0
    assert (answer.draws[:, known] == evidence[1][known]).all() and len(answer.draws.unique(dim=0)) > 1
    estimate = nb.conditional_given_future(tiny, evidence[1], (1, 1))
    assert estimate.status == "not converged" and estimate.stderr is None and abs(estimate.probs.sum() - 1) < 1e-12


@pytest.mark.parametrize("effective, stderr", [
    (256, 2 / 20), (64, (1 / 64 - 1 / 256) ** 0.5), (12, (1 / 12 - 1 / 256) ** 0.5), (8, None)])
def test_the_error_of_log_z_is_that_of_weighted_draws_and_never_less_than_two_in_n(
        nb, tiny, evidence, batches, monkeypatch, effective, stderr):
    """Exact numbers: of 256 draws `effective` have equal weights, the others 0; those of the pilot must not matter. It
    would see any other formula; the floor is 2 / N, N the effective draws, at most 20."""
    batches(64)
    draw, share = nb.weighted_draws, effective // 4

    def given(guide, image, known, n, seed):
        weighted = torch.arange(n) < (share if seed[1] == nb.ANSWER else 32)
        return draw(guide, image, known, n, seed)._replace(log_w=torch.where(weighted, -3.0, -math.inf).double())

    monkeypatch.setattr(nb, "weighted_draws", given)
    answer = nb.complete(tiny, evidence[1], PLACE > 4, 1)
    assert abs(answer.log_evidence - math.log(effective / 256) + 3) < 1e-9
    error = answer.log_evidence_stderr
    assert error is None if stderr is None else abs(error - stderr) < 1e-9
    error = nb.conditional_given_future(tiny, evidence[1], (1, 1)).stderr
    assert error is None if stderr is None else (error > 2 / min(20, effective) - 1e-9).all()


@pytest.mark.parametrize("hidden", [(0, 1, 2), (5, 6, 7, 8), (0, 4)])
def test_an_answer_depends_on_the_known_pixels_and_the_seed_alone(nb, tiny, evidence, batches, hidden):
    """It would see hidden pixels that are read. The controls: another known pixel, and another seed."""
    batches(32)
    image, known, guide = evidence[1], known_mask(*hidden), either_guide(nb, tiny, True)

    def answer(image, seed=10):
        found = nb.complete(tiny, image, known, 60, guide, seed=seed)
        return found.draws, found.log_evidence

    draws, log_z = answer(image)
    same, same_log_z = answer(torch.where(known, image, 2 - image))
    assert torch.equal(same, draws) and same_log_z == log_z
    assert answer(torch.where(PLACE == 3, (image + 1) % 3, image))[1] != log_z
    assert not torch.equal(answer(image, 11)[0], draws)


@pytest.mark.parametrize("hidden", [(0, 1, 2), (0, 3, 6, 7), (8,)])
def test_evidence_that_cannot_be_is_said_to_be_so(nb, evidence, batches, hidden):
    """A level of probability 0 at any one of the known pixels, or for question E: it would see an answer that is not a
    number. The control: without it the image is answered."""
    batches(32)
    model, known = nb.tiny_model(), known_mask(*hidden)
    model.head.bias[2] = -math.inf
    image = evidence[1].clamp(max=1)
    assert nb.complete(model, image, known, 4).log_evidence > -math.inf
    for row, column in known.nonzero().tolist():
        wrong = image.clone()
        wrong[row, column] = 2
        with pytest.raises(ValueError, match="impossible evidence"):
            nb.complete(model, wrong, known)
    with pytest.raises(ValueError, match="impossible evidence"):
        nb.conditional_given_rest(model, torch.full_like(image, 2), (1, 1))
