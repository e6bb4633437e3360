"""The whole notebook under the versions of Colab's image, in an environment of its own (its torch aside)."""

import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def colab(root):
    """The Python of .venv-colab, with what .ci/colab.txt names."""
    python = root / ".venv-colab" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", "-r", root / ".ci" / "colab.txt"], check=True)
    return python


def test_it_runs_top_to_bottom(root, mnist, colab, tmp_path):
    shutil.copytree(root / "data", tmp_path / "data")
    shutil.copy(root / "PixelCNN.ipynb", tmp_path)
    versions = subprocess.run([colab, "-c", "import IPython, numpy; print(IPython.__version__, numpy.__version__)"],
                              capture_output=True, text=True, check=True).stdout.split()
    assert versions == ["7.34.0", "2.1.3"]
    command = [colab, root / ".ci" / "tools" / "execute.py", "--fast", "--timeout", "1200", "--in", tmp_path]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
