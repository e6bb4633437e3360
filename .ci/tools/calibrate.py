"""What the verdict is calibrated by: rounds of runs for images that the model drew, recorded once and judged offline.

usage: python .ci/tools/calibrate.py record --folder FOLDER [--hidden centre|top] [--images 100] [--seed 2001]
       python .ci/tools/calibrate.py candidates --folder FOLDER [--rounds 4]
       python .ci/tools/calibrate.py replay --folder FOLDER [--rounds 4] [--keep NAME]
       python .ci/tools/calibrate.py sixteen --folder FOLDER
record: four rounds (eight for every fifth image) as `complete` makes them, and, where some rule may answer, four rounds
of eight runs that hold the truth; a file an image, so that it goes on where it stopped (two such commands, with
--part 0/2 and --part 1/2, share the images). candidates: other thresholds, on other numbers, each asked after every
round and stopped where it passes; the answer is what passes, as many fresh rounds, or all that are left. replay: the
notebook's own verdict. Both say how many are answered, in which quarters the truth's place stands by log p and by
log p/g (P of a chi-square at least as large), and how often log_evidence + 2.36 stderr reaches the bound from above.
sixteen: how many of the first twenty test images' tops are answered with sixteen rounds. What --keep and sixteen find
goes to apart.json; a published run takes it over.
"""
import argparse
import functools
import itertools
import json
import math
import time
from pathlib import Path

from definitions import ROOT, definitions
import numpy as np
import torch

APART = ROOT / ".ci" / "tools" / "record" / "apart.json"


def keep_apart(nb, name, value, stderr=None, *, n, how):
    """A result that no run of the notebook makes, with the SHA-256 of the weights it holds for."""
    weights = {path: nb.sha256_of(ROOT / "checkpoints" / path) for path in ("small.pt", "small_guide.pt")}
    apart = json.loads(APART.read_text()) if APART.exists() else {}
    if apart.get("weights") != weights:
        apart = dict(weights=weights, results={})
    apart["results"][name] = dict(value=value, stderr=stderr, n=n, how=how)
    nb.save_atomically(json.dumps(apart, indent=1).encode() + b"\n", APART)


def released(nb):
    """(Model, guide)."""
    model = nb.load_checkpoint(ROOT / "checkpoints" / "small.pt")
    return model, nb.Guide(model, nb.load_checkpoint(ROOT / "checkpoints" / "small_guide.pt", network=nb.GuideNetwork))


def hidden_mask(name):
    known = torch.ones(28, 28, dtype=torch.bool)
    known[dict(centre=np.s_[10:18, 10:18], top=np.s_[:14])[name]] = False
    return known


@torch.no_grad()
def record(nb, options):
    folder, (part, parts) = Path(options.folder), map(int, options.part.split("/"))
    model, guide = released(nb)
    known, budget = hidden_mask(options.hidden).to(model.device), nb.Budget()
    for number, image in enumerate(nb.sample(model, options.images, seed=options.seed)):
        path, started = folder / f"{options.hidden}_{options.seed}_{number:03d}.pt", time.monotonic()
        if path.exists() or number % parts != part:
            continue
        images = image.expand(budget.runs, -1, -1)
        told, seed, rounds = guide.told(images, known), options.seed + number, []
        for k in range(8 if number % 5 == 0 else 4):
            seeds = np.random.SeedSequence([seed, k]).generate_state(budget.runs, np.uint64).tolist()
            rounds.append(nb.smc(told, images, budget.particles, seeds))
        held = []
        if max(joined(nb, map(vars, rounds[:k])).effective_draws for k in range(1, 5)) >= 10:  # else no rule answers
            starts = range(10**7 + 100 * number, 10**7 + 100 * number + 32, 8)
            held = [nb.smc(told, images, budget.particles, range(start, start + 8), images).log_z for start in starts]
        log_p, ratio = nb.log_probs_and_weights(guide, image[None], known)[:, 0].tolist()
        nb.save_atomically(dict(rounds=[vars(found) for found in rounds], held=torch.cat([torch.empty(0), *held]),
                                log_p=log_p, ratio=ratio, particles=budget.particles), path)
        print(f"{path.name}: {time.monotonic() - started:.0f} s", flush=True)


def recorded(options):
    """(Name, what was saved of it, its rounds as keyword arguments of a Found) of each image."""
    for path in sorted(Path(options.folder).glob("*_*_*.pt")):
        saved = torch.load(path, weights_only=True)
        yield path.name.split("_")[0], saved, saved["rounds"]


