"""What repairs take: memory to keep moments, operations to collect them and to solve for a candidate."""

from __future__ import annotations

import torch
from litgpt.config import Config
from litgpt.model import Block

from litgpt_whittle.errors import UserError
from litgpt_whittle.files import readable_size
from litgpt_whittle.index_plan import layer_params, layer_plan, n_params
from litgpt_whittle.least_squares import sums_dtype
from litgpt_whittle.processes import free_memory, n_sharing
from litgpt_whittle.repair.cut import linear_names
from litgpt_whittle.repair.head import OPTIMIZER_COPIES
from litgpt_whittle.repair.units import maps_to_choose_for
from litgpt_whittle.subnet import SubNet

FP32 = torch.float32.itemsize

SOLVING = 8
"""How many operations of a forward pass take the time of one of a solve, which is in float64 and copies much; measured
on a teacher of 8M parameters"""


def widest_map(config: Config) -> int:
    """The most inputs that a map of a student with this config is fitted to."""
    writing = config.n_head * config.head_size, config.intermediate_size or 0
    # in a parallel block attention and MLP write together
    return max(config.n_embd, *((sum(writing),) if config.parallel_residual else writing))


def sums_bytes(subnet: SubNet, chooses_units: bool, device: torch.device) -> int:
    """What the moments take that a repair keeps at once, at most.

    Args:
        subnet: What the student keeps.
        chooses_units: Whether the repair chooses heads and neurons.
        device: Where they lie.
    """
    ours, theirs = subnet.config, subnet.teacher
    # of a map those to fit to, those held out, their sum and its factor; of experts all of the first two
    widest = widest_map(ours)
    found = [4 * widest * (widest + ours.n_embd)]
    if ours.n_expert:
        width = ours.moe_intermediate_size or ours.intermediate_size
        found.append(2 * ours.n_expert * width * (width + ours.n_embd))
    if chooses_units:
        n_inputs = {"attn.proj": theirs.n_head * theirs.head_size, "mlp.proj": theirs.intermediate_size}
        chosen = (maps_to_choose_for(subnet, i) for i in range(len(subnet)))
        # all inputs of the teacher's map, their covariance, its inverse and a copy
        found += [sum(4 * n_inputs[name] ** 2 for name in names) for names in chosen]
    return max(found) * sums_dtype(device).itemsize


def head_bytes(subnet: SubNet) -> int:
    """What an untied LM head takes while it is fitted to the teacher's predictions."""
    return FP32 * OPTIMIZER_COPIES * subnet.teacher.padded_vocab_size * len(subnet.n_embd)


def refine_bytes(subnet: SubNet, tied: bool) -> int:
    """Return what a student takes, without activations, while all its blocks are trained together."""
    return FP32 * OPTIMIZER_COPIES * (n_params(subnet.teacher, subnet) - (1 + tied) * _embedding(subnet))


def _embedding(subnet: SubNet) -> int:
    return subnet.teacher.padded_vocab_size * len(subnet.n_embd)


def repair_bytes(subnet: SubNet, tied: bool, device: torch.device) -> int:
    """What a repair with all its steps keeps on a device at once, without activations.

    Args:
        subnet: What the student keeps.
        tied: Whether the LM head is the embedding.
        device: Where it runs.
    """
    teacher = subnet.teacher
    both = (len(subnet.n_embd) + teacher.n_embd) * teacher.padded_vocab_size * (1 if tied else 2)
    # a block of the teacher, and one of the student, which is not larger
    block = 2 * largest_block(teacher) + sums_bytes(subnet, True, device)
    return FP32 * both + max(block, 0 if tied else head_bytes(subnet))


def scratch_bytes(subnet: SubNet, n_tokens: int, refines: bool = False) -> int:
    """Return what a repair takes of the disk: streams of so many tokens, finished layers, and a training's state."""
    # a stream of each model before and after a block, the teacher's within it, and one to train all blocks from
    streams = n_tokens * (3 * subnet.teacher.n_embd + (2 + refines) * len(subnet.n_embd))
    return FP32 * (streams + (1 + 4 * refines) * n_params(subnet.teacher, subnet))


def largest_block(config: Config) -> int:
    """Bytes of a model's largest block, in fp32."""
    full = SubNet.full(config)
    head_size = len(full.head_size)
    return FP32 * max(
        layer_params(config, i, config.n_embd, head_size, *full.layer(i).sizes) for i in range(config.n_layer)
    )


