"""Pretend CUDA: run PyTorch code "on the GPU" of a machine that has none, to find faults that only a GPU shows.

    with pretend_cuda.on(folder) as audit: ...

Import it before the process's first backward(), in a process of its own: it leaves a registered device behind, and what
remembers its device (accelerate's state) wants a new process. Importing raises where PyTorch lacks a private part.

A tensor "on the GPU" is a `Pretend`: it says device='cuda:0', goes through CUDA's autograd and autocast keys and shares
the memory of a CPU tensor on which every operation is really computed: values, .item() and control flow are right.
As on a GPU these raise: operands on two devices (0-dim CPU scalars and CPU indices pass, as CUDA lets them), numpy(),
np.asarray, BCE under autocast, integer matmul, a CPU generator for CUDA randomness, CUDA in a forked worker, a second
GPU. Files of torch.save name cuda:0 as a GPU's do; torch.load puts tensors back there unless map_location says
otherwise. `audit` counts, per line of the code under test, what makes the CPU wait for the GPU (.item(), nonzero,
boolean masks, copies that are not both pinned and non_blocking), and launched operations.

Not seen: memory and time, races (a non_blocking copy to the CPU is only counted), kernels that differ numerically or
whose shapes CUDA refuses, torch.compile (runs eagerly), cuDNN, several GPUs, C++ extensions, other processes. Made for
PyTorch 2.14, CUDA build, on Linux, with private parts of PyTorch; a build without CUDA may lack the device guard.
"""

import collections
import contextlib
import copy
import os
import sys
import threading
import time
from types import SimpleNamespace
from unittest import mock

import torch
import torch._dynamo  # takes stock of torch.cuda when it is imported, so before anything is replaced
import torch.utils.checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from tools.stand_in_gpu import accelerator_without_devices

CUDA, CPU, HERE = torch.device("cuda", 0), torch.device("cpu"), os.path.abspath(__file__)
IMPLICIT = torch._C.DispatchKey.CompositeImplicitAutograd
CROSS = {"copy_", "_to_copy", "_foreach_copy_", "set_"}  # operations that may join two devices
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
SCALAR = {*INDEXED, "masked_fill", "masked_fill_", "fill", "fill_"}  # beside the pointwise and foreach operations
FLOAT = {"mm", "addmm", "bmm", "baddbmm", "mv", "dot", "convolution", "avg_pool2d", "upsample_bilinear2d",
         "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "grid_sampler_2d",
         "reflection_pad2d", "_adaptive_avg_pool2d"}  # CUDA has no integer kernels of these
SYNCS = {"_local_scalar_dense": ".item()", **dict.fromkeys(("unique_dim", "_unique2", "unique_consecutive"), "unique"),
         "masked_select": "boolean mask", **{name: name for name in ("nonzero", "equal", "bincount", "nms")}}
RESHAPES = {"resize_", "set_", "squeeze_", "unsqueeze_", "t_", "transpose_", "as_strided_"}  # of their first argument


class Audit:
    """Counts of what costs time on a GPU, waits by the innermost line below the folder `own`; None counts nothing."""

    def __init__(self, own=None):
        self.own = own and os.path.abspath(own)
        self.syncs, self.launches = collections.Counter(), 0

    def where(self):
        frame = sys._getframe()
        while frame := frame.f_back:
            name = frame.f_code.co_filename
            if name.startswith(self.own) and "site-packages" not in name and name != HERE:
                return f"{os.path.relpath(name, self.own)}:{frame.f_lineno}"
        return "(backward, or outside)"

    def sync(self, kind):
        if self.own:
            self.syncs[self.where(), kind] += 1

    def counts(self):
        """-> (Counter of waits by "file:line kind", number of launched operations), so far."""
        return collections.Counter({f"{where} {kind}": n for (where, kind), n in self.syncs.items()}), self.launches


audit, _thread = Audit(), threading.local()
_state = SimpleNamespace(rng=torch.Generator().manual_seed(0).get_state(), own_stream=True, saving=None,
                         generators=set(), pid=os.getpid())


def is_cuda(device):
    device = torch.device(CPU if device is None else device)
    if device.type == "cuda" and device.index not in (None, 0):
        raise RuntimeError("CUDA error: invalid device ordinal")
    return device.type == "cuda"


