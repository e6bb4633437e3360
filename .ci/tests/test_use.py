"""What the README and section 9 tell a reader to copy into a program of their own does run."""

import re
import shutil
import subprocess
import sys

import pytest


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


def loading(root):
    """The README's lines that make the notebook's definitions a module, and those that use it."""
    (program,) = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), flags=re.S)
    assert program.count("\n") <= 12
    return program


def test_the_script_of_the_readme_runs(root, folder):
    """With two runs of eight particles, which are too few for an answer."""
    program = loading(root)
    small = program.replace("guide=guide)", "guide=guide, budget=nb.Budget(particles=8, runs=2, rounds=1))")
    assert small != program
    said = run(small, folder)
    assert "not converged" in said and "torch.Size([4, 28, 28])" in said and "tensor([-" in said


def test_the_program_for_other_data_runs_in_small(root, cells, folder):
    """With 256 images and a network of eight channels; it trains, scores, draws and completes."""
    (text,) = ["".join(c["source"]) for c in cells if "**Other data.**" in "".join(c["source"])]
    start, program = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert program.count("\n") <= 10
    small = program.replace("images_seen=100_000", "images_seen=256, channels=8, bottleneck=8, dilations=(1, 2)")
    small = small.replace("load_mnist()[0]", "load_mnist()[0][-6000:]").replace("-5000", "-64")
    assert small != program
    said = run(start + "\ntorch.set_num_threads(1)\n" + small, folder)
    assert float(re.search(r"bits/dim tensor\(([\d.]+)", said)[1]) < 2.5 and "converged" in said
    assert (folder / "run" / "other.png").exists() and (folder / "other" / "model.pt").exists()
