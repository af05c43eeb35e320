"""Launch and synchronise the processes of a distributed run; a single process needs no communication."""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import psutil
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import distributed

from litgpt_whittle.errors import UserError
from litgpt_whittle.files import check_writable, lock_dir
from litgpt_whittle.watchdog import end, end_silently, watch

T = TypeVar("T")
Item = TypeVar("Item")

_n_maps = 0
"""Number of calls of `parallel_map` so far"""

NO_LIMIT = timedelta(days=1000)
"""Timeout for processes that wait for another one, which may tokenise, save or score for hours"""

_patient_group: tuple[Any, Any] | None = None
"""The default process group, and the group that `_patient` has created for it"""

HELD_BYTES = 2**26
"""Growth of resident memory, in bytes, before freed memory is returned to the system"""

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None

_resident_when_trimmed = 0

_resident_at_launch = 0
"""Resident bytes of this process at `launch`"""


def n_devices(asked: int | str) -> int:
    """Return the number of devices to use: GPUs, or processes on the CPU's cores if there are no GPUs.

    Args:
        asked: A number, or "auto" for all GPUs or, without GPUs, one process on the CPU.

    Raises:
        UserError: If `asked` is not a positive number, or exceeds the number of devices.
    """
    gpus = torch.cuda.device_count()
    if asked in ("auto", -1, "-1"):
        return max(1, gpus)
    available, kind = (gpus, "GPUs") if gpus else (os.cpu_count() or 1, "CPU cores")
    if not str(asked).isdigit() or int(asked) < 1:
        raise UserError(f"devices must be 'auto' or a number from 1, got {asked!r}; use 1")
    if int(asked) > available:
        raise UserError(f"devices must be at most {available}, the {kind} of this machine, got {asked}; lower it")
    return int(asked)


def launch(
    n: int, precision: Any = "32-true", num_nodes: int = 1, strategy: Any = "ddp", loggers: Sequence[Any] = ()
) -> L.Fabric:
    """Start further processes, each of which runs this command from its beginning, and connect all processes.

    From then on, all processes end when one fails.

    Args:
        n: Devices per machine.
        precision: Precision of Fabric.
        num_nodes: Number of machines.
        strategy: Strategy of Fabric; ignored on a single device.
        loggers: Loggers of Fabric.
    """
    global _resident_at_launch
    _resident_at_launch = _resident()
    strategy = strategy if n * num_nodes > 1 else "auto"
    fabric = L.Fabric(devices=n, num_nodes=num_nodes, strategy=strategy, precision=precision, loggers=[*loggers])
    fabric.launch()
    if distributed.is_initialized():
        _patient()  # while all processes are here
    watch(fabric)
    return fabric


def is_first_started() -> bool:
    """Return whether this process is rank 0, before `launch` starts or connects other processes."""
    # Lightning reads RANK, LOCAL_RANK and SLURM's variables; a start on several machines without them sets NODE_RANK
    return rank_zero_only.rank == 0 and os.environ.get("NODE_RANK", "0") == "0"  # type: ignore[attr-defined]


def lock_dir_for_all(folder: Path, out_dir: Path | None = None) -> AbstractContextManager[Any]:
    """Return `lock_dir` on rank 0 and a null context on other ranks, before processes are started or connected."""
    return lock_dir(folder, out_dir) if is_first_started() else nullcontext()


@contextmanager
def lock_output(out_dir: Path) -> Iterator[None]:
    """Lock an output folder that a command replaces as a whole, so that no other process can write to it meanwhile.

    The lock is in a hidden folder next to `out_dir`; `out_dir` itself stays empty until the command has finished.

    Raises:
        UserError: If `out_dir` is the root folder, is not writable, or is locked.
    """
    path = out_dir.resolve()
    if not path.name:
        raise UserError(f"out_dir must not be the root folder, got {str(out_dir)!r}; choose another")
    check_writable(path.parent)
    with lock_dir_for_all(path.with_name(f".{path.name}.lock"), out_dir):
        yield


def own_device() -> torch.device:
    """Return this process's GPU or other accelerator, or the CPU if there is none.

    Before `launch`, PyTorch's current device is the first one in every process. The device is then taken from
    LOCAL_RANK, so that no process allocates memory on another one's device.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return torch.device("cpu")
    kind, local_rank = accelerator.type, int(os.environ.get("LOCAL_RANK", 0))
    return torch.device(kind, local_rank) if local_rank and not distributed.is_initialized() else torch.device(kind)


def free_memory(device: torch.device, n_local: int) -> int:
    """Return the free bytes on a process's device, including memory that this process's allocator keeps for reuse.

    On a CPU, and on devices that share main memory, the free bytes are divided by `n_local`, the number of this
    machine's processes. On a GPU, the call creates a context, which takes memory.
    """
    module = torch.get_device_module(device)
    if hasattr(module, "mem_get_info"):
        return module.mem_get_info(device)[0] + module.memory_reserved(device) - module.memory_allocated(device)
    return psutil.virtual_memory().available // n_local


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that a device's or the system's memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    signs = "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUSOLVER_STATUS_ALLOC_FAILED"
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def n_sharing(device: torch.device) -> int:
    """Return the number of this command's processes that share a device's memory: all on a CPU, one on a GPU."""
    return world_size() if device.type == "cpu" else 1


def peak_memory(device: torch.device) -> int:
    """Return the peak bytes that this process has used on its device since `launch`."""
    if (allocated := getattr(torch.get_device_module(device), "max_memory_allocated", None)) is not None:
        return allocated(device)
    return peak_resident() - _resident_at_launch


def peak_resident() -> int:
    """Return this process's peak resident memory in bytes."""
    import resource  # on POSIX systems only

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def give_back_freed() -> None:
    """Give memory that is freed, but still held by glibc's allocator, back to the system.

    Alternating buffers of many sizes fragment the heap, until gaps take more than the memory in use. Requesting memory
    again costs time, so nothing is given back before resident memory has grown by `HELD_BYTES`.
    """
    global _resident_when_trimmed
    if _trim is not None and _resident() > _resident_when_trimmed + HELD_BYTES:
        _trim(0)
        _resident_when_trimmed = _resident()


