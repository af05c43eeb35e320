"""Costs of storing and running a sub-network: formulas of its sizes, and measured latencies.

`MEASURES` lists all costs by name, so that a search can use any of them as an objective, a bin or a limit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from litgpt.config import Config

from litgpt_whittle.errors import UserError
from litgpt_whittle.index_plan import ConfigKey, layer_takes, n_params
from litgpt_whittle.latency import Latency, latency
from litgpt_whittle.processes import own_device
from litgpt_whittle.quantities import Range, Unit, parse_range
from litgpt_whittle.subnet import SubNet

BACKWARD = 2
"""Cost of a backward pass, in forward passes"""


def flops(teacher: Config, subnet: SubNet, seq_length: int) -> int:
    """Count the floating-point operations per token of one forward pass, 2 per multiply-add.

    All matrix products count: linear maps, the LM head, and attention. Only shared experts and experts that a token is
    routed to count. As litgpt computes attention, every query is multiplied with every key of the sequence, even in
    causal and sliding-window layers. Norms, activations, rotary embeddings, biases and embedding lookups do not count.
    These are the rules of `torch.utils.flop_counter`.

    Args:
        teacher: The teacher's config.
        subnet: A sub-network of the teacher.
        seq_length: Tokens per sequence.
    """
    per_token = teacher.padded_vocab_size * len(subnet.n_embd)
    query_and_value = sum(_key_and_value_sizes(teacher, subnet))
    for i, (multiply_adds, _) in enumerate(_layers(teacher, subnet)):
        groups, per_group, *_ = subnet.layer(i).sizes
        per_token += multiply_adds + groups * per_group * query_and_value * seq_length
    return 2 * per_token


def kv_cache_bytes(teacher: Config, subnet: SubNet, batch_size: int, seq_length: int, dtype: torch.dtype) -> int:
    """Count the bytes of the KV cache that `GPT.set_kv_cache` allocates.

    A sliding-window layer only caches its window, a layer without attention nothing. A layer-wise student is counted in
    its true shape.

    Args:
        teacher: The teacher's config.
        subnet: A sub-network of the teacher.
        batch_size: Sequences per batch.
        seq_length: Maximum sequence length, including the prompt.
        dtype: dtype of the cache.
    """
    window = teacher.sliding_window_size
    # with latent attention, litgpt caches uncompressed keys and does not use sliding windows
    slides = teacher.sliding_window_indices if window is not None and not teacher.latent_attention else None
    heads_and_positions = 0
    for i, layer in enumerate(subnet.layers):
        length = min(seq_length, window) if slides and slides[layer] else seq_length
        heads_and_positions += subnet.layer(i).sizes[0] * length
    return batch_size * heads_and_positions * sum(_key_and_value_sizes(teacher, subnet)) * dtype.itemsize


def weight_bytes(teacher: Config, subnet: SubNet, dtype: torch.dtype, tied: bool = False) -> int:
    """Count the bytes of a student's saved weights in its true shape.

    Args:
        teacher: The teacher's config.
        subnet: A sub-network of the teacher.
        dtype: dtype of the weights.
        tied: True if the LM head is tied to the embedding, which then counts once.
    """
    n_buffers = sum(buffers for _, buffers in _layers(teacher, subnet))
    return (n_params(teacher, subnet, tied) + n_buffers) * dtype.itemsize


@dataclass(frozen=True)
class MeasureArgs:
    """Inference settings for the costs of a sub-network"""

    seq_length: int | None = None
    """Tokens per sequence, prompt and answer together. By default the teacher's block size, but at most 2048"""
    batch_size: int = 1
    """Sequences per batch"""
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16"
    """dtype of weights, activations and KV cache"""
    tied: bool = False
    """True if the LM head is tied to the embedding, which then counts once"""
    device: str | None = None
    """Device for latency measurements; by default a GPU if there is one"""

    def __post_init__(self) -> None:
        if self.seq_length is not None and self.seq_length < 2:
            raise UserError(f"seq_length must be at least 2, a prompt and an answer, got {self.seq_length}; raise it")
        if self.batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {self.batch_size}; raise it")
        if self.dtype not in ("float32", "float16", "bfloat16"):
            raise UserError(f"dtype must be float32, float16 or bfloat16, got {self.dtype!r}; choose one")
        try:
            torch.device(self.device or "cpu")
        except RuntimeError:
            raise UserError(
                f"device must be one such as cpu, cuda or cuda:1, got {self.device!r}; choose another"
            ) from None

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as a PyTorch dtype."""
        return getattr(torch, self.dtype)

    def length(self, teacher: Config) -> int:
        """Return the tokens per sequence for this teacher.

        Raises:
            UserError: If they exceed its block size.
        """
        if self.seq_length is not None and self.seq_length > teacher.block_size:
            raise UserError(
                f"seq_length must be at most the teacher's block_size {teacher.block_size}, got {self.seq_length}; "
                "lower it"
            )
        return self.seq_length or min(teacher.block_size, 2048)


@dataclass(frozen=True)
class Measure:
    """A cost of sub-networks; lower is better."""

    function: Callable[[Config, SubNet, MeasureArgs], float]
    unit: Unit
    """Unit of the cost"""

    def __call__(self, teacher: Config, subnet: SubNet, args: MeasureArgs) -> float:
        """Return the cost of a sub-network of `teacher` under these settings."""
        return self.function(teacher, subnet, args)

    def parse(self, text: str | float) -> Range:
        """Parse a limit such as `2GB` or `600M-800M`; raise UserError if it is invalid for this unit."""
        return parse_range(text, self.unit)

    @property
    def is_timed(self) -> bool:
        """True if the cost is a measured latency, which takes time and varies between runs."""
        return self.unit == "seconds"


MEASURES: dict[str, Measure] = {
    "n_params": Measure(lambda teacher, subnet, args: n_params(teacher, subnet, args.tied), "parameters"),
    "flops": Measure(lambda teacher, subnet, args: flops(teacher, subnet, args.length(teacher)), "FLOPs per token"),
    "kv_cache_bytes": Measure(
        lambda teacher, subnet, args: kv_cache_bytes(
            teacher, subnet, args.batch_size, args.length(teacher), args.torch_dtype
        ),
        "bytes",
    ),
    "weight_bytes": Measure(
        lambda teacher, subnet, args: weight_bytes(teacher, subnet, args.torch_dtype, args.tied), "bytes"
    ),
    "latency_prefill": Measure(lambda teacher, subnet, args: _latency(teacher, subnet, args).prefill, "seconds"),
    "latency_decode": Measure(lambda teacher, subnet, args: _latency(teacher, subnet, args).decode, "seconds"),
}
"""All costs by name"""


def _key_and_value_sizes(teacher: Config, subnet: SubNet) -> tuple[int, int]:
    """Return the sizes of a head's keys (and queries) and values."""
    if teacher.latent_attention:
        return teacher.qk_head_dim, teacher.v_head_dim
    return len(subnet.head_size), len(subnet.head_size)


