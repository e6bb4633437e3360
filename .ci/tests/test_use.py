"""What the README and the notebook tell a reader to copy into a program of their own does run."""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image


LOADS = 'exec("".join(cell["source"]), vars(nb))\n'


@pytest.fixture
def folder(root, mnist, tmp_path):
    """The notebook with its data and checkpoints, and nothing else."""
    for name in ("data", "checkpoints"):
        shutil.copytree(root / name, tmp_path / name)
    shutil.copy(root / "PixelCNN.ipynb", tmp_path)
    return tmp_path


def run(program, folder):
    done = subprocess.run([sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", program], cwd=folder,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def programs(cells, words):
    """In the one cell with these words."""
    (text,) = [text for text in ("".join(cell["source"]) for cell in cells) if words in text]
    return re.findall(r"```python\n(.*?)```", text, flags=re.S)


def shortened(program, changes):
    """A program with what makes it small in place of what is there."""
    for old, new in changes.items():
        assert program.count(old) == 1, old
        program = program.replace(old, new)
    return program


@pytest.mark.parametrize("where", ["README", "8.7"])
def test_the_script_runs(root, cells, folder, where):
    """With two runs of eight particles, which are too few for an answer; it saves its draws, ink dark."""
    readme = dict(source=(root / "README.md").read_text())
    (program,) = programs([readme] if where == "README" else cells, LOADS)
    budget = "guide=guide, budget=nb.Budget(particles=8, runs=2, rounds=2), "
    digit = np.frombuffer((folder / "data/MNIST/raw/t10k-images-idx3-ubyte").read_bytes()[16:][:784], np.uint8)
    Image.fromarray(digit.reshape(28, 28)).save(folder / "my_digit.png")
    said = run(shortened(program, {"guide=guide, ": budget}), folder)
    assert re.fullmatch(r"not converged -\d+\.\d+ None\n", said) and program.count("\n") <= 14
    saved = np.asarray(Image.open(folder / "draws.png").convert("L"))
    assert saved.shape == (32, 122) and saved.min() == 0 and (saved == 255).mean() > 0.5


def test_the_program_for_other_data_runs_in_small(cells, folder):
    """After the first five lines of the script, with four steps of training; it trains both networks, scores, draws and
    completes, and the next time it loads them."""
    (script,), (program,) = programs(cells, LOADS), programs(cells, "**Other data.**")
    start = "".join(script.splitlines(keepends=True)[:5])
    small = shortened(program, {
        "vars(nb))\n": "vars(nb))\ntorch.set_num_threads(1)\n",
        "load_mnist()[0]": "load_mnist()[0][-6000:]", "images_seen=100_000": "images_seen=256",
        "guide=Guide(model, network))": "guide=Guide(model, network), budget=Budget(8, 2, 2))"})
    assert program.count("\n") <= 17
    for trained in (True, False):
        said = run(start + small, folder)
        assert float(re.search(r"bits a pixel tensor\(([\d.]+)", said)[1]) < 2.5 and "converged" in said
        assert ("training model.pt" in said and "training guide.pt" in said) == trained
    for made in ("other/draws.png", "other/model.pt", "other/guide.pt"):
        assert (folder / made).exists()
