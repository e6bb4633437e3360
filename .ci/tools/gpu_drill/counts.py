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
graphs.pretend(bf16=True)  # no step is skipped, as float16 skips its first ones
SIM = cudasim.Sim()
SIM.__enter__()


def counted(function):
    """(Launches, views) of a call on the pretended card."""
    before = SIM.ops.copy()
    function()
    return cudasim.launches_and_views(SIM.ops - before)


def one_step(config, **options):
    """(Launches, views) of a training step; they do not depend on the batch: one image."""
    def training(steps):
        with tempfile.TemporaryDirectory() as folder:
            train_until(nb, steps, replace(config, batch_size=1), few, few, path=Path(folder) / "network.pt",
                        device="cuda", save_seconds=math.inf, **options)

    return [(b - a) / 2 for a, b in zip(counted(lambda: training(1)), counted(lambda: training(3)))]


def flops_of(forward):
    """Of a pass over one image, on the CPU."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward()
    return counter.get_total_flops()


def line(what, launches, views, flops, half=0):
    seconds = cudasim.seconds(launches, views, flops, half).values()
    print(f"{what:<58}{round(launches):>12,}{round(views):>12,}{flops / 1e9:>12,.0f}"
          + "".join(f"{x:>10.3g}" for x in seconds), flush=True)


train_images, _, test_images, _ = nb.load_mnist(ROOT / "data")
few, image = train_images[:4], test_images[:1]
model = nb.load_checkpoint(ROOT / "checkpoints" / "small.pt", "cuda")
guide = nb.Guide(model, nb.load_checkpoint(ROOT / "checkpoints" / "small_guide.pt", "cuda", nb.GuideNetwork))
one_pass = flops_of(lambda: nb.PixelCNN(model.config)(image))
print(f"{'':<58}{'launches':>12}{'views':>12}{'GFLOP':>12}{'T4, s':>10}{'A100, s':>10}")

# The first row of a call runs as it is, the second is captured and compared, the others are replayed.
drawing = counted(lambda: nb.sample(model, 1))
line("256 samples", *drawing, 256 * one_pass)

config = nb.Config()
once = one_step(config)
line(f"a training step, batch {config.batch_size}", *once, 3 * one_pass * config.batch_size, 1)
for name, images in (("the first stage", config.images_seen), ("both stages", sum(c.images_seen for c in nb.STAGES))):
    line(f"training the model, {name}", *(images // config.batch_size * x for x in once), 3 * one_pass * images, 1)

network, everything = nb.GuideNetwork(guide.network.config), torch.ones(1, 28, 28, dtype=torch.bool)
flops = one_pass + 3 * flops_of(lambda: network(image, network.hint(image, everything)))
once = one_step(guide.network.config, network=nb.GuideNetwork, loss=partial(nb.guide_loss, model),
                score=partial(nb.guide_bits, model))
config = nb.GUIDE_CONFIG
for images in (200_000, config.images_seen):  # a missing file's; anew
    line(f"training the guide, {images:,} images", *(images // config.batch_size * x for x in once), flops * images, 1)
    line("and drawing them", *(images // 256 * x for x in drawing), images * one_pass)

half = torch.arange(784).view(28, 28) >= 392
# Launches hardly depend on the number of runs, and not on that of particles: eight runs of two are counted. Passes of
# 128 particles: p and h draw 14 rows, the last two and two known ones fourfold, p reads twelve; four promises.
eight = image.cuda().expand(8, -1, -1)
told = guide.told(eight, half.cuda())
passes = 2 * (12 + 4 * 4) / 28 + 12 / 28 + sum(28 - row for row in nb.look_rows(half, nb.LOOKS)) / 28
for name in ("first", "later"):
    launches, views = counted(lambda: nb.smc(told, eight, 2, [*range(8)]))
    line(f"G, the {name} round of eight runs of 128 particles", launches, views, round(8 * 128 * passes * one_pass))