class Pretend(torch.Tensor):
    """A CPU tensor, `_elem`, that poses as one on cuda:0."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, elem):
        if os.getpid() != _state.pid:
            raise RuntimeError("Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, you "
                               "must use the 'spawn' start method")
        self = torch.Tensor._make_subclass(cls, elem, False, dispatch_device=True, device_for_backend_keys=CUDA)
        self._elem = elem
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})

    def __repr__(self):
        return f"{self._elem!r:.2000} on cuda:0"

    def __format__(self, spec):
        return format(self.item() if self.dim() == 0 else str(self), spec)

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
                        "memory first.")

    __array__ = numpy

    def tolist(self):
        audit.sync("tolist()")
        return self._elem.tolist()

    def __deepcopy__(self, memo):
        if not self.is_leaf:
            raise RuntimeError("Only Tensors created explicitly by the user support the deepcopy protocol")
        if id(self) not in memo:
            new = memo[id(self)] = Pretend(copy.deepcopy(self._elem, memo)).requires_grad_(self.requires_grad)
            new.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k != "_elem"})
            new.grad = copy.deepcopy(self.grad, memo)
        return memo[id(self)]

    def __reduce_ex__(self, proto):
        if _state.saving is None:
            raise RuntimeError("pretend_cuda: a CUDA tensor is pickled outside torch.save")
        plain = self._elem.detach().requires_grad_(self.requires_grad)
        _state.saving[plain.untyped_storage()._cdata] = plain
        if getattr(self, "_is_param", False):
            return torch._utils._rebuild_parameter, (plain, self.requires_grad, collections.OrderedDict())
        return plain.__reduce_ex__(proto)

    def __tensor_flatten__(self):  # with its counterpart it lets Module.to exchange parameters in place
        return ["_elem"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return Pretend(inner["_elem"])

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        new = value.detach()
        if getattr(self, "_is_param", False):
            new = torch.nn.Parameter(new, self.requires_grad)
        if self.grad is not None:
            new.grad = self.grad if isinstance(new, Pretend) else self.grad._elem
        exchange(self, new)


def exchange(a, b):
    """Let two tensors change places, whatever refers to them."""
    a.__class__, b.__class__ = b.__class__, a.__class__
    a.__dict__, b.__dict__ = b.__dict__, a.__dict__
    torch._C._swap_tensor_impl(a, b)


# ---- every operation comes through here -----------------------------------------------------------------------------

def walk(content, leaf):
    if isinstance(content, torch.Tensor):
        return leaf(content)
    return type(content)(walk(part, leaf) for part in content) if isinstance(content, (list, tuple)) else content


def from_autograd(in_its_thread=False):
    """Whether autograd's C++ code asks, with no Python between."""
    frame = sys._getframe(2)
    while frame and frame.f_code.co_filename == HERE and frame.f_code.co_name in ("compute", "__torch_dispatch__"):
        frame = frame.f_back
    return frame is None or not in_its_thread and frame.f_code.co_name == "_engine_run_backward"


def compute(func, args, kwargs):
    if func is torch.ops.prim.device.default and isinstance(args[0], Pretend):
        return CPU if from_autograd() else CUDA  # of a CUDA tensor the engine would want streams
    if torch.is_inference_mode_enabled() and func.has_kernel_for_dispatch_key(IMPLICIT):
        with Mode():
            return func.decompose(*args, **kwargs)
    if not hasattr(_thread, "lifts"):  # torch.tensor(..., device="cuda") shall come here, in autograd's thread as well
        torch._C._set_only_lift_cpu_tensors(True)
        _thread.lifts = True
    inputs, name = {}, func._opname

    def unwrap(tensor):
        inner = tensor._elem if isinstance(tensor, Pretend) else tensor
        inputs[id(inner)] = tensor
        return inner

    plain, options = walk(args, unwrap), {key: walk(value, unwrap) for key, value in kwargs.items()}
    ours = [t for t in inputs.values() if isinstance(t, Pretend)]
    target = bool(ours)
    if kwargs.get("device") is not None:
        target = is_cuda(kwargs["device"]) or name != "_to_copy" and from_autograd(in_its_thread=True)
        options["device"] = CPU if target else kwargs["device"]
    if not target and not ours:
        return func(*args, **kwargs)
    if target and options.pop("pin_memory", None):
        raise RuntimeError("Only dense CPU tensors can be pinned")
    if ours:
        require_one_device(func, name, args, inputs, ours)
    if audit.own:
        audit.launches += 1
        note_waits(name, args, kwargs, target)
    if name == "_fused_sdp_choice":
        return 0  # attention as single operations
    result = call(func, plain, options, target)
    if name in RESHAPES and isinstance(args[0], Pretend):
        exchange(args[0], Pretend(args[0]._elem))
    return walk(result, lambda out: inputs[id(out)] if id(out) in inputs else Pretend(out) if target else out)


