"""A simulated accelerator: its tensors compute on the CPU, but cannot be mixed with CPU tensors, as on a GPU.

with pretended_device() as seen:  # Fabric, and thereby every command, chooses the device
    torch.zeros(3, device=DEVICE) + torch.ones(3)  # raises MixedDevices
seen.total("sync"), live_bytes()

with peak_bytes() as peak:
    ...
peak.total  # peak of live bytes above those at the start

It is a PyTorch PrivateUse1 backend written in Python: `DeviceTensor` keeps its values in a CPU tensor and intercepts
every operator. Operations that a GPU would refuse raise an error, and host waits are counted by the lines that cause
them. Kernels, streams, bf16 autocast and several devices are not simulated.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple
from unittest import mock

import torch
from lightning.fabric.accelerators import ACCELERATOR_REGISTRY, Accelerator
from lightning.fabric.connector import _Connector
from lightning.fabric.strategies import SingleDeviceStrategy
from torch.utils import backend_registration

NAME = "pretended"
CAN_PRETEND = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
"""True if this PyTorch lets Python register a device (from 2.9)"""

COPIES = {"copy_", "_to_copy", "lift_fresh"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
# element-wise operators accept 0-dim CPU tensors together with GPU tensors; these do not
REFUSE_CPU_SCALARS = set(
    """cat stack mm addmm bmm baddbmm mv addmv dot linear convolution embedding index_select gather scatter scatter_
    scatter_add scatter_add_ index_add index_add_ index_copy index_copy_ searchsorted bucketize topk sort""".split()
)
SYNCS = set(
    """_local_scalar_dense nonzero masked_select equal allclose is_nonzero bincount unique_dim _unique2
    unique_consecutive _linalg_check_errors""".split()
)
FACTORIES = ("arange", "arange.start", "arange.start_step", "eye", "eye.m")
"""PyTorch would build these from operators that resize their output"""


class MixedDevices(RuntimeError):
    """Error for tensors of two devices in one operator, which a GPU would refuse."""


class Seen:
    """Counts of device events: kind of event -> lines of code that caused it -> number.

    Kinds: `sync`, the host waits for a result; `upload`, it waits for a copy from pageable memory; `index`, it waits
    for the copy of a CPU index for one operator; `saved`, a tensor is pickled with the device's class; `emptied`,
    freed memory is returned to the device.
    """

    def __init__(self) -> None:
        self.events: dict[str, Counter[str]] = defaultdict(Counter)
        self.n_operators = 0

    def add(self, kind: str, what: str) -> None:
        self.events[kind][f"{what} at {_place()}"] += 1

    def total(self, *kinds: str) -> int:
        return sum(sum(self.events[kind].values()) for kind in kinds)

    def table(self) -> str:
        """Return the lines that caused most events of each kind, to show why a limit is exceeded."""
        rows = [(n, kind, what) for kind, found in self.events.items() for what, n in found.most_common(12)]
        return "\n".join(["", *(f"{n:6d} x {kind}: {what}" for n, kind, what in rows)])


_seen = Seen()
_is_chosen = False
"""True while commands run on the device; outside of `pretended_device`, no device is visible"""
_sizes: dict[int, int] = {}
"""Bytes of each storage on the device"""
_live = _peak = 0
"""Bytes of all storages on the device: now, and the maximum since `peak_bytes` began"""
_has_float64 = True
_capacity: int | None = None
"""Bytes that fit on the device; None without a limit"""


def live_bytes() -> int:
    """Return the bytes of all tensors on the device; tensors that share memory count once."""
    return _live


@dataclass
class Peak:
    """Peak of live bytes above those at the start."""

    total: int = 0


@contextmanager
def peak_bytes() -> Iterator[Peak]:
    """Yield an object that holds the peak of live bytes above those at the start, once the context ends.

    Temporary memory within a kernel is not counted.
    """
    global _peak
    gc.collect()  # garbage that is freed during the measurement would lower the peak
    before, found = _live, Peak()
    _peak = _live
    try:
        yield found
    finally:
        found.total = _peak - before


def _allocate(storage: torch.UntypedStorage) -> None:
    """Count a new storage.

    Raises:
        torch.OutOfMemoryError: If it exceeds the device's capacity.
    """
    global _live, _peak
    key, n = storage._cdata, storage.nbytes()
    if key in _sizes:
        return
    if _is_chosen and _capacity is not None and _live + n > _capacity:
        raise torch.OutOfMemoryError(f"{NAME}: {n} bytes asked for, {_capacity - _live} are free")
    _sizes[key] = n
    _live += n
    _peak = max(_peak, _live)
    weakref.finalize(storage, _free, key)


def _free(key: int) -> None:
    global _live
    _live -= _sizes.pop(key)


def _place(n: int = 2) -> str:
    """Return the innermost lines of litgpt_whittle and litgpt on the stack."""
    found, frame = [], sys._getframe(1)
    while frame is not None and len(found) < n:
        _, package, file = frame.f_code.co_filename.rpartition("/litgpt")
        if package:
            found.append(f"litgpt{file}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(found) or "a test"


class DeviceTensor(torch.Tensor):
    """A tensor on the device, with its values in the CPU tensor `on_cpu`."""

    on_cpu: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, on_cpu: torch.Tensor):
        if on_cpu.dtype == torch.float64 and _is_chosen and not _has_float64:
            raise TypeError(f"Cannot convert a {NAME} Tensor to float64 dtype")
        layout = dict(strides=on_cpu.stride(), storage_offset=on_cpu.storage_offset(), dtype=on_cpu.dtype)
        tensor = torch.Tensor._make_wrapper_subclass(cls, on_cpu.size(), device=torch.device(NAME, 0), **layout)
        tensor.on_cpu = on_cpu
        _allocate(on_cpu.untyped_storage())
        return tensor

    def __repr__(self):
        return f"DeviceTensor({self.on_cpu!r})"

    def data_ptr(self):
        return self.on_cpu.data_ptr()

    def untyped_storage(self):
        return self.on_cpu.untyped_storage()

    def tolist(self):
        _seen.add("sync", "tolist")
        return self.on_cpu.tolist()

    def numpy(self, *, force=False):
        raise TypeError(f"can't convert {NAME} device type tensor to numpy. Use Tensor.cpu() to copy it first.")

    __array__ = numpy

    def __matmul__(self, other):  # for a vector, PyTorch's version changes a shape in place
        return (self[None] @ other)[0] if self.dim() == 1 and other.dim() == 2 else torch.matmul(self, other)

    def __deepcopy__(self, memo):
        copied = DeviceTensor(self.on_cpu.detach().clone())
        memo[id(self)] = torch.nn.Parameter(copied, self.requires_grad) if hasattr(self, "_is_param") else copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol):  # stored without the device, so that the tests can read the device's files
        _seen.add("saved", "pickled")
        return self.on_cpu.detach().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if torch.is_inference_mode_enabled() and _facts(func).can_decompose:  # inference mode does not do this
            with torch.utils._python_dispatch._disable_current_modes():
                out = func.decompose(*args, **kwargs or {})
            if out is not NotImplemented:
                return out
        return _run(func, args, kwargs or {})


class Facts(NamedTuple):
    """Properties of an operator."""

    name: str
    written: dict[int, str]
    """Positions of the arguments that it writes to"""
    is_view: bool
    returns: bool
    can_decompose: bool


@cache
def _facts(func) -> Facts:
    schema = func._schema
    aliases = {i: a for i, a in enumerate(schema.arguments) if a.alias_info is not None}
    written = {i: a.name for i, a in aliases.items() if a.alias_info.is_write}
    name = schema.name.removeprefix("aten::")
    return Facts(name, written, bool(aliases), bool(schema.returns), func._can_decompose())


def _map(function: Callable, of: type, x: Any) -> Any:
    """Apply a function to tensors of a class in an operator's arguments or results."""
    if isinstance(x, of):
        return function(x)
    return type(x)(_map(function, of, each) for each in x) if type(x) in (tuple, list) else x


