"""The draft beside this file against the third edition (commit a68714d), on the released weights, one thread.

usage: python .ci/next/against_third.py FOLDER, which gets guide.pt in the draft's form: without made_for, its powers before
softplus. Prints the largest differences of logits, log p, E, draws and weights of 64 completions, and speeds as ratios.
"""
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "agg")


def definitions(text, name):
    nb = types.ModuleType(name)
    sys.modules[name] = nb
    for cell in json.loads(text)["cells"]:
        if "define" in cell["metadata"].get("tags", []):
            exec("".join(cell["source"]), vars(nb))
    return nb


old = definitions(subprocess.run(["git", "show", "a68714d:PixelCNN.ipynb"], check=True, capture_output=True).stdout, "old")
new = definitions((Path(__file__).parent / "PixelCNN.ipynb").read_text(), "new")
import torch

torch.set_num_threads(1)
folder = Path(sys.argv[1])
saved = torch.load("checkpoints/guide.pt", weights_only=True)
del saved["weights"]["made_for"]
saved["weights"]["powers"] = (saved["weights"]["powers"].double() * 2 * new.BIT).expm1().log().float()
new.save_atomically(saved, folder / "guide.pt")
old_model, model = (nb.load_checkpoint("checkpoints/pixelcnn.pt", "cpu") for nb in (old, new))
old_guide = old.Guide(old_model, old.load_checkpoint("checkpoints/guide.pt", "cpu", old.GuideNetwork))
guide = new.load_checkpoint(folder / "guide.pt", "cpu", new.GuideNetwork)
images, row = new.load_mnist("data")[1][:64], torch.arange(28)[:, None].expand(28, 28)
top, centre = row >= 14, new.all_but(10, 18, 10, 18)


def off(a, b):
    return f"{(a.double() - b.double()).abs().max().item():.1e}"


with torch.no_grad():
    plain = old_model(images[:2])
    print("logits", off(model(images[:2]), plain), *(off(new.cached_logits(model, images[:2], known), plain)
                                                    for known in (row < 0, row >= 0, row % 3 == 0)))
    print("log p", off(new.log_prob(model, images), old.log_prob(old_model, images)))
    print("E", off(new.given_rest(model, images[:1], (14, 14))[0], old.conditional_given_rest(old_model, images[0], (14, 14))))
    for known in (top, centre):
        for net, was in ((guide, old_guide), (None, old.Guide(old_model))):
            found, wanted = new.complete(model, images[0], known, 64, net, 5), old.weighted_draws(was, images[0], known, 64, 5)
            print("draws", *(off(*pair) for pair in zip(found, wanted)),
                  off(new.log_weights(model, wanted.draws, known, net), wanted.log_w))
    cases = {
        "a dense pass": (lambda: [old_model(x) for x in images.split(16)], lambda: [model(x) for x in images.split(16)]),
        **{f"{n} samples": (lambda n=n: old.sample(old_model, n), lambda n=n: new.sample(model, n)) for n in (64, 256)},
        "E": (lambda: old.conditional_given_rest(old_model, images[0], (14, 14)),
              lambda: new.given_rest(model, images[:1], (14, 14))),
        **{f"256 draws of a {name}": (lambda known=known: old.weighted_draws(old_guide, images[0], known, 256),
                                      lambda known=known: new.complete(model, images[0], known, 256, guide))
           for name, known in (("top", top), ("centre", centre))}}
    for name, pair in cases.items():
        took = [[], []]
        for _ in range(3):
            for function, times in zip(pair, took):
                started = time.monotonic()
                function()
                times.append(time.monotonic() - started)
        print(f"{name}: {min(took[0]) / min(took[1]):.2f} of the speed")
