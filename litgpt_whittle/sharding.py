"""A model whose weights lie in parts on several devices (FSDP2), loaded a part at a time."""

from __future__ import annotations

from pathlib import Path

import torch
from litgpt.model import GPT
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from litgpt_whittle.checkpoint import check_checkpoint, read_weights
from litgpt_whittle.registry import lookup
from litgpt_whittle.supergpt import is_tied


def load_sharded(
    checkpoint_dir: Path, model_class: str, dtype: torch.dtype, device: torch.device, max_seq_length: int
) -> GPT:
    """Opens a litgpt checkpoint with each block, and the rest of the model, spread over all processes.

    Each process reads its own part of every weight, so that no memory ever holds more than a tensor of it.

    Args:
        checkpoint_dir: The directory.
        model_class: A class registered in the entry-point group `litgpt.models`.
        dtype: What the weights are converted to.
        device: This process's device.
        max_seq_length: The longest sequence that the model will see.

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
    for module in (*model.transformer.h, model):
        fully_shard(module)
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
