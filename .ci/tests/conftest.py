"""The tests load the notebook's `define` cells, all of them and nothing else, as one module."""

import json
import os
import sys
import types
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("MPLBACKEND", "agg")
ROOT = Path(__file__).resolve().parents[2]
settings.register_profile("repeatable", derandomize=True)  # the same examples in each run
settings.load_profile("repeatable")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: the whole notebook, networks at full size, thousands of repeats")


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def cells():
    return json.loads((ROOT / "PixelCNN.ipynb").read_text())["cells"]


@pytest.fixture(scope="session")
def nb(cells):
    """The notebook's definitions as a module."""
    module = types.ModuleType("pixelcnn_notebook")
    sys.modules[module.__name__] = module
    for number, cell in enumerate(cells):
        if "define" in cell["metadata"].get("tags", []):
            code = compile("".join(cell["source"]), f"PixelCNN.ipynb[{number}]", "exec")
            exec(code, module.__dict__)
    return module


@pytest.fixture(scope="session")
def tiny(nb):
    """The enumerable model: 3x3 pixels, 3 levels, float64."""
    return nb.tiny_model()


@pytest.fixture(scope="session")
def table(nb, tiny):
    """(all images of the tiny model, their log-probabilities)."""
    images = nb.all_images(tiny)
    return images, nb.log_prob(tiny, images, 4096)


@pytest.fixture(scope="session")
def evidence(nb, tiny):
    """Six draws of the tiny model, uint8 [6, 3, 3]."""
    return nb.sample(tiny, 6, seed=5)


@pytest.fixture(scope="session")
def mnist(nb):
    return nb.load_mnist(ROOT / "data")
