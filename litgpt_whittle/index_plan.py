"""Index plan of a sub-network: the slices of the teacher's weights that it uses.

For every student parameter, the plan names a teacher parameter and has one index per dimension. Forward passes,
extraction, parameter counts, repair and importance ordering all use the same plan, so a scored candidate cannot differ
from the extracted model. All knowledge of architectures is in `RULES` and `kept_indices`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce

import numpy as np
import torch
from litgpt.config import Config
from litgpt.model import Block

from litgpt_whittle.errors import UserError
from litgpt_whittle.subnet import LayerUnits, SubNet, experts_of, fingerprint, layer_sizes
from litgpt_whittle.tensors import to_device
from litgpt_whittle.unit_index import UnitIndex


@dataclass(frozen=True, eq=False)
class ParamSlice:
    """Slice of a teacher parameter that forms one student parameter.

    Calling it on the teacher's tensor returns the student's tensor, which is a view if every index is a slice.
    """

    name: str
    """Name of the teacher's parameter"""
    index: tuple[slice | torch.Tensor, ...]
    """For each dimension, a slice (a contiguous run) or an int64 tensor of indices"""
    is_buffer: bool = False
    """True for a tensor that is saved with the weights but is not a parameter (a router's correction bias)"""

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        # slices first: they are views, and reduce the size of later copies
        for dim, index in sorted(enumerate(self.index), key=lambda item: not isinstance(item[1], slice)):
            tensor = take_along(tensor, dim, index)
        return tensor

    def add_into(self, tensor: torch.Tensor, part: torch.Tensor) -> None:
        """Add a tensor of the student's shape to the teacher's tensor, at the indices of this slice, in place."""
        indexed = []
        for dim, index in enumerate(self.index):
            if isinstance(index, slice):
                tensor = take_along(tensor, dim, index)
            else:
                indexed.append((dim, index.to(tensor.device)))
        while len(indexed) > 1:
            dim, index = indexed.pop()
            shape = [*part.shape[:dim], tensor.shape[dim], *part.shape[dim + 1 :]]
            part = part.new_zeros(shape).index_add_(dim, index, part)
        if indexed:
            tensor.index_add_(*indexed[0], part)
        else:
            tensor.add_(part)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the student's parameter."""
        return tuple(i.stop - i.start if isinstance(i, slice) else len(i) for i in self.index)

    def numel(self) -> int:
        """Return the number of elements of the student's parameter."""
        return math.prod(self.shape)


def take_along(tensor: torch.Tensor, dim: int, index: slice | torch.Tensor) -> torch.Tensor:
    """Index a tensor along one dimension; the result is a view if the index is a slice."""
    if isinstance(index, slice):
        return tensor.narrow(dim, index.start, index.stop - index.start)
    return tensor.index_select(dim, index.to(tensor.device))


SlicePlan = dict[str, ParamSlice]
"""Mapping from each student parameter's name to its slice of a teacher parameter."""


def plan(teacher: Config, subnet: SubNet, tied: bool = False) -> SlicePlan:
    """Build the index plan of a sub-network.

    Args:
        teacher: The teacher's config.
        subnet: The sub-network.
        tied: True if the teacher's LM head is tied to its embedding. The student's head and embedding then both map to
            the teacher's embedding.

    Raises:
        UserError: If `subnet` was made for another teacher.
    """
    slices, layers = plans(teacher, subnet, tied)
    for i, (layer, own) in enumerate(zip(subnet.layers, layers)):
        prefix = f"transformer.h.{layer}."
        for name, take in own.items():
            slices[f"transformer.h.{i}.{name}"] = dataclasses.replace(take, name=prefix + take.name)
    return slices


