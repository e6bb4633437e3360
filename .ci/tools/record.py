"""The record in one command: trains the model by its recipe, then its guide; scores what is finished on the test set,
and times the notebook with the checkpoints that are committed. The stage `more` trains the released model on: fresh
optimisers, constant rates, one decay over the last fifth. `guide1`, `guide2`, ... train the released guide on for it, a
leg each, on 40,000 digits and 40,000 draws that it has not seen; `gain` says what each leg gained.

usage: python .ci/tools/record.py --minutes N --folder FOLDER [--processes 2] [--tiny]
                            [--stages small,guide,score,notebook | more | guide1,guide2,...,gain | weights]
Run again with the same folder it goes on where it stopped. It fetches nothing: MNIST must be in data/. On a CPU two
processes of one thread each share a batch, which is 1.7 times as fast as one process with two threads (use one where
the other core is busy: they wait for each other); on a GPU there is one process. The stage `weights` puts those of an
unfinished network into .ci/tools/record, to travel in git; a folder without a state begins there, with fresh optimisers
and what is left of the images. The folder keeps <name>.state while a network trains, then <name>.pt with its history,
SHA256SUMS, scores.json and notebook.json.
"""
import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from definitions import ROOT, definitions

CARRIED = ROOT / ".ci" / "tools" / "record"
NAMES = {"small": "small.pt", "guide": "small_guide.pt", "more": "more.pt",
         **{f"guide{leg}": f"guide{leg}.pt" for leg in range(1, 10)}}


def recipe(nb, stage, tiny):
    """The notebook's; `more`: 1.2 million images after the released ones, in another order."""
    config = nb.Config()
    if stage == "more":
        config = replace(config, images_seen=1_200_000, warmup=64_000 / 1_200_000, decay=0.2, seed=11)
    if tiny and not stage[5:]:
        config = replace(config, **nb.FAST_SIZES)
    if stage.startswith("guide"):
        config = replace(config, encoder=(1, 2) if tiny and not stage[5:] else (1, 2, 4, 8, 2), decay=0.2,
                         matrix_learning_rate=0.01, learning_rate=0.0015, images_seen=512 if tiny else 648_192)
    if stage[5:]:
        config = replace(config, images_seen=256 if tiny else 80_000, warmup=0.05, decay=0.5, ema_decay=0.995,
                         seed=int(stage[5:]))
    return config


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


def going_on(nb, config, path, device, network, before=0):
    """(config for the images that are left, with the same decay at the end; initial=model) if weights that were carried
    stand in for a lost state. before: images seen before this recipe began."""
    kept, weights = path.with_suffix(".json"), CARRIED / path.name
    if not kept.exists() and (path.with_suffix(".state").exists() or not weights.exists()):
        return config, {}
    initial = nb.load_checkpoint(weights, device.type, network)
    if not kept.exists():
        kept.write_text(json.dumps(initial.history[-1]["images"]))
    left = config.images_seen - json.loads(kept.read_text()) + before
    warmup, decay = (share * config.images_seen / left for share in (config.warmup, config.decay))
    return replace(config, images_seen=left, warmup=warmup, decay=decay), dict(initial=initial)


def weights(options):
    """Put the weights of the last stage that is unfinished into .ci/tools/record."""
    nb, folder = definitions(), Path(options.folder)
    path = next(folder / name for name in reversed(NAMES.values()) if (folder / name).with_suffix(".state").exists())
    state = torch.load(path.with_suffix(".state"), map_location="cpu", weights_only=True)
    network = nb.GuideNetwork if "guide" in path.name else nb.PixelCNN
    model = network(nb.Config(**state["config"])).bfloat16()  # half the size, and 0.2 % is no loss here
    model.load_state_dict(state["model"])  # the running weights: the average lags behind
    _, images, seconds, history = state["progress"]
    history = [*history, dict(images=images, seconds=seconds, train_bits=math.nan, validation_bits=math.nan)]
    (CARRIED / path.name).unlink(missing_ok=True)
    nb.save_checkpoint(model, history, CARRIED / path.name)
    print(f"weights after {images:,} images are in {CARRIED / path.name}")


