"""Run litgpt models block by block.

Hooks on litgpt's own forward code capture the arguments of blocks, the inputs of submodules and the routing of experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from litgpt.config import Config
from litgpt.model import Block, LLaMAMoE
from torch import nn

from litgpt_whittle.files import MappedWeights
from litgpt_whittle.meta import meta_modules
from litgpt_whittle.student_block import student_block
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import BlocksGPT, Weights
from litgpt_whittle.windows import vectorize_windows


def load_block(config: Config, layer: int, weights: Mapping[str, torch.Tensor]) -> Block:
    """Build litgpt's block for layer `layer` of a model; it shares memory with the given weights."""
    with meta_modules():
        block = Block(config, layer)
    return _with_weights(block, weights)


def load_student_block(subnet: SubNet, index: int, weights: Mapping[str, torch.Tensor]) -> Block:
    """Build the block for a student's layer `index` in its true shape; it shares memory with the given weights."""
    with meta_modules():
        block = student_block(subnet, index)
    return _with_weights(block, weights)


def _with_weights(block: Block, weights: Mapping[str, torch.Tensor]) -> Block:
    block.load_state_dict(weights, assign=True)
    return vectorize_windows(block).eval().requires_grad_(False)


def read_block(weights: Mapping[str, torch.Tensor], layer: int, device: torch.device | str) -> Weights:
    """Return a layer's weights in float32, by their names within the block.

    If the weights are memory-mapped from a file, their memory pages are released afterwards.
    """
    prefix = f"transformer.h.{layer}."
    names = [name for name in weights if name.startswith(prefix)]
    read = {name.removeprefix(prefix): weights[name].to(device, torch.float32) for name in names}
    if isinstance(weights, MappedWeights):
        for name in names:
            weights.forget(name)
    return read


def read_outside(weights: Mapping[str, torch.Tensor], device: torch.device | str) -> Weights:
    """Return the weights outside the blocks, by name, in float32."""
    return {
        name: tensor.to(device, torch.float32)
        for name, tensor in weights.items()
        if not name.startswith("transformer.h.")
    }


class NonBlockModules(nn.Module):
    """Modules outside a model's blocks: embedding, final norm, LM head, rotary cache.

    Args:
        config: The model's config.
        weights: Weights of these modules, by their names in the model.
        seq_length: Tokens per sequence.
        device: Device of the weights.
    """

    def __init__(self, config: Config, weights: Weights, seq_length: int, device: torch.device | str) -> None:
        super().__init__()
        with meta_modules():
            model = BlocksGPT(config, [_Probe() for _ in range(config.n_layer)])
        model.load_state_dict(weights, assign=True)
        model.max_seq_length = seq_length
        model.cos, model.sin = model.rope_cache(device=device)
        self.model = model.eval().requires_grad_(False)
        with stopping_at(model.transformer.ln_f):  # saves the memory of the logits
            model(torch.zeros(1, seq_length, dtype=torch.long, device=device))
        self.block_args = [probe.seen[1:] for probe in model.transformer.h]
        """Arguments of each block besides the hidden states"""

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
        """Return the hidden states before the first block: (B, T) to (B, T, n_embd)."""
        first = self.model.transformer.h[0]
        with stopping_at(first):
            self.model(ids)
        return first.seen[0]


def run_block(
    block: Block, stream: torch.Tensor, args: Sequence, wanted: Sequence[str] = (), stop: bool = False
) -> dict[str, torch.Tensor]:
    """Run a block and capture inputs of its submodules.

    Args:
        block: The block.
        stream: Hidden states before the block, shape (B, T, n_embd).
        args: Other arguments of the block.
        wanted: Names of submodules whose inputs to capture.
        stop: If true, stop the forward pass as soon as all inputs are captured.

    Returns:
        The submodules' inputs by name, and the block's output under the key "out" unless the pass was stopped.
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
    """Return the input of the submodule `part` when the module `whole` runs on x."""
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
    """Return the routing weight of each expert for each token, 0 for experts that the token is not routed to.

    litgpt's own routing runs, with each expert's output replaced by a different unit vector.

    Args:
        moe: The mixture of experts, with at most n_embd experts.
        x: Input of the experts, shape (B, T, n_embd).
        times: Function from an expert's outputs for its n tokens, shape (n, n_embd), to factors that multiply these
            tokens' routing weights, shape (n, 1). By default all factors are 1.

    Returns:
        Weights, shape (B · T, n_expert).
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
    """Stop a forward pass after this module."""

    def stop(*_: object) -> None:
        raise _Stop

    handle = module.register_forward_hook(stop)
    try:
        yield
    except _Stop:
        pass
    finally:
        handle.remove()


@contextmanager
def stopping_before(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Stop a forward pass before this module, and append the module's input to the yielded list."""
    seen: list[torch.Tensor] = []

    def stop(_: nn.Module, inputs: tuple) -> None:
        seen.append(inputs[0])
        raise _Stop

    handle = module.register_forward_pre_hook(stop)
    try:
        yield seen
    except _Stop:
        pass
    finally:
        handle.remove()


class _Stop(Exception):
    """Stops a forward pass early."""


class _Probe(nn.Module):
    """Placeholder for a block that records its arguments and returns its input."""

    seen: tuple = ()

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        self.seen = args
        return args[0]