def joined(nb, rounds):
    """Rounds as one Found."""
    return functools.reduce(nb.Found.joined, [nb.Found(**found) for found in rounds])


def pareto_k(weights):
    """k-hat of the generalised Pareto distribution of the largest weights (float64 [s], any scale): Vehtari, Simpson,
    Gelman, Yao and Gabry 2024; the fit is that of Zhang and Stephens 2009. Infinite where fewer than five are positive.
    """
    weights = np.sort(weights)
    tail = math.ceil(min(0.2 * len(weights), 3 * len(weights) ** 0.5))
    x = weights[-tail:] - weights[-tail - 1]
    x = x[x > 0] / x[-1]
    n = len(x)
    if n < 5:
        return math.inf
    m = 30 + int(n**0.5)
    theta = 1 + (1 - (m / (np.arange(1, m + 1) - 0.5)) ** 0.5) / (3 * x[int(n / 4 + 0.5) - 1])

    def k_of(theta):
        return np.log1p(-np.outer(theta, x)).mean(axis=1)

    k = k_of(theta)
    likelihood = n * (np.log(-theta / k) - k - 1)
    share = np.exp(likelihood - likelihood.max())
    (k,) = k_of((share * theta).sum() / share.sum())
    return (n * k + 5) / (n + 10)


def sums_by_eve(found, particles):
    """The weights of all that descends from each first particle, zeros included, of the largest: float64 [s]."""
    shares = torch.exp(found.log_w - found.log_w.max())
    every = torch.zeros(len(found.eve), found.rounds * particles, dtype=torch.float64)
    return every.scatter_add_(1, found.eve, shares).flatten().numpy()


def numbers_of(nb, saved, found):
    """What a rule may ask about a Found, and how right it is."""
    log_evidence = nb.log_mean(found.log_z).item()
    without = torch.log1p(-torch.softmax(found.log_z, dim=0))
    sums = sums_by_eve(found, saved["particles"])
    above = -nb.log_mean(-saved["held"]).item() if len(saved["held"]) else math.nan
    return dict(
        rounds=found.rounds, sd=found.log_z.std().item(), effective=found.effective_draws, k=pareto_k(sums),
        usual_k=min(1 - 1 / math.log10(len(sums)), 0.7), jackknife=nb.jackknife(without).item(),
        below=above - log_evidence,
        by_p=nb.place_of_truth(saved["log_p"], found.log_p, found.log_w),
        by_w=nb.place_of_truth(saved["ratio"], found.log_p - found.log_g, found.log_w))


