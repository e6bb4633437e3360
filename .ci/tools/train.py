"""Train the released networks by the notebook's own `train` and recipes, faster on a CPU of two cores.

usage: python .ci/tools/train.py model|guide FOLDER [--start FILE] [--images N] [--one-core]
The guide's model is FOLDER/pixelcnn.pt. A training that was stopped goes on. Three things are other than in the
notebook, and give the same but for rounding: its layers are written as single products, which torch.compile makes fast;
two processes share the parts of each batch, and the draws of the guide's; and rows below the last hidden one, which add
nothing to the guide's loss, are left out. (--start: the second training; --images: a shorter training, for a trial.)
"""
import argparse
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the notebook does, before torch is imported
from definitions import ROOT, definitions
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F

PART = 4  # images of one pass
PATIENCE = 900  # seconds; then the other process is gone


def convolve(x, conv, shown, side, top, below):
    """A convolution of x [n, inputs, height, width] as one product over the taps that are shown."""
    spread, (rows, columns) = conv.dilation[0], conv.kernel_size
    x = F.pad(x.movedim(1, 3), (0, 0, side, side, top, below))
    height, width = x.shape[1] - (rows - 1) * spread, x.shape[2] - (columns - 1) * spread
    seen = torch.cat([x[:, r * spread :][:, :height, c * spread :][:, :, :width] for r, c in shown], dim=-1)
    matrix = torch.cat([conv.weight[:, :, r, c] for r, c in shown], dim=1)
    return F.linear(seen, matrix, conv.bias).movedim(3, 1)


def prepared(nb):
    """The notebook's definitions; where no cache is, with these layers."""
    cached_conv, cached_sums = nb.MaskedConv2d.forward, nb.sums_so_far

    def masked(conv, x, cache=None):
        if cache is not None:
            return cached_conv(conv, x, cache)
        rows, columns = conv.kernel_size
        last = columns // 2 + (conv.kind == "B")  # in the pixel's own row
        shown = [(r, c) for r in range(rows) for c in range(columns if r < rows - 1 else last)]
        return convolve(x, conv, shown, conv.side, conv.top, 0)

    def all_around(conv, x, cache=None):
        size = conv.kernel_size[0]
        side = size // 2 * conv.dilation[0]
        return convolve(x, conv, [(r, c) for r in range(size) for c in range(size)], side, side, side)

    def sums_so_far(x, layer, cache):
        """Along each row, plus all rows above: by triangular matrices, in float32."""
        if cache is not None:
            return cached_sums(x, layer, cache)
        with torch.autocast("cpu", enabled=False):
            in_row = x.new_ones(x.shape[2], x.shape[2]).tril() @ x
            above = x.new_ones(x.shape[1], x.shape[1]).tril(-1) @ in_row[:, :, -1]
        return in_row + above[:, :, None]

    def guide_loss(model, guide, images, known):
        """The same mean. known: bool [n, rows, w], the first rows of the masks; below them all is known."""
        height = images.shape[1]
        seen = images[:, : known.shape[1]]
        context = guide.context(images, F.pad(known, (0, 0, 0, height - known.shape[1]), value=True))
        losses = F.cross_entropy(guide.propose(model(seen), seen, context), seen.long(), reduction="none")
        return losses.masked_fill(known, 0).sum() / images.numel()

    nb.MaskedConv2d.forward, nb.AllAroundConv2d.forward, nb.sums_so_far = masked, all_around, sums_so_far
    nb.RunningMean.__init__.__defaults__ = (sums_so_far,)
    nb.guide_loss = guide_loss
    return nb


