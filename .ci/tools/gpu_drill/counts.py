"""Kernel launches and FLOPs of the released networks at full size, counted on a pretended card, and what they mean.

usage: python .ci/tools/gpu_drill/counts.py
A launch costs about 8 microseconds and a view 2 (the replay of a graph counts as one launch, though what is in it takes
some microseconds each); arithmetic runs at a tenth of the peak on a T4, a third on an A100.
The larger of the two sums is the estimate: good to a factor of two, no better. No card was used.
"""
import math
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
import cudasim
import graphs
import torch
from definitions import ROOT, definitions, train_until
from torch.utils.flop_counter import FlopCounterMode

torch.set_num_threads(1)
nb = definitions()
graphs.pretend("A100 (pretended)", True)  # bfloat16: no step is skipped, as float16 skips its first ones
SIM = cudasim.Sim()
SIM.__enter__()
FLOPS = {"T4": (8.1e12 / 10, 65e12 / 10), "A100": (19.5e12 / 3, 312e12 / 3)}  # float32, half precision


def counted(function):
    """(launches, views) of a call on the pretended card."""
    before = SIM.ops.copy()
    function()
    ops = SIM.ops - before
    views = sum(count for name, count in ops.items() if name in cudasim.VIEWS)
    return sum(ops.values()) - views, views


def estimate(launches, views, flops, half=0):
    """Seconds on each card."""
    waiting = 8e-6 * launches + 2e-6 * views
    return {card: max(waiting, flops / rates[half]) for card, rates in FLOPS.items()}


def line(what, launches, views, flops, half=0):
    seconds = estimate(launches, views, flops, half)
    print(f"{what:<58}{launches:>12,}{views:>12,}{flops / 1e9:>12,.0f}"
          + "".join(f"{seconds[card]:>10.3g}" for card in FLOPS), flush=True)
    return seconds


image = nb.load_mnist(ROOT / "data")[2][0]
model = nb.load_checkpoint(ROOT / "checkpoints" / "small.pt", "cuda")
guide = nb.Guide(model, nb.load_checkpoint(ROOT / "checkpoints" / "small_guide.pt", "cuda", nb.GuideNetwork))
with FlopCounterMode(display=False) as counter, torch.no_grad():
    nb.PixelCNN(model.config)(image[None])
one_pass = counter.get_total_flops()
print(f"{'':<58}{'launches':>12}{'views':>12}{'GFLOP':>12}{'T4, s':>10}{'A100, s':>10}")

# The first row of a call runs as it is, the second is captured and compared, the others are replayed.
drawing = counted(lambda: nb.sample(model, 1))
line("256 samples", *drawing, 256 * one_pass)

config, few = nb.Config(), nb.load_mnist(ROOT / "data")[0][:4]


def training(steps):
    """So many steps of one image each: launches do not depend on the batch."""
    with tempfile.TemporaryDirectory() as folder:
        train_until(nb, steps, replace(config, batch_size=1), few, few, path=Path(folder) / "small.pt", device="cuda",
                    save_seconds=math.inf)


once = [(b - a) / 2 for a, b in zip(counted(lambda: training(1)), counted(lambda: training(3)))]
steps = config.images_seen // config.batch_size
line(f"a training step, batch {config.batch_size}", *map(round, once), 3 * one_pass * config.batch_size, 1)
for name, images in (("the first stage", config.images_seen), ("both stages", sum(c.images_seen for c in nb.STAGES))):
    line(f"training the model, {name}", *(round(images // config.batch_size * x) for x in once), 3 * one_pass * images,
         1)


def guide_training(steps):
    """The same for the guide's network."""
    with tempfile.TemporaryDirectory() as folder:
        train_until(nb, steps, replace(guide.network.config, batch_size=1), few, few, path=Path(folder) / "guide.pt",
                    device="cuda", save_seconds=math.inf, network=nb.GuideNetwork, loss=partial(nb.guide_loss, model),
                    score=partial(nb.guide_bits, model))


network, everything = nb.GuideNetwork(guide.network.config), torch.ones(1, 28, 28, dtype=torch.bool)
with FlopCounterMode(display=False) as counter, torch.no_grad():
    network(image[None], network.hint(image[None], everything))
flops = one_pass + 3 * counter.get_total_flops()
once = [(b - a) / 2 for a, b in zip(counted(lambda: guide_training(1)), counted(lambda: guide_training(3)))]
config = nb.GUIDE_CONFIG
for images in (200_000, config.images_seen):  # a missing file's; anew
    steps = images // config.batch_size
    line(f"training the guide, {images:,} images", *(round(steps * x) for x in once), flops * images, 1)
    line("and drawing them", *(images // 256 * x for x in drawing), images * one_pass)

half = torch.arange(784).view(28, 28) >= 392
told = guide.told(image[None].cuda(), half.cuda())
# Launches hardly depend on the number of runs, and not on that of particles: eight runs of two are counted. Passes of
# 128 particles: p and h draw 14 rows, the last two and two known ones fourfold, p reads twelve; four promises.
eight = torch.zeros(8, dtype=torch.long)
runs = [counted(lambda: nb.smc(told[eight], image.cuda().expand(8, -1, -1), 2, [*range(8)])) for _ in range(2)]
passes = 2 * (12 + 4 * 4) / 28 + 12 / 28 + sum(28 - row for row in nb.look_rows(half, nb.LOOKS)) / 28
for name, (launches, views) in zip(("first", "later"), runs):
    line(f"G, the {name} round of eight runs of 128 particles", launches, views, round(8 * 128 * passes * one_pass))