def candidates(nb, options):
    """A line for each rule: how right is what answers where it passes. Of images with so many rounds."""
    path = Path(options.folder) / "numbers.json"  # they take minutes
    if not path.exists():
        spans = {*itertools.combinations(range(9), 2)}
        path.write_text(json.dumps([
            (name, {f"{i} {j}": numbers_of(nb, saved, joined(nb, rounds[i:j])) for i, j in spans if j <= len(rounds)})
            for name, saved, rounds in recorded(options)]))
    cases = json.loads(path.read_text())
    limits = {"none": lambda x: math.inf, "usual": lambda x: x["usual_k"], "0.7": lambda x: 0.7, "0.8": lambda x: 0.8,
              "0.9": lambda x: 0.9, "1": lambda x: 1.0}
    floors = {"2/N": lambda x: 2 / x["effective"], "0.1": lambda x: 0.1, "0.2": lambda x: 0.2, "0.3": lambda x: 0.3}
    most = options.rounds
    answers = {"what passes": (most, lambda k: f"0 {k}"), "as many again": (most // 2, lambda k: f"{k} {2 * k}"),
               "all that are left": (most - 1, lambda k: f"{k} {most}")}
    rules = itertools.product((10, 20, 50, 100), answers.items(), limits.items(), (0.5, 1.0))
    for effective, (answer, (asked, span)), (limit, largest), sd in rules:
        line, given = [], []
        for hidden in ("centre", "top"):
            found = []
            for name, numbers in cases:
                if name == hidden and f"0 {most}" in numbers:
                    tried = [numbers[f"0 {k}"] for k in range(1, asked + 1)]
                    passes = [x["rounds"] for x in tried if x["effective"] >= effective and x["sd"] <= sd
                              and x["k"] <= largest(x)]
                    found.append(bool(passes))
                    if passes:
                        given.append(numbers[span(passes[0])])
            line.append(f"{hidden} {sum(found)}/{len(found)}")
        for by in ("by_p", "by_w"):
            quarters, chance = nb.quarters_of([x[by] for x in given])
            line.append(f"{by} {quarters.int().tolist()} P {chance:.3f}")
        for floor, least in floors.items():
            errors = [max(x["jackknife"], least(x)) for x in given]
            covered = np.mean([x["below"] <= 2.36 * error for x, error in zip(given, errors)]) if given else math.nan
            line.append(f"{floor}: {covered:.0%}, {np.median(errors) if given else math.nan:.2f}")
        print(f"effective {effective}, k {limit}, sd {sd}, {answer}: " + "; ".join(line))


def answer_of(nb, rounds, most):
    """(The Found that the notebook answers with, or the last that it asked about; whether it answers)."""
    for k in range(1, most // 2 + 1):
        asked = joined(nb, rounds[:k])
        if not nb.doubts_about(asked):
            return joined(nb, rounds[k : 2 * k]), True
        if nb.hopeless(asked, most // 2):
            break
    return asked, False


def replay(nb, options):
    """The notebook's verdict, in the notebook's words."""
    places, covered, errors, counts = {"log_p": [], "weight": []}, [], [], {}
    for hidden, saved, rounds in recorded(options):
        found, passed = answer_of(nb, rounds, min(options.rounds, len(rounds)))
        counts.setdefault(hidden, []).append(passed)
        if passed:
            for by, value, values in (("log_p", saved["log_p"], found.log_p),
                                      ("weight", saved["ratio"], found.log_p - found.log_g)):
                places[by].append(nb.place_of_truth(value, values, found.log_w))
            log_evidence, stderr = found.log_evidence()
            covered.append(log_evidence + 2.36 * stderr >= -nb.log_mean(-saved["held"]).item())
            errors.append(stderr)

    def say(name, value, n, how):
        print(f"{how}: {value:.4g} (n = {n})")
        if options.keep:
            keep_apart(nb, f"{options.keep}_{name}", float(value), n=n, how=how)

    for hidden, passed in counts.items():
        say(f"{hidden}_converged", sum(passed), len(passed), f"model draws, {hidden} hidden: answered")
    for by, found in places.items():
        quarters, chance = nb.quarters_of(found)
        how = f"P of the truth's places by {by}; quarters {quarters.int().tolist()}"
        say(f"place_by_{by}_p", chance, len(found), how)
    say("bound_reached_share", np.mean(covered), len(covered), "log_evidence + 2.36 stderr reaches that from above")
    say("median_stderr_nats", np.median(errors), len(errors), "median stderr of log_evidence")


def sixteen(nb, options):
    """The tops of the first twenty test images, by the notebook's seeds."""
    model, guide = released(nb)
    images, folder, passed = nb.load_mnist(ROOT / "data")[2][:20], Path(options.folder), 0
    for number, image in enumerate(images.to(model.device)):
        path = folder / f"sixteen_{number:02d}.json"
        if not path.exists():
            seed = 13 + number if number < 10 else 120 + number
            answer = nb.complete(model, image, hidden_mask("top"), 1, nb.Budget(rounds=16), seed, guide)
            nb.save_atomically(json.dumps([answer.status, answer.found.rounds, answer.log_evidence]).encode(), path)
        status, rounds, log_evidence = json.loads(path.read_text())
        print(f"test image {number}: {status} after {rounds} rounds, log Z = {log_evidence:.2f}", flush=True)
        passed += status == "converged"
    keep_apart(nb, "question_g_converged_of_20_at_16_rounds", passed, n=20, how="the first twenty test images")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["record", "candidates", "replay", "sixteen"])
    parser.add_argument("--folder", required=True)
    parser.add_argument("--hidden", choices=["centre", "top"], default="centre")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=4, help="for candidates and replay: the most")
    parser.add_argument("--seed", type=int, default=2001)
    parser.add_argument("--part", default="0/1", help="for record: which of how many parts of the images")
    parser.add_argument("--keep", help="for replay: what the names of its results in apart.json begin with")
    options = parser.parse_args()
    Path(options.folder).mkdir(parents=True, exist_ok=True)
    dict(record=record, candidates=candidates, replay=replay, sixteen=sixteen)[options.what](definitions(), options)


if __name__ == "__main__":
    main()
