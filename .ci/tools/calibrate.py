"""Is what passes true, at full size? Cases recorded one by one in record/<kind>.jsonl, and judged together.

usage: python .ci/tools/calibrate.py record [--hidden MASK] [--images 100] [--seed 7001] [--part 0/2]
       python .ci/tools/calibrate.py future | tops [--part 0/2]
       python .ci/tools/calibrate.py judge
record: images that the model drew, so that the hidden pixels are a draw of the posterior; they are completed, and 2,048
more draws give a bound of log p(known) from above. MASK is centre, top, disc or chessboard. future: the same for
question D at (14,14), 40 images, and the place of the pixel's own level in D's distribution. tops: the first twenty
test images' tops, by 2,048 draws and by 16,384.
A case is a line: number, seed, ess, k_hat, log_z, error, bound, bound_error, place_p, place_w, outweighs (and of D
place_level). The first line of a file names weights and draws; with others it is refused. The same command goes on
where it stopped, and two of them, with --part 0/2 and --part 1/2, share the images. judge: what the cases say, for
apart.json, which a published run takes over. (--folder, --draws: for a trial.)
"""
import argparse
import hashlib
import json
import os
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the notebook does, before torch is imported
from definitions import ROOT, definitions
import numpy as np
import torch
from scipy import stats

RECORD = ROOT / ".ci" / "tools" / "record"
MORE = 2048  # draws of the bound


def digests(folder=ROOT / "checkpoints"):
    """{file: SHA-256} of the released networks."""
    return {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in ("pixelcnn.pt", "guide.pt")}


def released(nb):
    """(Model, guide), on the CPU: a card draws in other batches."""
    folder = ROOT / "checkpoints"
    return (nb.load_checkpoint(folder / "pixelcnn.pt", "cpu"),
            nb.load_checkpoint(folder / "guide.pt", "cpu", nb.GuideNetwork))


