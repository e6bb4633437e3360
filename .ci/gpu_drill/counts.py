"""Kernel launches and FLOPs of the released networks at full size, counted on a pretended card, and what they mean.

usage: python .ci/gpu_drill/counts.py
A launch costs about 8 microseconds and a view 2; arithmetic runs at a tenth of the peak on a T4, a third on an A100.
The larger of the two sums is the estimate: good to a factor of two, no better. No card was used.
"""
import math
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
import cudasim
import torch
from definitions import ROOT, definitions
from torch.utils.flop_counter import FlopCounterMode

torch.set_num_threads(1)
nb = definitions()
cudasim.pretend()
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

launches, views = counted(lambda: nb.sample(model, 1, stop=(3, 0)))
more = counted(lambda: nb.sample(model, 1, stop=(5, 0)))
step = [(b - a) / 56 for a, b in zip((launches, views), more)]
line("a pixel step of `sample`, row's work included", *(round(x) for x in step), one_pass / 784)
line("256 samples", *(round(784 * x) for x in step), 256 * one_pass)

config, few = nb.Config(), nb.load_mnist(ROOT / "data")[0][:4]


def training(steps):
    """So many steps of one image each: launches do not depend on the batch."""
    with tempfile.TemporaryDirectory() as folder:
        nb.train(replace(config, batch_size=1), few, few, path=Path(folder) / "small.pt", device="cuda", resume=False,
                 save_seconds=math.inf, stop_after=steps)


once = [(b - a) / 2 for a, b in zip(counted(lambda: training(1)), counted(lambda: training(3)))]
steps = config.images_seen // config.batch_size
line(f"a training step, batch {config.batch_size}", *map(round, once), 3 * one_pass * config.batch_size, 1)
line("training the model", *(round(steps * x) for x in once), 3 * one_pass * config.images_seen, 1)

half = torch.arange(784).view(28, 28) >= 392
told = guide.told(image[None].cuda(), half[None].cuda())
particles = nb.start(told, told.draw(image.cuda(), 2, 0)[0])
generator = torch.Generator().manual_seed(0)
band = torch.zeros(28, 28, dtype=torch.bool)
band[4:10] = True
move = counted(lambda: nb.redraw(particles, told, band.cuda(), 0.5, generator))
line("a band of six rows redrawn, 64 particles", *move, 64 * one_pass * 5)
draw = counted(lambda: nb.draw_looking_ahead(told, image.cuda(), 2, 2, 0))
line("1024 draws of the top half, culled and weighted", *(4 * x for x in draw), 1024 * one_pass * 3.6)
# A batch has the launches of one image: four parts of 256 draws an image are, though, drawn image by image.
for images in (1, 10):
    whole = [images * 4 * d + 2.5 * (4 + 2) * m for d, m in zip(draw, move)]  # four temperatures and two sweeps
    line(f"G, {images} digit{'s' * (images > 1)}, a round of four temperatures and two sweeps",
         *(round(x) for x in whole), images * (1024 * 3.6 + 6 * 2.5 * 64 * 5) * one_pass)
