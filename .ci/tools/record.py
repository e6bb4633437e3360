"""Trains the released networks by the notebook's recipes, and says what guides gain.

usage: python .ci/tools/record.py small|guide|leaky --folder FOLDER [--minutes N] [--processes 2] [--initial FILE]
           [--tiny]
       python .ci/tools/record.py gain FILE ...  (on 640 draws of the released model, an hour of one core for ten files)

On a CPU two processes of one thread each share a batch, which is 1.7 times as fast as one process with two threads (use
one where the other core is busy: they wait for each other); on a GPU there is one process. Run again with the same
folder it goes on where it stopped. FOLDER holds <name>.state while a network trains, then <name>.pt and SHA256SUMS; of
a guide also what it was at each validation. --initial: weights to begin with; a guide is trained for the small.pt that
stands in FOLDER, else for the released one. MNIST must be in data/.
"""
import argparse
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the notebook does, before torch is imported
from definitions import ROOT, definitions
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def report(history):
    last = history[-1]
    print(f"{last['images']:>9,} images  {last['seconds'] / 60:6.1f} min  train {last['train_bits']:.4f}  "
          f"validation {last['validation_bits']:.4f} bits/dim", flush=True)


def share_gradients(world):
    """From now on gradients are averaged over the processes before they are clipped."""
    clip = torch.nn.utils.clip_grad_norm_

    def average_and_clip(parameters, max_norm):
        parameters = list(parameters)
        flat = torch.cat([p.grad.flatten() for p in parameters])
        dist.all_reduce(flat)
        for p, part in zip(parameters, (flat / world).split([p.numel() for p in parameters])):
            p.grad.copy_(part.view_as(p))
        return clip(parameters, max_norm)

    torch.nn.utils.clip_grad_norm_ = average_and_clip


def share_draws(nb, rank, world):
    """From now on each process draws its part of what nb.sample is asked for."""
    sample = nb.sample

    def drawn_by_all(model, n, seed):
        own = sample(model, n // world, seed=world * seed + rank)
        parts = [torch.empty_like(own) for _ in range(world)]
        dist.all_gather(parts, own)
        return torch.cat(parts)

    nb.sample = drawn_by_all


def recipe(nb, name, model, images, tiny):
    """(stages, batches, options of nb.train) of a network."""
    small = nb.FAST_SIZES if tiny else {}
    if name == "small":
        return [replace(config, **small) for config in nb.STAGES], images, {}
    if name == "leaky":
        return [replace(nb.LEAKY, **small)], images, {}
    config = replace(nb.GUIDE_CONFIG, **small, encoder=(1, 2)) if tiny else nb.GUIDE_CONFIG
    return [config], nb.fresh_batches(model, images, config), dict(
        network=nb.GuideNetwork, initial=nb.GuideNetwork.starting_from(model, config.encoder),
        loss=partial(nb.guide_loss, model), score=partial(nb.guide_bits, model))


def work(rank, world, options):
    """One process's part of the training; process 0 keeps the state and validates."""
    nb, folder = definitions(), Path(options.folder)
    device, path = nb.pick_device(), folder / f"{options.what}.pt"
    if device.type == "cpu":
        torch.set_num_threads(1)
    images = nb.load_mnist(ROOT / "data")[0]
    train, validation = images[:55_000], images[55_000:56_000]
    if options.tiny:
        train, validation = train[:512], validation[:32]
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=world)
        share_gradients(world)
        share_draws(nb, rank, world)
    own_model = folder / "small.pt"
    model = None
    if options.what == "guide":
        model = nb.load_checkpoint(own_model if own_model.exists() else ROOT / "checkpoints" / "small.pt", device.type)
    stages, batches, extra = recipe(nb, options.what, model, train, options.tiny)
    if options.initial:
        extra["initial"] = nb.load_checkpoint(options.initial, device.type, extra.get("network", nb.PixelCNN))
    whole_loss, whole_score = extra.get("loss", nb.training_loss), extra.get("score", nb.bits_per_dim)

    def loss(network, batch, step):
        return whole_loss(network, batch[rank::world], step * world + rank)

    def score(network, images):
        if rank > 0:
            return torch.zeros(1)
        if options.what == "guide":
            torch.save(network.state_dict(), folder / f"guide_{time.strftime('%m%d_%H%M%S')}.weights")
        return whole_score(network, images)

    if rank > 0:
        other, state = folder / f"process{rank}", path.with_suffix(".state")
        other.mkdir(exist_ok=True)
        (other / state.name).unlink(missing_ok=True)
        if state.exists():
            shutil.copy(state, other)
        path = other / path.name
    if world > 1:
        dist.barrier()  # the state was copied before anybody writes it
    extra.update(loss=loss, score=score, report=report if rank == 0 else lambda history: None)
    nb.load_or_train(stages, batches, validation, path=path, device=device.type, anew=True, compiled=not options.tiny,
                     **extra)


