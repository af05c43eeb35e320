"""What processes that share some work need of each other; all of it does nothing where there is only one."""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import psutil
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import distributed

from litgpt_whittle.errors import UserError
from litgpt_whittle.files import claimed

T = TypeVar("T")
Item = TypeVar("Item")

_n_spread = 0
"""How often work was spread over the processes"""

HELD_BYTES = 2**26
"""Freed memory that the system's allocator may hold on to, at least"""

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None

_resident_when_trimmed = 0

_resident_at_launch = 0
"""Bytes of this process's memory before it began"""


def n_devices(asked: int | str) -> int:
    """How many devices to use: GPUs, or processes on the CPU's cores where there are none.

    Args:
        asked: A number, or "auto": all GPUs, one process on a CPU.

    Raises:
        UserError: If there are fewer.
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
    n: int, precision: str = "32-true", num_nodes: int = 1, strategy: Any = "ddp", loggers: Sequence[Any] = ()
) -> L.Fabric:
    """Starts the other processes, each of which runs this command from its beginning, and connects all of them.

    From then on all of them end when one does.

    Args:
        n: Devices per machine.
        precision: As Fabric names it.
        num_nodes: Machines.
        strategy: How they share the work, as Fabric has it; where there is one device it does not matter.
        loggers: As Fabric has them.
    """
    global _resident_at_launch
    _resident_at_launch = _resident()
    strategy = strategy if n * num_nodes > 1 else "auto"
    fabric = L.Fabric(devices=n, num_nodes=num_nodes, strategy=strategy, precision=precision, loggers=[*loggers])
    fabric.launch()
    _watch(getattr(fabric._strategy.launcher, "procs", []))
    return fabric


def _watch(processes: Sequence[Any]) -> None:
    """Ends this process with a message when one of those that it started has failed."""
    if not processes:
        return
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":  # Lightning's, which would kill this process without a word
            thread._run = lambda: True

    def watch() -> None:
        while any(code is None for code in [process.poll() for process in processes]):
            _check(processes)
            time.sleep(0.2)
        _check(processes)

    threading.Thread(target=watch, daemon=True, name="process-watch").start()


def _check(processes: Sequence[Any]) -> None:
    for i, process in enumerate(processes, 1):
        if process.returncode:
            _end(f"process {i} of {len(processes) + 1} ended with exit code {process.returncode}", processes)


def _end(what: str, processes: Sequence[Any] = ()) -> None:
    go_on = "run the same command again to go on, with --resume true where it knows that"
    print(f"Error: {what}; what is finished is kept, {go_on}", file=sys.stderr, flush=True)
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)  # it may hang in a collective
    os._exit(1)


def is_first_started() -> bool:
    """Whether this process, which nothing connects to others yet, is the first of them, or will start them."""
    # Lightning knows of RANK, LOCAL_RANK and SLURM's; who starts several machines without any of them sets NODE_RANK
    return rank_zero_only.rank == 0 and os.environ.get("NODE_RANK", "0") == "0"


def claimed_for_all(out_dir: Path) -> AbstractContextManager[Any]:
    """`claimed` by the first process, before it starts the others or they find each other."""
    return claimed(out_dir) if is_first_started() else nullcontext()


def free_memory(device: torch.device, n_local: int) -> int:
    """Bytes that a process may still take on its device; the `n_local` processes of a machine share its memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // n_local


def n_sharing(device: torch.device) -> int:
    """How many of this command's processes share a device's memory: all on a CPU, one on a GPU."""
    return world_size() if device.type == "cpu" else 1