def plans(teacher: Config, subnet: SubNet, tied: bool = False) -> tuple[SlicePlan, list[SlicePlan]]:
    """Build the index plan of a sub-network in parts, which `plan` joins.

    Returns:
        The plan of the parameters outside the blocks, and one plan per kept layer, with names relative to the block.
        Layers of equal structure that keep the same units share one plan object.

    Raises:
        UserError: If `subnet` was made for another teacher.
    """
    if subnet.teacher is not teacher and fingerprint(subnet.teacher) != fingerprint(teacher):
        raise UserError(
            f"the sub-network belongs to {subnet.teacher.name!r}, not to {teacher.name!r}; use one of this teacher"
        )
    key, built = ConfigKey(teacher), {}
    layers = []
    for i, layer in enumerate(subnet.layers):
        keep, tensors = subnet.layer(i), _block_tensors(key, layer)
        if (keep, tensors) not in built:
            built[keep, tensors] = _layer_plan(teacher, layer, subnet.n_embd, subnet.head_cut.dims, keep, tensors)
        layers.append(built[keep, tensors])
    return _root_plan(teacher, subnet.n_embd, tied), layers


def on_device(parts: Sequence[SlicePlan], device: torch.device) -> list[SlicePlan]:
    """Return plans with their index tensors on a device. One transfer copies all of them, equal tensors only once."""
    every = (index for part in parts for take in part.values() for index in take.index)
    indices = {id(index): index for index in every if isinstance(index, torch.Tensor)}
    contents = {at: index.numpy().tobytes() for at, index in indices.items()}
    distinct = {content: indices[at] for at, content in contents.items()}
    if not distinct:
        return list(parts)
    joined = to_device(torch.cat(list(distinct.values())), torch.device(device))
    sent = joined.split([len(index) for index in distinct.values()])
    by_content = dict(zip(distinct, sent))
    moved = {at: by_content[content] for at, content in contents.items()}
    done: dict[int, SlicePlan] = {}
    for part in parts:
        if id(part) not in done:
            done[id(part)] = {
                name: dataclasses.replace(take, index=tuple(moved.get(id(index), index) for index in take.index))
                for name, take in part.items()
            }
    return [done[id(part)] for part in parts]


RULES: dict[str, tuple[str, ...]] = {
    "transformer.wte": ("vocab", "n_embd"),
    "transformer.ln_f": ("n_embd",),
    "lm_head": ("vocab", "n_embd"),
    "norm_1": ("n_embd",),
    "norm_2": ("n_embd",),
    "post_attention_norm": ("n_embd",),
    "post_mlp_norm": ("n_embd",),
    "attn.qkv": ("qkv", "n_embd"),
    "attn.norm_q": ("norm_q",),
    "attn.norm_k": ("norm_k",),
    "attn.proj": ("n_embd", "attention"),
    "attn.q_a_proj": ("q_lora_rank", "n_embd"),
    "attn.q_a_norm": ("q_lora_rank",),
    "attn.q_b_proj": ("latent_q", "q_lora_rank"),
    "attn.kv_a_proj_with_mqa": ("latent_kv", "n_embd"),
    "attn.kv_a_norm": ("kv_lora_rank",),
    "attn.kv_b_proj": ("latent_k_v", "kv_lora_rank"),
    "mlp.fc": ("neurons", "n_embd"),
    "mlp.fc_1": ("neurons", "n_embd"),
    "mlp.fc_2": ("neurons", "n_embd"),
    "mlp.proj": ("n_embd", "neurons"),
    "mlp.gate": ("n_expert", "n_embd"),
    "mlp.experts.fc_1": ("neurons", "n_embd"),
    "mlp.experts.fc_2": ("neurons", "n_embd"),
    "mlp.experts.proj": ("n_embd", "neurons"),
    "mlp.shared_experts.fc_1": ("shared_neurons", "n_embd"),
    "mlp.shared_experts.fc_2": ("shared_neurons", "n_embd"),
    "mlp.shared_experts.proj": ("n_embd", "shared_neurons"),
}
"""Slicing rules: the axis of each dimension of a litgpt module's weight."""

