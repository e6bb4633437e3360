"""Is what passes true, at full size? Answers about images that the model drew, recorded one by one and judged together.

usage: python .ci/tools/calibrate.py record [--folder FOLDER] [--hidden MASK] [--images 100] [--seed 7001]
       python .ci/tools/calibrate.py judge [--folder FOLDER] [--hidden MASK] [--keep NAME]
       python .ci/tools/calibrate.py tops [--folder FOLDER]
       python .ci/tools/calibrate.py hole [--folder FOLDER]
       python .ci/tools/calibrate.py centre_73
record: `complete` with the budget of two cores; of the draws their weights are kept, and of what is answered those of
2,048 more, for a bound of log p(known) from above. judge: how many are answered, in which quarters the truth's place
stands by log p and by log p/g, how often log p(known) reaches the bound within 1.96 of both errors, and the answers'
Pareto k-hat. tops: of how many of the first twenty test images the top is answered, with that budget and with eight
times as much. hole: two hundred sweeps of Gibbs sampling pixel by pixel, beside `complete`. centre_73: by blocks,
beside weighted draws. MASK is centre, top, disc or chessboard.
What is found is kept a file an image, in a folder for these weights, so that the same command goes on where it stopped,
and two of them, with --part 0/2 and --part 1/2, share the images. What --keep, tops, hole and centre_73 find goes to
apart.json; a published run takes it over.
"""
import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the notebook does, before torch is imported
from definitions import ROOT, definitions
import arviz
import numpy as np
import torch
from scipy import stats

APART = ROOT / ".ci" / "tools" / "record" / "apart.json"
BUDGET = 2560  # draws of a pilot, at most


def keep_apart(nb, name, value, stderr=None, *, n, how):
    """A result that no run of the notebook makes, with the weights it holds for; written whole or not at all."""
    weights = fingerprints(nb)
    apart = json.loads(APART.read_text()) if APART.exists() else {}
    if apart.get("weights") != weights:
        apart = dict(weights=weights, results={})
    apart["results"][name] = dict(value=value, stderr=stderr, n=n, how=how)
    temporary = APART.with_suffix(".tmp")
    temporary.write_text(json.dumps(apart, indent=1) + "\n")
    temporary.replace(APART)


def released(nb):
    """(Model, guide), on the CPU: a card draws in other batches."""
    model = nb.load_checkpoint(ROOT / "checkpoints" / "pixelcnn.pt", "cpu")
    network = nb.load_checkpoint(ROOT / "checkpoints" / "guide.pt", "cpu", nb.GuideNetwork)
    return model, nb.Guide(model, network)


def fingerprints(nb):
    """{file: the fingerprint of the network in it, in hexadecimal} of the released ones."""
    model, guide = released(nb)
    return {file: bytes(nb.fingerprint(network).tolist()).hex()
            for file, network in {"pixelcnn.pt": model, "guide.pt": guide.network}.items()}


