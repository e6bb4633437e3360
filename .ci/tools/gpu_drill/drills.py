"""What a card refuses and a CPU forgives, function by function, on a pretended CUDA device (cudasim.py).

usage: python .ci/tools/gpu_drill/drills.py [--bf16]
Each drill runs a public function on a 6x6 model that is "on cuda", with images and masks on the CPU or on the card,
and compares the answer with the same call on the CPU. Prints a line each; exits 1 if one failed.
"""
import copy
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from unittest.mock import patch

sys.path.append(str(Path(__file__).resolve().parents[1]))
import cudasim
import graphs
import torch
from definitions import definitions, train_until

BF16 = "--bf16" in sys.argv
torch.set_num_threads(1)
graphs.pretend(BF16)
nb = definitions()

CONFIG = nb.Config(height=6, width=6, levels=4, embedding=4, channels=12, bottleneck=8, dilations=(1, 2), context=4,
                   images_seen=640, batch_size=16, validate_every=10)
torch.manual_seed(0)
MODEL = nb.PixelCNN(CONFIG).eval().requires_grad_(False)
for parameter in MODEL.parameters():
    parameter.add_(0.2 * torch.randn_like(parameter))
NETWORK = nb.GuideNetwork.starting_from(MODEL, (1, 2))
for parameter in NETWORK.parameters():
    parameter.add_(0.1 * torch.randn_like(parameter))
IMAGES = nb.sample(MODEL, 40, seed=1)
KNOWN = torch.arange(36).view(6, 6) >= 18
BUDGET = nb.Budget(particles=8, runs=4, rounds=2)
CUDA = torch.device("cuda", 0)


def on_card(module):
    return copy.deepcopy(module).to(CUDA)


def guide_on_card():
    return nb.Guide(on_card(MODEL), on_card(NETWORK))


def same(found, wanted, tolerance=1e-5):
    found, wanted = torch.as_tensor(found).cpu().double(), torch.as_tensor(wanted).cpu().double()
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    assert torch.allclose(found, wanted, rtol=0, atol=tolerance, equal_nan=True), (
        f"differs from the CPU by {(found - wanted).abs().max():.3g}")


def numbers(answer):
    """The numbers of an Estimate, a Completion, a tuple or a tensor, in a list."""
    if isinstance(answer, nb.Estimate):
        return [answer.probs, *([] if answer.stderr is None else [answer.stderr])]
    if isinstance(answer, nb.Completion):
        return [answer.draws, torch.tensor(answer.log_evidence), *numbers(answer.found)]
    if isinstance(answer, nb.Found):
        return [answer.draws, answer.log_w, answer.log_p, answer.eve]
    if isinstance(answer, (tuple, list)):
        return [number for part in answer for number in numbers(part)]
    return [answer] if isinstance(answer, (torch.Tensor, float, int)) else []


def compare(function):
    """function(model, guide, to) on the CPU, and on the card with the images on the CPU and on the card. Promises in
    float32 here: half precision is another one on each device, and would let others go on."""
    with patch.object(nb, "training_dtype", lambda device: torch.float32):
        wanted = numbers(function(MODEL, nb.Guide(MODEL, NETWORK), lambda x: x))
        assert wanted
        for to in (lambda x: x, lambda x: x.to(CUDA)):
            guide = guide_on_card()
            found = numbers(function(guide.model, guide, to))
            assert len(found) == len(wanted)
            for one, other in zip(found, wanted):
                same(one, other)


def runs(guide, reference=False, **rest):
    """Three runs of smc for the first image."""
    images = IMAGES[:1].to(guide.model.device).expand(3, -1, -1)
    told = guide.told(images, KNOWN.to(images.device))
    return nb.smc(told, images, 8, [1, 2, 3], images if reference else None, **rest)


