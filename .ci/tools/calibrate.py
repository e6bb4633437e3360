"""Records what the verdict is calibrated by: rounds of runs for images that the model drew, once, to be judged offline.

usage: python .ci/tools/calibrate.py record --folder FOLDER [--hidden centre|top] [--images 100] [--seed 2001]
       python .ci/tools/calibrate.py replay --folder FOLDER
record: four rounds (eight for every fifth image) as `complete` makes them, and four rounds of eight runs that hold the
truth; a file an image, so that it goes on where it stopped. replay: the notebook's verdict as it runs, asked after each
round and stopped where it passes: how many are answered, where the truth's place stands by log p and by log p/g, and how
often log_evidence + 2.36 stderr reaches the bound from above.
"""
import argparse
import math
import time
from pathlib import Path

from definitions import ROOT, definitions
import numpy as np
import torch


def hidden_mask(name):
    known = torch.ones(28, 28, dtype=torch.bool)
    known[dict(centre=np.s_[10:18, 10:18], top=np.s_[:14])[name]] = False
    return known


@torch.no_grad()
def record(nb, options):
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = nb.load_checkpoint(ROOT / "checkpoints" / "small.pt")
    guide = nb.Guide(model, nb.load_checkpoint(ROOT / "checkpoints" / "small_guide.pt", network=nb.GuideNetwork))
    known, budget = hidden_mask(options.hidden).to(model.device), nb.Budget()
    for number, image in enumerate(nb.sample(model, options.images, seed=options.seed)):
        path, started = folder / f"{options.hidden}_{options.seed}_{number:03d}.pt", time.monotonic()
        if path.exists():
            continue
        images = image.expand(budget.runs, -1, -1)
        told, seed, rounds = guide.told(images, known), options.seed + number, []
        for k in range(8 if number % 5 == 0 else 4):
            seeds = np.random.SeedSequence([seed, k]).generate_state(budget.runs, np.uint64).tolist()
            rounds.append(nb.smc(told, images, budget.particles, seeds))
        held = [nb.smc(told, images, budget.particles, range(10**7 + 100 * number + 8 * k, 10**7 + 100 * number + 8 * k + 8),
                       images).log_z for k in range(4)]
        log_p, ratio = nb.log_probs_and_weights(guide, image[None], known)[:, 0].tolist()
        nb.save_atomically(dict(rounds=[vars(found) for found in rounds], held=torch.cat(held), log_p=log_p,
                                ratio=ratio), path)
        print(f"{path.name}: {time.monotonic() - started:.0f} s", flush=True)


def stopped_at(nb, rounds, most):
    """(What the verdict is asked about last, whether it passes): rounds joined until it does, or cannot."""
    found = None
    for new in rounds[:most]:
        found = new if found is None else found.joined(new)
        if not nb.doubts_about(found):
            return found, True
        if nb.hopeless(found, most):
            break
    return found, False


def replay(nb, options):
    places, covered, errors, counts = {"log p": [], "log p/g": []}, [], [], {}
    for path in sorted(Path(options.folder).glob("*.pt")):
        saved = torch.load(path, weights_only=True)
        rounds = [nb.Found(**found) for found in saved["rounds"]]
        found, passed = stopped_at(nb, rounds, options.rounds)
        of = counts.setdefault(path.name.split("_")[0], [0, 0])
        of[0] += passed
        of[1] += 1
        if not passed:
            continue
        for by, value, values in (("log p", saved["log_p"], found.log_p),
                                  ("log p/g", saved["ratio"], found.log_p - found.log_g)):
            places[by].append(nb.place_of_truth(value, values, found.log_w))
        log_evidence, stderr = found.log_evidence()
        upper = -nb.log_mean(-saved["held"]).item()
        covered.append(log_evidence + 2.36 * stderr >= upper)
        errors.append(stderr)
    for name, (passed, of) in counts.items():
        print(f"{name}: {passed} of {of} answered")
    for by, found in places.items():
        quarters = np.histogram(found, 4, (0, 1))[0]
        square = ((quarters - len(found) / 4) ** 2 / (len(found) / 4)).sum()
        chance = torch.special.gammaincc(torch.tensor(1.5), torch.tensor(square / 2)).item()
        print(f"place of the truth by {by}: quarters {quarters}, P = {chance:.4f}")
    print(f"log_evidence + 2.36 stderr reaches the bound from above in {np.mean(covered):.0%}; median stderr "
          f"{np.median(errors) if errors else math.nan:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["record", "replay"])
    parser.add_argument("--folder", required=True)
    parser.add_argument("--hidden", choices=["centre", "top"], default="centre")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=4, help="for replay: the most")
    parser.add_argument("--seed", type=int, default=2001)
    options = parser.parse_args()
    dict(record=record, replay=replay)[options.what](definitions(), options)


if __name__ == "__main__":
    main()
