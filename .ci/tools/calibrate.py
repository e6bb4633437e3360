"""Is what passes true, at full size? Answers about images that the model drew, recorded one by one and judged together.

usage: python .ci/tools/calibrate.py record --folder FOLDER [--hidden centre|top] [--images 100] [--seed 7001]
       python .ci/tools/calibrate.py judge --folder FOLDER [--hidden centre|top] [--keep NAME]
       python .ci/tools/calibrate.py sixteen --folder FOLDER
record: `complete` with a CPU's budget, where that refuses with a card's; then, for what is answered, 32 runs that hold
the truth. judge: how many are answered, in which quarters the truth's place stands by log p and by log p/g (P of a
chi-square at least as large), and how often log_evidence + 2.36 stderr reaches the bound from above. sixteen: how many
of the first twenty test images' tops are answered with sixteen rounds. What is found is kept a file an image, so that
the same command goes on where it stopped, and two of them, with --part 0/2 and --part 1/2, share the images. What
--keep and sixteen find goes to apart.json; a published run takes it over.
"""
import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the notebook does, before torch is imported
from definitions import ROOT, definitions
import numpy as np
import torch
from scipy import stats

APART = ROOT / ".ci" / "tools" / "record" / "apart.json"
BUDGETS = {"two cores": 4, "a card": 8}  # rounds
FAULT = 13, 7, 8, 25  # of an earlier verdict's answers so many stood in each quarter by log p/g
TUNED = 50  # the half of `seldom_proposed` was chosen on the centres before this one


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


def own_images(options, count):
    """Which of so many images this process takes."""
    part, parts = map(int, options.part.split("/"))
    return range(part, count, parts)


@torch.no_grad()
def record(nb, options):
    folder = Path(options.folder)
    model, guide = released(nb)
    known = hidden_mask(options.hidden).to(model.device)
    images = nb.sample(model, options.images, seed=options.seed)
    paths = {number: folder / f"{options.hidden}_{options.seed}_{number:03d}.pt"
             for number in own_images(options, options.images)}
    for number, path in paths.items():
        if path.exists():
            continue
        started = time.monotonic()
        for rounds in BUDGETS.values():
            budget = nb.Budget(rounds=rounds)
            answer = nb.complete(model, images[number], known, 1, budget, options.seed + number, guide)
            if not answer.doubts:
                break
        found = answer.found
        log_p, ratio = nb.log_probs_and_weights(guide, images[number : number + 1], known)[:, 0].tolist()
        said = dict(hidden=options.hidden, answered=None if answer.doubts else rounds, rounds=found.rounds,
                    effective_draws=found.effective_draws, log_evidence=answer.log_evidence,
                    stderr=answer.log_evidence_stderr,
                    place_by_log_p=nb.place_of_truth(log_p, found.log_p, found.log_w),
                    place_by_weight=nb.place_of_truth(ratio, found.log_p - found.log_g, found.log_w))
        kept = {name: x for name, x in vars(found).items() if name != "draws"}  # for who asks why
        nb.save_atomically(said | dict(found=kept, log_p=log_p, ratio=ratio), path)
        print(f"{path.name}: {said}, {time.monotonic() - started:.0f} s", flush=True)
    for number, path in paths.items():
        case = torch.load(path, weights_only=True)
        if case["answered"] and "above" not in case:
            truth, particles = images[number].expand(8, -1, -1), nb.Budget().particles
            told, starts = guide.told(truth, known), range(10**7 + 100 * number, 10**7 + 100 * number + 32, 8)
            held = [nb.smc(told, truth, particles, range(start, start + 8), truth).log_z for start in starts]
            case["above"] = -nb.log_mean(-torch.cat(held)).item()
            nb.save_atomically(case, path)
            print(f"{path.name}: from above {case['above']:.2f}, answer {case['log_evidence']:.2f}", flush=True)