SAME_CALL = {
    "log_prob": lambda m, g, to: nb.log_prob(m, to(IMAGES), 7),
    "bits_per_dim": lambda m, g, to: nb.bits_per_dim(m, to(IMAGES)),
    "sample": lambda m, g, to: nb.sample(m, 5, seed=2),
    "sample, clamped": lambda m, g, to: nb.sample(m, 5, image=to(IMAGES[0]), known=to(KNOWN), seed=2),
    "sample_naive": lambda m, g, to: nb.sample_naive(m, to(IMAGES[:3]), seed=2),
    "marginal": lambda m, g, to: nb.marginal(m, (3, 2), 32),
    "conditional_given_past": lambda m, g, to: nb.conditional_given_past(m, to(IMAGES[0]), (3, 2)),
    "conditional_given_rest": lambda m, g, to: nb.conditional_given_rest(m, to(IMAGES[0]), (3, 2)),
    "conditional_given_future": lambda m, g, to: nb.conditional_given_future(m, to(IMAGES[0]), (3, 2), BUDGET),
    "the same with a guide": lambda m, g, to: nb.conditional_given_future(m, to(IMAGES[0]), (3, 2), BUDGET, guide=g),
    "complete": lambda m, g, to: nb.complete(m, to(IMAGES[0]), to(KNOWN), 4, BUDGET),
    "complete with a guide": lambda m, g, to: nb.complete(m, to(IMAGES[0]), to(KNOWN), 4, BUDGET, guide=g),
    "log_probs_and_weights": lambda m, g, to: nb.log_probs_and_weights(
        g, *(x.to(m.device) for x in (IMAGES, KNOWN))),
    "complete, prefix": lambda m, g, to: nb.complete(m, to(IMAGES[0]), to(~KNOWN), 4, BUDGET),
    "gibbs_sweep": lambda m, g, to: nb.gibbs_sweep(m, to(IMAGES[0]), KNOWN, torch.Generator().manual_seed(0)),
    "forward_gibbs": lambda m, g, to: nb.forward_gibbs(m, to(IMAGES[0]), KNOWN, 5, 1),
    "smc": lambda m, g, to: runs(g),
    "smc, the model alone": lambda m, g, to: runs(nb.Guide(m)),
    "smc with a reference": lambda m, g, to: runs(g, True),
    "smc without looks and copies": lambda m, g, to: runs(g, looks={}, copies=1),
    "gibbs_chains": lambda m, g, to: nb.gibbs_chains(g, IMAGES[:3].to(m.device), KNOWN.to(m.device), 2, 0),
    "draws_of_each": lambda m, g, to: nb.draws_of_each(runs(g), 1, 1),
    "both_bounds": lambda m, g, to: nb.both_bounds(g, IMAGES[0].to(m.device), KNOWN.to(m.device), 8, 3, 0),
    "guide_bits": lambda m, g, to: nb.guide_bits(m, g.network, to(IMAGES)),
    "fresh_batches": lambda m, g, to: nb.fresh_batches(m, IMAGES, CONFIG, steps=2)(3),
    "influence": lambda m, g, to: nb.influence(m, to(IMAGES[0])),
    "cached_logits": lambda m, g, to: nb.cached_logits(m, IMAGES[:4].to(m.device)),
    "FastNetwork, one pass": lambda m, g, to: nb.FastNetwork(m).logits(IMAGES.to(m.device)),
    "FastNetwork in half precision": lambda m, g, to: nb.FastNetwork(m, torch.bfloat16).logits(
        IMAGES.to(m.device)).float().log_softmax(1).mean(),
}


def memory_halved():
    """Half the memory that eight runs of 32 particles take: the same answer in smaller parts."""
    budget = nb.Budget(32, 8, 2)
    answers, peaks = [], []
    for share in (None, 0.6):
        guide = guide_on_card()  # a fresh one: graphs of rows hold memory too
        with (cudasim.Sim(memory=True, limit=share and share * peaks[0]) as sim,
              warnings.catch_warnings(record=True, action="always") as said):
            answers.append(nb.complete(guide.model, IMAGES[0], KNOWN, 4, budget, guide=guide))
        peaks.append(sim.peak)
    assert any("no GPU memory for" in str(w.message) for w in said), "nothing was halved"
    for one, other in zip(*map(numbers, answers)):
        same(one, other)


def promise_in_half_precision():
    """In the card's own half precision particles go on, whose weights are finite."""
    guide = guide_on_card()
    assert guide.quick.table.dtype == (torch.bfloat16 if BF16 else torch.float16)
    found = runs(guide)
    assert found.log_w.isfinite().all() and (found.draws[:, :, KNOWN] == IMAGES[0, KNOWN]).all()


def replayed():
    """`sample` and `smc` replay rows: all but the first of a kind; what is drawn once is not captured."""
    guide = guide_on_card()
    for draw, most in ((lambda: nb.sample(guide.model, 5), 5), (lambda: runs(guide), 1)):
        before = sim.ops["graph replay"]
        draw()
        assert sim.ops["graph replay"] - before >= most, "nothing was replayed"
    assert [*guide.fast[1].graphs.values()].count(None) == 1, "the one row after the copies was captured"
    runs(guide)
    assert None not in guide.fast[1].graphs.values()
    before = sim.ops.total()
    runs(guide)
    again = sim.ops.total() - before
    guide.fast[1].graphs.clear()
    runs(guide)
    assert sim.ops.total() - before > 2.5 * again, "a graph is made anew for each call"


