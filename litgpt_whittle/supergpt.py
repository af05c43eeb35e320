"""Super-network: a litgpt GPT that runs as any of its sub-networks, and standalone models of sub-networks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from litgpt.config import Config
from litgpt.model import GPT, Block
from torch import nn

from litgpt_whittle.files import MappedWeights
from litgpt_whittle.index_plan import ParamSlice, dropped_modules, on_device, plan, plans
from litgpt_whittle.processes import free_memory
from litgpt_whittle.running import Delegate, EmptyModules, Lookup, Running, Weights, pass_on
from litgpt_whittle.student_block import student_block
from litgpt_whittle.subnet import DROPS, SubNet
from litgpt_whittle.unit_index import UnitIndex
from litgpt_whittle.windows import vectorize_windows

KEPT_BYTES = {"cpu": 256 * 2**20}
"""Byte budget for caching a candidate's gathered weights (copies by index tensors) across batches: first the LM head's,
then the blocks'. Weights
beyond the budget are gathered again for every batch, which takes a CPU a few percent of its time"""

_EMBEDDING = "transformer.wte.weight"


class BlocksGPT(GPT):
    """litgpt's GPT with the given blocks."""

    def __init__(self, config: Config, blocks: Iterable[nn.Module]) -> None:
        super().__init__(dataclasses.replace(config, n_layer=0))
        self.config = config
        self.transformer["h"] = vectorize_windows(nn.ModuleList(blocks))


class LayerwiseGPT(BlocksGPT):
    """A litgpt GPT whose layers differ in width or lack sub-layers, which no single litgpt `Config` describes.

    Its `config` is that of a stock GPT as wide as the widest layer; `pad` converts the weights to that GPT for saving.
    Students with equal layers use this class, too, if `SubNet.config` adds heads to them.

    Args:
        subnet: The sub-network that defines the sizes of the layers.
    """

    def __init__(self, subnet: SubNet) -> None:
        super().__init__(subnet.config, (student_block(subnet, i) for i in range(len(subnet))))
        self.shape = shape_of(subnet)

    @classmethod
    def from_padded(cls, config: Config, weights: Mapping[str, torch.Tensor], shape: Mapping[str, Any]) -> LayerwiseGPT:
        """Create a student in its true shape from the weights of a padded stock checkpoint.

        Args:
            config: The padded config.
            weights: The padded weights.
            shape: The true shape, as a sub-network of `config` (see `SubNet.to_dict`).
        """
        subnet = SubNet.from_dict(config, shape)
        with torch.device("meta"):
            model = cls(subnet)
        model.load_state_dict(unpad(subnet, weights), assign=True)
        return model


class SuperBlock(Block):
    """A litgpt block that can run with slices of its weights.

    The weights are sliced inside `forward`, since a sharded block's parameters are only gathered there.
    """

    _running: Callable[..., torch.Tensor] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._running is None:
            return super().forward(*args, **kwargs)
        return self._running(self, *args, **kwargs)


