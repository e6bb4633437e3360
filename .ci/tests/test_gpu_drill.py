"""What a GPU would refuse, on a pretended one; and compiling, which is used on a GPU alone."""

import shutil
import subprocess
import sys

import pytest
import torch


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None or torch.version.cuda is not None,
                    reason="the pretended device needs a C++ compiler (g++) and torch without CUDA's own")
@pytest.mark.parametrize("planted", [False, True])
def test_every_function_works_on_a_card_as_on_a_cpu(root, planted):
    """It would see a tensor left on the other device, another answer, and a state that only one device goes on from.
    (The control: masks that are not moved to the card.)"""
    command = [sys.executable, root / ".ci" / "tools" / "gpu_drill" / "drill.py", *["--planted"] * planted]
    run = subprocess.run(command, capture_output=True, text=True)
    failed = [line.split(": FAILED")[0] for line in run.stdout.splitlines() if ": FAILED" in line]
    if planted:
        assert run.returncode == 1 and {"sample", "complete"} <= set(failed) and "weighted_draws" not in failed
    else:
        assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]


def test_a_gpu_that_is_not_there_is_one_clear_line(nb, monkeypatch):
    """It would see a fallback in silence, an error from inside torch, and convolutions in TF32."""
    assert not torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "mps"):
        with pytest.raises(ValueError, match=f'got "{name}".*no GPU here.*Change runtime type.*DEVICE = "auto"'):
            nb.pick_device(name)
    assert nb.pick_device("auto").type == nb.pick_device("cpu").type == "cpu"


def test_where_compiling_fails_training_goes_on_without(nb, config, recipe, images, tmp_path, monkeypatch):
    """It would see a run that ends for want of a compiler, or that trains something else. (The control: without what
    `train` sets, the broken compiler's error comes through.)"""
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    def trained(compiled):
        torch.manual_seed(0)
        model = nb.train(nb.PixelCNN(config), images, images[:20], [recipe], tmp_path / "model.pt", compiled)
        return [parameter.tolist() for parameter in model.parameters()]

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile(function, backend=broken))
    with torch._dynamo.config.patch(suppress_errors=False):
        with pytest.raises(Exception, match="no compiler here"):
            torch.compile(nb.PixelCNN(config).loss)(images[:8], 0)
        torch._dynamo.reset()
        assert trained(compiled=True) == trained(compiled=False)


@torch._dynamo.config.patch(suppress_errors=False)
def test_the_guides_whole_loss_compiles(nb, config, images):
    """Encoder, hint and the model that it multiplies, with gradients; masks stay on the host. It would see a step that
    cannot be compiled, and masks that are frozen into it."""
    torch._dynamo.reset()
    network = nb.starting_guide(nb.PixelCNN(config).eval().requires_grad_(False), (1,))
    for parameter in network.parameters():  # so that the hint says something
        parameter.data += 0.1 * torch.randn_like(parameter)
    compiled = torch.compile(network.loss, backend="aot_eager")  # the kernels, which take minutes, aside
    for step in (1, 2, 3):
        found = []
        for loss in (compiled, network.loss):
            network.zero_grad()
            nats = loss(images[:8], step)
            nats.backward()
            found.append(torch.cat([nats[None], *(p.grad.flatten() for p in network.parameters())]))
        assert (found[0] - found[1]).abs().max() < 1e-5
