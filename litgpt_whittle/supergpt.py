"""A litgpt GPT that runs as any of its sub-networks, and the models that sub-networks become."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from litgpt.config import Config
from litgpt.model import GPT, Block
from torch import nn
from torch.func import functional_call

from litgpt_whittle.files import MappedWeights
from litgpt_whittle.index_plan import Plan, Take, plan, take_along
from litgpt_whittle.subnet import SubNet

Weights = dict[str, torch.Tensor]

KEPT_BYTES = 256 * 2**20
"""Of a candidate's weights that are copies, so many are kept from one batch to the next, the head's before the blocks'.
The others are copied anew for every batch, which takes some hundredths of its time and no memory"""

_EMBEDDING = "transformer.wte.weight"


class BlocksGPT(GPT):
    """litgpt's GPT around given blocks."""

    def __init__(self, config: Config, blocks: Iterable[nn.Module]) -> None:
        super().__init__(dataclasses.replace(config, n_layer=0))
        self.config = config
        self.transformer["h"] = nn.ModuleList(blocks)


class LayerwiseGPT(BlocksGPT):
    """A litgpt GPT whose layers differ in width, which no single litgpt `Config` describes.

    Its `config` is the stock one padded to the widest layer, as which it is saved (`pad`). Layers that are alike become
    one, too, where the stock model needs more heads than they have (see `SubNet.config`).

    Args:
        subnet: The sub-network whose sizes the layers have.
    """

    def __init__(self, subnet: SubNet) -> None:
        super().__init__(subnet.config, (Block(subnet.layer_config(i), i) for i in range(len(subnet))))
        self.shape = shape_of(subnet)

    @classmethod
    def from_padded(cls, config: Config, weights: Mapping[str, torch.Tensor], shape: Mapping[str, Any]) -> LayerwiseGPT:
        """Opens a padded stock checkpoint in its true shape, the choice `shape` of its own config."""
        subnet = SubNet.from_dict(config, shape)
        with torch.device("meta"):
            model = cls(subnet)
        model.load_state_dict(unpad(subnet, weights), assign=True)
        return model


class SuperBlock(Block):
    """A litgpt block that can run with a part of its weights.

    The part is taken inside `forward`, where a sharded block's parameters are whole.
    """

    _running: _Running | None = None

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._running is None:
            return super().forward(*args, **kwargs)
        return self._running(self, *args, **kwargs)


