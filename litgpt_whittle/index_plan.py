"""Which teacher weights a sub-network uses: the index plan that everything else derives from.

For every parameter of the student, the teacher's parameter and one index per dimension. Forward passes, extraction,
parameter counts, repair and importance ordering all read the same plan, so what was scored cannot differ from what is
extracted. All knowledge of architectures is in `RULES` and `kept_indices`.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from functools import lru_cache, reduce

import numpy as np
import torch
from litgpt.config import Config
from litgpt.model import Block

from litgpt_whittle.errors import UserError
from litgpt_whittle.keep import Keep
from litgpt_whittle.subnet import LayerKeep, SubNet, experts_of, fingerprint, layer_sizes


@dataclass(frozen=True, eq=False)
class Take:
    """One student parameter: a teacher parameter and what to take of it along each dimension.

    Calling it on the teacher's tensor gives the student's: a view where every index is a slice.
    """

    name: str
    """The teacher's parameter"""
    index: tuple[slice | torch.Tensor, ...]
    """Per dimension, a slice (a contiguous run) or an int64 tensor of indices"""
    is_buffer: bool = False
    """Saved with the weights, but no parameter (a router's correction bias)"""

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        # views first, so that indices copy no more than they must
        for dim, index in sorted(enumerate(self.index), key=lambda item: not isinstance(item[1], slice)):
            tensor = take_along(tensor, dim, index)
        return tensor

    def add_into(self, tensor: torch.Tensor, part: torch.Tensor) -> None:
        """Adds a part, of the student's shape, to the places of the teacher's tensor that it was taken of."""
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
        """The student's shape."""
        return tuple(i.stop - i.start if isinstance(i, slice) else len(i) for i in self.index)

    def numel(self) -> int:
        """The number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))


def take_along(tensor: torch.Tensor, dim: int, index: slice | torch.Tensor) -> torch.Tensor:
    """What an index takes of a tensor along one dimension: a view where it is a slice."""
    if isinstance(index, slice):
        return tensor.narrow(dim, index.start, index.stop - index.start)
    return tensor.index_select(dim, index.to(tensor.device))


Plan = dict[str, Take]
"""From every student parameter's name to what it takes of the teacher."""


def plan(teacher: Config, subnet: SubNet, tied: bool = False) -> Plan:
    """Builds the index plan of a sub-network.

    Args:
        teacher: The teacher's config.
        subnet: What is kept.
        tied: Whether the teacher's LM head is its embedding; then both student names take the embedding.

    Raises:
        UserError: If `subnet` was made for another teacher.
    """
    if subnet.teacher is not teacher and fingerprint(subnet.teacher) != fingerprint(teacher):
        raise UserError(f"the sub-network belongs to {subnet.teacher.name!r}, not to {teacher.name!r}")
    takes = _root_plan(teacher, subnet.n_embd, tied)
    for i, layer in enumerate(subnet.layers):
        prefix = f"transformer.h.{layer}."
        for name, take in layer_plan(teacher, layer, subnet.n_embd, subnet.head_cut.dims, subnet.layer(i)).items():
            takes[f"transformer.h.{i}.{name}"] = dataclasses.replace(take, name=prefix + take.name)
    return takes


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
"""The slicing rules: along which axis each dimension of a litgpt module's weight runs."""

ATTENTION_AXES = {axis for name, axes in RULES.items() if name.startswith("attn.") for axis in axes}
"""Axes that heads may have a part of."""