def _layers(teacher: Config, subnet: SubNet) -> list[tuple[int, int]]:
    """Return, per student layer, the multiply-adds per token in linear maps and the number of buffer elements."""
    key, n_embd, head_size = ConfigKey(teacher), len(subnet.n_embd), len(subnet.head_size)
    return [_layer(key, layer, n_embd, head_size, *subnet.layer(i).sizes) for i, layer in enumerate(subnet.layers)]


@lru_cache(maxsize=2**16)
def _layer(teacher: ConfigKey, layer: int, *sizes: int) -> tuple[int, int]:
    slices, n_expert = layer_takes(teacher.config, layer, *sizes), sizes[-1]
    products = {name: take.numel() for name, take in slices.items() if len(take.shape) == 2}
    experts = sum(n for name, n in products.items() if name.startswith("mlp.experts."))
    # a token passes once through every matrix, except experts that it is not routed to; all experts have the same size
    idle = experts // n_expert * (n_expert - teacher.config.n_expert_per_token) if n_expert else 0
    return sum(products.values()) - idle, sum(take.numel() for take in slices.values() if take.is_buffer)


def _latency(teacher: Config, subnet: SubNet, args: MeasureArgs) -> Latency:
    """Measure both latencies of a sub-network; the last quarter of the sequence, at most 32 tokens, is decoded."""
    return _measured_latency(ConfigKey(teacher), subnet, args, args.length(teacher))


@lru_cache(maxsize=2**12)
def _measured_latency(_: ConfigKey, subnet: SubNet, args: MeasureArgs, length: int) -> Latency:
    new_tokens = min(max(length // 4, 1), 32)
    device = args.device or str(own_device())
    return latency(subnet, device, args.torch_dtype, args.batch_size, length - new_tokens, new_tokens)