class SuperGPT(BlocksGPT):
    """A litgpt GPT that runs as any of its sub-networks.

    Outside of `running` it is the full litgpt model: same weights, same names, same outputs.

        with model.running(subnet):
            logits = model(idx)  # (B, T, V)
    """

    _running: _Running | None = None

    def __init__(self, config: Config) -> None:
        super().__init__(config, (SuperBlock(config, i) for i in range(config.n_layer)))

    @property
    def tied(self) -> bool:
        """Whether the LM head is the embedding."""
        return self.lm_head.weight is self.transformer.wte.weight

    @property
    def head_owner(self) -> GPT:
        """The model whose LM head `forward` calls: this one, or that of the sub-network which it runs as."""
        return self if self._running is None else self._running.module

    def forward(self, idx: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | list[torch.Tensor]:
        if self._running is None:
            return super().forward(idx, *args, **kwargs)
        return self._running(self, idx, *args, **kwargs)

    @contextmanager
    def running(self, subnet: SubNet, materialize: bool = False, trains: bool = False) -> Iterator[SuperGPT]:
        """Makes `forward` compute the sub-network's logits, with gradients to the weights that it uses.

        Args:
            subnet: A sub-network of this model.
            materialize: Slice once, now, without gradients, instead of in every forward: for scoring a candidate on
                many batches. Contiguous runs stay views, which take no memory; of the rest, `KEPT_BYTES` are kept.
            trains: Give the weights of layers that are left out gradients of zero instead of none. Where processes
                train together, their modules are called, too: whatever wraps them (FSDP2, DDP) then finds all of them
                used, on every process. A single process adds gradients to the full weights' own in place.

        Raises:
            UserError: If `subnet` was made for another teacher.
        """
        takes = plan(self.config, subnet, tied=self.tied)
        in_place = trains and not dist.is_initialized()
        calls_all = trains and not in_place
        if in_place:
            self._fill_gradients()
        with torch.device("meta"):
            blocks = [Block(subnet.layer_config(i), i) for i in range(len(subnet))]
            shell = BlocksGPT(subnet.config, self._delegates(subnet.layers, calls_all))
            if not isinstance(takes[_EMBEDDING].index[1], slice):
                shell.transformer.wte = _Lookup(self.config, takes[_EMBEDDING])
                takes[_EMBEDDING] = Take(_EMBEDDING, ())
        shell.max_seq_length = self.max_seq_length
        rope = dict(zip(("cos", "sin"), self._rope(subnet)))
        root = {name: take for name, take in takes.items() if not name.startswith("transformer.h.")}
        active: list[tuple[nn.Module, _Running]] = [(self, _Running(shell, root, rope, in_place))]
        for i, layer in enumerate(subnet.layers):
            active.append((self.transformer.h[layer], _Running(blocks[i], _relative(takes, i, layer), {}, in_place)))
        if calls_all:
            left_out = set(range(self.config.n_layer)) - set(subnet.layers)
            active += [(self.transformer.h[layer], _pass_on) for layer in sorted(left_out)]
        left = KEPT_BYTES if materialize else 0
        try:
            for module, running in active:
                if materialize:
                    left -= running.materialize(module, left)
                module._running = running
            yield self
        finally:
            for module, _ in active:
                module._running = None

    def _fill_gradients(self) -> None:
        for weight in self.parameters():
            if weight.requires_grad and weight.grad is None:
                weight.grad = torch.zeros_like(weight)

    def _delegates(self, layers: Sequence[int], calls_all: bool) -> list[_Delegate]:
        """What calls each layer, those that are left out with the one behind them where it `calls_all`."""
        blocks, delegates, begin = self.transformer.h, [], 0
        for layer in layers:
            delegates.append(_Delegate(blocks[begin : layer + 1] if calls_all else [blocks[layer]]))
            begin = layer + 1
        if calls_all:
            delegates[-1].behind = tuple(blocks[begin:])
        return delegates

    def _rope(self, subnet: SubNet) -> tuple[torch.Tensor, torch.Tensor]:
        """The sub-network's rotary cache: this model's own unless heads shrink."""
        if len(subnet.head_size) == self.config.head_size:
            return self.cos, self.sin
        with torch.device("meta"):
            student = GPT(dataclasses.replace(subnet.config, n_layer=0))
        student.max_seq_length = self.max_seq_length
        return tuple(cache.to(self.cos.dtype) for cache in student.rope_cache(self.cos.device))


class _Running:
    """A sub-network's module, without weights of its own, and what it takes of the module that it stands in for."""

    def __init__(
        self, module: nn.Module, takes: Mapping[str, Take], constants: Weights, in_place: bool = False
    ) -> None:
        self.module = module.eval()
        self.in_place = in_place
        self.takes = takes
        self.constants = constants
        self.weights: Weights | None = None

    def __call__(self, owner: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        weights = self._take(owner) if self.weights is None else self.weights
        return functional_call(self.module, weights | self.constants, args, kwargs)

    @torch.no_grad()
    def materialize(self, owner: nn.Module, most: int) -> int:
        """Takes the weights once and for all, unless those that are no views have more bytes.

        Returns:
            How many they have, 0 where they are taken in every forward.
        """
        indexed = [take for take in self.takes.values() if any(not isinstance(i, slice) for i in take.index)]
        n_bytes = sum(take.numel() for take in indexed) * next(owner.parameters()).element_size()
        if n_bytes > most:
            return 0
        self.weights = {name: weight.detach() for name, weight in self._take(owner).items()}
        return n_bytes

    def _take(self, owner: nn.Module) -> Weights:
        # tied weights under both their names
        tensors = dict(owner.named_parameters(remove_duplicate=False)) | dict(owner.named_buffers())
        return {name: self._part(take, tensors[take.name]) for name, take in self.takes.items()}

    def _part(self, take: Take, tensor: torch.Tensor) -> torch.Tensor:
        return _TakeInPlace.apply(tensor, take) if self.in_place and tensor.requires_grad else take(tensor)


class _TakeInPlace(torch.autograd.Function):
    """A part of a leaf, with its gradient added to the leaf's own.

    Autograd's own slicing would make every part's gradient as large as the whole before it adds them up.
    """

    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor, take: Take) -> torch.Tensor:
        ctx.leaf, ctx.take = leaf, take
        return take(leaf)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None]:
        ctx.take.add_into(ctx.leaf.grad, grad)
        return None, None