def _tensors(arguments: Iterable) -> Iterator[torch.Tensor]:
    for x in arguments:
        if isinstance(x, torch.Tensor):
            yield x
        elif type(x) in (tuple, list):
            yield from _tensors(x)


def _is_device(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _on_cpu(x: DeviceTensor) -> torch.Tensor:
    return x.on_cpu


def _on_device(x: torch.Tensor) -> DeviceTensor:
    return x if isinstance(x, DeviceTensor) else DeviceTensor(x)


def _run(func, args, kwargs):
    """Run an operator as the device would."""
    facts = _facts(func)
    name, first = facts.name, args[0] if args else None
    _seen.n_operators += 1
    _check(func, name, args, kwargs)
    plain_args = _map(_on_cpu, DeviceTensor, tuple(args))
    plain_kwargs = {key: _map(_on_cpu, DeviceTensor, value) for key, value in kwargs.items()}
    device, stays = kwargs.get("device"), True
    if device is not None:
        stays = _is_device(device)
        plain_kwargs["device"] = "cpu" if stays else device
    if name == "_to_copy":
        stays = stays if device is not None else isinstance(first, DeviceTensor)
        plain_kwargs.pop("non_blocking", None)
        _note_copy(first, stays, kwargs.get("non_blocking"))
    elif name == "copy_":
        _note_copy(args[1], isinstance(first, DeviceTensor), kwargs.get("non_blocking") or (*args, False)[2])
    out = func(*plain_args, **plain_kwargs)
    if facts.written:
        return _written(facts, args, kwargs)
    if not stays:
        return out
    # in inference mode, a view of a tensor made outside counts as made outside
    is_outside = facts.is_view and isinstance(first, DeviceTensor) and not first.is_inference()
    with torch.inference_mode(False) if is_outside else nullcontext():
        return _map(_on_device, torch.Tensor, out)


def _written(facts: Facts, args, kwargs):
    """Return the arguments that an operator has written to."""
    given = [args[i] if i < len(args) else kwargs.get(name) for i, name in facts.written.items()]
    for x in _tensors(given):
        if isinstance(x, DeviceTensor) and x.shape != x.on_cpu.shape:
            raise NotImplementedError(f"{facts.name} changes a shape in place")
    return (given[0] if len(given) == 1 else tuple(given)) if facts.returns else None


def _note_copy(source: Any, is_there: bool, non_blocking: Any) -> None:
    """Count a copy that the host waits for; PyTorch sends 0-dim CPU tensors as arguments of a kernel."""
    if isinstance(source, DeviceTensor) and not is_there:
        _seen.add("sync", "copy to the CPU")
    elif isinstance(source, torch.Tensor) and not isinstance(source, DeviceTensor) and is_there:
        if source.dim() and not non_blocking:
            _seen.add("upload", f"copy of shape {tuple(source.shape)}")


def _check(func, name: str, args, kwargs) -> None:
    """Raise MixedDevices where a GPU would, and count host waits."""
    tensors = [*_tensors(args), *_tensors(kwargs.values())]
    ours = [x for x in tensors if isinstance(x, DeviceTensor)]
    others = [x for x in tensors if not isinstance(x, DeviceTensor)]
    generator = kwargs.get("generator")
    if generator is not None and (ours or _is_device(kwargs.get("device"))):
        raise MixedDevices(f"{func}: expected a '{NAME}' generator, got one on '{generator.device}'")
    if name in COPIES:
        return
    if name in INDEXING:
        _check_index(func, args[0], [x for x in args[1] if x is not None], args[2:3])
    elif ours and others:
        if name in REFUSE_CPU_SCALARS or any(x.dim() or x.device.type == "meta" for x in others):
            shapes = [(str(x.device), tuple(x.shape)) for x in tensors]
            raise MixedDevices(f"{func}: expected all tensors on the same device, got {shapes} at {_place(6)}")
    if name in SYNCS and ours:
        _seen.add("sync", name)


def _check_index(func, indexed: torch.Tensor, indices: list[torch.Tensor], values: tuple) -> None:
    is_there = isinstance(indexed, DeviceTensor)
    for index in indices:
        if not is_there and isinstance(index, DeviceTensor):
            raise MixedDevices(f"{func}: an index on the device into a tensor on the CPU at {_place(6)}")
        if is_there and not isinstance(index, DeviceTensor):
            _seen.add("index", f"index of shape {tuple(index.shape)}")
        if is_there and index.dtype in (torch.bool, torch.uint8):
            _seen.add("sync", "index by a mask")
    for value in values:
        if isinstance(value, DeviceTensor) != is_there and (value.dim() or not is_there):
            raise MixedDevices(f"{func}: values on another device than the indexed tensor at {_place(6)}")


class _Module:
    """Stand-in for `torch.cuda`, as `torch.pretended`."""

    is_available = staticmethod(lambda: _is_chosen)
    device_count = staticmethod(lambda: int(_is_chosen))
    is_initialized = staticmethod(lambda: True)
    current_device = staticmethod(lambda: 0)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16, torch.float32])
    get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())

    def __getattr__(self, name: str) -> Callable:
        if name in ("set_device", "synchronize", "manual_seed", "manual_seed_all", "_is_in_bad_fork", "set_rng_state"):
            return lambda *args: None
        if name == "empty_cache":
            return lambda: _seen.add("emptied", "cache")
        if name == "mem_get_info" and _capacity is not None:
            return lambda device=None: (_capacity - _live, _capacity)
        if name in ("memory_reserved", "memory_allocated") and _capacity is not None:
            return lambda device=None: _live  # the allocator caches nothing
        raise AttributeError(name)