def judge(nb, options):
    cases = [torch.load(path, weights_only=True) | dict(number=int(path.stem.split("_")[-1]))
             for path in sorted(Path(options.folder).glob(f"{options.hidden}_*_*.pt"))]
    for case in cases:
        if case["answered"]:  # the error as it is today, from what is kept
            case["stderr"] = max(case["stderr"], nb.Found(None, **case["found"]).seldom_proposed())

    def say(name, value, n, how, stderr=None):
        name = f"{options.hidden}_{name}"
        print(f"{name}: {value:.4g}{f' ± {stderr:.2g}' if stderr else ''} (n = {n}; {how})")
        if options.keep:
            keep_apart(nb, f"{options.keep}_{name}", float(value), stderr, n=n, how=how)

    def say_reached(name, given):
        reached = [case["log_evidence"] + 2.36 * case["stderr"] >= case["above"] for case in given]
        if reached:
            share = np.mean(reached)
            say(name, share, len(given), "log_evidence + 2.36 stderr reaches the bound from above",
                float((share * (1 - share) / len(given)) ** 0.5))

    uneven = sum((count / sum(FAULT) - 1 / 4) ** 2 * 4 for count in FAULT)
    for machine, most in BUDGETS.items():
        given = [case for case in cases if case["answered"] and case["answered"] <= most]
        say(f"answered_in_{most}_rounds", len(given), len(cases),
            f"model draws, {options.hidden} hidden, the budget of {machine}")
        for by in ("log_p", "weight"):
            quarters, chance = nb.quarters_of([case[f"place_by_{by}"] for case in given])
            say(f"place_by_{by}_p_in_{most}_rounds", chance, len(given),
                f"P of the truth's places by {by}; quarters {quarters.int().tolist()}")
        say(f"power_in_{most}_rounds", stats.ncx2.sf(stats.chi2.isf(0.05, 3), 3, len(given) * uneven), len(given),
            f"probability that P < 0.05 where quarters are as {FAULT}")
        say(f"median_stderr_in_{most}_rounds_nats", np.median([case["stderr"] for case in given]), len(given),
            "of log_evidence")
        bounded = [case for case in given if "above" in case]
        say_reached(f"bound_reached_share_in_{most}_rounds", bounded)
        new = [case for case in bounded if case["number"] >= TUNED]
        say_reached(f"bound_reached_share_of_new_in_{most}_rounds", new)
        if bounded:
            gaps = torch.tensor([case["above"] - case["log_evidence"] for case in bounded])
            say(f"widest_gap_in_{most}_rounds_nats", gaps.max(), len(bounded), "bound from above minus log_evidence")
            mean, stderr = nb.mean_and_error((-gaps).exp())
            say(f"mean_product_in_{most}_rounds", mean, len(bounded),
                "Z-hat of the answer times the mean 1 / Z-hat of 32 runs that hold the truth: 1 on average", stderr)


def sixteen(nb, options):
    """The tops of the first twenty test images, by the notebook's seeds; kept once all are there."""
    model, guide = released(nb)
    images = nb.load_mnist(ROOT / "data")[2][:20].to(model.device)
    paths = [Path(options.folder) / f"sixteen_{number:02d}.json" for number in range(20)]
    for number in own_images(options, 20):
        if not paths[number].exists():
            seed = 13 + number if number < 10 else 120 + number
            answer = nb.complete(model, images[number], hidden_mask("top"), 1, nb.Budget(rounds=16), seed, guide)
            said = answer.status, answer.found.rounds, answer.log_evidence
            nb.save_atomically(json.dumps(said).encode(), paths[number])
            print("test image {}: {} after {} rounds, log Z = {:.2f}".format(number, *said), flush=True)
    if all(path.exists() for path in paths):
        passed = sum(json.loads(path.read_text())[0] == "converged" for path in paths)
        print(f"{passed} of 20 answered")
        keep_apart(nb, "question_g_converged_of_20_at_16_rounds", passed, n=20, how="the first twenty test images")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["record", "judge", "sixteen"])
    parser.add_argument("--folder", required=True)
    parser.add_argument("--hidden", choices=["centre", "top"], default="centre")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--seed", type=int, default=7001)
    parser.add_argument("--part", default="0/1", help="which of how many parts of the images")
    parser.add_argument("--keep", help="for judge: what the names of its results in apart.json begin with")
    options = parser.parse_args()
    Path(options.folder).mkdir(parents=True, exist_ok=True)
    dict(record=record, judge=judge, sixteen=sixteen)[options.what](definitions(), options)


if __name__ == "__main__":
    main()
