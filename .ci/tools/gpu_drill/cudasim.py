"""A pretend CUDA device that really executes, on a CPU-only build of PyTorch.

Tensors "on cuda" are wrapper subclasses (torch.Tensor._make_wrapper_subclass, device cuda:0: so C++ and
Python see .device == cuda:0, .numpy() refuses, autocast takes CUDA's lists) around a CPU tensor.
Every op passes `Sim`, a TorchDispatchMode: it checks devices as CUDA would, runs the op on the CPU
data, wraps the result.  Use:   import cudasim; sim = cudasim.Sim(); sim.__enter__()

sim.errors: what CUDA would refuse (also raised, as RuntimeError).  sim.ops: Counter of ops on "cuda".
sim.syncs: host-device synchronisations.  sim.h2d: copies.  sim.live / sim.peak: bytes "on cuda", if memory=True;
with limit=bytes an operation whose result does not fit raises torch.OutOfMemoryError, as CUDA would.
"""
import collections, ctypes, importlib.util, os, subprocess, sys, tempfile, traceback, weakref
assert "torch" not in sys.modules, "import cudasim before torch: guard.so must register its hooks first"
_lib = os.path.join(os.path.dirname(importlib.util.find_spec("torch").origin), "lib")
ctypes.CDLL(os.path.join(_lib, "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
_guard = os.path.join(tempfile.gettempdir(), f"cudasim_guard_{os.getuid()}.so")  # a do-nothing CUDA, built from guard.cpp
_source = os.path.join(os.path.dirname(os.path.abspath(__file__)), "guard.cpp")
if not os.path.exists(_guard) or os.path.getmtime(_guard) < os.path.getmtime(_source):
    _include = os.path.join(os.path.dirname(_lib), "include")
    subprocess.run(["g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-I", _include, "-I",
                    os.path.join(_include, "torch/csrc/api/include"), _source, "-o", _guard], check=True)
ctypes.CDLL(_guard)
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils import _pytree as pytree

aten = torch.ops.aten
torch.autograd.set_multithreading_enabled(False)  # no device threads for a device that is not there
torch.__future__.set_overwrite_module_params_on_conversion(True)
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


def pretend(name="Tesla T4 (pretended)", bf16=False):
    torch.cuda._lazy_init = lambda: None
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.current_device = lambda: 0
    torch.cuda.is_bf16_supported = lambda including_emulation=True: including_emulation or bf16
    torch.cuda.synchronize = lambda *a: None
    torch.cuda.empty_cache = lambda: None
    torch.cuda.get_device_name = lambda *a: name


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


# as on CUDA: optimisers and clipping take the foreach way
from torch.utils import _foreach_utils
import torch.optim.optimizer as _oo
for lst in {id(l): l for l in (getattr(_foreach_utils, "_foreach_supported_types", None),
                               getattr(_oo, "_foreach_supported_types", None)) if isinstance(l, list)}.values():
    if Gpu not in lst:
        lst.append(Gpu)

SIM = []
COPIES = {aten.copy_.default, aten._to_copy.default, aten.copy.default}
INDEX = {aten.index.Tensor, aten._unsafe_index.Tensor}
INDEX_PUT = {aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default,
             aten._unsafe_index_put.default}
SCALAR_OK = {aten.fill_.Tensor, aten.fill.Tensor, aten.masked_fill.Tensor, aten.masked_fill_.Tensor,
             aten.index_fill.int_Tensor, aten.index_fill_.int_Tensor}
VIEWS = {"view", "_unsafe_view", "select", "slice", "transpose", "permute", "t", "expand", "unsqueeze",
         "squeeze", "split", "split_with_sizes", "unbind", "as_strided", "alias", "detach", "diagonal",
         "unfold", "view_as", "_reshape_alias", "chunk", "_conj", "lift_fresh", "is_same_size",
         "numpy_T", "real", "view_as_real"}


class Mismatch(RuntimeError):
    pass


class Sim(TorchDispatchMode):
    def __init__(self, memory=False, limit=None):
        self.limit = limit
        super().__init__()
        self.errors, self.ops, self.syncs, self.h2d = [], collections.Counter(), collections.Counter(), 0
        self.memory, self.live, self.peak, self.seen, self.peak_at = memory, 0, 0, {}, None
        self.mixed = collections.Counter()

    def __enter__(self):
        SIM.append(self)
        return super().__enter__()

    def __exit__(self, *a):
        SIM.pop()
        return super().__exit__(*a)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def fail(self, func, why):
        where = [f"{f.filename}:{f.lineno} {f.line}" for f in traceback.extract_stack()
                 if "cell" in f.filename][-3:]
        self.errors.append((str(func), why, where))
        raise Mismatch(f"{func}: {why}")

    def wrap(self, x):
        if self.memory:
            st = x.untyped_storage()
            key = st._cdata
            if key not in self.seen:
                size = -(-st.nbytes() // 512) * 512   # the caching allocator rounds to 512 bytes
                self.seen[key] = size
                self.live += size
                if self.live > self.peak:
                    self.peak = self.live
                    if self.memory == "where":
                        self.peak_at = [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_stack()
                                        if "cell" in f.filename][-6:]
                weakref.finalize(st, self.forget, key)
                if self.limit is not None and self.live > self.limit:
                    raise torch.OutOfMemoryError("pretended CUDA: out of memory")
        return Gpu(x)

    def forget(self, key):
        self.live -= self.seen.pop(key, 0)

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
        if func in COPIES:
            if func is aten._to_copy.default:
                if device is not None and torch.device(device).type == "cpu":
                    self.syncs["copy to cpu"] += 1
                elif not gpu:
                    self.h2d += 1
            elif not isinstance(args[0], Gpu):
                self.syncs["copy to cpu"] += 1
            elif not isinstance(args[1], Gpu):
                self.h2d += 1
        elif name in ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim",
                      "repeat_interleave", "bincount", "unique_consecutive"):
            self.syncs[name] += 1
        elif func in INDEX or func in INDEX_PUT:
            for i in args[1]:
                if i is not None and i.dtype in (torch.bool, torch.uint8) and isinstance(i, Gpu):
                    self.syncs["mask index"] += 1
                elif i is not None and not isinstance(i, Gpu):
                    self.h2d += 1
        self.ops[name] += 1
        owner = {id(g.elem): g for g in gpu}
        flat = [a.elem if isinstance(a, Gpu) else a for a in flat]
        a, k = pytree.tree_unflatten(flat, spec)
        if device is not None:
            k["device"] = CPU
        out = func(*a, **k)
        if device is not None and not to_cuda:
            return out
        if isinstance(out, torch.Tensor):
            return owner.get(id(out)) if id(out) in owner else self.wrap(out)
        if isinstance(out, (tuple, list)):
            return pytree.tree_map(lambda o: (owner.get(id(o)) if id(o) in owner else self.wrap(o))
                                   if isinstance(o, torch.Tensor) else o, out)
        return out

    def check(self, func, name, args, kwargs, gpu, cpu):
        self.mixed[(name, tuple(cpu[0].shape) if len(cpu[0].shape) < 1 else "nd")] += 1
        if func in INDEX:
            if not isinstance(args[0], Gpu):
                self.fail(func, "indices should be either on cpu or on the same device as the indexed tensor (cpu)")
            return
        if func in INDEX_PUT:
            self_, indices, values = args[:3]
            if not isinstance(self_, Gpu):
                self.fail(func, "indices or values on cuda for an indexed tensor on cpu")
            if not isinstance(values, Gpu) and values.dim() > 0:
                self.fail(func, "index_put_: values on cpu, self on cuda")
            return
        inplace = name.endswith("_") and not name.startswith("__")
        first = args[0] if args else None
        if name.startswith("_foreach"):
            # grouped by device only if each position agrees
            lists = [x for x in args if isinstance(x, (list, tuple))]
            for items in zip(*lists):
                kinds = {isinstance(i, Gpu) for i in items if isinstance(i, torch.Tensor) and i.dim() > 0}
                if len(kinds) > 1:
                    self.fail(func, "foreach over tensors of different devices")
            return
        pointwise = torch.Tag.pointwise in func.tags or func in SCALAR_OK or name in ("where", "lerp", "add",
                    "sub", "mul", "div", "addcmul", "addcdiv", "clamp", "maximum", "minimum")
        if pointwise and all(c.dim() == 0 for c in cpu) and not (
                (inplace and not isinstance(first, Gpu)) or
                any(o is not None and not isinstance(o, Gpu) for o in [kwargs.get("out")])):
            if name in ("masked_fill", "masked_fill_") and not isinstance(args[1], Gpu):
                self.fail(func, "mask on cpu")
            return
        shapes = [("cuda" if isinstance(x, Gpu) else "cpu", tuple(x.shape)) for x in gpu + cpu]
        self.fail(func, f"Expected all tensors to be on the same device: {shapes}")