def parts_of(images, known=None):
    """Parts of a batch; a guide's as (images, masks [n, rows, w]), those of most rows first."""
    if known is None:
        return [(part,) for part in images.split(PART)]
    height = known.shape[1]
    last = ((~known).any(dim=2) * torch.arange(1, height + 1)).amax(dim=1)  # the number of the last row that hides
    order = last.argsort(descending=True, stable=True)
    parts = []
    for own in order.split(PART):
        few = [rows for rows in (height // 2 + 1, 3 * height // 4 + 1) if rows >= last[own[0]]]  # few shapes to compile
        parts.append((images[own], known[own, : min([height, *few])]))
    return parts


def task(nb, options):
    """The arguments of `train`."""
    images = nb.load_mnist(ROOT / "data")[0]
    images, validation = images[:55_000], images[55_000:56_000]
    first, second = ((nb.MODEL_RECIPE, nb.SECOND_MODEL_RECIPE) if options.network == "model"
                     else (nb.GUIDE_RECIPE, nb.SECOND_GUIDE_RECIPE))
    recipe = replace(second if options.start else first, dtype=torch.bfloat16)
    if options.images:
        recipe = replace(recipe, images=options.images, decay=options.images // 5)
    torch.manual_seed(0)
    if options.network == "model":
        model = nb.load_checkpoint(options.start, "cpu") if options.start else nb.PixelCNN(nb.Config())
        return model, nb.model_loss, nb.image_batches(model, images, recipe), [validation], recipe
    model = nb.load_checkpoint(options.folder / "pixelcnn.pt", "cpu")
    guide = (nb.load_checkpoint(options.start, "cpu", nb.GuideNetwork) if options.start
             else nb.starting_guide(model, (1, 2, 4, 8, 2)))
    masks = nb.random_masks(len(validation), 28, 28, seed=0)
    return (guide, partial(nb.guide_loss, model), nb.fresh_batches(model, images, recipe), [validation, masks], recipe)


class Half:
    """One of two processes. shared: weights; gradients and nats of the second; draws; parts taken; step; a barrier."""

    def __init__(self, rank, nb, options, task, shared):
        self.rank, self.nb, self.options = rank, nb, options
        self.weights, self.gradients, self.draws, self.taken, self.step, self.barrier = shared
        self.network, self.loss, self.batches, self.validation, self.recipe = task
        if not options.one_core:
            os.sched_setaffinity(0, {rank})
            nb.sample = self.sample
        self.network.requires_grad_(True)
        self.compiled = torch.compile(self.loss, dynamic=False)

    def wait(self):
        if not self.options.one_core:
            self.barrier.wait(PATIENCE)

    def sample(self, model, n, seed):
        """`sample`, of which each process draws a half."""
        own = slice(self.rank, n, 2)
        none = torch.zeros(model.size, dtype=torch.uint8)
        numbers = self.nb.uniforms(seed, n, *model.size)
        self.draws[own] = self.nb.draw(model, none, none > 0, numbers[own])[0]
        self.wait()
        return self.draws.clone()

    def parts(self, *batch):
        """Parts that the other process has not taken."""
        parts = parts_of(*batch)
        while True:
            with self.taken.get_lock():
                number = self.taken.value
                self.taken.value += 1
            if number >= len(parts):
                return
            yield parts[number]

    def help(self):
        """What the second process does."""
        while True:
            self.wait()
            if self.step.value < 0:
                return
            torch.nn.utils.vector_to_parameters(self.weights, self.network.parameters())
            batch, nats = self.batches(self.step.value), 0.0
            for part in self.parts(*batch):
                with torch.autocast("cpu", self.recipe.dtype):
                    loss = self.compiled(self.network, *part) * (len(part[0]) / len(batch[0]))
                loss.backward()
                nats += loss.item()
            found = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.network.parameters()]
            self.gradients[:-1] = torch.nn.utils.parameters_to_vector(found)
            self.gradients[-1] = nats
            self.network.zero_grad()
            self.wait()

    def lead(self):
        """`train`, whose parts are those that the other leaves, and as a last one all that the other took."""
        in_parts = self.nb.in_parts

        def batches(step):
            self.weights.copy_(torch.nn.utils.parameters_to_vector(self.network.parameters()).detach())
            self.taken.value, self.step.value = 0, step
            self.wait()
            return self.batches(step)

        def parts(network, *batch):
            if not torch.is_grad_enabled():
                yield from in_parts(network, *batch)
            else:
                yield from self.parts(*batch)
                self.wait()
                yield batch

        def loss(network, *part):
            if not torch.is_grad_enabled():
                return self.loss(network, *part)
            if len(part[0]) == PART:
                return self.compiled(network, *part)
            linear = (torch.nn.utils.parameters_to_vector(network.parameters()) * self.gradients[:-1]).sum()
            return self.gradients[-1] + linear - linear.detach()  # its value, and its gradient

        self.nb.in_parts = parts
        path = self.options.folder / ("pixelcnn.pt" if self.options.network == "model" else "guide.pt")
        self.nb.train(self.network, loss, batches, self.validation, self.recipe, path)
        self.step.value = -1
        self.wait()


def second(options, *shared):
    torch.set_num_threads(1)
    nb = prepared(definitions())
    Half(1, nb, options, task(nb, options), shared).help()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", choices=["model", "guide"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int)
    parser.add_argument("--start", type=Path, help="weights of a first training, for the second")
    parser.add_argument("--one-core", action="store_true", help="one process, on whatever core")
    options = parser.parse_args()
    torch.set_num_threads(1)
    nb, processes = prepared(definitions()), mp.get_context("spawn")
    own = task(nb, options)
    size = nb.count_parameters(own[0])
    shared = [torch.zeros(size).share_memory_(), torch.zeros(size + 1).share_memory_(),
              torch.zeros(512, 28, 28, dtype=torch.uint8).share_memory_(),
              processes.Value("i"), processes.Value("i"), processes.Barrier(2)]
    if not options.one_core:
        processes.Process(target=second, args=(options, *shared), daemon=True).start()
    Half(0, nb, options, own, shared).lead()


if __name__ == "__main__":
    main()
