"""The whole notebook under the versions of Colab's image, in an environment of its own (its torch aside)."""

import shutil
import subprocess
import sys

import nbformat
import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def colab(root):
    """The Python of .venv-colab, made from .ci/colab.txt if it is not there."""
    python = root / ".venv-colab" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "-r", root / ".ci" / "colab.txt"], check=True)
    return python


def test_it_runs_top_to_bottom_and_shows_its_pictures(root, mnist, colab, tmp_path):
    shutil.copytree(root / "data", tmp_path / "data")
    shutil.copy(root / "PixelCNN.ipynb", tmp_path)
    versions = subprocess.run([colab, "-c", "import IPython, numpy; print(IPython.__version__, numpy.__version__)"],
                              capture_output=True, text=True, check=True).stdout.split()
    assert versions == ["7.34.0", "2.1.3"]
    command = [colab, root / ".ci" / "tools" / "execute.py", "--fast", "--prove", "--timeout", "1200", "--in", tmp_path]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    outputs = [o for c in nbformat.read(tmp_path / "PixelCNN.ipynb", as_version=4).cells if c.cell_type == "code"
               for o in c.outputs]
    pictures = [o for o in outputs if "image/png" in o.get("data", {}) and "alt" in o.metadata.get("image/png", {})]
    assert len(pictures) >= 20 and all(' alt="' in o.data["text/html"] for o in pictures)
