"""Trees of tensors: map a function over them, save them for any machine, send them to a device; types of weights."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Literal

import torch


def map_tensors(tree: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """Apply a function to all tensors in nested dicts, lists and tuples."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_tensors(value, function) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map_tensors(value, function) for value in tree)
    return tree


def save_tensors(tree: Any, file: Path | IO[bytes]) -> None:
    """Save a tree with all tensors moved to CPU memory, so that machines without the tensors' device can load it.

    `torch.save` stores each tensor's device, on which `torch.load` puts it by default. Tensors that are the same view
    of the same memory, such as tied weights, are stored once.

    Args:
        tree: Nested dicts, lists and tuples of tensors and of other values that `torch.save` accepts.
        file: The path, or an open file.

    Raises:
        OSError: If it cannot be written.
    """
    copies: dict[Any, torch.Tensor] = {}

    def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == "cpu":
            return tensor
        view = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if view not in copies:
            copies[view] = tensor.detach().cpu()
        return copies[view]

    try:
        torch.save(map_tensors(tree, on_cpu), file)
    except RuntimeError as error:
        # PyTorch's file writer raises no OSError
        if not re.search("inline_container|iostream|write", str(error)):
            raise
        raise OSError(errno.EIO, "the disk is full or failing", str(file)) from None


WITHOUT_FLOAT64 = {"mps"}
"""Kinds of devices that have no float64"""


def sums_dtype(device: torch.device | str) -> torch.dtype:
    """Return the dtype of sums over tokens: float64, or float32 on devices without it."""
    return torch.float32 if torch.device(device).type in WITHOUT_FLOAT64 else torch.float64


def in_sums_dtype(tensor: torch.Tensor) -> torch.Tensor:
    """Cast a tensor to the dtype of sums over tokens on its device (`sums_dtype`)."""
    return tensor.to(sums_dtype(tensor.device))


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a CPU tensor to a device; where possible, do not wait for the device's earlier work."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # a copy from pageable memory waits
    # on MPS, the tensor's memory may be reused before it is copied
    return tensor.to(device, non_blocking=device.type not in ("cpu", "mps"))


IGNORE_INDEX = -100


def upcast(x: torch.Tensor) -> torch.Tensor:
    """Cast to fp32; float64 is unchanged."""
    return x if x.dtype == torch.float64 else x.float()


def default_precision() -> Literal["bf16-true", "32-true"]:
    """Return the precision in which commands that do not train compute by default."""
    return "bf16-true" if torch.cuda.is_available() else "32-true"


def weights_dtype(precision: str) -> torch.dtype:
    """Return the dtype of a model's weights for one of Fabric's precisions, such as `bf16-true`."""
    return {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(precision, torch.float32)