def guide_before(leg, folder):
    """Where the guide is that a leg begins with."""
    return folder / NAMES[f"guide{leg - 1}"] if leg > 1 else ROOT / "checkpoints" / "small_guide.pt"


def with_draws(nb, model, digits, count, path, leg, rank, world):
    """Digits and draws of the model for the guide at `path`; each process draws its share, once. What goes on from
    weights draws others, and so does each leg: a guide that has seen the same draws eight times knows them by heart."""
    parts = [path.with_suffix(f".draws{number}of{world}") for number in range(world)]
    kept = path.with_suffix(".json")
    seen = json.loads(kept.read_text()) if kept.exists() else 0
    if not parts[rank].exists():
        draws = nb.sample(model, count // world, seed=59 + rank + seen + 10**7 * leg)
        nb.save_atomically(draws.cpu(), parts[rank])
    if world > 1:
        dist.barrier()
    return torch.cat([digits, *(torch.load(part, weights_only=True) for part in parts)])


def work(rank, world, stage, options):
    """One process's part of a stage; process 0 keeps the state and validates."""
    nb, folder = definitions(), Path(options.folder)
    config, device, path = recipe(nb, stage, options.tiny), nb.pick_device(), folder / NAMES[stage]
    leg = int(stage[5:] or 0)
    train_images = nb.load_mnist(ROOT / "data")[0]
    images, validation = train_images[:55_000], train_images[55_000:56_000]
    if options.tiny:
        images, validation = images[:512], validation[:32]
    if device.type == "cpu":
        torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=world)
    extra, whole_loss, score = {}, nb.training_loss, nb.bits_per_dim
    if stage.startswith("guide"):
        model = nb.load_checkpoint(folder / NAMES["more" if leg else "small"], device.type)
        initial = (nb.load_checkpoint(guide_before(leg, folder), device.type, nb.GuideNetwork) if leg
                   else nb.GuideNetwork.starting_from(model, config.encoder))
        score, extra = partial(nb.guide_bits, model), dict(network=nb.GuideNetwork, initial=initial)

        def whole_loss(network, batch, step):
            return nb.guide_loss(model, network, batch, step + 10**6 * leg)  # other masks in each leg

        images = with_draws(nb, model, images[:40_000], 64 if options.tiny else 40_000, path, leg, rank, world)
    whole = config
    if stage == "more":
        extra = dict(initial=nb.load_checkpoint(ROOT / "checkpoints" / "small.pt", device.type))
    seen_before = getattr(extra.get("initial"), "history", [])  # by what this recipe begins with
    before = seen_before[-1]["images"] if seen_before else 0
    network = nb.GuideNetwork if stage.startswith("guide") else nb.PixelCNN
    config, other = going_on(nb, config, path, device, network, before)
    extra.update(other)
    loss = whole_loss
    if world > 1:
        share_gradients(world)

        def loss(model, batch, step):
            return whole_loss(model, batch[rank::world], step * world + rank)

        if rank > 0:
            other, state = folder / f"process{rank}", path.with_suffix(".state")
            other.mkdir(exist_ok=True)
            (other / state.name).unlink(missing_ok=True)
            if state.exists():
                shutil.copy(state, other)
            path, score = other / path.name, lambda model, images: torch.zeros(1)
        dist.barrier()  # the state was copied before anybody writes it
    model, history = nb.train(config, images, validation, path=path, device=device.type, loss=loss, score=score,
                              report=report if rank == 0 else lambda history: None, compiled=not options.tiny, **extra)
    if rank == 0 and config != whole:  # the end of the whole recipe
        model.config = whole
        nb.save_checkpoint(model, history, path)


def trained(stage, options, end):
    """Train a network until `end`; whether it is finished."""
    folder, path = Path(options.folder), Path(options.folder) / NAMES[stage]
    if path.exists():
        return True
    print(f"== {stage}", flush=True)
    (folder / "meeting").unlink(missing_ok=True)
    world, context = 1 if torch.cuda.is_available() else options.processes, mp.get_context("spawn")
    workers = [context.Process(target=work, args=(rank, world, stage, options), daemon=True)
               for rank in range(world)]
    for worker in workers:
        worker.start()
    # The others are done before process 0, which validates at the end.
    while time.monotonic() < end and workers[0].is_alive() and not any(worker.exitcode for worker in workers):
        time.sleep(0.5)
    for worker in workers:  # one that is cut off loses the last three minutes at most
        worker.join(60 if path.exists() else 0)
        worker.terminate()
        worker.join()
    return path.exists()