class _Lookup(nn.Embedding):
    """The teacher's embedding, of which a sub-network takes scattered channels: of the rows that it looks up only."""

    def __init__(self, teacher: Config, take: Take) -> None:
        super().__init__(teacher.padded_vocab_size, teacher.n_embd)
        self.channels = take.index[1]

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        return take_along(super().forward(idx), -1, self.channels)


class _Delegate(nn.Module):
    """Calls a block of the super-network from within the sub-network's model, without owning its weights.

    Args:
        blocks: The block, and before it those that only pass the stream on.
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        # tuples hide them from PyTorch's registry of submodules
        *before, block = blocks
        self.before, self.block, self.behind = tuple(before), (block,), ()

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        for block in self.before:
            x = block(x)
        x = self.block[0](x, *args, **kwargs)
        for block in self.behind:
            x = block(x)
        return x


def _pass_on(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Stands for a block that is left out: gives what it gets."""
    return _PassOn.apply(x, *block.parameters())


class _PassOn(torch.autograd.Function):
    """The identity, with gradients of zero for weights that it does not use."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        ctx.weights = [(weight.shape, weight.dtype, weight.device) for weight in weights]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        zeros = (torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.weights)
        return grad, *zeros


def _relative(takes: Plan, student_layer: int, teacher_layer: int) -> Plan:
    """One layer's part of a plan, with names relative to its block on both sides."""
    ours, theirs = f"transformer.h.{student_layer}.", f"transformer.h.{teacher_layer}."
    return {
        name.removeprefix(ours): dataclasses.replace(take, name=take.name.removeprefix(theirs))
        for name, take in takes.items()
        if name.startswith(ours)
    }


def student_model(subnet: SubNet) -> GPT:
    """A model of the sub-network's true shape with fresh weights: a stock `GPT` where its sizes are uniform."""
    return GPT(subnet.config) if subnet.is_uniform else LayerwiseGPT(subnet)


def extract_weights(teacher: GPT | Mapping[str, torch.Tensor], subnet: SubNet, tied: bool | None = None) -> Weights:
    """Cuts a sub-network's weights out of its teacher.

    Args:
        teacher: The teacher, or its weights; memory-mapped ones are read only where needed, a tensor at a time.
        subnet: What to keep.
        tied: Whether the teacher's LM head is its embedding; found out from the weights by default.

    Returns:
        The weights of `student_model(subnet)`, contiguous copies; a tied head shares its embedding's memory.
    """
    weights = teacher.state_dict() if isinstance(teacher, nn.Module) else teacher
    tied = is_tied(weights) if tied is None else tied
    student: Weights = {}
    taken: dict[str, torch.Tensor] = {}
    for name, take in plan(subnet.teacher, subnet, tied).items():
        if take.name not in taken:
            part = take(weights[take.name]).detach()
            # an index makes a copy already, a slice is a view on the teacher's memory
            is_view = part.untyped_storage().data_ptr() == weights[take.name].untyped_storage().data_ptr()
            taken[take.name] = part.clone(memory_format=torch.contiguous_format) if is_view else part.contiguous()
            if isinstance(weights, MappedWeights):
                weights.forget(take.name)
        student[name] = taken[take.name]
    return student


def tie(model: GPT) -> GPT:
    """Make the embedding of a model its LM head, in place; return the model."""
    model.transformer.wte.weight = model.lm_head.weight
    return model