def hidden_mask(name):
    row, column = torch.meshgrid(torch.arange(28), torch.arange(28), indexing="ij")
    hidden = dict(centre=(row >= 10) & (row < 18) & (column >= 10) & (column < 18), top=row < 14,
                  disc=(row - 13.5) ** 2 + (column - 13.5) ** 2 < 7**2,  # this and the next no guide was trained on
                  chessboard=(row // 4 + column // 4) % 2 == 0,
                  hole=(row // 2 == 11) & (column // 2 == 5))  # at the foot of a stroke of test image 2
    return ~hidden[name]


def own_files(options, name, count):
    """(Number, path) of those of so many images that this process takes and has not done."""
    part, parts = map(int, options.part.split("/"))
    paths = [(k, options.folder / f"{name}_{k:03d}.pt") for k in range(part, count, parts)]
    return [(k, path) for k, path in paths if not path.exists()]


@torch.no_grad()
def answer_about(nb, guide, image, known, seed, path, most=BUDGET):
    """Complete an image whose hidden pixels are the truth, and write what judge needs."""
    started = time.monotonic()
    answer = nb.complete(guide.model, image, known, 1, guide, most, seed)
    log_p = nb.log_prob(guide.model, image[None]).item()
    log_g = nb.guide_pixel_log_probs(guide, image[None], known).sum().item()
    parts = {name: part and dict(log_w=part.log_w, log_p=part.log_p)
             for name, part in (("pilot", answer.pilot), ("found", answer.found))}
    said = dict(status=answer.status, log_evidence=answer.log_evidence, stderr=answer.log_evidence_stderr,
                seconds=time.monotonic() - started)
    if answer.status == "converged":  # what is refused is not judged
        parts["more"] = nb.weighted_draws(guide, image, known, 2048, seed=10**6 + seed).log_w
    nb.save_atomically(said | parts | dict(log_p=log_p, log_w=log_p - log_g), path)
    print(f"{path.name}: {said}", flush=True)


def record(nb, options):
    model, guide = released(nb)
    images = nb.sample(model, options.images, seed=options.seed)
    for number, path in own_files(options, f"{options.hidden}_{options.seed}", options.images):
        seed = options.seed + (number or options.images)  # the seed itself drew the images
        answer_about(nb, guide, images[number], hidden_mask(options.hidden), seed, path)


def tops(nb, options):
    _, guide = released(nb)
    images = nb.load_mnist(ROOT / "data")[1][:20]
    for times in (1, 8):
        for number, path in own_files(options, f"tops_{times}", 20):
            answer_about(nb, guide, images[number], hidden_mask("top"), 13 + number, path, times * BUDGET)
        cases = [torch.load(path, weights_only=True) for path in options.folder.glob(f"tops_{times}_*.pt")]
        passed = sum(case["status"] == "converged" for case in cases)
        tried = sum(case["found"] is not None for case in cases)
        print(f"{passed} of {len(cases)} answered with at most {times * BUDGET:,} draws in the pilot")
        if len(cases) == 20:
            how = f"the first twenty test images, at most {times * BUDGET} draws in the pilot"
            keep_apart(nb, f"question_g_converged_of_20_at_{times}_budgets", passed, n=20, how=how)
            keep_apart(nb, f"question_g_pilots_passed_of_20_at_{times}_budgets", tried, n=20, how=how)


def hole(nb, options):
    """Four chains, from blank, full ink and two forward draws; of 200 sweeps the first 20 are left out."""
    model, guide = released(nb)
    image, known, path = nb.load_mnist(ROOT / "data")[1][2], hidden_mask("hole"), options.folder / "hole.pt"
    start = torch.cat([torch.zeros(1, 28, 28), torch.full((1, 28, 28), 255)]).byte()
    states = torch.cat([start, nb.sample(model, 2, image=image, known=known, seed=1)])[None]
    if path.exists():
        states = torch.load(path, weights_only=True)
    while len(states) <= 200:
        more = nb.gibbs(model, image, known, 10, 4, start=states[-1], seed=len(states))
        states = torch.cat([states, more[1:]])
        nb.save_atomically(states, path)
        print(f"{len(states) - 1} sweeps", flush=True)
    answer = nb.complete(model, image, known, 1, guide, BUDGET, seed=3)
    keep_both(nb, "hole", model, known, states[20:], answer.found or answer.pilot,
              "mean level of 2x2 hidden pixels of test image 2")


def centre_73(nb, options):
    """Section 9.6's question, longer: eight chains of 40 sweeps by blocks, 12,288 weighted draws."""
    model, guide = released(nb)
    image, known = nb.load_mnist(ROOT / "data")[1][73], hidden_mask("centre")
    states = nb.gibbs(model, image, known, 40, 8, guide=guide, seed=73)
    found = nb.weighted_draws(guide, image, known, 12_288, seed=73)
    keep_both(nb, "centre_73", model, known, states[4:], found, "mean level of the centre of test image 73")


def keep_both(nb, name, model, known, states, found, how):
    """A mean level by chains, [states, chains, h, w], and by weighted draws."""
    log_p, ink = nb.watch(model, states, known)  # [states, chains]
    keep_apart(nb, f"{name}_mean_level_by_gibbs", ink.mean().item(), float(arviz.mcse(ink.T.numpy())), n=ink.numel(),
               how=how)
    mean, error = nb.weighted_ink(found, known)
    keep_apart(nb, f"{name}_mean_level_by_complete", mean.item(), error.item(), n=len(found.draws), how=how)
    keep_apart(nb, f"{name}_r_hat", max(nb.r_hat(ink), nb.r_hat(log_p)), n=ink.numel(),
               how="the larger of mean level's, log p's")


def place_of(truth, values, log_w, uniform):
    """The share of the weight on smaller values; of that on equal ones a random share."""
    weights, equal = log_w.softmax(0), (values - truth).abs() < 1e-3  # the same image, differently rounded
    return (weights[(values < truth) & ~equal].sum() + uniform * weights[equal].sum()).item()


def bound_from_above(case):
    """(log of the mean weight of the truth and draws that are not the answer's, its error). Given K the truth is a draw
    of the posterior, so one over that mean is 1 / Z on average, and its log lies above log Z, in expectation."""
    log_w = torch.cat([case["more"], case["more"].new_tensor([case["log_w"]])])
    variance = (log_w.softmax(0) ** 2).sum() - 1 / len(log_w)
    return log_w.logsumexp(0).item() - np.log(len(log_w)), variance.item() ** 0.5


def judgement(cases):
    """{what: (value, stderr, n, how)} of the files of `record`."""
    given = [case for case in cases if case["status"] == "converged"]
    found = dict(answered=(len(given), None, len(cases), "images that the model drew"))
    if not given:
        return found
    n, uniforms = len(given), np.random.default_rng(0).random((2, len(given)))
    for by, row in zip(("log_p", "log_w"), uniforms):
        places = [place_of(case[by], case["found"][by], case["found"]["log_w"], u) for case, u in zip(given, row)]
        quarters = np.histogram(places, [0, 0.25, 0.5, 0.75, 1 + 1e-9])[0]
        found[f"place_by_{by}_p"] = (stats.chisquare(quarters).pvalue, None, n,
                                     f"P of the quarters in which the truth stands: {quarters.tolist()}")
    bounds, errors = np.array([bound_from_above(case) for case in given]).T
    stderrs, log_evidences = np.array([[case["stderr"], case["log_evidence"]] for case in given]).T
    gaps = bounds - log_evidences
    for name, error, whose in (("bound_reached_share", np.hypot(stderrs, errors), "errors of both"),
                               ("bound_reached_by_stated_errors_share", stderrs, "errors")):
        share = np.mean(gaps <= 1.96 * error)
        found[name] = (share, (share * (1 - share) / n) ** 0.5, n, f"log_evidence + 1.96 {whose} reach the bound")
    outweighs = [case["log_w"] > case["more"].logsumexp(0).item() for case in given]
    found["truths_that_outweigh_all"] = (sum(outweighs), None, n, "the truth's weight is above the sum of 2,048 draws'")
    k_hats = [float(arviz.psislw(case["found"]["log_w"].numpy())[1]) for case in given]
    found["median_k_hat"] = (np.median(k_hats), None, n, "Pareto k-hat of the answers' weights")
    found["k_hats_above_0_7"] = (int(np.sum(np.array(k_hats) > 0.7)), None, n, "Pareto k-hat of the answers' weights")
    found["widest_gap_nats"] = (gaps.max(), None, n, "bound from above minus log_evidence")
    found["median_stderr_nats"] = (np.median(stderrs), None, n, "of log_evidence")
    return found


def judge(nb, options):
    paths = sorted(options.folder.glob(f"{options.hidden}_*_*.pt"))
    for name, (value, stderr, n, how) in judgement([torch.load(path, weights_only=True) for path in paths]).items():
        print(f"{options.hidden}_{name}: {value:.4g}{f' ± {stderr:.2g}' if stderr else ''} (n = {n}; {how})")
        if options.keep:
            name = f"{options.keep}_{options.hidden}_{name}"
            keep_apart(nb, name, float(value), stderr and float(stderr), n=n, how=how)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["record", "judge", "tops", "hole", "centre_73"])
    parser.add_argument("--folder", type=Path, default="data/calibration")
    parser.add_argument("--hidden", choices=["centre", "top", "disc", "chessboard"], default="centre")
    parser.add_argument("--images", type=int, default=100, help="how many")
    parser.add_argument("--seed", type=int, default=7001)
    parser.add_argument("--part", default="0/1", help="which of how many parts of the images")
    parser.add_argument("--keep", help="for judge: what the names of its results in apart.json begin with")
    options = parser.parse_args()
    nb = definitions()
    options.folder /= fingerprints(nb)["guide.pt"][:8]  # answers of other weights stay apart
    dict(record=record, judge=judge, tops=tops, hole=hole, centre_73=centre_73)[options.what](nb, options)


if __name__ == "__main__":
    main()