@torch.no_grad()
def gain(options):
    """What the released guide and each leg gain over the model alone, in nats: log g of the hidden pixels of 640 draws
    of the model, top half, left half or centre; and by how much that is more than the one before, paired."""
    nb, folder = definitions(), Path(options.folder)
    model = nb.load_checkpoint(folder / NAMES["more"])
    images, before = nb.sample(model, 4 if options.tiny else 640, seed=97), {}
    alone = nb.pixel_log_probs(model, images)
    masks = torch.ones(3, 28, 28, dtype=torch.bool)  # True: known
    masks[0, :14] = masks[1, :, :14] = masks[2, 10:18, 10:18] = False
    for leg in range(1, 11):
        path = guide_before(leg, folder)
        if not path.exists():
            break
        guide = nb.Guide(model, nb.load_checkpoint(path, network=nb.GuideNetwork))
        for name, known in zip(("top", "left", "centre"), masks.to(images.device)):
            known = known.expand(images.shape)
            log_g = nb.guide_pixel_log_probs(guide, images, known)
            gained = (log_g - alone).masked_fill(known, 0).sum(dim=(1, 2))
            for what, x in (("gains", gained), ("more than before", gained - before.get(name, gained))):
                mean, stderr = nb.mean_and_error(x)
                print(f"{path.name}, {name}: {what} {mean:.2f} ± {stderr:.2f} nats", flush=True)
            before[name] = gained


def score(options):
    """Test bits/dim of the finished models, once each, into scores.json."""
    nb, folder = definitions(), Path(options.folder)
    kept = folder / "scores.json"
    scores = json.loads(kept.read_text()) if kept.exists() else {}
    for name in ("small.pt", "more.pt"):
        if name not in scores and (folder / name).exists():
            test_images = nb.load_mnist(ROOT / "data")[2][: 64 if options.tiny else None]
            bits = nb.bits_per_dim(nb.load_checkpoint(folder / name), test_images, batch_size=32)
            scores[name] = dict(bits=bits.mean().item(), stderr=bits.std().item() / math.sqrt(len(bits)), n=len(bits))
            kept.write_text(json.dumps(scores, indent=1) + "\n")
    print(json.dumps(scores), flush=True)


def notebook(options, end):
    """Minutes of the whole notebook, run on a copy, into notebook.json."""
    folder = Path(options.folder)
    place = folder / "notebook"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(ROOT / "checkpoints", place / "checkpoints")
    (place / "data").symlink_to(ROOT / "data")
    shutil.copy(ROOT / "PixelCNN.ipynb", place)
    started = time.monotonic()
    try:
        execute = ROOT / ".ci" / "tools" / "execute.py"
        run = subprocess.run([sys.executable, execute, "--in", place, *["--fast"] * options.tiny],
                             capture_output=True, text=True, timeout=max(end - started, 1))
        said = "finished" if run.returncode == 0 else run.stderr.strip().splitlines()[-1]
    except subprocess.TimeoutExpired:
        said = "stopped by the time limit"
    nb = definitions()
    found = dict(minutes=(time.monotonic() - started) / 60, said=said, device=nb.device_name(nb.pick_device()))
    (folder / "notebook.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--stages", default="small,guide,score,notebook")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count()), help="on a CPU")
    parser.add_argument("--tiny", action="store_true", help="small networks, but for legs; few images, to try the command")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    folder = Path(options.folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    options.folder = str(folder)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the workers, daemons, end as well
    for stage in options.stages.split(","):
        if stage in NAMES:
            if not trained(stage, options, end):
                print(f"{stage} is not finished; run again to go on")
                return
        elif stage in ("score", "gain", "weights"):
            dict(score=score, gain=gain, weights=weights)[stage](options)
        else:
            notebook(options, end)


if __name__ == "__main__":
    main()
