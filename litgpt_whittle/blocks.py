"""litgpt's models a block at a time: what a block is called with, what its parts see, where its tokens are routed.

Everything is found out by watching litgpt's own forward code run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from litgpt.config import Config
from litgpt.model import Block, LLaMAMoE
from torch import nn

from litgpt_whittle.files import MappedWeights
from litgpt_whittle.supergpt import BlocksGPT, Weights


def load_block(config: Config, layer: int, weights: Mapping[str, torch.Tensor]) -> Block:
    """litgpt's block around weights, which it shares."""
    with torch.device("meta"):
        block = Block(config, layer)
    block.load_state_dict(weights, assign=True)
    return block.eval().requires_grad_(False)


def read_block(weights: Mapping[str, torch.Tensor], layer: int, device: torch.device | str) -> Weights:
    """A layer's weights by their names in the block, in float32; of memory-mapped ones no page stays in memory."""
    prefix = f"transformer.h.{layer}."
    names = [name for name in weights if name.startswith(prefix)]
    read = {name.removeprefix(prefix): weights[name].to(device, torch.float32) for name in names}
    if isinstance(weights, MappedWeights):
        for name in names:
            weights.forget(name)
    return read


def read_outside(weights: Mapping[str, torch.Tensor], device: torch.device | str) -> Weights:
    """The weights outside of the blocks, in float32."""
    return {
        name: tensor.to(device, torch.float32)
        for name, tensor in weights.items()
        if not name.startswith("transformer.h.")
    }


class Outside(nn.Module):
    """What lies outside a model's blocks: embedding, final norm, LM head, rotary cache.

    Args:
        config: The model's config.
        weights: The weights of these parts, by their names in the model.
        seq_length: Tokens in each sequence.
        device: Where the weights are.
    """

    def __init__(self, config: Config, weights: Weights, seq_length: int, device: torch.device | str) -> None:
        super().__init__()
        with torch.device("meta"):
            model = BlocksGPT(config, [_Probe() for _ in range(config.n_layer)])
        model.load_state_dict(weights, assign=True)
        model.max_seq_length = seq_length
        model.cos, model.sin = model.rope_cache(device=device)
        self.model = model.eval().requires_grad_(False)
        with stopping_at(model.transformer.ln_f):  # the logits would take memory for nothing
            model(torch.zeros(1, seq_length, dtype=torch.long, device=device))
        self.block_args = [probe.seen[1:] for probe in model.transformer.h]
        """What each block is called with besides the stream"""

    @property
    def embedding(self) -> torch.Tensor:
        return self.model.transformer.wte.weight

    @property
    def norm(self) -> nn.Module:
        """The final norm."""
        return self.model.transformer.ln_f

    @property
    def head(self) -> nn.Linear:
        return self.model.lm_head

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """The stream before the first block, (B, T) to (B, T, n_embd)."""
        first = self.model.transformer.h[0]
        with stopping_at(first):
            self.model(ids)
        return first.seen[0]


def run_block(
    block: Block, stream: torch.Tensor, args: Sequence, wanted: Sequence[str] = (), stop: bool = False
) -> dict[str, torch.Tensor]:
    """Runs a block on a stream.

    Args:
        block: The block.
        stream: Its input, shape (B, T, n_embd).
        args: What else it is called with.
        wanted: Modules whose inputs are wanted, by their names.
        stop: Leave off as soon as all of them were seen.

    Returns:
        The inputs of the modules by name, and the block's output as `out` unless it was stopped.
    """
    seen: dict[str, torch.Tensor] = {}

    def note(name: str):
        def hook(_: nn.Module, inputs: tuple) -> None:
            seen[name] = inputs[0]
            if stop and len(seen) == len(wanted):
                raise _Stop

        return hook

    handles = [block.get_submodule(name).register_forward_pre_hook(note(name)) for name in wanted]
    try:
        seen["out"] = block(stream, *args)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen


def input_of(part: nn.Module, whole: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a part of a module reads when the module runs on x."""
    seen = []
    handle = part.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        whole(x)
    finally:
        handle.remove()
    return seen[0]


def routing(
    moe: LLaMAMoE, x: torch.Tensor, times: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> torch.Tensor:
    """How much of each expert's answer goes into each token's output, 0 where it is not asked.

    It is what litgpt's own routing makes of experts that answer with unit vectors, each with its own.

    Args:
        moe: The experts, not more than n_embd.
        x: Their input, shape (B, T, n_embd).
        times: What to multiply it by, a function of the answer: shape (n, n_embd) to (n, 1). By default 1.

    Returns:
        Shape (B · T, n_expert).
    """
    n_expert, n_embd = len(moe.experts), x.shape[-1]
    assert n_expert <= n_embd, "every expert needs a unit vector of its own"
    units = torch.eye(n_expert, n_embd, dtype=x.dtype, device=x.device)

    def answer(unit: torch.Tensor):
        return lambda _, inputs, output: unit.expand_as(output) if times is None else unit * times(output)

    handles = [expert.register_forward_hook(answer(unit)) for expert, unit in zip(moe.experts, units)]
    if hasattr(moe, "shared_experts"):
        handles.append(moe.shared_experts.register_forward_hook(answer(torch.zeros_like(units[0]))))
    try:
        return moe(x)[..., :n_expert].flatten(0, -2)
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def stopping_at(module: nn.Module) -> Iterator[None]:
    """Ends a forward pass behind this module."""

    def stop(*_: object) -> None:
        raise _Stop

    handle = module.register_forward_hook(stop)
    try:
        yield
    except _Stop:
        pass
    finally:
        handle.remove()


class _Stop(Exception):
    """Ends a forward pass that has shown all it should."""


class _Probe(nn.Module):
    """Stands in for a block: notes what it is called with, and passes the stream on."""

    seen: tuple = ()

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        self.seen = args
        return args[0]
