"""What the README and the notebook tell a reader to copy into a program of their own does run."""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image


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


def text_with(cells, words):
    """Of the one cell with these words."""
    (text,) = [text for text in ("".join(cell["source"]) for cell in cells) if words in text]
    return text


@pytest.mark.parametrize("where", ["README", "8.5"])
def test_the_scripts_run(root, cells, folder, where):
    """With two runs of eight particles, which are too few for an answer; what is saved are its draws, ink dark."""
    text = (root / "README.md").read_text() if where == "README" else text_with(cells, "**From a script of your own**")
    programs = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert programs
    for program in programs:
        small = program.replace("guide=guide)", "guide=guide, budget=nb.Budget(particles=8, runs=2, rounds=1))")
        assert small != program and program.count("\n") <= 14
        digit = np.frombuffer((folder / "data/MNIST/raw/t10k-images-idx3-ubyte").read_bytes()[16:][:784], np.uint8)
        Image.fromarray(digit.reshape(28, 28)).save(folder / "my_digit.png")
        said = run(small, folder)
        assert "not converged" in said
        assert ("torch.Size([4, 28, 28])" in said and "tensor([-" in said) == (where == "README")
        if "draws.png" in program:
            saved = np.asarray(Image.open(folder / "draws.png").convert("L"))
            assert saved.shape == (32, 122) and saved.min() == 0 and (saved == 255).mean() > 0.5


def test_the_program_for_other_data_runs_in_small(root, cells, folder):
    """With 256 images and a network of eight channels; it trains, scores, draws and completes."""
    start, program = re.findall(r"```python\n(.*?)```", text_with(cells, "**Other data.**"), flags=re.S)
    assert program.count("\n") <= 10
    small = program.replace("images_seen=100_000", "images_seen=256, channels=8, bottleneck=8, dilations=(1, 2)")
    small = small.replace("load_mnist()[0]", "load_mnist()[0][-6000:]").replace("-5000", "-64")
    assert small != program
    said = run(start + "\ntorch.set_num_threads(1)\n" + small, folder)
    assert float(re.search(r"bits/dim tensor\(([\d.]+)", said)[1]) < 2.5 and "converged" in said
    assert (folder / "run" / "other.png").exists() and (folder / "other" / "model.pt").exists()