def train(options):
    """Train a network for so many minutes; the exit status is 1 if it is not finished then."""
    folder, end = Path(options.folder), time.monotonic() + 60 * options.minutes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meeting").unlink(missing_ok=True)
    world, context = 1 if torch.cuda.is_available() else options.processes, mp.get_context("spawn")
    workers = [context.Process(target=work, args=(rank, world, options), daemon=True) for rank in range(world)]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the workers, daemons, end as well
    for worker in workers:
        worker.start()
    # The others are done before process 0, which validates at the end.
    while time.monotonic() < end and workers[0].is_alive() and not any(worker.exitcode for worker in workers):
        time.sleep(0.5)
    for worker in workers:  # one that is cut off loses the last three minutes at most
        worker.join(0)
        worker.terminate()
        worker.join()
    if not all(worker.exitcode == 0 for worker in workers):
        sys.exit(f"{options.what} is not finished; run again to go on")


@torch.no_grad()
def gain(options):
    """What guides gain over the model alone, in nats: log g of the hidden pixels of draws of the model, top half, left
    half or centre, less the model's own log p; and by how much that is more than the first file's, paired."""
    nb = definitions()
    model, first = nb.load_checkpoint(ROOT / "checkpoints" / "small.pt"), {}
    images = nb.sample(model, 4 if options.tiny else 640, seed=97)
    alone = nb.pixel_log_probs(model, images)
    masks = torch.ones(3, 28, 28, dtype=torch.bool)  # True: known
    masks[0, :14] = masks[1, :, :14] = masks[2, 10:18, 10:18] = False
    for path in map(Path, options.files):
        if path.suffix == ".pt":
            network = nb.load_checkpoint(path, network=nb.GuideNetwork)
        else:
            network = nb.GuideNetwork.starting_from(model, nb.GUIDE_CONFIG.encoder)
            network.load_state_dict(torch.load(path, map_location=model.device, weights_only=True))
        for name, known in zip(("top", "left", "centre"), masks.to(images.device)):
            known = known.expand(images.shape)
            log_g = nb.guide_pixel_log_probs(nb.Guide(model, network), images, known)
            gained = (log_g - alone).masked_fill(known, 0).sum(dim=(1, 2))
            more = gained - first.setdefault(name, gained)
            print(f"{path.name}, {name}: " + ", more than the first ".join(
                "{:.2f} ± {:.2f}".format(*nb.mean_and_error(x)) for x in (gained, more)), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["small", "guide", "leaky", "gain"])
    parser.add_argument("files", nargs="*", help="of guides, for gain")
    parser.add_argument("--folder")
    parser.add_argument("--minutes", type=float, default=1e6)
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count()), help="on a CPU")
    parser.add_argument("--initial")
    parser.add_argument("--tiny", action="store_true", help="small networks, few images, to try the command")
    options = parser.parse_args()
    if options.what != "gain" and options.folder is None:
        parser.error(f"{options.what} needs --folder")
    (gain if options.what == "gain" else train)(options)


if __name__ == "__main__":
    main()
