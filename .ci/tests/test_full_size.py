"""An exact rank test of the moves with the released networks, 28x28 pixels and 256 levels."""

import pytest
import torch
from test_kernels import RANK_BOUND, rank_statistic
from test_proposal import wrong

NEAR = 1e-3  # nats, for float32


@pytest.fixture(scope="module")
def model(nb, root):
    return nb.load_checkpoint(root / "checkpoints" / "small.pt", "cpu")


@pytest.fixture(scope="module")
def proposal(nb, root):
    return nb.load_checkpoint(root / "checkpoints" / "small_proposal.pt", "cpu", nb.Proposal)


def statistic_of(nb, model, proposal, kernel, n=96):
    """The rank statistic of the kernels "run" (of the model) and "block" (of the proposal), hidden centre of 8x8."""
    images = nb.sample(model, n, seed=71)
    known = torch.ones(28, 28, dtype=torch.bool)
    known[10:18, 10:18] = False
    unknown = (~known.flatten()).nonzero()[:, 0].tolist()
    if kernel == "run":
        def move(particles, generator):
            first = unknown[int(torch.randint(len(unknown), (1,), generator=generator))]
            nb.regenerate(particles, known, first, first + 4, 1.0, generator)
        return rank_statistic(lambda: nb.Particles(model, images.clone()), lambda p: p.evidence(known), move, 73,
                              near=NEAR)
    # At beta = 1 the path's q drops out of the target, so that one guide serves all images.
    guide = proposal.given(images[:1], known[None])

    def move(particles, generator):
        row, column = torch.randint(10, 15, (2,), generator=generator).tolist()
        block = torch.zeros(28, 28, dtype=torch.bool)
        block[row : row + 4, column : column + 4] = True
        nb.redraw_block(particles, proposal, block, 1.0, generator)
    return rank_statistic(lambda: nb.Guided(model, guide, images.clone(), known), lambda p: p.evidence(known), move, 73,
                          near=NEAR)


@pytest.mark.parametrize("kernel", ["run", "block"])
def test_ranks_of_the_truth_are_uniform_at_full_size(nb, model, proposal, kernel):
    """Detects a kernel whose evidence term drifts from the truth's; false alarm 1e-4 a kernel."""
    assert statistic_of(nb, model, proposal, kernel) < RANK_BOUND


def test_the_rank_test_at_full_size_rejects_wrong_kernels(nb, model, proposal, monkeypatch):
    monkeypatch.setattr(nb, "log_acceptance", lambda old, *_: torch.zeros(len(old), dtype=torch.float64))
    assert statistic_of(nb, model, proposal, "run") > RANK_BOUND
    monkeypatch.setattr(nb, "guided_log_acceptance", wrong("proposal ratio upside down", nb.guided_log_acceptance))
    assert statistic_of(nb, model, proposal, "block") > RANK_BOUND