def kept_indices(teacher: Config, layer: int, head_dims: np.ndarray, keep: LayerKeep) -> dict[str, np.ndarray]:
    """The kept teacher indices along every axis that `RULES` names for this layer, except `n_embd`."""
    per_group = teacher.n_head // teacher.n_query_groups
    groups = keep.n_query_groups.indices
    # litgpt orders query heads by group
    heads = (groups[:, None] * per_group + keep.heads_per_group.indices).ravel()

    def rows(units: np.ndarray, size: int, dims: np.ndarray, offset: int = 0) -> np.ndarray:
        return (offset + units[:, None] * size + dims).ravel()

    axes = {"neurons": keep.intermediate_size.indices}
    if keep.n_expert is not None:
        axes["n_expert"] = experts_of(teacher, keep.n_expert)
        width = teacher.moe_intermediate_size or teacher.intermediate_size
        # litgpt's shared expert is n_shared_expert experts side by side
        axes["shared_neurons"] = rows(np.arange(teacher.n_shared_expert or 0), width, keep.intermediate_size.indices)
    if teacher.latent_attention:
        qk, v, k_v = teacher.qk_head_dim, teacher.v_head_dim, teacher.qk_nope_head_dim + teacher.v_head_dim
        return axes | {
            "q_lora_rank": np.arange(teacher.q_lora_rank),
            "kv_lora_rank": np.arange(teacher.kv_lora_rank),
            "latent_kv": np.arange(teacher.kv_lora_rank + teacher.qk_rope_head_dim),
            "latent_q": rows(heads, qk, np.arange(qk)),
            "latent_k_v": rows(groups, k_v, np.arange(k_v)),
            "attention": rows(heads, v, np.arange(v)),
        }
    size = teacher.head_size
    q, k = rows(heads, size, head_dims), rows(groups, size, head_dims)
    k_offset, v_offset = teacher.n_head * size, (teacher.n_head + teacher.n_query_groups) * size
    over_all_heads = teacher.norm_qk_type == "olmo2"
    return axes | {
        "qkv": np.concatenate((q, k + k_offset, k + v_offset)),
        "attention": q,
        "norm_q": q if over_all_heads else head_dims,
        "norm_k": k if over_all_heads else head_dims,
    }


def units_of(teacher: Config, layer: int) -> dict[str, dict[str, np.ndarray]]:
    """What belongs to each unit of a layer, and to no other unit of its kind.

    Returns:
        For every kind, by the names of `layer_sizes`, the teacher indices along the axes that its units have a part of,
        shape (n_units, size). What all of them share (a group's keys, to the heads within it) is not among them.
    """
    dims, full = np.arange(teacher.head_size), SubNet.full(teacher).layer(layer)
    axes, width = kept_indices(teacher, layer, dims, full), len(full.intermediate_size)
    units: dict[str, dict[str, np.ndarray]] = {}
    for kind in layer_sizes(teacher, layer):
        if kind == "n_expert":
            units[kind] = {"n_expert": axes["n_expert"][:, None]}
        elif kind.endswith("intermediate_size"):
            units[kind] = {name: axes[name].reshape(-1, width).T for name in axes if name.endswith("neurons")}
        else:
            keeps = [dataclasses.replace(full, **{kind: Keep([u])}) for u in getattr(full, kind).indices]
            alone = [kept_indices(teacher, layer, dims, keep) for keep in keeps]
            units[kind] = {name: _own([of[name] for of in alone]) for name in axes if name in ATTENTION_AXES}
        units[kind] = {name: own for name, own in units[kind].items() if own.size}
    return units


def _own(alone: list[np.ndarray]) -> np.ndarray:
    """From what each of several units has when it is kept alone, what not all of them have, shape (n_units, size)."""
    shared = reduce(np.intersect1d, alone) if len(alone) > 1 else []
    return np.stack([np.setdiff1d(indices, shared) for indices in alone])


def layer_plan(teacher: Config, layer: int, n_embd: Keep, head_dims: np.ndarray, keep: LayerKeep) -> Plan:
    """The plan of one layer, with names relative to its block."""
    axes = kept_indices(teacher, layer, head_dims, keep) | {"n_embd": n_embd.indices}
    indices = {name: _index(units) for name, units in axes.items()}
    takes = {}
    for name, is_buffer in _block_tensors(ConfigKey(teacher), layer):
        module, _, leaf = name.rpartition(".")
        if module.startswith("mlp.experts."):
            expert, _, part = module.removeprefix("mlp.experts.").partition(".")
            kept = np.flatnonzero(axes["n_expert"] == int(expert))
            if not len(kept):
                continue
            student_name = f"mlp.experts.{kept[0]}.{part}.{leaf}"
        else:
            student_name = name
        takes[student_name] = Take(name, _take_index(module, leaf, indices), is_buffer)
    return takes


