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
from gpu_drill.faults import Infinite, broken_compile


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the pretended device needs a C++ compiler (g++)")
def test_every_public_function_works_on_a_card_as_on_a_cpu(root):
    drills = root / ".ci" / "tools" / "gpu_drill" / "drills.py"
    run = subprocess.run([sys.executable, drills], capture_output=True, text=True)
    assert run.returncode == 0 and "0 failed" in run.stdout and "0 device mismatches" in run.stdout, run.stdout[-4000:]


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


def test_no_gradient_reaches_a_hidden_tap_even_if_it_is_infinite(nb):
    """weight * mask would give inf * 0 = nan."""
    layer = nb.MaskedConv2d("B", 2, 3, rows=2, reach=1)
    kernel = layer.kernel()
    kernel.backward(torch.where(layer.mask, 1.0, torch.inf).expand_as(kernel))
    gradient = layer.weight.grad.view_as(kernel)
    assert (gradient[..., ~layer.mask] == 0).all() and (gradient[..., layer.mask] == 1).all()


def test_a_gpu_that_is_not_there_is_one_clear_line(nb, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no GPU here.*Change runtime type"):
        nb.pick_device("cuda")
    assert nb.pick_device("auto").type == "cpu"


def test_compiling_that_fails_is_one_warning(nb, config, images, tmp_path, monkeypatch):
    config = replace(config, dilations=(1,), images_seen=32)
    eager, _ = nb.train(config, images, images[:20], path=tmp_path / "eager.pt", device="cpu")
    monkeypatch.setattr(torch, "compile", broken_compile)
    with pytest.warns(UserWarning, match=r"torch.compile failed \(RuntimeError\)") as said:
        model, _ = nb.train(config, images, images[:20], path=tmp_path / "model.pt", device="cpu", compiled=True)
    assert len(said) == 1
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), eager.parameters()))


def test_a_compiled_loss_that_is_another_is_one_warning(nb, config, images, tmp_path, monkeypatch):
    """More than 1 % off: trained as if not compiled. (The control: 0.1 % off is rounding, and goes on compiled.)"""
    config = replace(config, dilations=(1,), images_seen=32)

    def trained(factor):
        monkeypatch.setattr(torch, "compile", lambda loss: lambda *inputs: loss(*inputs) * factor)
        return nb.train(config, images, images[:20], path=tmp_path / "model.pt", device="cpu", compiled=factor != 1)[1]

    plain = trained(1)[-1]["train_bits"]
    with pytest.warns(UserWarning, match="its loss is .*, the plain one") as said:
        assert trained(1.1)[-1]["train_bits"] == plain
    assert len(said) == 1 and abs(trained(1.001)[-1]["train_bits"] / plain - 1.001) < 1e-4


@pytest.mark.slow
def test_the_guides_whole_loss_compiles(nb, config, images):
    """Encoder, h and the model that it multiplies, with gradients, and no warning; masks stay on the host."""
    model = nb.PixelCNN(config).eval().requires_grad_(False)
    network = nb.GuideNetwork.starting_from(model, (1,)).train().requires_grad_(True)
    images, loss = images[:8], partial(nb.guide_loss, model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
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
