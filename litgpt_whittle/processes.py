"""What processes that share some work need of each other; all of it does nothing where there is only one."""

from __future__ import annotations

import torch
from torch import distributed


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


def add_up(tensor: torch.Tensor) -> torch.Tensor:
    """Sums a tensor over the processes, in place."""
    if distributed.is_initialized():
        distributed.all_reduce(tensor)
    return tensor