def _root_plan(teacher: Config, n_embd: Keep, tied: bool) -> Plan:
    """The plan of what lies outside the blocks."""
    indices = {"vocab": slice(0, teacher.padded_vocab_size), "n_embd": _index(n_embd.indices)}
    names = ["transformer.wte.weight", "lm_head.weight"]
    names += ["lm_head.bias"] if teacher.lm_head_bias else []
    norm = teacher.norm_class(1)
    names += [f"transformer.ln_f.{leaf}" for leaf, value in norm.named_parameters()]
    takes = {name: Take(name, _take_index(*name.rsplit(".", 1), indices)) for name in names}
    if tied:
        takes["lm_head.weight"] = takes["transformer.wte.weight"]
    return takes


def axes_of(module: str) -> tuple[str, ...]:
    """Along which axis each dimension of a litgpt module's weight runs.

    Args:
        module: Its name; within a block, relative to the block.

    Raises:
        TypeError: If there is no rule for it.
    """
    module = re.sub(r"^mlp\.experts\.\d+\.", "mlp.experts.", module)
    if module not in RULES:
        raise TypeError(f"No slicing rule for {module!r}; add one to litgpt_whittle.index_plan.RULES")
    return RULES[module]


def _take_index(module: str, leaf: str, indices: dict[str, slice | torch.Tensor]) -> tuple[slice | torch.Tensor, ...]:
    axes = axes_of(module) if leaf == "weight" else axes_of(module)[:1]
    return tuple(indices[axis] for axis in axes)


def _index(units: np.ndarray) -> slice | torch.Tensor:
    """A slice for a contiguous run, which keeps a teacher's weight a view, else an index tensor."""
    if (np.diff(units) == 1).all():
        start = int(units[0]) if len(units) else 0
        return slice(start, start + len(units))
    return torch.from_numpy(units.copy())


class ConfigKey:
    """Lets a teacher's config, which litgpt made mutable and unhashable, be the key of a cache by its value."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.text = repr(config)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ConfigKey) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)


@lru_cache(maxsize=1024)
def _block_tensors(teacher: ConfigKey, layer: int) -> tuple[tuple[str, bool], ...]:
    """Name and is-a-buffer of every saved tensor of a teacher's block, as litgpt itself builds it."""
    with torch.device("meta"):
        block = Block(teacher.config, layer)
    parameters = {name for name, _ in block.named_parameters()}
    return tuple((name, name not in parameters) for name in block.state_dict())


def n_params(teacher: Config, subnet: SubNet, tied: bool = False) -> int:
    """Counts a sub-network's parameters from its sizes alone, tied weights once; no model is built."""
    n_embd, head_size = len(subnet.n_embd), len(subnet.head_size)
    layers = (
        layer_params(teacher, layer, n_embd, head_size, *subnet.layer(i).sizes) for i, layer in enumerate(subnet.layers)
    )
    return root_params(teacher, n_embd, tied) + sum(layers)


def root_params(teacher: Config, n_embd: int, tied: bool = False) -> int:
    """Parameters outside the blocks: embedding, final norm, LM head."""
    return _count(_root_plan(teacher, Keep(n_embd), tied))


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
    """Parameters of one layer at these sizes (`n_expert` 0 in a dense layer); affine and growing in each of them."""
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
) -> Plan:
    """The plan of one layer that keeps the first units of these sizes, for its shapes."""
    widths = Keep(n_query_groups), Keep(heads_per_group), Keep(intermediate_size)
    keep = LayerKeep(*widths, Keep(n_expert) if n_expert else None)
    return layer_plan(teacher, layer, Keep(n_embd), np.arange(head_size), keep)


def _count(takes: Plan) -> int:
    """Elements of the distinct teacher parameters that a plan takes."""
    return sum({take.name: take.numel() for take in takes.values() if not take.is_buffer}.values())