def known_mask(name):
    row, column = torch.meshgrid(torch.arange(28), torch.arange(28), indexing="ij")
    hidden = dict(centre=(row >= 10) & (row < 18) & (column >= 10) & (column < 18), top=row < 14,
                  disc=(row - 13.5) ** 2 + (column - 13.5) ** 2 < 7**2,  # this and the next no guide was trained on
                  chessboard=(row // 4 + column // 4) % 2 == 0, future=28 * row + column <= 406)
    return ~hidden[name]


def place_of(truth, values, weights, luck):
    """The share of the weight on smaller values; of that on equal ones a random share."""
    equal = (values - truth).abs() < 1e-3  # the same image, differently rounded
    return (weights[(values < truth) & ~equal].sum() + luck * weights[equal].sum()).item()


def case_of(number, seed, found, log_ps, log_p, log_w, more):
    """What is recorded of a Weighted and its log p, of the truth's log p and log w, and of log w of other draws.

    Given K the truth is a draw of the posterior, so one over the mean weight of it and fresh draws is 1 / Z on average,
    and the mean's log lies above log Z, in expectation."""
    luck = torch.rand(2, generator=torch.Generator().manual_seed(seed)).tolist()
    bound, bound_error = found._replace(log_w=torch.cat([more.new_tensor([log_w]), more[1:]])).log_z
    log_z, error = found.log_z
    return dict(number=number, seed=seed, ess=found.ess, k_hat=found.k_hat, log_z=log_z, error=error, bound=bound,
                bound_error=bound_error, place_p=place_of(log_p, log_ps, found.weights, luck[0]),
                place_w=place_of(log_w, found.log_w, found.weights, luck[1]),
                outweighs=log_w > more.logsumexp(0).item())


def head_of(draws):
    """The first line of a file of cases: of which weights they are, and of how many draws."""
    return dict(weights={file: digest[:16] for file, digest in digests().items()}, draws=draws)


def read(path, draws=None):
    """The cases of a file; ValueError if they are of other weights, or not of so many draws."""
    head, *cases = map(json.loads, path.read_text().splitlines())
    expected = head_of(draws or head["draws"])
    if head != expected:
        raise ValueError(f"{path}: expected cases of {expected}, got {head}; move it away")
    return cases


def record(nb, kind, mask, images, seed, draws, options):
    """Write a line for each of images [n, 28, 28] that is in this process's part and has none."""
    (model, guide), known, path = released(nb), known_mask(mask), options.folder / f"{kind}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text(json.dumps(head_of(draws)) + "\n")
    done = {(case["number"], case["seed"]) for case in read(path, draws)}
    part, parts = map(int, options.part.split("/"))
    for number in range(part, len(images), parts):
        own, image = seed + 1 + number, images[number]  # the seed itself drew the images
        if (number, own) not in done:
            generator = torch.Generator().manual_seed(own)
            found = nb.complete(model, image, known, draws, guide, generator)
            _, more = nb.draw_many(model, image, known, min(draws, MORE), 10**6 + own, guide)
            log_p = nb.log_prob(model, image[None]).item()
            log_w = nb.log_weights(model, image[None], known, guide).item()
            case = case_of(number, own, found, nb.log_prob(model, found.draws), log_p, log_w, more)
            if kind == "future":  # as `conditional` does
                probs = nb.given_rest(model, found.pick(nb.PICKED, generator), (14, 14)).mean(dim=0)
                luck = torch.rand((), generator=generator).item()
                case["place_level"] = place_of(image[14, 14].item(), torch.arange(256), probs, luck)
            line = json.dumps(case)
            with path.open("a") as file:  # one write, at once whole
                file.write(line + "\n")
            print(f"{kind}: {line}", flush=True)


def binned(cases):
    """{bin: its cases}: by k-hat those with 20 effective draws; those with fewer."""
    bins = dict(k_hat_to_0_7=[], k_hat_to_1=[], k_hat_above_1=[], few_effective=[])
    for case in cases:
        k_hat = case["k_hat"]
        name = "k_hat_to_0_7" if k_hat <= 0.7 else "k_hat_to_1" if k_hat <= 1 else "k_hat_above_1"
        bins[name if case["ess"] >= 20 else "few_effective"].append(case)
    return bins


def reached(cases):
    """Whether log_z comes within 1.96 errors of the bounds, by the answer's own and by both, and the gaps: [n] each."""
    gaps = np.array([case["bound"] - case["log_z"] for case in cases])
    own, others = np.array([[case["error"], case["bound_error"]] for case in cases]).T
    return gaps <= 1.96 * own, gaps <= 1.96 * np.hypot(own, others), gaps


def judgement(cases):
    """{what: (value, stderr, n, how)} of cases."""
    n, found = len(cases), dict(cases=(len(cases), None, len(cases), "images that the model drew"))
    if n == 0:
        return found
    *both, gaps = reached(cases)
    for name, share in zip(("own", "both"), (held.mean() for held in both)):
        how = f"log_z + 1.96 errors ({name}) reach the bound"
        found[f"bound_reached_by_{name}"] = (share, (share * (1 - share) / n) ** 0.5, n, how)
    found["median_error"] = (np.median([case["error"] for case in cases]), None, n, "of log_z, nats")
    found["widest_gap"] = (gaps.max(), None, n, "bound from above minus log_z, nats")
    found["truths_that_outweigh_all"] = (sum(case["outweighs"] for case in cases), None, n, f"the sum of {MORE} draws")
    for by in [name for name in ("p", "w", "level") if f"place_{name}" in cases[0]]:
        places = [case[f"place_{by}"] for case in cases]
        quarters = np.histogram(places, [0, 0.25, 0.5, 0.75, 1 + 1e-9])[0]
        how = f"of the truth by {by}; 0.5 if all is right"
        found[f"mean_place_{by}"] = (np.mean(places), (12 * n) ** -0.5, n, how)
        found[f"quarters_{by}_p"] = (stats.chisquare(quarters).pvalue, None, n, f"truths in each: {quarters.tolist()}")
    return found


def limit(cases):
    """The largest k-hat with which an answer is believed, as k_hat_limit: 1 if at least 0.9 of the intervals between
    0.7 and 1 reach the bound by their own errors, else 0.7."""
    between = binned(cases)["k_hat_to_1"]
    share = reached(between)[0].mean() if between else 0.0
    return dict(k_hat_limit=(1.0 if share >= 0.9 else 0.7, None, len(between),
                             f"{share:.3f} of the intervals of k-hat 0.7 to 1 reach the bound; 0.9 give 1"))


def judge(nb, options):
    found, drawn = {}, []
    for path in sorted(options.folder.glob("*.jsonl")):
        cases = read(path)
        if path.stem.startswith("tops"):
            believed = sum(case["ess"] >= nb.MIN_ESS and case["k_hat"] <= nb.MAX_K_HAT for case in cases)
            found[f"{path.stem}_converged"] = (believed, None, len(cases), "tops of the first test images")
        else:
            drawn += cases
            for name, part in binned(cases).items():
                found |= {f"{path.stem}_{name}_{what}": values for what, values in judgement(part).items()}
    found |= limit(drawn)
    results = {}
    for name, (value, stderr, n, how) in found.items():
        print(f"{name}: {value:.4g}{f' ± {stderr:.2g}' if stderr else ''} (n = {n}; {how})")
        results[name] = dict(value=float(value), stderr=stderr and float(stderr), n=n, how=how)
    (options.folder / "apart.json").write_text(json.dumps(dict(weights=digests(), results=results), indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["record", "future", "tops", "judge"])
    parser.add_argument("--hidden", choices=["centre", "top", "disc", "chessboard"], default="centre")
    parser.add_argument("--images", type=int, help="how many")
    parser.add_argument("--seed", type=int, default=7001)
    parser.add_argument("--part", default="0/1", help="which of how many parts of the images")
    parser.add_argument("--folder", type=Path, default=RECORD)
    parser.add_argument("--draws", type=int, default=2048)
    options = parser.parse_args()
    nb = definitions()
    if options.what == "judge":
        judge(nb, options)
    elif options.what == "tops":
        images = nb.load_mnist(ROOT / "data")[1][: options.images or 20]
        for draws in (options.draws, 8 * options.draws):
            record(nb, f"tops_{draws}", "top", images, 12, draws, options)
    else:
        kind, count = (options.hidden, 100) if options.what == "record" else ("future", 40)
        images = nb.sample(released(nb)[0], options.images or count, seed=options.seed)
        record(nb, kind, kind, images, options.seed, options.draws, options)


if __name__ == "__main__":
    main()
