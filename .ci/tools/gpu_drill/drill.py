"""What a card refuses and a CPU forgives, on a pretended CUDA device (cudasim.py): the notebook's functions.

usage: python .ci/tools/gpu_drill/drill.py [--planted]
Each call runs for small networks "on cuda", its images and masks on the CPU and on the card, and must give what it
gives on the CPU; training runs in float16, as on a T4. Prints a line each; exits 1 if one failed. --planted: a
control, the same calls with masks that stay where they are. Not shown: speed, TF32, kernels' rounding, torch.compile.
"""
import contextlib
import copy
import os
import sys
import tempfile
import traceback
from functools import partial
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"  # read when torch imports tqdm
sys.path.append(str(Path(__file__).resolve().parents[1]))
import cudasim
import torch
from definitions import definitions

PLANTED = "--planted" in sys.argv
torch.set_num_threads(1)
cudasim.pretend()
nb = definitions()
if PLANTED:
    nb.check_known = lambda model, known: known

torch.manual_seed(0)
CONFIG = nb.Config(6, 6, 4, embedding=4, channels=12, bottleneck=8, dilations=(1, 2), context=4)
RECIPE = nb.Recipe(640, warmup=64, decay=160, batch_size=16, validate_every=10)
MODEL = nb.PixelCNN(CONFIG).eval().requires_grad_(False)
NETWORK = nb.starting_guide(MODEL, (1, 2)).requires_grad_(False)
for parameter in [*MODEL.parameters(), *NETWORK.parameters()]:
    parameter.add_(0.15 * torch.randn_like(parameter))
IMAGES = nb.sample(MODEL, 40, seed=1)
KNOWN = torch.arange(36).view(6, 6) >= 18


def numbers(answer):
    """The numbers of an Estimate, a Completion, a Found, a tuple or a tensor, in a list."""
    if isinstance(answer, (nb.Estimate, nb.Completion)):
        answer = [x for x in vars(answer).values() if not isinstance(x, str)]
    if isinstance(answer, (tuple, list)):
        return [number for part in answer for number in numbers(part)]
    return [] if answer is None else [torch.as_tensor(answer).cpu().double()]


CALLS = {  # of a guide, and of what moves images or masks to where they are given
    "log_prob": lambda g, to: nb.log_prob(g.model, to(IMAGES)),
    "influence": lambda g, to: nb.influence(g.model, IMAGES[0].to(g.model.device)),
    "sample_naive": lambda g, to: nb.sample_naive(g.model, IMAGES[:3].to(g.model.device), seed=2),
    "sample": lambda g, to: nb.sample(g.model, 5, seed=2),
    "sample, sharpened and clamped": lambda g, to: nb.sample(
        g.model, 5, image=to(IMAGES[0]), known=to(KNOWN), temperature=0.8, seed=2),
    "marginal": lambda g, to: nb.marginal(g.model, (3, 2), 32),
    "conditional_given_past": lambda g, to: nb.conditional_given_past(g.model, to(IMAGES[0]), (3, 2)),
    "conditional_given_rest": lambda g, to: nb.conditional_given_rest(g.model, to(IMAGES[0]), (3, 2)),
    "conditional_given_future": lambda g, to: nb.conditional_given_future(
        g.model, to(IMAGES[0]), (3, 2), guide=g, most=64),
    "weighted_draws": lambda g, to: nb.weighted_draws(g, to(IMAGES[0]), to(KNOWN), 32),
    "weighted_draws, the model alone": lambda g, to: nb.weighted_draws(
        nb.Guide(g.model), to(IMAGES[0]), to(KNOWN), 32),
    "gibbs_sweep": lambda g, to: nb.gibbs_sweep(g.model, to(IMAGES[0]), KNOWN, torch.Generator().manual_seed(0)),
    "gibbs_chains": lambda g, to: nb.gibbs_chains(g, IMAGES[:3].to(g.model.device), to(KNOWN), 2, 0),
    "complete": lambda g, to: nb.complete(g.model, to(IMAGES[0]), to(KNOWN), 4, g, 2048),
    "complete, too few draws": lambda g, to: nb.complete(g.model, to(IMAGES[0]), to(KNOWN), 4, g, 8),
    "complete, a prefix": lambda g, to: nb.complete(g.model, to(IMAGES[0]), to(~KNOWN), 4),
    "the guide's loss": lambda g, to: nb.validation_bits(g.network, IMAGES.to(g.model.device)),
    "fresh_batches": lambda g, to: nb.fresh_batches(g.model, to(IMAGES.repeat(8, 1, 1)), steps=2)(RECIPE, 3)}


def compare(call):
    """The card's answers, for images on the CPU and on the card, against the CPU's."""
    wanted = numbers(call(nb.Guide(MODEL, NETWORK), lambda x: x))
    for to in (lambda x: x, lambda x: x.to("cuda")):
        model, network = (copy.deepcopy(x).to("cuda") for x in (MODEL, NETWORK))
        network.given = [model]
        found = numbers(call(nb.Guide(model, network), to))
        assert len(found) == len(wanted) > 0
        assert all(torch.allclose(*pair, rtol=0, atol=1e-5) for pair in zip(found, wanted)), "another answer"


def training(folder):
    """In float16 with its scaler, close to float32 on a CPU; also if it is stopped on the other device and goes on."""
    assert nb.training_dtype(torch.device("cuda")) == torch.float16
    nb.training_dtype = lambda device: torch.float32 if device.type == "cpu" else torch.float16

    def trained(*devices):
        def batches(recipe, step):
            next(steps)  # all but the last device are stopped as they ask for a batch
            return nb.batch_at(IMAGES, recipe, step)

        path = folder / f"{len(devices)}_{devices[-1]}.pt"
        for device in devices:
            torch.manual_seed(1)
            steps = iter(range(40 if device == devices[-1] else 13))
            with contextlib.suppress(StopIteration):
                model = nb.train(nb.PixelCNN(CONFIG).to(device), batches, IMAGES[:20], [RECIPE], path, save_seconds=0)
        return torch.cat([parameter.cpu().flatten() for parameter in model.parameters()])

    plain = trained("cpu")
    for devices in (["cuda"], ["cpu", "cuda"], ["cuda", "cpu"]):
        found = trained(*devices)
        assert found.isfinite().all() and 0 < (found - plain).abs().mean() < 0.05 * plain.abs().mean(), devices


DRILLS = {name: partial(compare, call) for name, call in CALLS.items()}
failed = []
with cudasim.Sim() as sim, tempfile.TemporaryDirectory() as folder:
    if not PLANTED:
        DRILLS["train"] = partial(training, Path(folder))
    for name, drill in DRILLS.items():
        before, errors = sim.ops, len(sim.errors)
        try:
            drill()
            assert sim.ops > before and len(sim.errors) == errors, "nothing ran on the card, or it refused"
            print(f"{name}: ok", flush=True)
        except Exception as error:
            failed.append(name)
            print(f"{name}: FAILED {type(error).__name__}: {error}"[:400], flush=True)
            for frame in traceback.extract_tb(error.__traceback__):
                if "cell" in frame.filename or "drill" in frame.filename:
                    print("   ", frame.filename[-12:], frame.lineno, frame.name)
print(f"{len(DRILLS)} drills, {len(failed)} failed: {failed}; {len(sim.errors)} device mismatches")
sys.exit(bool(failed or sim.errors))
