"""What a GPU would refuse, on a pretended one.

The whole notebook on the pretended card takes several minutes and runs on demand:
`.venv/bin/python .ci/tools/gpu_drill/run_notebook.py` as on a T4, with `--bf16` as on an A100.
"""

import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None or torch.version.cuda is not None,
                    reason="the pretended device needs a C++ compiler (g++) and torch without CUDA's own")
@pytest.mark.parametrize("command", ["drills.py", "-m pytest -p no:cacheprovider test_graphs.py"])
def test_every_public_function_works_on_a_card_as_on_a_cpu(root, command):
    """And the pretended card's graphs are what a card's are."""
    run = subprocess.run([sys.executable, *command.split()], cwd=root / ".ci" / "tools" / "gpu_drill",
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]


def test_a_gpu_that_is_not_there_is_one_clear_line(nb, monkeypatch):
    """And full float32 is asked for where there is one."""
    assert not torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "mps"):
        with pytest.raises(ValueError, match="no GPU here.*Change runtime type.*mps.*float64"):
            nb.pick_device(name)
    assert nb.pick_device("auto").type == nb.pick_device("cpu").type == "cpu"


@pytest.mark.parametrize("factor, said", [(None, r"torch.compile failed \(TypeError"), (1.1, "not close")])
def test_compiling_that_fails_or_gives_another_loss_is_one_warning(
        nb, config, images, tmp_path, monkeypatch, factor, said):
    """More than 1 % off: trained as if not compiled. (The control: 0.1 % off is rounding, and goes on compiled.)"""
    def bits(factor, compiled=True):
        monkeypatch.setattr(torch, "compile", lambda loss: lambda *inputs: loss(*inputs) * factor)
        _, history = nb.train(replace(config, dilations=(1,), images_seen=32), images, images[:20],
                              path=tmp_path / "model.pt", device="cpu", compiled=compiled)
        return [history[-1][name] for name in ("train_bits", "validation_bits")]

    plain = bits(None, compiled=False)
    with pytest.warns(UserWarning, match=said) as warned:
        assert bits(factor) == plain
    assert len(warned) == 1 and abs(bits(1.001)[0] / plain[0] - 1.001) < 1e-4


@pytest.mark.slow
def test_the_guides_whole_loss_compiles(nb, config, images):
    """Encoder, h and the model that it multiplies, with gradients, and no warning; masks stay on the host."""
    model = nb.PixelCNN(config).eval().requires_grad_(False)
    network = nb.GuideNetwork.starting_from(model, (1,)).train().requires_grad_(True)
    images, loss = images[:8], partial(nb.guide_loss, model)
    with warnings.catch_warnings(record=True, action="always") as said:
        compiled = nb.compile_or_warn(loss, network, images, torch.float32)
    assert compiled is not loss, [str(warning.message) for warning in said]
    for step in (1, 2, 3):
        assert abs(compiled(network, images, step) - loss(network, images, step)) < 1e-5


def test_a_gradient_that_is_no_number_stops_the_run_where_no_scale_is_to_blame(nb, config, images, tmp_path):
    def loss(model, batch, step):
        w = model.head.weight
        return nb.training_loss(model, batch, step) + (w - w.detach()).sqrt().sum()  # 0, its gradient infinite

    with pytest.raises(FloatingPointError, match="gradient norm is (inf|nan) at step 0"):
        nb.train(config, images, images, path=tmp_path / "model.pt", device="cpu", loss=loss)
