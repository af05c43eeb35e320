"""Cost estimates of repairs: memory, disk space, and operations to collect moments and to solve for a candidate."""

from __future__ import annotations

import torch
from litgpt.config import Config
from litgpt.model import Block

from litgpt_whittle.errors import UserError
from litgpt_whittle.files import readable_size
from litgpt_whittle.index_plan import layer_params, layer_plan, n_params
from litgpt_whittle.least_squares import PRODUCT_ROWS
from litgpt_whittle.processes import free_memory, n_sharing
from litgpt_whittle.repair.cut import linear_names
from litgpt_whittle.repair.end_to_end import TOKENS_PER_STEP as TOKENS_PER_STEP_OF_ALL
from litgpt_whittle.repair.head import OPTIMIZER_COPIES, STEP_COPIES, TOKENS_PER_STEP
from litgpt_whittle.repair.units import maps_to_choose_for
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.tensors import sums_dtype

FP32 = torch.float32.itemsize

SOLVING = 8
"""Time per operation of a solve, relative to that of a forward pass, measured on a teacher of 8M parameters. Solves are
slower because they run in float64 and copy matrices"""

SOLVE_COPIES = 8
"""Matrices over a map's inputs that exist at once while the map is fitted, or its inputs are chosen: moments for
fitting and tuning, their sum, covariances, damped covariances, their factor or inverse, and temporaries"""

LOGITS_COPIES = 8
"""Tensors as large as the logits that exist at once while a divergence and its gradient are computed"""

CANDIDATE_COPIES = 7
"""`SOLVE_COPIES` for one candidate of a repair from moments, in addition to the moments of all layers"""


def widest_map(config: Config) -> int:
    """Return the largest number of inputs of a regression for a student with this config."""
    writing = config.n_head * config.head_size, config.intermediate_size or 0
    # in a parallel block, the output projections of attention and MLP are fitted jointly
    return max(config.n_embd, *((sum(writing),) if config.parallel_residual else writing))


def sums_bytes(subnet: SubNet, chooses_units: bool, device: torch.device) -> int:
    """Return the peak memory in bytes for the moments of a repair.

    Args:
        subnet: The student's sub-network.
        chooses_units: True if the repair selects heads and neurons.
        device: Device of the moments.
    """
    ours, theirs = subnet.config, subnet.teacher
    widest = widest_map(ours)
    found = [SOLVE_COPIES * widest * (widest + ours.n_embd), SOLVE_COPIES * ours.n_embd * (ours.n_embd + theirs.n_embd)]
    if ours.n_expert:  # moments to fit and to tune exist for all experts at once
        width = ours.moe_intermediate_size or ours.intermediate_size
        found.append((2 * (ours.n_expert - 1) + SOLVE_COPIES) * width * (width + ours.n_embd))
    if chooses_units:
        n_inputs = {"attn.proj": theirs.n_head * theirs.head_size, "mlp.proj": theirs.intermediate_size}
        chosen = (maps_to_choose_for(subnet, i) for i in range(len(subnet)))
        # over all inputs of the teacher's map
        found += [SOLVE_COPIES * sum(n_inputs[name] ** 2 for name in names) for names in chosen]
    return max(found) * sums_dtype(device).itemsize


def head_bytes(subnet: SubNet) -> int:
    """Return the bytes for fitting an untied LM head to the teacher's predictions."""
    return FP32 * (OPTIMIZER_COPIES + STEP_COPIES) * _embedding(subnet) + _logits_bytes(subnet, TOKENS_PER_STEP)


def _logits_bytes(subnet: SubNet, n_tokens: int) -> int:
    """Return the bytes of temporary tensors in the computation of the divergence between both models' predictions."""
    return FP32 * LOGITS_COPIES * n_tokens * subnet.teacher.padded_vocab_size


def refine_bytes(subnet: SubNet, tied: bool) -> int:
    """Return the bytes for training all blocks of a student jointly, without activations."""
    n_trained = n_params(subnet.teacher, subnet) - (1 + tied) * _embedding(subnet)
    largest = largest_block(subnet.teacher) if tied else max(largest_block(subnet.teacher), FP32 * _embedding(subnet))
    trained = FP32 * OPTIMIZER_COPIES * n_trained + STEP_COPIES * largest
    return trained + _logits_bytes(subnet, TOKENS_PER_STEP_OF_ALL)


def _embedding(subnet: SubNet) -> int:
    """Return the number of weights of the student's embedding."""
    return subnet.teacher.padded_vocab_size * len(subnet.n_embd)