SUBLAYERS = {"attn": ("norm_1", "post_attention_norm"), "mlp": ("norm_2", "post_mlp_norm")}
"""litgpt's names of a block's two sub-layers, each with the norms before and after it"""

ATTENTION_AXES = {axis for name, axes in RULES.items() if name.startswith("attn.") for axis in axes}
"""Axes along which attention heads can own indices."""


def dropped_modules(teacher: Config, parts: Collection[str]) -> set[str]:
    """Return the modules that a block lacks if it keeps only the sub-layers `parts`: the other one, and its norms.

    A norm before both sub-layers (`shared_attention_norm`) stays.
    """
    dropped: set[str] = set()
    for name, (before, after) in SUBLAYERS.items():
        if name not in parts:
            dropped |= {name, after} if teacher.shared_attention_norm else {name, before, after}
    return dropped


def kept_indices(teacher: Config, layer: int, head_dims: np.ndarray, keep: LayerUnits) -> dict[str, np.ndarray]:
    """Return the kept teacher indices along every axis of `RULES` that this layer has, except `n_embd`."""
    return _mlp_indices(teacher, keep) | _attention_indices(teacher, head_dims, keep)


def _rows(units: np.ndarray, size: int, dims: np.ndarray, offset: int = 0) -> np.ndarray:
    return (offset + units[:, None] * size + dims).ravel()


def _mlp_indices(teacher: Config, keep: LayerUnits) -> dict[str, np.ndarray]:
    if keep.intermediate_size is None:
        return {}
    axes = {"neurons": keep.intermediate_size.indices}
    if keep.n_expert is not None:
        axes["n_expert"] = experts_of(teacher, keep.n_expert)
        width = teacher.moe_intermediate_size or teacher.intermediate_size
        # litgpt's shared expert is n_shared_expert experts side by side
        axes["shared_neurons"] = _rows(np.arange(teacher.n_shared_expert or 0), width, keep.intermediate_size.indices)
    return axes


def _attention_indices(teacher: Config, head_dims: np.ndarray, keep: LayerUnits) -> dict[str, np.ndarray]:
    if keep.n_query_groups is None or keep.heads_per_group is None:
        return {}
    per_group = teacher.n_head // teacher.n_query_groups
    groups = keep.n_query_groups.indices
    # litgpt orders query heads by group
    heads = (groups[:, None] * per_group + keep.heads_per_group.indices).ravel()
    if teacher.latent_attention:
        qk, v, k_v = teacher.qk_head_dim, teacher.v_head_dim, teacher.qk_nope_head_dim + teacher.v_head_dim
        return {
            "q_lora_rank": np.arange(teacher.q_lora_rank),
            "kv_lora_rank": np.arange(teacher.kv_lora_rank),
            "latent_kv": np.arange(teacher.kv_lora_rank + teacher.qk_rope_head_dim),
            "latent_q": _rows(heads, qk, np.arange(qk)),
            "latent_k_v": _rows(groups, k_v, np.arange(k_v)),
            "attention": _rows(heads, v, np.arange(v)),
        }
    size = teacher.head_size
    q, k = _rows(heads, size, head_dims), _rows(groups, size, head_dims)
    k_offset, v_offset = teacher.n_head * size, (teacher.n_head + teacher.n_query_groups) * size
    over_all_heads = teacher.norm_qk_type == "olmo2"
    return {
        "qkv": np.concatenate((q, k + k_offset, k + v_offset)),
        "attention": q,
        "norm_q": q if over_all_heads else head_dims,
        "norm_k": k if over_all_heads else head_dims,
    }