def is_tied(weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether the LM head is the embedding: one memory, or equal values."""
    head, embedding = weights["lm_head.weight"], weights["transformer.wte.weight"]
    if head.data_ptr() == embedding.data_ptr() and head.device.type != "meta":
        return True
    # a row tells nearly always, so that a large file is not read for nothing
    return torch.equal(head[0], embedding[0]) and torch.equal(head, embedding)


def shape_of(subnet: SubNet) -> SubNet:
    """A layer-wise student's true shape, as the leading part that it uses of every padded tensor."""
    layers = [subnet.layer(i) for i in range(len(subnet))]
    config = subnet.config
    width = "moe_intermediate_size" if config.moe_intermediate_size is not None else "intermediate_size"
    sizes: dict[str, list] = {"intermediate_size": [None] * len(layers)}
    sizes["n_query_groups"] = [len(keep.n_query_groups) for keep in layers]
    sizes["heads_per_group"] = [len(keep.heads_per_group) for keep in layers]
    for i, keep in enumerate(layers):
        name = "intermediate_size" if keep.n_expert is None else width
        sizes.setdefault(name, [None] * len(layers))[i] = len(keep.intermediate_size)
    return SubNet(config, **{k: v for k, v in sizes.items() if any(n is not None for n in v)})


def pad(subnet: SubNet, weights: Mapping[str, torch.Tensor]) -> Weights:
    """Zero-pads a layer-wise student to its widest layer: a stock litgpt model with the same outputs.

    Padded neurons and query groups give nothing and get no gradient. A padded head of a group that the student keeps
    gives nothing either, but it shares that group's values: training the padded model in stock litgpt can bring it to
    life. A norm over all heads (OLMo 2) would average over the padding too; its inputs and weight are scaled against
    that.

    Args:
        subnet: The student's sub-network.
        weights: Its weights, in their true shape.

    Returns:
        The weights of a stock `GPT(subnet.config)`.
    """
    shape = shape_of(subnet)
    return fill_up(shape, _rescale_norms(shape, dict(weights), inverse=False))


def fill_up(shape: SubNet, weights: Mapping[str, torch.Tensor]) -> Weights:
    """Puts a sub-network's weights where `shape` takes them from, among zeros.

    Args:
        shape: The part of the whole model (`shape.teacher`) that the weights are; all its channels are kept.
        weights: They, in the sub-network's true shape.

    Returns:
        The weights of a stock `GPT(shape.teacher)`.
    """
    with torch.device("meta"):
        stock = GPT(shape.teacher).state_dict()
    filled: Weights = {}
    for name, take in plan(shape.teacher, shape).items():
        part = weights[name]
        filled[name] = torch.zeros(stock[take.name].shape, dtype=part.dtype, device=part.device)
        index = [i if isinstance(i, slice) else i.to(part.device) for i in take.index]
        if sum(not isinstance(i, slice) for i in index) > 1:
            index = torch.meshgrid(*(_as_tensor(i, part.device) for i in index), indexing="ij")
        filled[name][tuple(index)] = part
    if is_tied(weights):
        filled["lm_head.weight"] = filled["transformer.wte.weight"]
    return filled


def unpad(subnet: SubNet, weights: Mapping[str, torch.Tensor]) -> Weights:
    """Undoes `pad`: the true shape of a layer-wise student from its padded stock weights."""
    shape = shape_of(subnet)
    return _rescale_norms(shape, extract_weights(weights, shape), inverse=True)


def _as_tensor(index: slice | torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.arange(index.start, index.stop, device=device) if isinstance(index, slice) else index


def _rescale_norms(shape: SubNet, weights: Weights, inverse: bool) -> Weights:
    """Scales the inputs of norms over all heads so that their mean square is the same with zeros appended."""
    config = shape.teacher
    if not (config.norm_qk and config.norm_qk_type == "olmo2") or shape.is_uniform:
        return weights
    for i in range(len(shape)):
        keep = shape.layer(i)
        groups, size = len(keep.n_query_groups), config.head_size
        heads = groups * len(keep.heads_per_group)
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
