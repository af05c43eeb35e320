"""Which teacher weights a sub-network uses: the choice (`SubNet`) and the index plan that everything else derives from.

A sub-network is a litgpt `Config` plus a plan: for every parameter of the student, the teacher's parameter and one
index per dimension. Forward passes, extraction, parameter counts and importance ordering all read the same plan, so
what was scored cannot differ from what is extracted.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from litgpt.config import Config
from litgpt.model import Block

from litgpt_whittle.errors import UserError
from litgpt_whittle.files import to_yaml, write_text
from litgpt_whittle.rope import HeadCut, cut_head, legal_head_sizes

__all__ = [
    "Keep",
    "LayerKeep",
    "Plan",
    "SubNet",
    "Take",
    "layer_params",
    "legal_head_sizes",
    "n_params",
    "plan",
    "root_params",
]


class Keep:
    """Which units of one dimension are kept: the first n, or a sorted set of indices.

    Immutable and hashable; a set that is just the first n compares equal to `Keep(n)`.

    Args:
        units: A number (the first n) or sorted distinct indices.

    Raises:
        UserError: If nothing is kept, or the indices are negative, unsorted or repeated.
    """

    __slots__ = ("_hash", "_indices", "_n")

    def __init__(self, units: int | Iterable[int] | np.ndarray) -> None:
        if isinstance(units, int | np.integer):
            self._n, self._indices = int(units), None
        else:
            indices = np.array(list(units) if not isinstance(units, np.ndarray) else units, dtype=np.int64)
            _check_sorted(indices)
            self._n = len(indices)
            is_prefix = self._n > 0 and indices[-1] == self._n - 1
            indices.setflags(write=False)
            self._indices = None if is_prefix else indices
        if self._n < 1:
            raise UserError(f"at least one unit must be kept, got {self._n}; choose 1 or more")
        self._hash = hash((self._n, None if self._indices is None else self._indices.tobytes()))

    @classmethod
    def parse(cls, value: int | str | Keep) -> Keep:
        """Reads `512` (the first 512) or `0-511,640-767` (inclusive ranges).

        Raises:
            UserError: If the text is neither.
        """
        if isinstance(value, Keep):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            return cls(value)
        if not isinstance(value, str):
            raise UserError(f"units are given as a number or as ranges such as '0-511,640-767', got {value!r}")
        text = value.strip()
        if text.isdigit():
            return cls(int(text))
        parts = []
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            if not first.isdigit() or (dash and not last.isdigit()):
                raise UserError(f"ranges look like '0-511,640-767', got {value!r}; correct {part!r}")
            if dash and int(last) < int(first):
                raise UserError(f"a range runs upwards, got {part!r} in {value!r}; swap its ends")
            parts.append(np.arange(int(first), int(last if dash else first) + 1))
        return cls(np.concatenate(parts))

    @property
    def is_prefix(self) -> bool:
        """Whether these are the first n units, so that a slice of the teacher's weight is a view."""
        return self._indices is None

    @property
    def indices(self) -> np.ndarray:
        """The kept indices, sorted, int64, shape (n,)."""
        return np.arange(self._n) if self._indices is None else self._indices

    @property
    def largest(self) -> int:
        """The largest kept index."""
        return self._n - 1 if self._indices is None else int(self._indices[-1])

    def to_yaml(self) -> int | str:
        """The compact form that `parse` reads: a number for a prefix, ranges for a set."""
        return self._n if self._indices is None else str(self)

    def __len__(self) -> int:
        return self._n

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Keep):
            return NotImplemented
        return self._hash == other._hash and self._n == other._n and np.array_equal(self.indices, other.indices)

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        if self._indices is None:
            return str(self._n)
        breaks = np.flatnonzero(np.diff(self._indices) != 1)
        firsts = self._indices[np.concatenate(([0], breaks + 1))]
        lasts = self._indices[np.concatenate((breaks, [self._n - 1]))]
        # a lone index is written as a range, so that "7" always means the first seven
        if len(firsts) == 1:
            return f"{firsts[0]}-{lasts[0]}"
        return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(firsts, lasts))

    def __repr__(self) -> str:
        return f"Keep({str(self)!r})" if self._indices is not None else f"Keep({self._n})"

    def __reduce__(self) -> tuple:
        return Keep, (self._n if self._indices is None else self._indices,)