def units_of(teacher: Config, layer: int) -> dict[str, dict[str, np.ndarray]]:
    """Return for each unit of a layer the indices that belong to it, and to no other unit of its kind.

    Returns:
        Mapping from kinds of units (the names of `layer_sizes`) to mappings from axes to the teacher's indices, shape
        (n_units, size). Indices shared by all units, such as a group's keys for the heads within it, are excluded.
    """
    dims, full = np.arange(teacher.head_size), SubNet.full(teacher).layer(layer)
    axes, width = kept_indices(teacher, layer, dims, full), full.sizes[2]
    units: dict[str, dict[str, np.ndarray]] = {}
    for kind in layer_sizes(teacher, layer):
        if kind == "n_expert":
            units[kind] = {"n_expert": axes["n_expert"][:, None]}
        elif kind.endswith("intermediate_size"):
            units[kind] = {name: axes[name].reshape(-1, width).T for name in axes if name.endswith("neurons")}
        else:
            keeps = [dataclasses.replace(full, **{kind: UnitIndex([u])}) for u in getattr(full, kind).indices]
            alone = [kept_indices(teacher, layer, dims, keep) for keep in keeps]
            units[kind] = {name: _own([of[name] for of in alone]) for name in axes if name in ATTENTION_AXES}
        units[kind] = {name: own for name, own in units[kind].items() if own.size}
    return units


def _own(alone: list[np.ndarray]) -> np.ndarray:
    """Return each unit's indices without those that all units share, shape (n_units, size).

    Args:
        alone: For each unit, the indices that are kept if it is the only kept unit.
    """
    shared: np.ndarray | list[int] = reduce(np.intersect1d, alone) if len(alone) > 1 else []
    return np.stack([np.setdiff1d(indices, shared) for indices in alone])


def layer_plan(teacher: Config, layer: int, n_embd: UnitIndex, head_dims: np.ndarray, keep: LayerUnits) -> SlicePlan:
    """Return the plan of one layer, with names relative to its block."""
    return _layer_plan(teacher, layer, n_embd, head_dims, keep, _block_tensors(ConfigKey(teacher), layer))


def _layer_plan(
    teacher: Config,
    layer: int,
    n_embd: UnitIndex,
    head_dims: np.ndarray,
    keep: LayerUnits,
    tensors: tuple[tuple[str, bool], ...],
) -> SlicePlan:
    axes = kept_indices(teacher, layer, head_dims, keep) | {"n_embd": n_embd.indices}
    indices = {name: _index(units) for name, units in axes.items()}
    dropped = dropped_modules(teacher, keep.parts)
    slices = {}
    for name, is_buffer in tensors:
        if name.partition(".")[0] in dropped:
            continue
        module, _, leaf = name.rpartition(".")
        if module.startswith("mlp.experts."):
            expert, _, part = module.removeprefix("mlp.experts.").partition(".")
            kept = np.flatnonzero(axes["n_expert"] == int(expert))
            if not len(kept):
                continue
            student_name = f"mlp.experts.{kept[0]}.{part}.{leaf}"
        else:
            student_name = name
        slices[student_name] = ParamSlice(name, _take_index(module, leaf, indices), is_buffer)
    return slices


def _root_plan(teacher: Config, n_embd: UnitIndex, tied: bool) -> SlicePlan:
    """Return the plan of the parameters outside the blocks."""
    indices = {"vocab": slice(0, teacher.padded_vocab_size), "n_embd": _index(n_embd.indices)}
    names = ["transformer.wte.weight", "lm_head.weight"]
    names += ["lm_head.bias"] if teacher.lm_head_bias else []
    norm = teacher.norm_class(1)
    names += [f"transformer.ln_f.{leaf}" for leaf, value in norm.named_parameters()]
    slices = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        slices[name] = ParamSlice(name, _take_index(module, leaf, indices))
    if tied:
        slices["lm_head.weight"] = slices["transformer.wte.weight"]
    return slices