def sites(config: Config, layer: int) -> list[tuple[str, ...]]:
    """The maps of a block that write to the stream; attention and MLP of a parallel block do it together."""
    full = SubNet.full(config)
    plan = layer_plan(config, layer, full.n_embd, full.head_cut.dims, full.layer(layer))
    writing = linear_names(plan, "writing")
    return [tuple(writing)] if config.parallel_residual and len(writing) == 2 else [(name,) for name in writing]


def moments_bytes(config: Config, n_tokens: int, device: torch.device) -> int:
    """What the moments of all layers take.

    Args:
        config: The teacher's.
        n_tokens: Different tokens in the calibration text.
        device: Where they lie.
    """
    by_token = 4 * n_tokens * config.n_embd * (config.n_layer - 1)
    return _n_numbers(config) * sums_dtype(device).itemsize + by_token


def streams_bytes(config: Config, n_calibration: int) -> int:
    """Return the main memory for the teacher's stream before each layer and after the last, in float32 at most."""
    return FP32 * (config.n_layer + 1) * n_calibration * config.n_embd


def check_memory(config: Config, n_tokens: int, device: torch.device, beside: int = 0, n_calibration: int = 0) -> None:
    """Refuses a teacher whose moments would take more memory than there is.

    Args:
        config: The teacher's.
        n_tokens: Different tokens in the calibration text, 0 where that is not known yet.
        device: Where the moments will lie.
        beside: Bytes of what is still to be loaded beside them.
        n_calibration: Number of calibration tokens, whose streams are kept in main memory.

    Raises:
        UserError: With both numbers.
    """
    needed, free = moments_bytes(config, n_tokens, device), free_memory(device, n_sharing(device)) - beside
    if device.type == "cpu":
        needed += streams_bytes(config, n_calibration)
    if needed > free:
        raise UserError(
            f"a repair from moments keeps those of all layers, {readable_size(needed)} for {config.name}, and "
            f"{readable_size(max(free, 0))} are free; choose --fitness perplexity, or a larger device"
        )


def collecting_flops(config: Config, n_tokens: int) -> float:
    """Operations that add up the moments of so many tokens, and that order all units by them, once."""
    # half of the products are mirrored, and all of them are in float64, which takes twice as long
    return 2 * n_tokens * _n_numbers(config) + SOLVING * 2 * sum(n**3 for sizes in _sizes(config) for n in sizes)


def solving_flops(subnet: SubNet, tied: bool) -> float:
    """Operations that repair a candidate, in those of a forward pass. Right in its order, no more.

    Args:
        subnet: The candidate.
        tied: Whether the LM head is the embedding, which is not fitted.
    """
    teacher, n, wide = subnet.teacher, len(subnet.n_embd), subnet.teacher.n_embd
    sizes, full = _sizes(teacher), SubNet.full(teacher)
    total = _reading(n, wide, 0 if tied else teacher.padded_vocab_size)
    for i, layer in enumerate(subnet.layers):
        ours, theirs = (
            layer_params(teacher, layer, len(net.n_embd), len(net.head_size), *net.layer(at).sizes)
            for net, at in ((subnet, i), (full, layer))
        )
        kept = min(ours * wide / (theirs * n), 1.0)  # of the layer's units
        total += _reading(n, wide, ours / n) + sum(_writing(n, wide, size, kept * size) for size in sizes[layer])
    return SOLVING * total


def _reading(n: int, wide: int, n_rows: float) -> float:
    """The regression of a stream of `wide` channels on one of n, and what maps with so many outputs make of it."""
    return n**3 / 3 + 2 * n**2 * wide + 2 * (n + n_rows) * wide * (wide + n)


def _writing(n: int, wide: int, size: int, kept: float) -> float:
    """The solve for a map from the kept ones of its inputs to n channels, and the moments that it starts from."""
    return kept**3 / 3 + 2 * kept**2 * n + 2 * n * size * (wide + kept)


def _sizes(config: Config) -> list[list[int]]:
    """By layer, the inputs of its writing maps, those counted together that write together."""
    found = []
    for layer in range(config.n_layer):
        with torch.device("meta"):
            block = Block(config, layer)
        found.append([sum(block.get_submodule(name).in_features for name in names) for names in sites(config, layer)])
    return found


def _n_numbers(config: Config) -> int:
    """Entries of all moments."""
    streams = config.n_layer * (1 if config.parallel_residual else 2) * config.n_embd**2
    return streams + sum(n**2 for sizes in _sizes(config) for n in sizes)