def _check_sorted(indices: np.ndarray) -> None:
    if indices.ndim != 1:
        raise UserError(f"kept indices form one list, got an array of shape {indices.shape}")
    if len(indices) and indices[0] < 0:
        raise UserError(f"kept indices start at 0, got {indices[0]}; remove the negative ones")
    steps = np.diff(indices)
    if (steps == 0).any():
        raise UserError(f"kept indices must be distinct, got {indices[:-1][steps == 0][0]} twice; remove one")
    if (steps < 0).any():
        at = int(np.flatnonzero(steps < 0)[0])
        raise UserError(f"kept indices must be sorted, got {indices[at]} before {indices[at + 1]}; sort them")


PER_LAYER = ("n_query_groups", "heads_per_group", "intermediate_size", "moe_intermediate_size", "n_expert")
"""The fields of a `SubNet` that may differ from layer to layer."""

FIELDS = ("n_embd", "n_layer", "head_size", *PER_LAYER)
"""All fields of a `SubNet`, in the order in which they are written."""


@dataclass(frozen=True)
class LayerKeep:
    """What one layer of the student keeps of its teacher layer."""

    n_query_groups: Keep
    """Query groups (with as many groups as heads: the heads)"""
    heads_per_group: Keep
    """Query heads within each group"""
    intermediate_size: Keep
    """Neurons of the MLP, or of each expert"""
    n_expert: Keep | None
    """Experts, None in a dense layer"""

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Query groups, heads per group, neurons, experts (0 in a dense layer)."""
        n_expert = len(self.n_expert) if self.n_expert is not None else 0
        return len(self.n_query_groups), len(self.heads_per_group), len(self.intermediate_size), n_expert


class SubNet:
    """What a student keeps of a teacher, checked against the teacher's config when it is made.

    Every field takes a number (the first n), ranges such as `"0-511,640-767"`, or a `Keep`; None keeps all. The
    per-layer fields also take a list with one entry per *kept* layer (None where that layer has no such units). Lists
    whose entries agree are the same sub-network as the one value. Immutable, hashable, compared by value.

    Args:
        teacher: The teacher's litgpt config.
        n_embd: Channels of the residual stream.
        n_layer: Layers, kept in order.
        head_size: Dimensions of each head; rotary pairs keep their frequencies (see `litgpt_whittle.rope`).
        n_query_groups: Query groups; heads, where each head has its own keys and values.
        heads_per_group: Query heads within each group, the same in all groups of a layer.
        intermediate_size: MLP neurons (of each expert, where the teacher has no `moe_intermediate_size`).
        moe_intermediate_size: Neurons of each expert, for teachers that set it; shared experts follow it.
        n_expert: Experts. The number must be the same in all layers, the sets may differ.

    Raises:
        UserError: If the choice is illegal for this teacher.
    """

    n_embd: Keep
    n_layer: Keep
    head_size: Keep
    n_query_groups: Keep | tuple[Keep, ...]
    heads_per_group: Keep | tuple[Keep, ...]
    intermediate_size: Keep | tuple[Keep | None, ...] | None
    moe_intermediate_size: Keep | tuple[Keep | None, ...] | None
    n_expert: Keep | tuple[Keep | None, ...] | None

    def __init__(
        self,
        teacher: Config,
        *,
        n_embd: int | str | Keep | None = None,
        n_layer: int | str | Keep | None = None,
        head_size: int | str | Keep | None = None,
        n_query_groups: int | str | Keep | list | tuple | None = None,
        heads_per_group: int | str | Keep | list | tuple | None = None,
        intermediate_size: int | str | Keep | list | tuple | None = None,
        moe_intermediate_size: int | str | Keep | list | tuple | None = None,
        n_expert: int | str | Keep | list | tuple | None = None,
    ) -> None:
        self.teacher = teacher
        self.n_embd = _keep("n_embd", n_embd, teacher.n_embd)
        self.n_layer = _keep("n_layer", n_layer, teacher.n_layer)
        self.head_size = _keep("head_size", head_size, teacher.head_size)
        given = dict(zip(PER_LAYER, (n_query_groups, heads_per_group, intermediate_size, moe_intermediate_size, n_expert)))
        for name, value in given.items():
            setattr(self, name, self._per_layer(name, value))
        self._key = tuple(getattr(self, name) for name in FIELDS)
        self._check_experts()
        self.head_cut  # raises where the head size is illegal

    def _per_layer(self, name: str, value: Any) -> Keep | tuple[Keep | None, ...] | None:
        """One `Keep` where all layers agree, else one entry per kept layer; None where no kept layer has such units."""
        limits = [layer_sizes(self.teacher, layer).get(name) for layer in self.layers]
        values = list(value) if isinstance(value, list | tuple) else [value] * len(limits)
        if len(values) != len(limits):
            raise UserError(f"{name} has {len(values)} entries for {len(limits)} kept layers; give one for each")
        if isinstance(value, list | tuple):
            for i, (entry, limit) in enumerate(zip(values, limits)):
                if entry is not None and limit is None:
                    raise UserError(f"layer {self.layers[i]} of the teacher has no {name}; write null for it")
        elif value is not None and all(limit is None for limit in limits):
            raise UserError(f"no kept layer of the teacher has {name}, got {value!r}; leave it out")
        keeps = [None if limit is None else _keep(name, v, limit) for v, limit in zip(values, limits)]
        distinct = {keep for keep in keeps if keep is not None}
        return tuple(keeps) if len(distinct) > 1 else next(iter(distinct), None)

    def _check_experts(self) -> None:
        keeps = {self.layer(i).n_expert for i in range(len(self))} - {None}
        if len({len(keep) for keep in keeps}) > 1:
            sizes = sorted({len(keep) for keep in keeps})
            raise UserError(
                f"n_expert must be the same number in all layers, got {sizes}; litgpt's router cannot leave out experts"
            )
        for keep in keeps:
            experts_of(self.teacher, keep)

    @property
    def layers(self) -> tuple[int, ...]:
        """The teacher's layer behind each of the student's."""
        return tuple(int(i) for i in self.n_layer.indices)

    def layer(self, index: int) -> LayerKeep:
        """What the student's layer `index` keeps."""
        at = {name: value[index] if isinstance(value := getattr(self, name), tuple) else value for name in PER_LAYER}
        sizes = layer_sizes(self.teacher, self.layers[index])
        width = "moe_intermediate_size" if "moe_intermediate_size" in sizes else "intermediate_size"
        n_expert = at["n_expert"] if "n_expert" in sizes else None
        return LayerKeep(at["n_query_groups"], at["heads_per_group"], at[width], n_expert)

    @cached_property
    def head_cut(self) -> HeadCut:
        """Which dimensions of a head are kept, and the RoPE settings that keep their frequencies."""
        return cut_head(self.teacher, self.head_size.indices if not self.head_size.is_prefix else len(self.head_size))

    @cached_property
    def is_uniform(self) -> bool:
        """Whether all layers have the same sizes, so that a stock litgpt config describes the student."""
        sizes = [self.layer(i).sizes for i in range(len(self))]
        dense = {s for s in sizes if s[3] == 0}
        experts = {s for s in sizes if s[3] > 0}
        attention = {s[:2] for s in sizes}
        return len(attention) == 1 and len(dense) <= 1 and len(experts) <= 1

    @cached_property
    def config(self) -> Config:
        """The student's litgpt config; of a layer-wise student, the one padded to its widest layer."""
        layers = [self.layer(i) for i in range(len(self))]
        dense = [len(k.intermediate_size) for k in layers if k.n_expert is None]
        experts = [len(k.intermediate_size) for k in layers if k.n_expert is not None]
        return self._config(
            n_query_groups=max(len(k.n_query_groups) for k in layers),
            heads_per_group=max(len(k.heads_per_group) for k in layers),
            dense=max(dense, default=None),
            experts=max(experts, default=None),
            n_expert=max((len(k.n_expert) for k in layers if k.n_expert is not None), default=None),
        )

    def layer_config(self, index: int) -> Config:
        """The config that litgpt's `Block` needs to build the student's layer `index` in its true shape."""
        keep = self.layer(index)
        width = len(keep.intermediate_size)
        is_dense = keep.n_expert is None
        return self._config(
            n_query_groups=len(keep.n_query_groups),
            heads_per_group=len(keep.heads_per_group),
            dense=width if is_dense else None,
            experts=None if is_dense else width,
            n_expert=None if is_dense else len(keep.n_expert),
        )

    def _config(
        self, n_query_groups: int, heads_per_group: int, dense: int | None, experts: int | None, n_expert: int | None
    ) -> Config:
        teacher, layers = self.teacher, self.layers
        changes: dict[str, Any] = dict(
            n_embd=len(self.n_embd),
            n_layer=len(layers),
            n_query_groups=n_query_groups,
            n_head=n_query_groups * heads_per_group,
            **self.head_cut.config_changes,
        )
        for name in ("sliding_window_indices", "rope_indices"):  # which kind of attention goes with its layer
            if getattr(teacher, name) is not None:
                changes[name] = [getattr(teacher, name)[layer] for layer in layers]
        if teacher.first_k_dense_replace is not None:
            changes["first_k_dense_replace"] = sum(layer < teacher.first_k_dense_replace for layer in layers)
        if dense is not None:
            changes["intermediate_size"] = dense
        if experts is not None:
            width = "moe_intermediate_size" if teacher.moe_intermediate_size is not None else "intermediate_size"
            changes |= {width: experts, "n_expert": n_expert}
        return dataclasses.replace(teacher, **changes)

    @classmethod
    def full(cls, teacher: Config) -> SubNet:
        """The sub-network that keeps everything."""
        return cls(teacher)

    def replace(self, **changes: Any) -> SubNet:
        """The same choice with some fields changed."""
        return SubNet(self.teacher, **({name: getattr(self, name) for name in FIELDS} | changes))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for YAML or JSON; `from_dict` reads them back."""
        choice = {}
        for name in FIELDS:
            value = getattr(self, name)
            if isinstance(value, tuple):
                choice[name] = [None if keep is None else keep.to_yaml() for keep in value]
            elif value is not None:
                choice[name] = value.to_yaml()
        if self.teacher.n_head == self.teacher.n_query_groups:
            del choice["heads_per_group"]  # each head is its own group
        return choice

    @classmethod
    def from_dict(cls, teacher: Config, choice: Mapping[str, Any]) -> SubNet:
        """Makes a sub-network of `teacher` from what `to_dict` gave.

        Raises:
            UserError: If a key is unknown or the choice is illegal for this teacher.
        """
        if unknown := set(choice) - set(FIELDS):
            raise UserError(f"a sub-network has no {sorted(unknown)[0]!r}; its fields are {', '.join(FIELDS)}")
        return cls(teacher, **choice)

    def save(self, path: Path, **provenance: Any) -> None:
        """Writes the choice as YAML, with where it came from below it."""
        origin = {"teacher": self.teacher.name, "teacher_config": fingerprint(self.teacher)} | provenance
        write_text(path, to_yaml(self.to_dict() | {"provenance": origin}))

    @classmethod
    def load(cls, path: Path, teacher: Config) -> SubNet:
        """Reads a sub-network of `teacher` from YAML.

        Raises:
            UserError: If the file is missing, not YAML, illegal for this teacher, or says it is for another one.
        """
        choice = read_choice(path)
        origin = choice.pop("provenance", None) or {}
        made_for = origin.get("teacher_config")
        if made_for is not None and made_for != fingerprint(teacher):
            raise UserError(
                f"{path} is a sub-network of {origin.get('teacher')!r} ({made_for}), not of {teacher.name!r} "
                f"({fingerprint(teacher)}); name the checkpoint that it was searched in"
            )
        try:
            return cls.from_dict(teacher, choice)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def __len__(self) -> int:
        """The number of layers kept."""
        return len(self.n_layer)

    def __eq__(self, other: object) -> bool:
        return self._key == other._key if isinstance(other, SubNet) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"SubNet({', '.join(f'{name}={value}' for name, value in self.to_dict().items())})"


def read_choice(path: Path) -> dict[str, Any]:
    """Reads a sub-network's YAML without looking at any teacher."""
    try:
        choice = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UserError(f"cannot read the sub-network {str(path)!r}: {error.strerror}; check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise UserError(f"{str(path)!r} is not YAML; a sub-network has lines such as 'n_embd: 512'") from None
    if not isinstance(choice, dict):
        raise UserError(f"{str(path)!r} is not a sub-network; it has lines such as 'n_embd: 512'")
    return choice


def fingerprint(config: Config) -> str:
    """Eight hex digits that tell a teacher's architecture from others, whatever its name."""
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("name", "hf_config")}
    return hashlib.sha256(repr(sorted(fields.items())).encode()).hexdigest()[:8]