def axes_of(module: str) -> tuple[str, ...]:
    """Return the axis of each dimension of a litgpt module's weight.

    Args:
        module: The module's name; within a block, relative to the block.

    Raises:
        TypeError: If there is no rule for the module.
    """
    module = re.sub(r"^mlp\.experts\.\d+\.", "mlp.experts.", module)
    if module not in RULES:
        raise TypeError(f"No slicing rule for {module!r}; add one to litgpt_whittle.index_plan.RULES")
    return RULES[module]


def _take_index(module: str, leaf: str, indices: dict[str, slice | torch.Tensor]) -> tuple[slice | torch.Tensor, ...]:
    axes = axes_of(module) if leaf == "weight" else axes_of(module)[:1]
    return tuple(indices[axis] for axis in axes)


def _index(units: np.ndarray) -> slice | torch.Tensor:
    """Return a slice for a contiguous run, which makes the student's weight a view, else an index tensor."""
    if (np.diff(units) == 1).all():
        start = int(units[0]) if len(units) else 0
        return slice(start, start + len(units))
    return torch.from_numpy(units.copy())


class ConfigKey:
    """Cache key that compares configs by value; litgpt's configs are mutable and unhashable."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.text = repr(config)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ConfigKey) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)


@lru_cache(maxsize=1024)
def _block_tensors(teacher: ConfigKey, layer: int) -> tuple[tuple[str, bool], ...]:
    """Return name and `is_buffer` of every saved tensor of a teacher's block, as built by litgpt."""
    with torch.device("meta"):
        block = Block(teacher.config, layer)
    parameters = {name for name, _ in block.named_parameters()}
    return tuple((name, name not in parameters) for name in block.state_dict())


def n_params(teacher: Config, subnet: SubNet, tied: bool = False) -> int:
    """Count a sub-network's parameters without building a model; tied weights count once."""
    n_embd, head_size = len(subnet.n_embd), len(subnet.head_size)
    layers = (
        layer_params(teacher, layer, n_embd, head_size, *subnet.layer(i).sizes) for i, layer in enumerate(subnet.layers)
    )
    return root_params(teacher, n_embd, tied) + sum(layers)


def root_params(teacher: Config, n_embd: int, tied: bool = False) -> int:
    """Count the parameters outside the blocks: embedding, final norm, LM head."""
    return _count(_root_plan(teacher, UnitIndex(n_embd), tied))


def layer_params(
    teacher: Config,
    layer: int,
    n_embd: int,
    head_size: int,
    n_query_groups: int,
    heads_per_group: int,
    intermediate_size: int,
    n_expert: int = 0,
) -> int:
    """Count one layer's parameters at these sizes.

    `n_expert` is 0 for a dense layer, `n_query_groups` for a layer without attention, `intermediate_size` for a layer
    without an MLP. Above 0, the count is affine and increasing in each size.
    """
    sizes = (n_embd, head_size, n_query_groups, heads_per_group, intermediate_size, n_expert)
    return _layer_params(ConfigKey(teacher), layer, *sizes)


@lru_cache(maxsize=2**16)
def _layer_params(teacher: ConfigKey, layer: int, n_embd: int, head_size: int, *sizes: int) -> int:
    return _count(layer_takes(teacher.config, layer, n_embd, head_size, *sizes))


def layer_takes(
    teacher: Config,
    layer: int,
    n_embd: int,
    head_size: int,
    n_query_groups: int,
    heads_per_group: int,
    intermediate_size: int,
    n_expert: int = 0,
) -> SlicePlan:
    """Return the plan of one layer that keeps the first units of each kind, for counting and shapes."""
    sizes = n_query_groups, heads_per_group, intermediate_size, n_expert
    keep = LayerUnits(*(UnitIndex(size) if size else None for size in sizes))
    return layer_plan(teacher, layer, UnitIndex(n_embd), np.arange(head_size), keep)


def _count(slices: SlicePlan) -> int:
    """Count the elements of a plan, each teacher parameter once, without buffers."""
    return sum({take.name: take.numel() for take in slices.values() if not take.is_buffer}.values())
