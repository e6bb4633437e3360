"""What a GPU would refuse, on a pretended one; and what TF32 would do to the numbers.

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
import torch.nn.functional as F
from gpu_drill.faults import Infinite


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the pretended device needs a C++ compiler (g++)")
@pytest.mark.parametrize("command", ["drills.py", "-m pytest -p no:cacheprovider test_graphs.py"])
def test_every_public_function_works_on_a_card_as_on_a_cpu(root, command):
    """And the pretended card's graphs are what a card's are."""
    run = subprocess.run([sys.executable, *command.split()], cwd=root / ".ci" / "tools" / "gpu_drill",
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]


def with_tf32(convolution):
    """A convolution whose float32 inputs are rounded to the 10 bits of TF32, as cuDNN does where it may."""
    def rounded(x):
        return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) if x.dtype == torch.float32 else x

    def call(x, weight, *rest, **options):
        return convolution(rounded(x.contiguous()), rounded(weight.contiguous()), *rest, **options)
    return call


def test_full_float32_is_asked_for_and_needed(nb, root, mnist, monkeypatch):
    """Logits of the sampler and of the full pass agree to 1e-4 in float32; under TF32 they differ by 1e-3 or more."""
    assert not torch.backends.cudnn.allow_tf32
    model, images = nb.load_checkpoint(root / "checkpoints" / "small.pt", "cpu"), mnist[2][:2]
    full = model(images)
    assert (nb.cached_logits(model, images) - full).abs().max() < 1e-4
    monkeypatch.setattr(F, "conv2d", with_tf32(F.conv2d))
    assert (model(images) - full).abs().max() > 1e-3


def test_a_gpu_that_is_not_there_is_one_clear_line(nb, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "mps"):
        with pytest.raises(ValueError, match="no GPU here.*Change runtime type.*mps.*float64"):
            nb.pick_device(name)
    assert nb.pick_device("auto").type == nb.pick_device("cpu").type == "cpu"


def unable(loss):
    """In place of torch.compile."""
    def call(*_):
        raise RuntimeError("Triton does not know this GPU")
    return call


def times(factor):
    return lambda loss: lambda *inputs: loss(*inputs) * factor


@pytest.mark.parametrize("compiler, said", [(unable, r"torch.compile failed \(RuntimeError"),
                                            (times(1.1), "not close")])
def test_compiling_that_fails_or_gives_another_loss_is_one_warning(
        nb, config, images, tmp_path, monkeypatch, compiler, said):
    """More than 1 % off: trained as if not compiled. (The control: 0.1 % off is rounding, and goes on compiled.)"""
    def bits(compiler, compiled=True):
        monkeypatch.setattr(torch, "compile", compiler)
        _, history = nb.train(replace(config, dilations=(1,), images_seen=32), images, images[:20],
                              path=tmp_path / "model.pt", device="cpu", compiled=compiled)
        return [history[-1][name] for name in ("train_bits", "validation_bits")]

    plain = bits(unable, compiled=False)
    with pytest.warns(UserWarning, match=said) as warned:
        assert bits(compiler) == plain
    assert len(warned) == 1 and abs(bits(times(1.001))[0] / plain[0] - 1.001) < 1e-4


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


def test_a_state_written_without_a_scaler_goes_on_with_one_and_back(nb, config, tmp_path):
    """bf16 on a CPU has no scaler, float16 on a T4 has one."""
    path, model = tmp_path / "model.state", nb.PixelCNN(config)
    scaled = dict(model=model, scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    plain = dict(model=model, scaler=torch.amp.GradScaler("cpu", enabled=False))
    for one, other in ((plain, scaled), (scaled, plain)):
        nb.save_state(path, config, one, (3, 48, 1.5, []))
        assert tuple(nb.restore_state(path, config, other)) == (3, 48, 1.5, [])
        assert scaled["scaler"].get_scale() == 8.0


def test_a_gradient_that_is_no_number_stops_the_run_where_no_scale_is_to_blame(nb, config, images, tmp_path):
    def loss(model, batch, step):
        return nb.training_loss(model, batch, step) + Infinite.apply(model.head.weight)

    with pytest.raises(FloatingPointError, match="gradient norm is (inf|nan) at step 0"):
        nb.train(config, images, images, path=tmp_path / "model.pt", device="cpu", loss=loss)
