"""What processes that share some work need of each other; all of it does nothing where there is only one."""

from __future__ import annotations

import os

import lightning as L
import torch
from torch import distributed

from litgpt_whittle.errors import UserError


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


def launch(n: int, precision: str = "32-true") -> L.Fabric:
    """Starts the other processes, each of which runs this command from its beginning, and connects all of them."""
    fabric = L.Fabric(devices=n, strategy="ddp" if n > 1 else "auto", precision=precision)
    fabric.launch()
    return fabric


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
