"""What the tests share: the notebook's definitions, small networks, guides, data, and what a statistic may differ by.

One comparison in two million exceeds its bound by chance. The suite makes fewer than 200 of them, so a correct program
fails any with probability below 1e-4, as far as the statistics follow t and chi-square: means of skewed weights and
small counts do so roughly.
"""

import sys
from pathlib import Path

import pytest
from scipy import stats

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))
from definitions import ROOT, definitions

NOTEBOOK = definitions()  # before torch is imported, which then reads what the first cell sets for it
import torch

FALSE_ALARM = 5e-7


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: the whole notebook, networks at full size, thousands of repeats")


@pytest.fixture(scope="session")
def nb():
    """The notebook's definitions as a module."""
    return NOTEBOOK


@pytest.fixture(scope="session")
def tiny(nb):
    """The enumerable model: 3x3 pixels, 3 levels, float64. Of seed 2 all its conditionals are in doubt."""
    return nb.tiny_model(2)


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
    return nb.Config(5, 4, 3, embedding=4, channels=8, bottleneck=8, dilations=(1, 2), mean_channels=4)


@pytest.fixture(scope="session")
def recipe(nb):
    """Forty steps for it; the weights change from the first on."""
    return nb.Recipe(640, warmup=64, decay=160, batch_size=16, ema_decay=0.9, validate_every=15)


@pytest.fixture(scope="session")
def images():
    """A hundred for it; columns repeat, so that there is something to learn."""
    return random_images(100, 5, 1, 3).repeat(1, 1, 4)


def random_images(n, height=28, width=28, levels=256):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, levels, (n, height, width), generator=generator, dtype=torch.uint8)


class Payload(str):
    """A path: whoever unpickles it opens it for writing."""
    def __reduce__(self):
        return open, (str(self), "w")


def same(a, b):
    """Whether two networks have the same weights, to the last bit."""
    return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


def strong(nb, height, width, dilations, levels=3):
    """A network in which everything matters, float64."""
    torch.manual_seed(0)
    config = nb.Config(height, width, levels, 4, channels=12, bottleneck=8, dilations=dilations, mean_channels=4)
    network = nb.PixelCNN(config).double().requires_grad_(False)
    for parameter in network.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    return network


def known_mask(*hidden):
    """Of the 3x3 model."""
    known = torch.ones(3, 3, dtype=torch.bool)
    known.view(-1)[list(hidden)] = False
    return known


def meaningless_guide(nb, model, strength=0.15, powers=(0.7, 0.6), seed=3):
    """A guide with random weights: its context means nothing, and it reaches every block. Its powers, a and b of
    g = p^a q^b, need not sum to 1."""
    torch.manual_seed(seed)
    guide = nb.starting_guide(model, (1, 2)).eval().requires_grad_(False)
    for name, parameter in guide.named_parameters():
        if name.startswith("encoder.") or ".from_context." in name:
            parameter.add_(strength * torch.randn_like(parameter))
    guide.powers.copy_((2 * nb.BIT * torch.tensor(powers, dtype=torch.float64)).expm1().log())  # softplus undone
    return guide


def either_guide(nb, model, learned):
    """None, the model alone, or a meaningless guide."""
    return meaningless_guide(nb, model) if learned else None


def t_bound(n):
    """Of |mean - truth| in standard errors, both from n independent values (5.0 for large n)."""
    return stats.t.isf(FALSE_ALARM / 2, n - 1)


MANY = t_bound(10**9)