class SuperGPT(BlocksGPT):
    """A litgpt GPT that runs as any of its sub-networks.

    Outside `running` it is the full litgpt model, with the same weights, names and outputs.

        with model.running(subnet):
            logits = model(idx)  # (B, T, V)
    """

    _running: Running | None = None

    def __init__(self, config: Config) -> None:
        super().__init__(config, (SuperBlock(config, i) for i in range(config.n_layer)))
        self._modules_to_run = EmptyModules()

    @property
    def tied(self) -> bool:
        """True if the LM head is tied to the embedding."""
        return self.lm_head.weight is self.transformer.wte.weight

    @property
    def head_owner(self) -> GPT:
        """Model whose LM head `forward` calls: this model, or the module of the running sub-network."""
        return self if self._running is None else self._running.module

    def forward(self, idx: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | list[torch.Tensor]:
        if self._running is None:
            return super().forward(idx, *args, **kwargs)
        return self._running(self, idx, *args, **kwargs)

    @contextmanager
    def running(self, subnet: SubNet, materialize: bool = False, trains: bool = False) -> Iterator[SuperGPT]:
        """Run as a sub-network: `forward` computes its logits, with gradients for the weights that it uses.

        Args:
            subnet: A sub-network of this model.
            materialize: If true, slice the weights once, without gradients, instead of in every forward pass; for
                scoring a candidate on many batches. Contiguous runs are views, which take no memory. Gathered weights
                are cached within `kept_bytes`.
            trains: If true, the weights of dropped layers and sub-layers get zero gradients instead of None. With
                several processes, the dropped layers' modules are called as well, so that wrappers (FSDP2, DDP) see
                every module used on every process. A single process adds gradients in place to those of the full
                weights.

        Raises:
            UserError: If `subnet` was made for another teacher.
        """
        device = self.lm_head.weight.device
        outer, layers = plans(self.config, subnet, tied=self.tied)
        outer, *layers = on_device([outer, *layers], device)
        in_place = trains and not dist.is_initialized()
        calls_all = trains and not in_place
        if in_place:
            self._fill_gradients()
        shell = self._shell(subnet, outer[_EMBEDDING])
        shell.transformer["h"] = nn.ModuleList(self._delegates(subnet.layers, calls_all))
        constants = dict(zip(("cos", "sin"), self._rope(shell)))
        channels = outer[_EMBEDDING].index[1]
        if isinstance(channels, torch.Tensor):  # for the shell's `Lookup`
            constants["transformer.wte.channels"] = channels
            outer[_EMBEDDING] = ParamSlice(_EMBEDDING, ())
        active: list[tuple[Any, Callable[..., torch.Tensor]]] = [(self, Running(shell, outer, constants, in_place))]
        for i, layer in enumerate(subnet.layers):
            idle: Collection[str] = dropped_modules(self.config, subnet.layer(i).parts) if calls_all else ()
            running = Running(self._modules_to_run.block(subnet, i), layers[i], {}, in_place, idle)
            active.append((self.transformer.h[layer], running))
        if calls_all:
            left_out = set(range(self.config.n_layer)) - set(subnet.layers)
            active += [(self.transformer.h[layer], pass_on) for layer in sorted(left_out)]
        left = kept_bytes(device) if materialize else 0
        try:
            for module, forward in active:
                if materialize and isinstance(forward, Running):
                    left -= forward.materialize(module, left)
                module._running = forward
            yield self
        finally:
            for module, _ in active:
                module._running = None

    def _fill_gradients(self) -> None:
        for weight in self.parameters():
            if weight.requires_grad and weight.grad is None:
                weight.grad = torch.zeros_like(weight)

    def _shell(self, subnet: SubNet, embedding: ParamSlice) -> GPT:
        """Return the sub-network's model without weights and blocks.

        Its embedding is a `Lookup` if the kept channels are not a slice.
        """
        is_scattered = isinstance(embedding.index[1], torch.Tensor)

        def build() -> GPT:
            shell = BlocksGPT(subnet.config, [])
            shell.max_seq_length = self.max_seq_length
            if is_scattered:
                shell.transformer.wte = Lookup(self.config)
            return shell

        key = len(subnet.n_embd), subnet.head_cut.dims.tobytes(), self.max_seq_length, is_scattered
        shell = self._modules_to_run.get(key, build)
        shell.config = subnet.config
        return shell

    def _delegates(self, layers: Sequence[int], calls_all: bool) -> list[Delegate]:
        """Return one module per kept layer, which calls that layer.

        If `calls_all`, it first calls the dropped layers before that layer; the last module calls those after it, too.
        """
        blocks, delegates, begin = self.transformer.h, [], 0
        for layer in layers:
            delegates.append(Delegate(blocks[begin : layer + 1] if calls_all else [blocks[layer]]))
            begin = layer + 1
        if calls_all:
            delegates[-1].behind = tuple(blocks[begin:])
        return delegates

    def _rope(self, shell: GPT) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rotary cache of a sub-network's model: this model's cache, unless heads are smaller."""
        if shell.config.head_size == self.config.head_size:
            return self.cos, self.sin
        return tuple(cache.to(self.cos.dtype) for cache in shell.rope_cache(self.cos.device))


def kept_bytes(device: torch.device) -> int:
    """Return the byte budget for caching a candidate's gathered weights: `KEPT_BYTES`, or half of a GPU's free memory.

    The other half is for activations. Repeated gathers cost a GPU more time than a CPU, and its memory is otherwise
    unused.
    """
    return KEPT_BYTES[device.type] if device.type in KEPT_BYTES else free_memory(device, 1) // 2


def student_model(subnet: SubNet) -> GPT:
    """Create a model of the sub-network's true shape with newly initialised weights: a stock `GPT` if it is uniform."""
    return vectorize_windows(GPT(subnet.config)) if subnet.is_uniform else LayerwiseGPT(subnet)


def extract_weights(teacher: GPT | Mapping[str, torch.Tensor], subnet: SubNet, tied: bool | None = None) -> Weights:
    """Extract a sub-network's weights from its teacher.

    Args:
        teacher: The teacher, or its weights; memory-mapped weights are read only where needed, one tensor at a time.
        subnet: The sub-network.
        tied: True if the teacher's LM head is tied to its embedding; inferred from the weights by default.

    Returns:
        The weights of `student_model(subnet)`, as contiguous copies. A tied head is the same tensor as the embedding.
    """
    weights = teacher.state_dict() if isinstance(teacher, nn.Module) else teacher
    tied = is_tied(weights) if tied is None else tied
    student: Weights = {}
    taken: dict[str, torch.Tensor] = {}
    for name, take in plan(subnet.teacher, subnet, tied).items():
        if take.name not in taken:
            part = take(weights[take.name]).detach()
            # an index tensor copies already; a slice is a view of the teacher's memory
            is_view = part.untyped_storage().data_ptr() == weights[take.name].untyped_storage().data_ptr()
            taken[take.name] = part.clone(memory_format=torch.contiguous_format) if is_view else part.contiguous()
            if isinstance(weights, MappedWeights):
                weights.forget(take.name)
        student[name] = taken[take.name]
    return student


def tie(model: GPT) -> GPT:
    """Tie a model's embedding to its LM head, in place; return the model."""
    model.transformer.wte.weight = model.lm_head.weight
    return model


def is_tied(weights: Mapping[str, torch.Tensor]) -> bool:
    """Return whether the LM head is tied to the embedding: both share memory or have equal values."""
    head, embedding = weights["lm_head.weight"], weights["transformer.wte.weight"]
    if head.data_ptr() == embedding.data_ptr() and head.device.type != "meta":
        return True
    # comparing one row first usually avoids reading a large file
    return torch.equal(head[0], embedding[0]) and torch.equal(head, embedding)


def shape_of(subnet: SubNet) -> SubNet:
    """Return a layer-wise student's true shape as a sub-network of its padded config that keeps the first units."""
    layers = [subnet.layer(i) for i in range(len(subnet))]
    config = subnet.config
    width = "moe_intermediate_size" if config.moe_intermediate_size is not None else "intermediate_size"
    sizes: dict[str, Any] = {"intermediate_size": [None] * len(layers)}
    sizes["n_query_groups"] = [keep.sizes[0] or None for keep in layers]
    sizes["heads_per_group"] = [keep.sizes[1] or None for keep in layers]
    for i, keep in enumerate(layers):
        name = "intermediate_size" if keep.n_expert is None else width
        sizes.setdefault(name, [None] * len(layers))[i] = keep.sizes[2] or None
    sizes = {name: own for name, own in sizes.items() if any(n is not None for n in own)}
    for name in DROPS:
        if (dropped := getattr(subnet, name)) is not None:
            sizes[name] = UnitIndex([i for i, layer in enumerate(subnet.layers) if layer in dropped.indices])
    return SubNet(config, **sizes)


def pad(subnet: SubNet, weights: Mapping[str, torch.Tensor]) -> Weights:
    """Zero-pad a layer-wise student to its widest layer: a stock litgpt model with the same outputs.

    Padded neurons and query groups output zero and get no gradient. A padded head of a kept group outputs zero as well,
    but shares that group's values, so training the padded model in stock litgpt can activate it. A norm over all heads
    (OLMo 2) would average over the padding too; its inputs and weight are rescaled to compensate. The weights of
    a dropped sub-layer and its norms are zero, and get no gradient either, except for the output projection's bias.

    Args:
        subnet: The student's sub-network.
        weights: The student's weights in their true shape.

    Returns:
        The weights of a stock `GPT(subnet.config)`.
    """
    shape = shape_of(subnet)
    return fill_up(shape, _rescale_norms(shape, dict(weights), inverse=False))


def fill_up(shape: SubNet, weights: Mapping[str, torch.Tensor]) -> Weights:
    """Scatter a sub-network's weights into zeros of the full model's shape; the inverse of extraction.

    Args:
        shape: The sub-network of the full model (`shape.teacher`); it keeps all channels.
        weights: The sub-network's weights in their true shape.

    Returns:
        The weights of a stock `GPT(shape.teacher)`.
    """
    with torch.device("meta"):
        stock = GPT(shape.teacher).state_dict()
    filled: Weights = {}
    for name, take in plan(shape.teacher, shape).items():
        part = weights[name]
        filled[name] = torch.zeros(stock[take.name].shape, dtype=part.dtype, device=part.device)
        index: Sequence[slice | torch.Tensor] = [i if isinstance(i, slice) else i.to(part.device) for i in take.index]
        if sum(not isinstance(i, slice) for i in index) > 1:
            index = torch.meshgrid(*(_as_tensor(i, part.device) for i in index), indexing="ij")
        filled[name][tuple(index)] = part
    for name, tensor in stock.items():  # dropped sub-layers
        if name not in filled:
            filled[name] = weights["lm_head.weight"].new_zeros(tensor.shape)
    if is_tied(weights):
        filled["lm_head.weight"] = filled["transformer.wte.weight"]
    return filled


def unpad(subnet: SubNet, weights: Mapping[str, torch.Tensor]) -> Weights:
    """Return a layer-wise student's weights in their true shape from its padded weights; the inverse of `pad`."""
    shape = shape_of(subnet)
    return _rescale_norms(shape, extract_weights(weights, shape), inverse=True)


def _as_tensor(index: slice | torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.arange(index.start, index.stop, device=device) if isinstance(index, slice) else index


def _rescale_norms(shape: SubNet, weights: Weights, inverse: bool) -> Weights:
    """Scale the inputs and weights of norms over all heads so that appended zeros do not change their outputs."""
    config = shape.teacher
    if not (config.norm_qk and config.norm_qk_type == "olmo2") or shape.is_uniform:
        return weights
    for i in range(len(shape)):
        (groups, per_group, *_), size = shape.layer(i).sizes, config.head_size
        if not groups:
            continue
        heads = groups * per_group
        prefix = f"transformer.h.{i}.attn."
        n_q, n_k = heads * size, groups * size
        for leaf, padded, true, start, stop in (
            ("norm_q", config.n_head, heads, 0, n_q),
            ("norm_k", config.n_query_groups, groups, n_q, n_q + n_k),
        ):
            scale = math.sqrt(true / padded) if inverse else math.sqrt(padded / true)
            for name in (prefix + "qkv.weight", prefix + "qkv.bias"):
                if name in weights:
                    weights[name] = weights[name].clone()
                    weights[name][start:stop] *= scale
            weights[prefix + leaf + ".weight"] = weights[prefix + leaf + ".weight"] / scale
    return weights
