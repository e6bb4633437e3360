"""Is the verdict right? Over hundreds of answers to questions whose answers are known."""

import pytest
from conftest import known_mask, meaningless_guide

pytestmark = pytest.mark.slow

MASKS = [(0, 1, 2), (0, 4, 8), (0, 1, 2, 3, 4), (1, 3, 5, 7), (0, 1, 3), (2,), (0, 1, 2, 3, 4, 5), (0, 2, 4, 6)]
CONTEXTS = (None, (0.1, (0.7, 0.6)), (0.2, (0.5, 0.8)))  # the model alone; meaningless; strong and too sure of itself


@pytest.fixture(scope="module")
def cases(nb):
    """17 of (model, table): flatter, as it is, or sharper."""
    made = []
    for number in range(17):
        model = nb.tiny_model(number % 4)
        model.head.weight.mul_((0.5, 0.8, 1.0, 1.5)[number // 4 % 4])
        images = nb.all_images(model)
        made.append((model, (images, nb.log_prob(model, images))))
    return made


def outcomes(nb, cases, seed, n):
    """(Whether the evidence was drawn, converged, wrong) of 51 answers of n draws."""
    found = []
    for number, (model, table) in enumerate(cases):
        image, drawn = nb.sample(model, 1, seed=100 + seed + number)[0], number % 4 != 3
        if not drawn:
            image = table[0][table[1].argsort()[number * 50 + seed // 100]]  # among the least probable of all
        known = known_mask(*MASKS[number % len(MASKS)])
        support, posterior, exact = nb.exact_posterior(*table, image, known)
        for how in CONTEXTS:
            guide = meaningless_guide(nb, model, *how, seed=number) if how else None
            answer = nb.complete(model, image, known, n, guide, seed + number)
            means_off = answer.mean(answer.draws[:, ~known].double())[0] - posterior @ support[:, ~known].double()
            (log_z, error), answered = answer.log_z, answer.status == "converged"
            off, bound = abs(log_z - exact), 4 * max(error, 0.1)
            found.append((drawn, answered, off > min(bound, 1) or means_off.abs().max().item() > 2 * bound))
    return found


def test_right_answers_are_given_and_wrong_ones_are_few(nb, cases):
    """408 answers, 102 each of 2048, 256, 64 and 32 draws; a quarter are about evidence that is among the least
    probable of all. Wrong: log Z is off by more than 1 nat or 4 errors, none below 0.1, or a hidden pixel's mean level
    by more than 4 errors times 2, by which levels can differ. Of what has converged at most 3 % is wrong with 2048
    draws, at most 5 % with all; with 2048, and evidence that the model drew, at most 10 % of the right are refused.

    The control: without the rule over 10 % are wrong. (Of the improbable evidence's answers that have converged, over
    twenty seeds, a fifth is wrong with 2048 draws, a third with all: weights do not show what is never drawn.)"""
    by_size = {n: outcomes(nb, cases, 0, n) + outcomes(nb, cases, 1000, n) for n in (2048, 256, 64, 32)}
    by_size["all"] = sum(by_size.values(), [])
    shares = {}
    for n, found in by_size.items():
        given = [wrong for _, answered, wrong in found if answered]
        shares[n] = sum(given) / len(given), sum(wrong for *_, wrong in found) / len(found)
        refused = [not answered for drawn, answered, wrong in found if drawn and not wrong]
        strange = [wrong for drawn, answered, wrong in found if answered and not drawn]
        print(f"{n}: {len(given)} of {len(found)} have converged, {sum(given)} wrongly ({shares[n][1]:.1%} of all); "
              f"of improbable evidence {len(strange)}, {sum(strange)} wrongly; "
              f"of the right about drawn evidence {sum(refused) / len(refused):.1%} are refused")
        if n == 2048:
            assert shares[n][0] <= 0.03 and sum(refused) / len(refused) <= 0.1
    assert shares["all"][0] <= 0.05 and shares["all"][1] > 0.1
