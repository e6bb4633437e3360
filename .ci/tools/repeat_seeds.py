"""A pytest plugin that shifts the seeds in the body of each test by SHIFT: is any test flaky?

    for k in {1..20}; do SHIFT=$k PYTHONPATH=.ci/tools .venv/bin/pytest -p repeat_seeds .ci/tests/test_guide.py; done

Those of torch.Generator, torch.manual_seed and numpy.random.default_rng. Fixtures keep theirs.
"""

import os

import numpy as np
import pytest
import torch

shift, generator_class, manual_seed, default_rng = [], torch.Generator, torch.manual_seed, np.random.default_rng


class ShiftedGenerator(generator_class):
    def manual_seed(self, seed):
        return super().manual_seed(int(seed) + sum(shift))


torch.Generator = ShiftedGenerator
torch.manual_seed = lambda seed: manual_seed(int(seed) + sum(shift))
np.random.default_rng = lambda seed=None: default_rng(
    [*(seed if isinstance(seed, (list, tuple)) else [seed]), *shift] if shift else seed)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call():
    shift.append(int(os.environ["SHIFT"]))
    try:
        return (yield)
    finally:
        shift.clear()
