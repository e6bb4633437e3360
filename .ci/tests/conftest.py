"""What the tests share: the notebook's definitions, the model that can be enumerated, MNIST, a small network's
sizes, images and recipe for it."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))
from definitions import ROOT, definitions, notebook_cells

NOTEBOOK = definitions()  # before a test imports torch, which then reads what the first cell sets for it


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: the whole notebook, networks at full size, thousands of repeats")


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def cells():
    return notebook_cells()


@pytest.fixture(scope="session")
def nb():
    """The notebook's definitions as a module."""
    return NOTEBOOK


@pytest.fixture(scope="session")
def tiny(nb):
    """The enumerable model: 3x3 pixels, 3 levels, float64."""
    return nb.tiny_model()


@pytest.fixture(scope="session")
def table(nb, tiny):
    """(all images of the tiny model, their log-probabilities)."""
    images = nb.all_images(tiny)
    return images, nb.log_prob(tiny, images)


@pytest.fixture(scope="session")
def evidence(nb, tiny):
    """Six draws of the tiny model, uint8 [6, 3, 3]."""
    return nb.sample(tiny, 6, seed=5)


@pytest.fixture(scope="session")
def mnist(nb):
    return nb.load_mnist(ROOT / "data")


@pytest.fixture(scope="session")
def config(nb):
    """Of a network that trains in a second, 5x4 pixels and 3 levels."""
    return nb.Config(5, 4, 3, embedding=4, channels=8, bottleneck=8, dilations=(1, 2), context=4)


@pytest.fixture(scope="session")
def recipe(nb):
    """Forty steps for it; the weights change from the first on."""
    return nb.Recipe(640, warmup=64, decay=160, batch_size=16, ema_decay=0.9, validate_every=15)


@pytest.fixture(scope="session")
def images(nb):
    """A hundred for that network; columns repeat, so that there is something to learn."""
    generator = nb.torch.Generator().manual_seed(0)
    return nb.torch.randint(0, 3, (100, 5, 1), generator=generator, dtype=nb.torch.uint8).repeat(1, 1, 4)