def outside_bytes(subnet: SubNet, tied: bool) -> tuple[int, int]:
    """Return the bytes of the embedding and the LM head, of the teacher and of the student."""
    n_rows = subnet.teacher.padded_vocab_size * (1 if tied else 2)
    return FP32 * n_rows * subnet.teacher.n_embd, FP32 * n_rows * len(subnet.n_embd)


def repair_bytes(subnet: SubNet, tied: bool, device: torch.device, refines: bool = False) -> int:
    """Return the peak device memory of a repair in bytes, without activations.

    Args:
        subnet: The student's sub-network.
        tied: True if the LM head is tied to the embedding.
        device: Device of the repair.
        refines: True if all blocks are trained jointly after the closed form.
    """
    teacher = subnet.teacher
    theirs, ours = outside_bytes(subnet, tied)
    largest = largest_block(teacher)
    # a block of the teacher and one of the student, which is at most as large, before and after the fit
    block = 3 * largest + sums_bytes(subnet, True, device)
    # the principal directions are computed before the student exists; its weights are then sliced from a copy
    centred = 3 * FP32 * teacher.n_embd * teacher.padded_vocab_size  # the head, in float64, too
    begin = max(largest + centred + SOLVE_COPIES * teacher.n_embd**2 * torch.float64.itemsize, theirs) - ours
    head = _logits_bytes(subnet, TOKENS_PER_STEP) if tied else head_bytes(subnet)
    return theirs + ours + max(begin, block, head, refine_bytes(subnet, tied) if refines else 0)


def check_repair_memory(
    subnet: SubNet, tied: bool, device: torch.device, chooses_units: bool, trains_head: bool, refines: bool
) -> None:
    """Check that the moments, training of the LM head and joint training of the blocks fit into memory.

    Args:
        subnet: The student's sub-network.
        tied: True if the LM head is tied to the embedding.
        device: Device of the repair.
        chooses_units: True if the repair selects heads and neurons.
        trains_head: True if the LM head is trained on the teacher's predictions.
        refines: True if all blocks are trained jointly after the closed form.

    Raises:
        UserError: If one of them does not fit.
    """
    free = max(free_memory(device, n_sharing(device)) - sum(outside_bytes(subnet, tied)), 0)
    if (needed := sums_bytes(subnet, chooses_units, device)) > free:
        raise UserError(
            f"the repair takes {readable_size(needed)} for the moments of its widest maps, and "
            f"{readable_size(free)} are free; keep fewer neurons, or choose another device"
        )
    if refines and (needed := refine_bytes(subnet, tied)) > free:
        raise UserError(
            f"training all blocks together takes {readable_size(needed)} without activations, and "
            f"{readable_size(free)} are free; leave out --repair.refine_passes and use `litgpt distill`, which "
            "shards the student"
        )
    if trains_head and not tied and (needed := head_bytes(subnet)) > free:
        raise UserError(
            f"fitting the LM head to the teacher's predictions takes {readable_size(needed)}, and "
            f"{readable_size(free)} are free; give --repair.head_passes 0, or choose another device"
        )


def scratch_bytes(subnet: SubNet, n_tokens: int, refines: bool = False) -> int:
    """Return the disk space of a repair in bytes: residual streams, finished layers, and the state of training."""
    # hidden states of both models before and after a block, the teacher's within it, and the input of joint training
    streams = n_tokens * (3 * subnet.teacher.n_embd + (2 + refines) * len(subnet.n_embd))
    return FP32 * (streams + (1 + 4 * refines) * n_params(subnet.teacher, subnet))


def largest_block(config: Config) -> int:
    """Return the bytes of a model's largest block in fp32."""
    full = SubNet.full(config)
    head_size = len(full.head_size)
    return FP32 * max(
        layer_params(config, i, config.n_embd, head_size, *full.layer(i).sizes) for i in range(config.n_layer)
    )


def sites(config: Config, layer: int) -> list[tuple[str, ...]]:
    """Return the names of a block's output projections, grouped by the regression that fits them.

    Attention and MLP of a parallel block share one regression.
    """
    full = SubNet.full(config)
    plan = layer_plan(config, layer, full.n_embd, full.head_cut.dims, full.layer(layer))
    writing = linear_names(plan, "writing")
    return [tuple(writing)] if config.parallel_residual and len(writing) == 2 else [(name,) for name in writing]


def moments_bytes(config: Config, n_tokens: int, device: torch.device) -> int:
    """Return the bytes of the moments of all layers.

    Args:
        config: The teacher's config.
        n_tokens: Number of distinct tokens in the calibration data.
        device: Device of the moments.
    """
    by_token = 4 * n_tokens * config.n_embd * (config.n_layer - 1)
    return _n_numbers(config) * sums_dtype(device).itemsize + by_token


