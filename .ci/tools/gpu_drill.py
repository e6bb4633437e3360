"""What a card refuses and a CPU forgives: the notebook's functions on a pretended CUDA device.

usage: python .ci/tools/gpu_drill.py [--planted]
Tensors "on cuda" are wrappers around CPU tensors; each operation is checked for devices as CUDA would, and runs on the
CPU. Each call must give there what it gives on the CPU; training is in float16, as on a T4. Exits 1 if one failed.
--planted: a control, with images that stay where they are, and optimisers of another network.
"""
import contextlib
import copy
import ctypes
import importlib.util
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

# A CUDA that does nothing, for C++ (the autograd engine, .to), which accepts device cuda:0 then; before torch.
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <ATen/detail/CUDAHooksInterface.h>
using namespace c10;
constexpr auto T = DeviceType::CUDA;
struct Guard final : impl::NoOpDeviceGuardImpl<T> {
  Device exchangeDevice(Device) const override { return Device(T, 0); }
  Device getDevice() const override { return Device(T, 0); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, Device(T, 0)); }
};
struct CUDAHooks : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
};
using at::CUDAHooksRegistry;
namespace at { REGISTER_CUDA_HOOKS(CUDAHooks); }
C10_REGISTER_GUARD_IMPL(CUDA, Guard);
"""
place = Path(importlib.util.find_spec("torch").origin).parent
with tempfile.TemporaryDirectory() as folder:
    include, built = place / "include", Path(folder) / "guard.so"
    subprocess.run(["g++", "-std=c++20", "-fPIC", "-shared", "-I", include, "-x", "c++", "-", "-o", built],
                   input=GUARD.encode(), check=True)
    ctypes.CDLL(place / "lib" / "libtorch_cpu.so", mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(built)

import torch
from definitions import definitions
from torch.optim.optimizer import _foreach_supported_types as optimisers_types
from torch.utils import _pytree as pytree
from torch.utils._foreach_utils import _foreach_supported_types as clipping_types
from torch.utils._python_dispatch import TorchDispatchMode

refused, ran = [], []  # on the card


def allowed(func, args, flat):
    """Whether CUDA takes these tensors together: CPU ones may be single numbers, indices, or what is copied."""
    name = func._overloadpacket.__name__
    if name in ("copy_", "copy", "_to_copy"):
        return True
    if "index_put" in name or name in ("index", "_unsafe_index"):
        flat = [args[0], *args[2:3]]  # without the indices
    return all(isinstance(x, Card) or x.dim() == 0 for x in flat if isinstance(x, torch.Tensor))


def run(func, args, kwargs):
    flat, spec = pytree.tree_flatten((args, kwargs))
    cards = {id(x.elem): x for x in flat if isinstance(x, Card)}
    device = kwargs.get("device")
    to = device and torch.device(device).type
    if not cards and to != "cuda":
        return func(*args, **kwargs)
    if (cards and not allowed(func, args, flat)) or kwargs.get("generator") is not None:
        refused.append(str(func))
        raise RuntimeError(f"{func}: expected all tensors to be on the same device")
    ran.append(func)
    args, kwargs = pytree.tree_unflatten([x.elem if isinstance(x, Card) else x for x in flat], spec)
    if to:
        kwargs["device"] = "cpu"
    out = func(*args, **kwargs)
    if to == "cpu":
        return out
    return pytree.tree_map_only(torch.Tensor, lambda x: cards[id(x)] if id(x) in cards else Card(x), out)


class Card(torch.Tensor):
    """A tensor on the card; elem: what is in it."""
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, elem):
        new = torch.Tensor._make_wrapper_subclass(
            cls, elem.size(), strides=elem.stride(), storage_offset=elem.storage_offset(), dtype=elem.dtype,
            device="cuda:0")
        new.elem = elem
        return new

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def __reduce_ex__(self, protocol):  # saved as what is in it
        return self.elem.detach().__reduce_ex__(protocol)


class Everywhere(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


optimisers_types.append(Card)  # as on CUDA: optimisers and clipping take the foreach way
clipping_types.append(Card)
torch.autograd.set_multithreading_enabled(False)  # no thread for a device that is not there
torch.__future__.set_overwrite_module_params_on_conversion(True)
torch.cuda._lazy_init = lambda: None
torch.cuda.is_available = lambda: True
torch.cuda.is_bf16_supported = lambda including_emulation=True: including_emulation  # a T4
torch.set_num_threads(1)
nb = definitions()
if "--planted" in sys.argv:
    nb.check_image = lambda model, image, name="image", ndim=2: image
    nb.make_optimisers = lambda model, recipe, make=nb.make_optimisers: make(copy.deepcopy(model), recipe)
assert not torch.backends.cudnn.allow_tf32

torch.manual_seed(0)
CONFIG = nb.Config(6, 6, 4, embedding=4, channels=12, bottleneck=8, dilations=(1, 2), mean_channels=4)
RECIPE = nb.Recipe(640, warmup=64, decay=160, batch_size=16, shift=1, validate_every=10)
MODEL = nb.PixelCNN(CONFIG).eval().requires_grad_(False)
GUIDE = nb.starting_guide(MODEL, (1, 2)).eval().requires_grad_(False)
for parameter in [*MODEL.parameters(), *GUIDE.parameters()]:
    parameter.add_(0.15 * torch.randn_like(parameter))
IMAGES = nb.sample(MODEL, 40, seed=1)
KNOWN = torch.arange(36).view(6, 6) >= 18


def told(found):
    """All that a Weighted says; means of values on its device and on the CPU."""
    values = found.draws.double()
    return [*found, found.weights, found.ess, found.k_hat, found.status == "converged", found.log_z, found.pick(4, 1),
            found.mean(values), found.mean(values.cpu())]


CALLS = {  # of a guide g, its model m, images x and a mask k; x is where the model is, or on the CPU
    "influence": lambda g, m, x, k: nb.influence(m, x[0].to(m.device)),
    "sample_naive": lambda g, m, x, k: nb.sample_naive(m, x[:3].to(m.device), k, seed=2),
    "draw_categorical": lambda g, m, x, k: nb.draw_categorical(torch.ones(3, 4).to(m.device), nb.uniforms(5, 3, 2)),
    "sample": lambda g, m, x, k: nb.sample(m, 5, image=x[0], known=k, seed=torch.Generator().manual_seed(2)),
    "cached_logits": lambda g, m, x, k: nb.cached_logits(m, x[:3].to(m.device), k.cpu()),
    "log_prob": lambda g, m, x, k: nb.log_prob(m, x),
    "given_past": lambda g, m, x, k: nb.given_past(m, x, (3, 2)),
    "given_rest": lambda g, m, x, k: nb.given_rest(m, x[:3], (3, 2)),
    "marginal": lambda g, m, x, k: nb.marginal(m, (3, 2), 32),
    "conditional": lambda g, m, x, k: nb.mean_of_picked(*nb.conditional(m, x[0], k, (1, 2), 64, g)),
    "complete": lambda g, m, x, k: told(nb.complete(m, x[0], k, 64, g)),
    "complete, the model alone": lambda g, m, x, k: told(nb.complete(m, x[0], k, 64)),
    "complete, a prefix": lambda g, m, x, k: told(nb.complete(m, x[0], ~k, 8, g)),
    "draw_many": lambda g, m, x, k: nb.draw_many(m, x[0], ~k, 8, 0, g),
    "log_weights": lambda g, m, x, k: [nb.log_weights(m, x, k, g), nb.log_weights(m, x, k)],
    "gibbs by pixels": lambda g, m, x, k: nb.gibbs(partial(nb.sweep_by_pixels, m, k), x[:2], 2),
    "gibbs at once": lambda g, m, x, k: nb.gibbs(partial(nb.sweep_at_once, m, g, k, candidates=4),
                                                 torch.where(k, x[0], x[:3]), 2),
    "ink_of, r_hat": lambda g, m, x, k: nb.r_hat(nb.ink_of(x.view(10, 4, 6, 6), k)),
    "guide_loss": lambda g, m, x, k: nb.score(
        g, partial(nb.guide_loss, m), [x.to(m.device), k.to(m.device).expand(40, 6, 6)]),
    "fresh_batches": lambda g, m, x, k: nb.fresh_batches(m, x, RECIPE, steps=2)(3),
    "image_batches": lambda g, m, x, k: nb.image_batches(m, x, RECIPE)(3)}


def compare(call):
    """The card's answers, for images on the CPU and on the card, against the CPU's."""
    answers = []
    for device, where in (("cpu", "cpu"), ("cuda", "cpu"), ("cuda", "cuda")):
        networks = (copy.deepcopy(x).to(device) for x in (GUIDE, MODEL))
        answer = call(*networks, IMAGES.to(where), KNOWN.to(where))
        answers.append([torch.as_tensor(x).cpu().double() for x in pytree.tree_leaves(answer)])
    assert all(torch.allclose(x, y, rtol=0, atol=1e-5) for found in answers[1:]
               for x, y in zip(found, answers[0], strict=True)), "another answer"


def trained(recipe, *devices):
    """Weights of a training that is stopped in step 13 on each device but the last, and the precisions of its steps."""
    steps, precisions = [], set()

    def loss(network, images):
        if torch.is_grad_enabled():
            precisions.add(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32)
        return nb.model_loss(network, images)

    def batches(step):
        if step == 13 and device != devices[-1]:
            raise StopIteration
        steps.append(step)
        return make(step)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        for device in devices:
            torch.manual_seed(1)
            start = nb.PixelCNN(CONFIG).to(device)
            make = nb.image_batches(start, IMAGES, recipe)
            with contextlib.suppress(StopIteration):
                model = nb.train(start, loss, batches, [IMAGES[:20]], recipe, path, save_seconds=0)
        loaded = nb.load_checkpoint(path)
    assert steps == [*range(40)], "it did not go on"
    weights, again = (torch.cat([p.cpu().flatten() for p in x.parameters()]) for x in (model, loaded))
    assert loaded.device.type == "cuda" and torch.equal(weights, again), "another file"  # "auto" is the card
    return weights, precisions


def training():
    """In float16 with its scaler, close to float32 on a CPU; if it is stopped it goes on on the other device, in the
    precision in which it began."""
    (plain, precisions), half = trained(RECIPE, "cpu"), replace(RECIPE, dtype=torch.float16)
    assert precisions == {torch.float32}
    for recipe, *devices in ((RECIPE, "cuda"), (RECIPE, "cuda", "cpu"), (RECIPE, "cpu", "cuda"), (half, "cpu", "cuda")):
        found, precisions = trained(recipe, *devices)
        expected = torch.float32 if recipe is RECIPE and devices[0] == "cpu" else torch.float16
        off = (found - plain).abs().mean() / plain.abs().mean()
        assert 0 < off < 0.05 and precisions == {expected}, f"{devices}, {precisions}: {off:.2g} away"


failed = False
with Everywhere():
    for name, call in [*CALLS.items(), ("train", None)]:
        before, said = (len(ran), len(refused)), "ok"
        try:
            compare(call) if call else training()
            assert len(ran) > before[0] and len(refused) == before[1], "nothing ran on the card, or it refused"
        except Exception as error:
            failed, said = True, f"FAILED {error!r}"
        print(f"{name}: {said}"[:400], flush=True)
sys.exit(failed)
