"""Models sharded over several devices (FSDP2): shard, load and gather their weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from litgpt.model import GPT
from torch import nn
from torch.distributed import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from litgpt_whittle.checkpoint import check_checkpoint, read_weights
from litgpt_whittle.distillation.head import LossModel, tap_head
from litgpt_whittle.processes import rank
from litgpt_whittle.registry import lookup
from litgpt_whittle.sharded_checkpoint import Rows
from litgpt_whittle.supergpt import is_tied
from litgpt_whittle.tensors import map_tensors


def shard_student(root: LossModel, mesh: DeviceMesh, precision: str) -> LossModel:
    """Shard a trained model over the processes: each block separately, all other parameters with the root.

    Args:
        root: The unsharded model.
        mesh: The device mesh.
        precision: Fabric's name of the precision. With bf16-mixed, weights are gathered and used in bf16, and gradients
            are reduced in fp32.
    """
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)  # a cast would round positions
    if precision == "bf16-mixed":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in root.model.transformer.h:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(root, mesh=mesh, mp_policy=policy)
    return root


def shard_frozen(model: GPT, mesh: DeviceMesh | None = None, keep_root: bool = False) -> None:
    """Shard a frozen model over the processes: each block separately, all other parameters together.

    Args:
        model: The unsharded model; its tensors may be without data.
        mesh: The device mesh; by default all devices.
        keep_root: If true, embedding, last norm and head stay gathered after the first forward pass, so that the head
            can be used outside of it.
    """
    tap_head(model)  # before sharding, which fixes the set of modules
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=not keep_root)


def checkpoint_activations(model: GPT) -> None:
    """Recompute every block in the backward pass, so that its activations need not be stored."""
    for block in model.transformer.h:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def whole(tensor: torch.Tensor) -> torch.Tensor | None:
    """Gather a sharded tensor in CPU memory on the first process; return `None` on all other processes.

    All processes must call it. Tensors that are not sharded are returned unchanged.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    full = tensor.full_tensor()
    return full.cpu() if rank() == 0 else None


def gathered(tree: Any) -> Any:
    """Gather the sharded tensors of a tree on the first process; all processes must call it."""
    return map_tensors(tree, whole)


def load_gathered(module: nn.Module, state: dict[str, torch.Tensor | Rows]) -> None:
    """Load weights into a module, sharded or not: whole tensors (`gathered`), or rows of a file (`read_parts`)."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            tensor.copy_(_like(state[name], tensor))


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state into an optimizer, sharded or not: whole tensors (`gathered`), or rows of a file (`read_parts`)."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    own = {
        i: {name: _like(value, parameters[i]) for name, value in slots.items()} for i, slots in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": own})


def _like(value: Any, parameter: torch.Tensor) -> Any:
    """Return a value, sharded like the parameter if both have the same shape, else whole."""
    if isinstance(value, Rows) and isinstance(parameter, DTensor):
        # FSDP gives each process equally many rows; the last processes may get fewer or none
        n_rows = -(-len(parameter) // parameter.device_mesh.size())
        own = value[rank() * n_rows : (rank() + 1) * n_rows].to(parameter.device)
        mesh, placements = parameter.device_mesh, parameter.placements
        shape, stride = parameter.shape, parameter.stride()
        return DTensor.from_local(own, mesh, placements, run_check=False, shape=shape, stride=stride)
    value = value[:] if isinstance(value, Rows) else value
    if not isinstance(parameter, DTensor) or not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def load_sharded(
    checkpoint_dir: Path,
    model_class: str,
    dtype: torch.dtype,
    device: torch.device,
    max_seq_length: int,
    keep_root: bool = False,
) -> GPT:
    """Load a litgpt checkpoint, sharded over all processes as by `shard_frozen`.

    Each process reads the weights one at a time and keeps its part, so that at most one whole tensor is in memory.

    Args:
        checkpoint_dir: The checkpoint directory.
        model_class: A class registered in the entry-point group `litgpt.models`.
        dtype: Type that the weights are converted to.
        device: This process's device.
        max_seq_length: Length of the longest input sequence.
        keep_root: If true, keep embedding, last norm and head gathered, as in `shard_frozen`.

    Returns:
        The model, in evaluation mode and without gradients.
    """
    weights, config = read_weights(checkpoint_dir), check_checkpoint(checkpoint_dir)
    with torch.device("meta"):
        model = lookup("litgpt.models", model_class)(config)
        model.max_seq_length = max_seq_length
    if is_tied(weights):
        model.lm_head.weight = model.transformer.wte.weight
    model.to(dtype).eval().requires_grad_(False)
    shard_frozen(model, keep_root=keep_root)
    state = {}
    for name, empty in model.state_dict().items():
        # no communication, because every process reads the file
        part = distribute_tensor(
            weights[name].to(device, dtype), empty.device_mesh, empty.placements, src_data_rank=None
        )
        state[name] = DTensor.from_local(part.to_local().clone(), empty.device_mesh, empty.placements, run_check=False)
        if hasattr(weights, "forget"):
            weights.forget(name)
    model.load_state_dict(state, assign=True)
    model.cos, model.sin = model.rope_cache(device=device)
    return model


def is_sharded(model: torch.nn.Module) -> bool:
    """Return whether a model's weights are sharded over several devices."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
