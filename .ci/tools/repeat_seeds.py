"""A pytest plugin that runs the body of each test again and again with its seeds shifted: is any test flaky?

    PYTHONPATH=.ci/tools REPEATS=20 .venv/bin/pytest -p repeat_seeds .ci/tests/test_inference.py

Shifted are the seeds of torch.Generator, torch.manual_seed and numpy.random.default_rng. Fixtures keep theirs. A test
that draws no random numbers runs once.
"""

import inspect
import os
import traceback

import numpy as np
import pytest
import torch

REPEATS = int(os.environ.get("REPEATS", "20"))
state = dict(shift=0, seeded=False)
generator_class, manual_seed, default_rng = torch.Generator, torch.manual_seed, np.random.default_rng


def shifted(seed):
    state["seeded"] = True
    return int(seed) + state["shift"]


class ShiftedGenerator(generator_class):
    def manual_seed(self, seed):
        return super().manual_seed(shifted(seed))


def shifted_rng(seed=None):
    state["seeded"] = True
    if seed is None or state["shift"] == 0:
        return default_rng(seed)
    return default_rng([*(seed if isinstance(seed, (list, tuple)) else [seed]), state["shift"]])


torch.Generator = ShiftedGenerator
torch.manual_seed = lambda seed: manual_seed(shifted(seed))
np.random.default_rng = shifted_rng


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """In place of pytest's own call: shift 0 to REPEATS - 1, and one failure that lists all."""
    wanted, failures = inspect.signature(pyfuncitem.obj).parameters, {}
    given = {name: value for name, value in pyfuncitem.funcargs.items() if name in wanted}
    folder = given.get("tmp_path")
    for shift in range(REPEATS):
        state.update(shift=shift, seeded=False)
        if folder:
            given["tmp_path"] = folder / f"shift_{shift}"
            given["tmp_path"].mkdir()
        try:
            pyfuncitem.obj(**given)
        except Exception as error:
            line = traceback.extract_tb(error.__traceback__)[-1].lineno
            failures[shift] = f"line {line}: {str(error).splitlines()[:1]}"
        finally:
            state["shift"] = 0
            if "monkeypatch" in given:
                given["monkeypatch"].undo()
        if not state["seeded"]:
            break
    print(f"{pyfuncitem.name}: {shift + 1} runs, {len(failures)} failed")
    assert not failures, failures
    return True
