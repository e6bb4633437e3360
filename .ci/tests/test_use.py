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
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def programs(texts, words):
    """In the one text with these words."""
    (text,) = [text for text in texts if words in text]
    return re.findall(r"```python\n(.*?)```", text, flags=re.S)


def shortened(program, changes):
    """A program with what makes it small in place of what is there."""
    for old, new in changes.items():
        assert program.count(old) == 1, old
        program = program.replace(old, new)
    return program


@pytest.fixture
def texts(cells):
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]


@pytest.mark.parametrize("where", ["README", "notebook"])
def test_the_script_runs(root, texts, folder, where):
    """With fewer rows hidden and 16 draws, too few for an answer; it saves its draws, ink dark. It would see a name
    that the notebook no longer has, and a need for a file that is not released."""
    (program,) = programs([(root / "README.md").read_text()] if where == "README" else texts, LOADS)
    digit = np.frombuffer((folder / "data/MNIST/raw/t10k-images-idx3-ubyte").read_bytes()[16:][:784], np.uint8)
    Image.fromarray(digit.reshape(28, 28)).save(folder / "my_digit.png")
    small = shortened(program, {"guide=guide, ": "guide=guide, most=16, ", ">= 14": ">= 4"})
    said = run(small, folder)
    assert re.fullmatch(r"not converged -\d+\.\d+ None\n", said) and program.count("\n") <= 14
    saved = np.asarray(Image.open(folder / "draws.png").convert("L"))
    assert saved.shape == (32, 122) and saved.min() == 0 and (saved == 255).mean() > 0.5


def test_the_program_for_other_data_runs_in_small(texts, folder):
    """After the first five lines of the script, with a few steps of training; it trains both networks, scores, draws
    and completes. It would see a function that works at 28x28 pixels of 256 levels alone."""
    (script,), (program,) = programs(texts, LOADS), programs(texts, "**Other data.**")
    small = shortened(program, {
        "vars(nb))\n": "vars(nb))\ntorch.set_num_threads(1)\n", "load_mnist()[0]": "load_mnist()[0][-6000:]",
        "validation = images[:-5000], images[-5000:-4000]": "validation = images[:-5000], images[-5000:-4900]",
        "guide=Guide(model, network))": "guide=Guide(model, network), most=16)"}).replace("100_000", "256")
    assert program.count("\n") <= 17
    said = run("".join(script.splitlines(keepends=True)[:5]) + small, folder)
    assert float(re.search(r"bits a pixel tensor\(([\d.]+)", said)[1]) < 2.5 and "converged" in said
    assert float(re.search(r"by tensor\(([\d.e-]+)", said)[1]) < 1e-9
    for made in ("other/draws.png", "other/model.pt", "other/guide.pt"):
        assert (folder / made).exists()
