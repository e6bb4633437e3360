"""A pretend CUDA device that really executes, on a CPU-only build of PyTorch.

Tensors "on cuda" are wrapper subclasses (torch.Tensor._make_wrapper_subclass, device cuda:0: so C++ and Python see
.device == cuda:0, .numpy() refuses, autocast takes CUDA's lists) around a CPU tensor. Every op passes `Sim`, a
TorchDispatchMode: it checks devices as CUDA would, runs the op on the CPU data, wraps the result.

sim.errors: what CUDA would refuse (also raised, as RuntimeError). sim.ops: how many operations ran "on cuda".
"""
import ctypes, importlib.metadata, importlib.util, os, subprocess, sys, tempfile, traceback
assert "torch" not in sys.modules, "import cudasim before torch: guard.so must register its hooks first"
_lib = os.path.join(os.path.dirname(importlib.util.find_spec("torch").origin), "lib")
ctypes.CDLL(os.path.join(_lib, "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
_name = f"cudasim_guard_{os.getuid()}_{importlib.metadata.version('torch')}.so"
_guard = os.path.join(tempfile.gettempdir(), _name)  # a do-nothing CUDA, of guard.cpp
_source = os.path.join(os.path.dirname(os.path.abspath(__file__)), "guard.cpp")
if not os.path.exists(_guard) or os.path.getmtime(_guard) < os.path.getmtime(_source):
    _include = os.path.join(os.path.dirname(_lib), "include")
    subprocess.run(["g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-I", _include, "-I",
                    os.path.join(_include, "torch/csrc/api/include"), _source, "-o", _guard], check=True)
ctypes.CDLL(_guard)
import torch
from torch.optim.optimizer import _foreach_supported_types as _optimisers_types
from torch.utils import _pytree as pytree
from torch.utils._foreach_utils import _foreach_supported_types as _clipping_types
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
torch.autograd.set_multithreading_enabled(False)  # no device threads for a device that is not there
torch.__future__.set_overwrite_module_params_on_conversion(True)
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


def pretend():
    """A T4, which has no bfloat16."""
    torch.cuda._lazy_init = lambda: None
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.current_device = lambda: 0
    torch.cuda.is_bf16_supported = lambda including_emulation=True: including_emulation
    torch.cuda.synchronize = lambda *a: None
    torch.cuda.get_device_name = lambda *a: "Tesla T4 (pretended)"


def _lists(i):
    if isinstance(i, list):
        return torch.tensor(i)
    return tuple(_lists(j) for j in i) if isinstance(i, tuple) else i


class Gpu(torch.Tensor):
    @staticmethod
    def __new__(cls, elem):
        r = torch.Tensor._make_wrapper_subclass(
            cls, elem.size(), strides=elem.stride(), storage_offset=elem.storage_offset(),
            dtype=elem.dtype, layout=elem.layout, device=CUDA, requires_grad=False)
        r.elem = elem
        return r

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return SIM[-1].run(func, args, kwargs or {})

    def __repr__(self, **_):
        return f"Gpu({self.elem!r})"

    def __format__(self, spec):
        return self.item().__format__(spec) if self.dim() == 0 else object.__format__(self, spec)

    # x[[0, 2]]: on CUDA the list becomes a cuda index; C++ would bypass the mode, so do it here
    def __getitem__(self, i):
        return torch.Tensor.__getitem__(self, _lists(i))

    def __setitem__(self, i, v):
        torch.Tensor.__setitem__(self, _lists(i), v)

    def tolist(self):
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol):  # saved as its CPU data (torch.load(map_location="cpu"))
        return self.elem.detach().__reduce_ex__(protocol)


_optimisers_types.append(Gpu)  # as on CUDA: optimisers and clipping take the foreach way
_clipping_types.append(Gpu)

SIM = []
COPIES = {aten.copy_.default, aten._to_copy.default, aten.copy.default}
INDEX = {aten.index.Tensor, aten._unsafe_index.Tensor}
INDEX_PUT = {aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default,
             aten._unsafe_index_put.default}
SCALAR_OK = {aten.fill_.Tensor, aten.fill.Tensor, aten.masked_fill.Tensor, aten.masked_fill_.Tensor,
             aten.index_fill.int_Tensor, aten.index_fill_.int_Tensor}
POINTWISE = {"where", "lerp", "add", "sub", "mul", "div", "addcmul", "addcdiv", "clamp", "maximum", "minimum"}


class Sim(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.errors, self.ops = [], 0

    def __enter__(self):
        SIM.append(self)
        return super().__enter__()

    def __exit__(self, *a):
        SIM.pop()
        return super().__exit__(*a)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def fail(self, func, why):
        where = [f"{f.filename}:{f.lineno} {f.line}" for f in traceback.extract_stack() if "cell" in f.filename][-3:]
        self.errors.append((str(func), why, where))
        raise RuntimeError(f"{func}: {why}")

    def run(self, func, args, kwargs):
        flat, spec = pytree.tree_flatten((args, kwargs))
        gpu = [a for a in flat if isinstance(a, Gpu)]
        device = kwargs.get("device")
        to_cuda = device is not None and torch.device(device).type == "cuda"
        if not gpu and not to_cuda:
            return func(*args, **kwargs)
        cpu = [a for a in flat if isinstance(a, torch.Tensor) and not isinstance(a, Gpu)]
        name = func._overloadpacket.__name__
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type != "cuda":
            self.fail(func, "Expected a 'cuda' device type for generator but found 'cpu'")
        if gpu and cpu and func not in COPIES:
            self.check(func, name, args, kwargs, gpu, cpu)
        self.ops += 1
        owner = {id(g.elem): g for g in gpu}
        a, k = pytree.tree_unflatten([x.elem if isinstance(x, Gpu) else x for x in flat], spec)
        if device is not None:
            k["device"] = CPU
        out = func(*a, **k)
        if device is not None and not to_cuda:
            return out
        return pytree.tree_map_only(torch.Tensor, lambda x: owner[id(x)] if id(x) in owner else Gpu(x), out)

    def check(self, func, name, args, kwargs, gpu, cpu):
        """Of an operation on tensors of both devices: fail where CUDA would."""
        if func in INDEX:
            if not isinstance(args[0], Gpu):
                self.fail(func, "indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        elif func in INDEX_PUT:
            changed, _, values = args[:3]
            if not isinstance(changed, Gpu):
                self.fail(func, "indices or values on cuda for an indexed tensor on cpu")
            if not isinstance(values, Gpu) and values.dim() > 0:
                self.fail(func, "index_put_: values on cpu, self on cuda")
        elif name.startswith("_foreach"):  # grouped by device only if each position agrees
            for items in zip(*(x for x in args if isinstance(x, (list, tuple)))):
                if len({isinstance(i, Gpu) for i in items if isinstance(i, torch.Tensor) and i.dim() > 0}) > 1:
                    self.fail(func, "foreach over tensors of different devices")
        else:
            out = args[0] if name.endswith("_") and not name.startswith("__") else kwargs.get("out")
            pointwise = torch.Tag.pointwise in func.tags or func in SCALAR_OK or name in POINTWISE
            if not pointwise or any(c.dim() > 0 for c in cpu) or out is not None and not isinstance(out, Gpu):
                shapes = [("cuda" if isinstance(x, Gpu) else "cpu", tuple(x.shape)) for x in gpu + cpu]
                self.fail(func, f"Expected all tensors to be on the same device: {shapes}")
            if name in ("masked_fill", "masked_fill_") and not isinstance(args[1], Gpu):
                self.fail(func, "mask on cpu")