def _keep(name: str, value: Any, size: int) -> Keep:
    if value is None:
        return Keep(size)
    try:
        keep = Keep.parse(value)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    if keep.largest >= size:
        what = f"{len(keep)}" if keep.is_prefix else f"index {keep.largest}"
        raise UserError(f"{name} must lie within the teacher's {size}, got {what}; keep at most {size}")
    return keep


def layer_sizes(teacher: Config, layer: int) -> dict[str, int]:
    """The sizes of the teacher's layer `layer`, under the names of a `SubNet`'s per-layer fields."""
    sizes = {"n_query_groups": teacher.n_query_groups, "heads_per_group": teacher.n_head // teacher.n_query_groups}
    is_dense = teacher.mlp_class_name != "LLaMAMoE" or layer < (teacher.first_k_dense_replace or 0)
    if is_dense:
        return sizes | {"intermediate_size": teacher.intermediate_size}
    if teacher.moe_intermediate_size is not None:
        return sizes | {"moe_intermediate_size": teacher.moe_intermediate_size, "n_expert": teacher.n_expert}
    return sizes | {"intermediate_size": teacher.intermediate_size, "n_expert": teacher.n_expert}


def experts_of(teacher: Config, keep: Keep) -> np.ndarray:
    """The kept experts' indices. In grouped routing, "the first n" are the first n / groups of each group.

    Raises:
        UserError: If litgpt's router could not choose among so few, or the groups would differ in size.
    """
    n, per_token = len(keep), teacher.n_expert_per_token
    if n < per_token:
        raise UserError(f"n_expert must be at least n_expert_per_token = {per_token}, got {n}; keep more experts")
    groups = teacher.n_expert_groups
    if not groups:
        return keep.indices
    group_size = teacher.n_expert // groups
    if n % groups:
        raise UserError(f"n_expert must be a multiple of n_expert_groups = {groups}, got {n}; keep {n - n % groups}")
    least = max(teacher.n_topk_scores_per_group, -(-per_token // teacher.n_topk_groups))
    if n // groups < least:
        raise UserError(f"each group needs {least} experts to route to, got {n // groups}; keep {least * groups}")
    if keep.is_prefix:
        return (np.arange(groups)[:, None] * group_size + np.arange(n // groups)).ravel()
    if (counts := np.bincount(keep.indices // group_size, minlength=groups)).min() != counts.max():
        raise UserError(f"every expert group must keep the same number, got {counts.tolist()}; balance n_expert")
    return keep.indices


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
        for dim, index in enumerate(self.index):
            if isinstance(index, slice):
                tensor = tensor.narrow(dim, index.start, index.stop - index.start)
        for dim, index in enumerate(self.index):
            if not isinstance(index, slice):
                tensor = tensor.index_select(dim, index.to(tensor.device))
        return tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The student's shape."""
        return tuple(i.stop - i.start if isinstance(i, slice) else len(i) for i in self.index)

    def numel(self) -> int:
        """The number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))


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
        for name, take in _layer_plan(teacher, layer, subnet.n_embd, subnet.head_cut.dims, subnet.layer(i)).items():
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


def _axes(teacher: Config, layer: int, head_dims: np.ndarray, keep: LayerKeep) -> dict[str, np.ndarray]:
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


def _layer_plan(teacher: Config, layer: int, n_embd: Keep, head_dims: np.ndarray, keep: LayerKeep) -> Plan:
    """The plan of one layer, with names relative to its block."""
    axes = _axes(teacher, layer, head_dims, keep) | {"n_embd": n_embd.indices}
    indices = {name: _index(units) for name, units in axes.items()}
    takes = {}
    for name, is_buffer in _block_tensors(_Key(teacher), layer):
        module, _, leaf = name.rpartition(".")
        if module.startswith("mlp.experts."):
            expert, _, part = module.removeprefix("mlp.experts.").partition(".")
            kept = np.flatnonzero(axes["n_expert"] == int(expert))
            if not len(kept):
                continue
            student_name, module = f"mlp.experts.{kept[0]}.{part}.{leaf}", f"mlp.experts.{part}"
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


def _take_index(module: str, leaf: str, indices: dict[str, slice | torch.Tensor]) -> tuple[slice | torch.Tensor, ...]:
    if module not in RULES:
        raise TypeError(f"No slicing rule for {module!r}; add one to litgpt_whittle.subnet.RULES")
    axes = RULES[module] if leaf == "weight" else RULES[module][:1]
    return tuple(indices[axis] for axis in axes)


def _index(units: np.ndarray) -> slice | torch.Tensor:
    """A slice for a contiguous run, which keeps a teacher's weight a view, else an index tensor."""
    if len(units) == 0 or units[-1] - units[0] == len(units) - 1:
        start = int(units[0]) if len(units) else 0
        return slice(start, start + len(units))
    return torch.from_numpy(units.copy())


class _Key:
    """Lets a teacher's config, which litgpt made mutable and unhashable, be the key of a cache by its value."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.text = repr(config)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)


@lru_cache(maxsize=1024)
def _block_tensors(teacher: _Key, layer: int) -> tuple[tuple[str, bool], ...]:
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
    return _layer_params(_Key(teacher), layer, *sizes)


@lru_cache(maxsize=2**16)
def _layer_params(teacher: _Key, layer: int, n_embd: int, head_size: int, *sizes: int) -> int:
    groups, per_group, neurons, n_expert = sizes
    keep = LayerKeep(Keep(groups), Keep(per_group), Keep(neurons), Keep(n_expert) if n_expert else None)
    return _count(_layer_plan(teacher.config, layer, Keep(n_embd), np.arange(head_size), keep))


def _count(takes: Plan) -> int:
    """Elements of the distinct teacher parameters that a plan takes."""
    return sum({take.name: take.numel() for take in takes.values() if not take.is_buffer}.values())
