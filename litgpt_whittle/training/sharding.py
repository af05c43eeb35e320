"""Models whose weights lie in parts on several devices (FSDP2): sharded, loaded, put together again."""

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
from litgpt_whittle.supergpt import is_tied
from litgpt_whittle.training.parts import Rows, map_tensors


def shard_student(root: LossModel, mesh: DeviceMesh, precision: str) -> LossModel:
    """Spreads a model that is trained over the processes: each block, and the rest with the losses.

    Args:
        root: The model, whole.
        mesh: The devices.
        precision: Fabric's name of it. With bf16-mixed, weights travel and compute in bf16, gradients add up in fp32.
    """
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)  # a cast would round positions
    if precision == "bf16-mixed":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in root.model.transformer.h:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(root, mesh=mesh, mp_policy=policy)


def shard_frozen(model: GPT, mesh: DeviceMesh | None = None, keep_root: bool = False) -> None:
    """Spreads a model that only runs over the processes: each block, and the rest of it.

    Args:
        model: The model, whole or without content.
        mesh: The devices; by default all.
        keep_root: Whether embedding, last norm and head stay whole from the first forward pass on, so that the head
            can be used after one.
    """
    tap_head(model)  # what is sharded knows its modules
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=not keep_root)


def checkpoint_activations(model: GPT) -> None:
    """Has every block computed anew in the backward pass, so that what it computed need not be kept."""
    for block in model.transformer.h:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def whole(tensor: torch.Tensor) -> torch.Tensor | None:
    """A tensor put together on the first process's CPU memory, `None` on the others; all must ask for it."""
    if not isinstance(tensor, DTensor):
        return tensor
    full = tensor.full_tensor()
    return full.cpu() if rank() == 0 else None


def gathered(tree: Any) -> Any:
    """A tree of tensors as one process alone would have it, on the first process; all must ask for it."""
    return map_tensors(tree, whole)


def load_gathered(module: nn.Module, state: dict[str, torch.Tensor | Rows]) -> None:
    """Gives a module the weights that `gathered` or `read_parts` gave of it, over any number of processes."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            tensor.copy_(_like(state[name], tensor))


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Gives an optimizer the state that `gathered` or `read_parts` gave of it, over any number of processes."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    own = {
        i: {name: _like(value, parameters[i]) for name, value in slots.items()} for i, slots in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": own})


def _like(value: Any, parameter: torch.Tensor) -> Any:
    """This process's part of what belongs to a parameter entry by entry."""
    if isinstance(value, Rows) and isinstance(parameter, DTensor):
        # FSDP gives every process as many rows, as far as there are any
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
    """Opens a litgpt checkpoint with each block, and the rest of the model, spread over all processes.

    Each process reads its own part of every weight, so that no memory ever holds more than a tensor of it.

    Args:
        checkpoint_dir: The directory.
        model_class: A class registered in the entry-point group `litgpt.models`.
        dtype: What the weights are converted to.
        device: This process's device.
        max_seq_length: The longest sequence that the model will see.
        keep_root: As `shard_frozen` has it.

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
        # every process has the file, so that nothing is sent
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
    """Whether a model's weights lie in parts on several devices."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