def candidate_bytes(config: Config, device: torch.device) -> int:
    """Return the bytes for repairing one candidate in addition to the moments, without activations.

    Args:
        config: The teacher's config; the candidate is assumed to be as large as the teacher.
        device: Device of the moments.
    """
    full = SubNet.full(config)
    widest = max(config.n_embd, *(n for sizes in _sizes(config) for n in sizes))
    # the student, the teacher's embedding and head in fp32, and rows of the head in float64
    weights = FP32 * n_params(config, full) + outside_bytes(full, tied=False)[0]
    weights += 4 * FP32 * min(PRODUCT_ROWS, config.padded_vocab_size) * config.n_embd
    return weights + largest_block(config) + CANDIDATE_COPIES * widest**2 * sums_dtype(device).itemsize


def streams_bytes(config: Config, n_calibration: int) -> int:
    """Return an upper bound, in bytes, for the teacher's hidden states before each layer and after the last one.

    Args:
        config: The teacher's config.
        n_calibration: Number of calibration tokens.
    """
    return FP32 * (config.n_layer + 1) * n_calibration * config.n_embd


def check_memory(config: Config, n_tokens: int, device: torch.device, beside: int = 0, n_calibration: int = 0) -> None:
    """Check that the moments of all layers of a teacher and one candidate fit into memory.

    Args:
        config: The teacher's config.
        n_tokens: Number of distinct tokens in the calibration data; 0 if unknown.
        device: Device of the moments.
        beside: Bytes to reserve for weights that are loaded later.
        n_calibration: Number of calibration tokens, whose hidden states are kept in main memory.

    Raises:
        UserError: If they do not fit.
    """
    free = free_memory(device, n_sharing(device)) - beside
    needed = moments_bytes(config, n_tokens, device) + candidate_bytes(config, device)
    if device.type == "cpu":
        needed += streams_bytes(config, n_calibration)
    if needed > free:
        raise UserError(
            f"a repair from moments keeps the moments of all layers in memory, {readable_size(needed)} for "
            f"{config.name}, and only {readable_size(max(free, 0))} are free; choose --fitness perplexity, or a larger "
            "device"
        )


def collecting_flops(config: Config, n_tokens: int) -> float:
    """Return the operations to collect the moments of `n_tokens` tokens, and to rank all units once by them."""
    # half of the products are mirrored, but float64 takes twice as long
    return 2 * n_tokens * _n_numbers(config) + SOLVING * 2 * sum(n**3 for sizes in _sizes(config) for n in sizes)


def solving_flops(subnet: SubNet, tied: bool) -> float:
    """Estimate the cost of repairing a candidate, in operations of a forward pass; an order of magnitude.

    Args:
        subnet: The candidate.
        tied: True if the LM head is tied to the embedding; a tied head is not fitted.
    """
    teacher, n, wide = subnet.teacher, len(subnet.n_embd), subnet.teacher.n_embd
    sizes, full = _sizes(teacher), SubNet.full(teacher)
    total = _reading(n, wide, 0 if tied else teacher.padded_vocab_size)
    for i, layer in enumerate(subnet.layers):
        ours, theirs = (
            layer_params(teacher, layer, len(net.n_embd), len(net.head_size), *net.layer(at).sizes)
            for net, at in ((subnet, i), (full, layer))
        )
        kept = min(ours * wide / (theirs * n), 1.0)  # fraction of the layer's units
        total += _reading(n, wide, ours / n) + sum(_writing(n, wide, size, kept * size) for size in sizes[layer])
    return SOLVING * total


def _reading(n: int, wide: int, n_rows: float) -> float:
    """Return the operations to regress `wide` channels on n, and to compute input projections of `n_rows` outputs."""
    return n**3 / 3 + 2 * n**2 * wide + 2 * (n + n_rows) * wide * (wide + n)


def _writing(n: int, wide: int, size: int, kept: float) -> float:
    """Return the operations to fit an output projection, from `kept` of its `size` inputs to n channels."""
    return kept**3 / 3 + 2 * kept**2 * n + 2 * n * size * (wide + kept)


def _sizes(config: Config) -> list[list[int]]:
    """Return the number of inputs of each regression for output projections (see `sites`), by layer."""
    found = []
    for layer in range(config.n_layer):
        with torch.device("meta"):
            block = Block(config, layer)
        found.append([sum(block.get_submodule(name).in_features for name in names) for names in sites(config, layer)])
    return found


def _n_numbers(config: Config) -> int:
    """Return the number of entries of all moments."""
    streams = config.n_layer * (1 if config.parallel_residual else 2) * config.n_embd**2
    return streams + sum(n**2 for sizes in _sizes(config) for n in sizes)