def call(func, args, kwargs, target):
    generator = kwargs.get("generator")
    if generator is not None and target != (generator._cdata in _state.generators):
        raise RuntimeError(f"Expected a '{'cuda' if target else 'cpu'}' device type for generator")
    if generator is None and target and _state.own_stream and torch.Tag.nondeterministic_seeded in func.tags:
        kept = torch.get_rng_state()
        torch.set_rng_state(_state.rng)
        try:
            return func(*args, **kwargs)
        finally:
            _state.rng = torch.get_rng_state()
            torch.set_rng_state(kept)
    if func._opname in ("_softmax", "_log_softmax") and args[2]:  # from half to float at once: only CUDA can
        return func(args[0].float(), args[1], False)
    if func._opname in ("_softmax_backward_data", "_log_softmax_backward_data") and args[0].dtype != args[3]:
        return func(*args[:3], args[0].dtype).to(args[3])
    try:
        return func(*args, **kwargs)
    except RuntimeError as error:
        if "not implemented for 'Half'" not in str(error):
            raise
    args = walk(list(args), lambda t: t.float() if t.dtype == torch.half else t)  # another kernel that only CUDA has
    return walk(func(*args, **kwargs), lambda t: t.half() if t.dtype == torch.float else t)


def require_one_device(func, name, args, inputs, ours):
    if name in FLOAT and not any(t.is_floating_point() or t.is_complex() for t in ours):
        raise NotImplementedError(f'"{name}_cuda" not implemented for \'{ours[0].dtype}\'')
    others = [t for t in inputs.values() if not isinstance(t, Pretend)]
    if name in CROSS:
        return
    if name in INDEXED:
        indices = [t for t in args[1] if t is not None]
        if not isinstance(args[0], Pretend) and any(isinstance(t, Pretend) for t in indices):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        others = [t for t in others if not any(t is index for index in indices)]
    if torch.Tag.pointwise in func.tags or name in SCALAR or name.startswith("_foreach"):
        others = [t for t in others if t.dim() or name.endswith("_") and t is args[0]]
    if others:
        raise RuntimeError("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and "
                           f"cpu! ({name})")


def note_waits(name, args, kwargs, target):
    if name in SYNCS:
        audit.sync(SYNCS[name])
    elif name in INDEXED:
        indices = [t for t in args[1] if t is not None]
        fills = len(args) > 2 and len(indices) == 1 and args[2].numel() == 1  # becomes masked_fill
        if any(t.dtype in (torch.bool, torch.uint8) for t in indices) and not fills:
            audit.sync("boolean mask")
        if isinstance(args[0], Pretend) and not all(isinstance(t, Pretend) for t in indices):
            audit.sync("indices from the CPU")
    elif name == "repeat_interleave" and kwargs.get("output_size") is None:
        audit.sync(name)
    elif name in ("_to_copy", "copy_"):
        source, goes = (args[0], target) if name == "_to_copy" else (args[1], isinstance(args[0], Pretend))
        waits = not (kwargs.get("non_blocking") or name == "copy_" and len(args) > 2 and args[2])
        if goes and not isinstance(source, Pretend) and (waits or not is_pinned(source)):
            audit.sync("CPU -> GPU" + ("" if waits else ", not pinned"))
        elif isinstance(source, Pretend) and not goes:
            audit.sync("GPU -> CPU" if waits else "GPU -> CPU, non_blocking: UNSAFE")


class Mode(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls):
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


# ---- what torch.cuda and its neighbours answer ----------------------------------------------------------------------

_Generator, _save, _load = torch.Generator, torch.save, torch.load


class PretendGenerator(_Generator):
    device = CUDA

    def __new__(cls, device="cpu"):
        if not is_cuda(device):
            return _Generator()
        self = super().__new__(cls)
        _state.generators.add(self._cdata)
        return self

    def __del__(self):
        _state.generators.discard(self._cdata)


class PretendEvent:
    def __init__(self, *args, **kwargs):
        self.time = None

    def record(self, stream=None):
        self.time = time.perf_counter()

    def elapsed_time(self, end):
        if self.time is None or end.time is None:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        return 1000 * (end.time - self.time)

    def synchronize(self):
        audit.sync("synchronize()")


class PretendStream:
    device, synchronize = CUDA, PretendEvent.synchronize

    def is_capturing(self):
        return False

    def wait_stream(self, other):
        pass


def is_pinned(tensor):
    return getattr(tensor.untyped_storage(), "pretend_pinned", False)


def pin_memory(tensor, device=None):
    if isinstance(tensor, Pretend):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    tensor = tensor if is_pinned(tensor) else tensor.clone()
    tensor.untyped_storage().pretend_pinned = True
    return tensor


def save(*args, **kwargs):
    _state.saving = {}
    try:
        _save(*args, **kwargs)
    finally:
        _state.saving = None