def peak_memory(device: torch.device) -> int:
    """Bytes that this process took on its device at most since `launch`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident() - _resident_at_launch


def peak_resident() -> int:
    """Return the most bytes of memory that this process has taken so far."""
    import resource  # of POSIX systems

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def give_back_freed() -> None:
    """Returns memory to the system that is free and that the system's allocator (glibc's) still holds.

    Buffers of many sizes, in turns, leave it with gaps that add up to more than what is in use. What is returned must
    be fetched again, so nothing is until `HELD_BYTES` have come together.
    """
    global _resident_when_trimmed
    if _trim is not None and _resident() > _resident_when_trimmed + HELD_BYTES:
        _trim(0)
        _resident_when_trimmed = _resident()


def _resident() -> int:
    return psutil.Process().memory_info().rss


class Termination:
    """Notes SIGTERM, by which schedulers announce that they will take the machine away, instead of dying of it."""

    def __enter__(self) -> Termination:
        self.is_announced = False
        # only the main thread may; elsewhere the signal does what it always does
        in_main = threading.current_thread() is threading.main_thread()
        self._before = signal.signal(signal.SIGTERM, self._note) if in_main else None
        return self

    def _note(self, *_: Any) -> None:
        self.is_announced = True

    def __exit__(self, *_: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def agreed(self, fabric: L.Fabric) -> bool:
        """Whether any process was told; all of them must ask."""
        if fabric.world_size == 1:
            return self.is_announced
        told = torch.tensor(float(self.is_announced), device=fabric.device)
        return bool(fabric.all_reduce(told, reduce_op="sum") > 0)


def rank() -> int:
    """This process's number."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """How many processes share the work."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def barrier() -> None:
    """Waits until all processes are here, so that each finds the files that the others have written."""
    if distributed.is_initialized():
        distributed.barrier()


def leave() -> bool:
    """Ends the sharing; says whether this is the first process, which goes on alone.

    Processes that just exited could find their connections gone and abort.
    """
    is_first = rank() == 0
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
    return is_first


def add_up(tensor: torch.Tensor) -> torch.Tensor:
    """Sums a tensor over the processes, in place."""
    if distributed.is_initialized():
        distributed.all_reduce(tensor)
    return tensor


def gather(value: T) -> list[T]:
    """Every process's value, in the order of the processes, on all of them.

    Where another process is gone, this one ends.
    """
    if not distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    try:
        distributed.all_gather_object(values, value)
    except RuntimeError as error:
        _lost(error)
    return values


def _lost(error: Exception) -> None:
    if rank() == 0:
        time.sleep(2)  # the watch knows which one, and how it ended
    _end(f"the connection to another process broke ({str(error).splitlines()[0][:100]})")


def spread(function: Callable[[Item], T], items: Sequence[Item]) -> Iterator[T]:
    """Applies a function to items, each on whichever process is free; all of them get all results, in order.

    A process that waits for others' results is given its next item first, so that slow items hold nobody up.
    """
    if not distributed.is_initialized():
        yield from map(function, items)
        return
    global _n_spread
    _n_spread += 1  # the same on all processes, which call this in step
    # what the processes found each other by; PyTorch gives no other way to it
    store = distributed.PrefixStore(f"spread {_n_spread}", distributed.distributed_c10d._get_default_store())
    n_given = 0
    try:
        while (own := store.add("next", 1) - 1) < len(items):
            store.set(str(own), pickle.dumps(function(items[own])))
            while n_given < len(items) and store.check([str(n_given)]):
                yield pickle.loads(store.get(str(n_given)))
                n_given += 1
        for i in range(n_given, len(items)):
            yield pickle.loads(store.get(str(i)))
    except distributed.DistError as error:
        _lost(error)


def each(function: Callable[[Item], T], items: Sequence[Item]) -> Iterator[T]:
    """Applies a function in which all processes work together to items, one after the other."""
    return map(function, items)


def first_does(function: Callable[[], T]) -> T:
    """What the first process returns of a function that the others do not call.

    Raises:
        UserError: If it did; the other processes end without a word.
    """
    result, failure = None, None
    if rank() == 0:
        try:
            result = function()
        except UserError as error:
            failure = error
    result, failed = gather((result, failure is not None))[0]
    if failure is not None:
        raise failure
    if failed:
        os._exit(0)
    return result


# looked up here, since little may be done between a fork and what follows it
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1
"""Of linux/prctl.h"""


def stop_with_parent() -> None:
    """Has Linux tell this process to stop, by SIGTERM, when the one that started it was killed."""
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