def without_graphs(planted):
    """Capture that fails, or a replay that is off: one warning for each kind of row, and the same draws."""
    wanted = nb.sample(MODEL, 5, seed=2)
    model = on_card(MODEL)
    with warnings.catch_warnings(record=True, action="always") as said, planted:
        same(nb.sample(model, 5, seed=2), wanted)
    assert sum("no CUDA graph of a row" in str(w.message) for w in said) == 1, [str(w.message) for w in said]


def broken_capture(*_):
    raise RuntimeError("operation not permitted when stream is capturing")


class Stale(torch.cuda.CUDAGraph):
    """A graph whose replay leaves old numbers."""
    def replay(self):
        super().replay()
        self.poison()


def stopped_and_resumed(first, then):
    """Training on device `first`, stopped after 13 steps, goes on on device `then`."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
        path = Path(folder) / "model.pt"
        train_until(nb, 13, CONFIG, IMAGES, IMAGES[:20], path=path, device=first)
        model, history = nb.train(CONFIG, IMAGES, IMAGES[:20], path=path, device=then)
        assert history[-1]["images"] == 640
        whole, _ = nb.train(CONFIG, IMAGES, IMAGES[:20], path=Path(folder) / "whole.pt", device=then)
    assert all(p.isfinite().all() for p in model.parameters())
    if first == then:
        for one, other in zip(model.parameters(), whole.parameters()):
            same(one, other, 0)


def overflow(where):
    """An infinite gradient at step 7: weights finite and equal to those of a run that left the step out."""
    def loss(model, batch, step):
        w = getattr(model, where).weight
        extra = (w - w.detach()).sqrt().sum() if step == 7 else 0.0  # 0, its gradient infinite
        return nb.training_loss(model, batch, step) + extra

    saved = []
    with tempfile.TemporaryDirectory() as folder:
        for planted in (True, False):
            path = Path(folder) / f"{planted}.pt"
            if not planted:  # stop before step 7, and go on after it
                train_until(nb, 7, CONFIG, IMAGES, IMAGES[:20], path=path, device="cuda")
                state = torch.load(path.with_suffix(".state"), weights_only=True)
                _, *rest = state["progress"]
                torch.save({**state, "progress": (8, *rest)}, path.with_suffix(".state"))
            train_until(nb, 12, CONFIG, IMAGES, IMAGES[:20], path=path, device="cuda",
                        loss=loss if planted else None)
            saved.append(torch.load(path.with_suffix(".state"), weights_only=True))
    for part in ("model", "averaged"):
        for one, other in zip(*(state[part].values() for state in saved)):
            assert one.isfinite().all()
            same(one, other, 1e-5)
    assert saved[0]["scaler"]["scale"] == saved[1]["scaler"]["scale"] / 2


DRILLS = {name: lambda call=call: compare(call) for name, call in SAME_CALL.items()}
DRILLS["complete with memory for a part of the particles"] = memory_halved
DRILLS["smc with promises in half precision"] = promise_in_half_precision
DRILLS["rows are replayed"] = replayed
DRILLS["sample where capture fails"] = lambda: without_graphs(patch.object(torch.cuda, "graph", broken_capture))
DRILLS["sample where a replay is off"] = lambda: without_graphs(patch.object(torch.cuda, "CUDAGraph", Stale))
DRILLS["train, stopped and resumed"] = lambda: stopped_and_resumed("cuda", "cuda")
DRILLS["train, begun on a CPU"] = lambda: stopped_and_resumed("cpu", "cuda")
DRILLS["train, gone on with on a CPU"] = lambda: stopped_and_resumed("cuda", "cpu")
if not BF16:  # float16 alone has a scaler
    DRILLS["train, overflow in AdamW's part"] = lambda: overflow("head")
    DRILLS["train, overflow in Muon's part"] = lambda: overflow("first")

failed = []
with cudasim.Sim() as sim:
    for name, drill in DRILLS.items():
        before = len(sim.errors)
        try:
            drill()
            assert len(sim.errors) == before, sim.errors[before:]
            print(f"{name}: ok", flush=True)
        except Exception as error:
            failed.append(name)
            print(f"{name}: FAILED {type(error).__name__}: {error}"[:400], flush=True)
            for frame in traceback.extract_tb(error.__traceback__):
                if "cell" in frame.filename or "drills" in frame.filename:
                    print("   ", frame.filename[-12:], frame.lineno, frame.name)
print(f"{len(DRILLS)} drills, {len(failed)} failed: {failed}; {len(sim.errors)} device mismatches")
sys.exit(bool(failed or sim.errors))
