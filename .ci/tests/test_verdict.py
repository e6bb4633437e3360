"""Is the verdict calibrated? Over hundreds of cases with known answers."""

import pytest
from scipy import stats
from test_guide import meaningless_guide
from test_kernels import known_mask

pytestmark = pytest.mark.slow


def sharper(nb, seed, factor):
    """A tiny model whose conditionals are sharper (factor > 1) or flatter."""
    model = nb.tiny_model(seed)
    model.head.weight.mul_(factor)
    return model


def guide_of(nb, model, kind, seed):
    """The model alone, a guide with random hints, or one that misleads: strong hints and exponents that are too large.
    """
    if kind == "model":
        return nb.Guide(model)
    return meaningless_guide(nb, model, seed, *((0.1, [0.7, 0.6]) if kind == "random" else (0.2, [0.5, 0.8])))


MASKS = [(0, 1, 2), (0, 4, 8), (0, 1, 2, 3, 4), (1, 3, 5, 7), (0, 1, 3), (2,), (0, 1, 2, 3, 4, 5), (0, 2, 4, 6)]


def outcomes(nb, budget, seed):
    """Of 51 cases: (refused, wrong, whether the 95 % interval of log Z covers, the share of pixels whose mean's
    does, whether it is log Z that is wrong, whether it would be wrong by the replicates' spread alone) of each. Wrong:
    log Z off by more than 1 nat, or a pixel's mean level or log Z by more than 4 standard errors (and an allowance of
    0.02 of a level or nat).
    """
    found = []
    for number in range(17):
        model = sharper(nb, number % 4, (0.5, 0.8, 1.0, 1.5)[number // 4 % 4])
        images = nb.all_images(model)
        log_probs = nb.log_prob(model, images, 4096)
        image = nb.sample(model, 1, seed=100 + seed + number)[0]
        if number % 4 == 3:
            image = images[log_probs.argsort()[number * 50 + seed // 100]]  # among the least probable of all
        known = known_mask(*MASKS[number % len(MASKS)])
        support, posterior, log_evidence = nb.exact_posterior(images, log_probs, image, known)
        exact = (posterior[:, None] * support[:, ~known].double()).sum(0)
        for kind in ("model", "random", "misleading"):
            guide = guide_of(nb, model, kind, number)
            answer = nb.complete(model, image, known, 1, budget, seed + number, guide)
            replicates = answer.diagnostics["replicates"]
            off = abs(answer.log_evidence - log_evidence)
            means = replicates.within(replicates.draws[:, :, ~known])
            mean, spread = replicates.over(means)
            stderr = replicates.estimate(means, 2)[1]
            wrong_z = off > 1 or off > 4 * replicates.log_evidence()[1] + 0.02
            wrong, alone = (wrong_z or bool(((mean - exact).abs() > 4 * error + 0.02).any())
                            for error in (stderr, spread))
            wide = stats.t.isf(0.025, 7)
            covered = off <= wide * replicates.log_evidence()[1] + 1e-9
            pixels = ((mean - exact).abs() <= wide * stderr + 1e-9).double().mean().item()
            found.append((answer.status != "converged", wrong, covered, pixels, wrong_z, alone))
    return found


def test_right_answers_pass_and_wrong_ones_are_refused(nb):
    """408 cases (some thirty posteriors, with several guides, budgets and seeds each). At most 10 % of right answers
    are refused at the default budget; of all answers given, starved budgets and misleading guides included, at most 5 %
    are wrong, 3 % in log Z, and none where the budget is smallest; 95 % intervals (2.36 errors: t with 7 degrees) cover
    in 90 to 99 %, of log Z and of the pixels' means.

    The controls: with the replicates' spread alone as the error more than 5 % are wrong (all replicates miss a group of
    images that holds a few per cent: no comparison of them can see it), and without refusals far more.
    """
    budgets = (nb.Budget(), nb.Budget(initial=16, particles=8, rounds=1), nb.Budget(initial=8, particles=2, rounds=2),
               nb.Budget(initial=4, particles=1, sweeps=2, rounds=2))
    default, *starved, smallest = [outcomes(nb, budget, 0) + outcomes(nb, budget, 1000) for budget in budgets]
    cases = [*default, *(case for found in starved for case in found), *smallest]
    right = [refused for refused, wrong, *_ in default if not wrong]
    wrong_ones, covered, pixels, of_z, alone = map(sum, zip(*(rest for refused, *rest in cases if not refused)))
    count = sum(not refused for refused, *_ in cases)
    plain = [wrong for refused, wrong, *_ in default if not refused]
    print(f"default: {sum(right)} of {len(right)} right ones refused, {sum(plain)} of {len(plain)} answers wrong; of "
          f"{len(cases)} answered {count}, wrong {wrong_ones}, in log Z {of_z}, by the spread alone {alone}; intervals "
          f"that cover {covered}, of the means {pixels / count:.3f}")
    assert len(cases) >= 200 and count >= 80
    assert sum(right) <= 0.1 * len(right)
    assert wrong_ones <= 0.05 * count < alone and of_z <= 0.03 * count
    assert not any(wrong and not refused for refused, wrong, *_ in smallest)
    assert 0.9 * count <= covered <= 0.99 * count and 0.9 * count <= pixels <= 0.99 * count
    wrong = [refused for refused, *_, alone in cases if alone]
    assert sum(wrong) >= 20  # there are wrong ones, and most of them are refused
    assert sum(wrong) >= 0.6 * len(wrong)