class _Accelerator(Accelerator):
    """Accelerator for Fabric."""

    setup_device = teardown = lambda self, *args: None
    parse_devices = staticmethod(lambda devices: 1)
    get_parallel_devices = staticmethod(lambda devices: [torch.device(NAME, 0)])
    auto_device_count = staticmethod(lambda: 1)
    is_available = staticmethod(lambda: _is_chosen)
    name = staticmethod(lambda: NAME)


_libraries: list[torch.library.Library] = []


def register() -> None:
    """Register the device, once; must precede the first backward pass of a process, which counts devices."""
    if _libraries or not CAN_PRETEND:
        return
    backend_registration._setup_privateuseone_for_python_backend(rename=NAME, backend_module=_Module())
    everything, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    _libraries.extend([everything, aten])
    everything.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in FACTORIES:
        base, _, overload = name.partition(".")
        op = getattr(getattr(torch.ops.aten, base), overload or "default")
        aten.impl(name, lambda *args, _op=op, **kwargs: _run(_op, args, kwargs), "PrivateUse1")
    ACCELERATOR_REGISTRY.register(NAME, _Accelerator)


def _by_way_of_the_cpu(function: Callable) -> Callable:
    """Wrap `torch.tensor`, which moves its result without the dispatcher."""

    def made(*args, device=None, **kwargs):
        device = torch.get_default_device() if device is None else device
        if not _is_device(device):
            return function(*args, device=device, **kwargs)
        return function(*args, device="cpu", **kwargs).to(device)

    return made