def load(f, map_location=None, **kwargs):
    moved = {}

    def place(storage, location):
        wanted = location if map_location is None else map_location
        if isinstance(wanted, dict):
            wanted = wanted.get(location, location)
        elif callable(wanted):
            wanted = (wanted(storage, location) or storage).device
        if is_cuda(wanted):
            moved[storage._cdata] = storage
        return storage

    def back(content):
        if isinstance(content, torch.Tensor) and content.untyped_storage()._cdata in moved:
            new = Pretend(content.detach()).requires_grad_(content.requires_grad)
            return torch.nn.Parameter(new, new.requires_grad) if isinstance(content, torch.nn.Parameter) else new
        if isinstance(content, dict):
            content.update({key: back(value) for key, value in content.items()})
        return type(content)(map(back, content)) if isinstance(content, (list, tuple)) else content

    return back(_load(f, map_location=place, **kwargs))


def get_rng_state(device="cuda"):
    return _state.rng.clone()


def set_rng_state(state, device="cuda"):
    if isinstance(state, Pretend) or state.dtype != torch.uint8:
        raise TypeError("RNG state must be a torch.ByteTensor")
    _state.rng = state.clone()


def seed(number):
    _state.rng = _Generator().manual_seed(int(number)).get_state()


def patches():
    """-> [(object, attribute, value)]: everything that `on` replaces."""
    def constant(value):
        return lambda *args, **kwargs: value

    def synchronize(device=None):
        audit.sync("synchronize()")

    stream = PretendStream()
    properties = SimpleNamespace(name="Pretend GPU", total_memory=24 << 30, major=8, minor=0, multi_processor_count=80)
    both = {"is_available": True, "device_count": 1, "get_device_capability": (8, 0), "empty_cache": None,
            "reset_peak_memory_stats": None, "memory_allocated": 1 << 20, "max_memory_allocated": 3 << 20,
            "memory_reserved": 2 << 20, "max_memory_reserved": 4 << 20, "current_stream": stream}
    cuda = {"current_device": 0, "set_device": None, "get_device_name": "Pretend GPU", "init": None, "_lazy_init": None,
            "get_device_properties": properties, "mem_get_info": (20 << 30, 24 << 30), "is_bf16_supported": True,
            "is_initialized": True, "_exchange_device": 0, "_maybe_exchange_device": 0,
            "is_current_stream_capturing": False, "initial_seed": 0, "default_stream": stream,
            "stream": contextlib.nullcontext()}
    random = {"get_rng_state": get_rng_state, "set_rng_state": set_rng_state, "manual_seed": seed,
              "manual_seed_all": seed, "get_rng_state_all": lambda: [get_rng_state()],
              "set_rng_state_all": lambda states: [set_rng_state(state) for state in states]}
    accelerator = {"current_accelerator": torch.device("cuda"), "current_device_index": 0, "set_device_index": None}
    return [*((torch.cuda, k, constant(v)) for k, v in (both | cuda).items()),
            *((torch.accelerator, k, constant(v)) for k, v in (both | accelerator).items()),
            *((module, k, v) for module in (torch.cuda, torch.cuda.random) for k, v in random.items()),
            *((module, "synchronize", synchronize) for module in (torch.cuda, torch.accelerator)),
            (torch.cuda, "Event", PretendEvent), (torch.cuda, "Stream", PretendStream),
            (torch, "Generator", PretendGenerator), (torch, "save", save), (torch, "load", load),
            (torch.Tensor, "pin_memory", pin_memory), (torch.Tensor, "is_pinned", is_pinned),
            (torch, "compile", lambda model=None, **kwargs: model if model is not None else lambda f: f),
            (torch.utils.checkpoint.DefaultDeviceType, "_default_device_type", "cuda"),
            *((sys.modules[name], "_foreach_supported_types", [torch.Tensor, torch.nn.Parameter, Pretend])
              for name in (torch.optim.Optimizer.__module__, "torch.utils._foreach_utils"))]


def register():
    _state.keep = accelerator_without_devices("pretend", seed)
    torch.serialization.register_package(
        0, lambda storage: "cuda:0" if _state.saving and storage._cdata in _state.saving else None, lambda *args: None)


register()  # before the first backward pass of the process, which starts a thread for each device


@contextlib.contextmanager
def on(own=None, own_stream=True):
    """Within, this process has one GPU.

    Args:
        own: folder by whose lines the audit, the value of the `with`, counts.
        own_stream: CUDA has its own random stream, as a GPU's; False: the CPU's, so that values are those of the CPU.
    """
    global audit
    audit, _state.pid, _state.own_stream = Audit(own), os.getpid(), own_stream
    with contextlib.ExitStack() as stack:
        for owner, name, value in patches():
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))  # its operations have no counterpart on the CPU
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        _thread.__dict__.clear()
        stack.enter_context(Mode())
        torch.empty(0, device="cuda")
        yield audit