def release_memory() -> None:
    """Give the memory of unreachable objects back to the device and the system, for other processes.

    Otherwise, a model's reference cycles live until garbage collection, and PyTorch keeps the device's memory.
    """
    gc.collect()
    if (empty_cache := getattr(torch.get_device_module(own_device()), "empty_cache", None)) is not None:
        empty_cache()
    if _trim is not None:
        _trim(0)


def _resident() -> int:
    return psutil.Process().memory_info().rss


class Termination:
    """Context manager that records SIGTERM, which schedulers send before preemption, instead of ending the process."""

    def __enter__(self) -> Termination:
        self.is_announced = False
        # only the main thread may set a handler; in other threads the signal keeps its default action
        in_main = threading.current_thread() is threading.main_thread()
        self._before = signal.signal(signal.SIGTERM, self._note) if in_main else None
        return self

    def _note(self, *_: Any) -> None:
        self.is_announced = True

    def __exit__(self, *_: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def agreed(self, fabric: L.Fabric) -> bool:
        """Return whether any rank received SIGTERM; a collective, which all ranks must call."""
        if fabric.world_size == 1:
            return self.is_announced
        return bool(all_reduce_sum(torch.tensor(float(self.is_announced), device=fabric.device)) > 0)


def rank() -> int:
    """Return this process's rank."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def barrier() -> None:
    """Wait for all processes, so that each finds the files that other processes have written.

    Ends this process if another process has ended.
    """
    if distributed.is_initialized():
        with _reported():
            distributed.barrier(_patient())


def _patient() -> Any:
    """Return a Gloo group without a time limit, for barriers and for exchanging Python objects without the devices.

    Collectives of the default group fail after half an hour. The first call must come from all processes.
    """
    global _patient_group
    if _patient_group is None or _patient_group[0] is not distributed.group.WORLD:
        _patient_group = distributed.group.WORLD, distributed.new_group(timeout=NO_LIMIT, backend="gloo")
    return _patient_group[1]


@contextmanager
def _reported() -> Iterator[None]:
    """Replace an error of a collective, which means that another process has ended, by a message and an exit."""
    try:
        yield
    except RuntimeError as error:
        _lost(error)


def shutdown() -> bool:
    """Shut down the process group, and return whether this is rank 0, which continues alone.

    A process that exits without this call could abort when another one closes their connection.
    """
    is_first = rank() == 0
    if distributed.is_initialized():
        barrier()
        distributed.destroy_process_group()
    return is_first


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over the processes, in place."""
    if distributed.is_initialized():
        distributed.all_reduce(tensor)
    return tensor


def gather(value: T) -> list[T]:
    """Return the values of all processes, in order of rank, on every process.

    Ends this process if another process has ended.
    """
    if not distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    with _reported():
        distributed.all_gather_object(values, value, _patient())
    return values


def _lost(error: Exception) -> None:
    if rank() == 0:
        time.sleep(2)  # `watch` reports which process ended, and how
    end(f"the connection to another process broke ({str(error).splitlines()[0][:100]})")


def parallel_map(function: Callable[[Item], T], items: Sequence[Item]) -> Iterator[T]:
    """Apply a function to items in parallel, each on the next free process.

    Every process yields all results, in the order of the items. A process takes its next item before it waits for
    results of other processes, so that slow items block no process.
    """
    if not distributed.is_initialized():
        yield from map(function, items)
        return
    global _n_maps
    _n_maps += 1  # the same on all processes, which make the same calls
    # the store of the process group's rendezvous, which PyTorch exposes nowhere else
    store = distributed.PrefixStore(f"parallel_map {_n_maps}", distributed.distributed_c10d._get_default_store())
    n_given = 0
    try:
        while (own := store.add("next", 1) - 1) < len(items):
            store.set(str(own), pickle.dumps(function(items[own])))  # type: ignore[arg-type]
            while n_given < len(items) and store.check([str(n_given)]):
                yield pickle.loads(store.get(str(n_given)))
                n_given += 1
        for i in range(n_given, len(items)):
            store.wait([str(i)], NO_LIMIT)
            yield pickle.loads(store.get(str(i)))
    except distributed.DistError as error:
        _lost(error)


def each(function: Callable[[Item], T], items: Sequence[Item]) -> Iterator[T]:
    """Apply a function to items one after the other, for functions that all processes run together."""
    return map(function, items)


def on_rank_zero(function: Callable[[], T]) -> T:
    """Call a function on rank 0 only, and return its result on all ranks.

    Raises:
        UserError: On rank 0, if the function raises it; all other ranks exit with code 0.
    """
    result: Any = None
    failure: UserError | None = None
    if rank() == 0:
        try:
            result = function()
        except UserError as error:
            failure = error
    result, failed = gather((result, failure is not None))[0]
    if failure is not None:
        raise failure
    if failed:
        end_silently()
    return result