@contextmanager
def pretended_device(capacity: int | None = None, has_float64: bool = True) -> Iterator[Seen]:
    """Run commands on the device, and yield the counts of its events.

    Args:
        capacity: Bytes that fit on the device, in addition to what lies there already; by default without a limit.
        has_float64: False for a device without float64, such as MPS.
    """
    global _seen, _is_chosen, _capacity, _has_float64
    register()
    _has_float64 = has_float64
    before = _seen, _is_chosen, _capacity, torch.__future__.get_swap_module_params_on_conversion()
    choose, single = _Connector._choose_strategy, lambda: SingleDeviceStrategy(torch.device(NAME, 0))
    with ExitStack() as stack:
        for name in ("tensor", "as_tensor"):
            stack.enter_context(mock.patch.object(torch, name, _by_way_of_the_cpu(getattr(torch, name))))
        stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", lambda tensor, *_: tensor))
        stack.enter_context(mock.patch.object(_Connector, "_choose_auto_accelerator", staticmethod(lambda: NAME)))
        is_single = lambda connector: connector._accelerator_flag == NAME
        chosen = lambda connector: single() if is_single(connector) else choose(connector)
        stack.enter_context(mock.patch.object(_Connector, "_choose_strategy", chosen))
        torch.__future__.set_swap_module_params_on_conversion(True)  # modules cannot hold two classes of tensors
        _seen, _is_chosen, _capacity = Seen(), True, None if capacity is None else _live + capacity
        try:
            yield _seen
        finally:
            _seen, _is_chosen, _capacity = before[:3]
            _has_float64 = True
            torch.__future__.set_swap_module_params_on_conversion(before[3])
