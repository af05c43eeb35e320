"""Sub-networks of a teacher: the kept channels, layers, heads, neurons and experts.

A sub-network is a litgpt `Config` plus an index plan. `SubNet` holds the kept units and derives the student's config;
`litgpt_whittle.index_plan` maps it to slices of the teacher's weights, from which everything else follows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from litgpt.config import Config

from litgpt_whittle.errors import UserError
from litgpt_whittle.families import filled_heads, shares_channels
from litgpt_whittle.layer_units import ATTENTION, PER_LAYER, LayerUnits, experts_of, layer_sizes
from litgpt_whittle.rope import HeadCut, cut_head
from litgpt_whittle.subnet_file import fingerprint, read_choice, without_provenance, write_choice
from litgpt_whittle.unit_index import UnitIndex

__all__ = [  # some of these names are defined in `layer_units` and `subnet_file`, but imported from here
    "ATTENTION",
    "DROPS",
    "FIELDS",
    "LAYER_SETTINGS",
    "PER_LAYER",
    "LayerUnits",
    "SubNet",
    "experts_of",
    "fingerprint",
    "layer_sizes",
    "read_choice",
]

DROPS = {"drop_attention": "attn", "drop_mlp": "mlp"}
"""Fields of a `SubNet` that list the layers kept without their attention or MLP, with litgpt's name of that part"""

FIELDS = ("n_embd", "n_layer", "head_size", *PER_LAYER, *DROPS)
"""All fields of a `SubNet`, in the order of the YAML file."""

LAYER_SETTINGS = ("sliding_window_indices", "rope_indices")
"""litgpt's settings with one entry per layer."""


class SubNet:
    """A sub-network of a teacher, validated against the teacher's config at construction.

    Every field takes a number (the first n), ranges such as `"0-511,640-767"`, or a `UnitIndex`; None keeps all units.
    Per-layer fields also take a list with one entry per *kept* layer (None for layers without such units; entries for
    dropped sub-layers are ignored). A list of equal entries gives the same sub-network as a single value. Instances are
    immutable, hashable and compared by value.

    Args:
        teacher: The teacher's litgpt config.
        n_embd: Channels of the residual stream.
        n_layer: Layers; their order does not change.
        head_size: Dimensions of each head; rotary pairs keep their frequencies (see `litgpt_whittle.rope`).
        n_query_groups: Query groups; these are the heads if each head has its own keys and values.
        heads_per_group: Query heads within each group, the same in all groups of a layer.
        intermediate_size: MLP neurons (of each expert, if the teacher has no `moe_intermediate_size`).
        moe_intermediate_size: Neurons of each expert, for teachers that set it; also applied to shared experts.
        n_expert: Experts. All layers must keep the same number of experts, but may keep different ones.
        drop_attention: Layers of the teacher that are kept without their attention; by default none.
        drop_mlp: Layers of the teacher that are kept without their MLP, or mixture of experts; by default none.

    Raises:
        UserError: If the sub-network is invalid for this teacher.
    """

    n_embd: UnitIndex
    n_layer: UnitIndex
    head_size: UnitIndex
    n_query_groups: UnitIndex | tuple[UnitIndex | None, ...]
    heads_per_group: UnitIndex | tuple[UnitIndex | None, ...]
    intermediate_size: UnitIndex | tuple[UnitIndex | None, ...] | None
    moe_intermediate_size: UnitIndex | tuple[UnitIndex | None, ...] | None
    n_expert: UnitIndex | tuple[UnitIndex | None, ...] | None
    drop_attention: UnitIndex | None
    drop_mlp: UnitIndex | None

    def __init__(
        self,
        teacher: Config,
        *,
        n_embd: int | str | UnitIndex | None = None,
        n_layer: int | str | UnitIndex | None = None,
        head_size: int | str | UnitIndex | None = None,
        n_query_groups: int | str | UnitIndex | list | tuple | None = None,
        heads_per_group: int | str | UnitIndex | list | tuple | None = None,
        intermediate_size: int | str | UnitIndex | list | tuple | None = None,
        moe_intermediate_size: int | str | UnitIndex | list | tuple | None = None,
        n_expert: int | str | UnitIndex | list | tuple | None = None,
        drop_attention: int | str | UnitIndex | None = None,
        drop_mlp: int | str | UnitIndex | None = None,
    ) -> None:
        self.teacher = teacher
        self.n_embd = _keep("n_embd", n_embd, teacher.n_embd)
        self.n_layer = _keep("n_layer", n_layer, teacher.n_layer)
        self.head_size = _keep("head_size", head_size, teacher.head_size)
        self.drop_attention, self.drop_mlp = (
            None if layers is None else _keep(name, layers, teacher.n_layer)
            for name, layers in zip(DROPS, (drop_attention, drop_mlp))
        )
        self._lacking = {part: _layers_in(getattr(self, name)) for name, part in DROPS.items()}
        self._check_drops()
        given = dict(
            zip(PER_LAYER, (n_query_groups, heads_per_group, intermediate_size, moe_intermediate_size, n_expert))
        )
        for name, value in given.items():
            setattr(self, name, self._per_layer(name, value))
        self._key = tuple(getattr(self, name) for name in FIELDS)
        self._check_experts()
        _ = self.head_cut  # raises if the head size is invalid

    def _per_layer(self, name: str, value: Any) -> UnitIndex | tuple[UnitIndex | None, ...] | None:
        """Return one `UnitIndex` if all layers agree, else one per kept layer; None if no kept layer has such units."""
        theirs = [layer_sizes(self.teacher, layer).get(name) for layer in self.layers]
        values = list(value) if isinstance(value, list | tuple) else [value] * len(theirs)
        if len(values) != len(theirs):
            raise UserError(f"{name} has {len(values)} entries for {len(theirs)} kept layers; give one for each")
        if isinstance(value, list | tuple):
            for i, (entry, limit) in enumerate(zip(values, theirs)):
                if entry is not None and limit is None:
                    raise UserError(f"layer {self.layers[i]} of the teacher has no {name}; write null for it")
        elif value is not None and all(limit is None for limit in theirs):
            raise UserError(f"no kept layer of the teacher has {name}, got {value!r}; leave it out")
        limits = [None if layer in self._without(name) else n for layer, n in zip(self.layers, theirs)]
        keeps = [None if limit is None else _keep(name, v, limit) for v, limit in zip(values, limits)]
        distinct = {keep for keep in keeps if keep is not None}
        return tuple(keeps) if len(distinct) > 1 else next(iter(distinct), None)

    def _without(self, name: str) -> frozenset[int]:
        """Return the teacher's layers in which the sub-layer that has the units `name` is dropped."""
        return self._lacking["attn" if name in ATTENTION else "mlp"]

    def _check_drops(self) -> None:
        layers = set(self.layers)
        for name, part in DROPS.items():
            if others := self._lacking[part] - layers:
                raise UserError(f"{name} lists layer {min(others)}, which n_layer does not keep; remove it from {name}")
            if self._lacking[part] == layers:
                raise UserError(f"{name} lists all {len(layers)} kept layers; leave at least one out")
        if both := self._lacking["attn"] & self._lacking["mlp"]:
            raise UserError(
                f"layer {min(both)} has neither attention nor MLP; drop the layer instead: remove it from n_layer, "
                "drop_attention and drop_mlp"
            )

    def _check_experts(self) -> None:
        keeps = {keep for i in range(len(self)) if (keep := self.layer(i).n_expert) is not None}
        if len({len(keep) for keep in keeps}) > 1:
            sizes = sorted({len(keep) for keep in keeps})
            raise UserError(
                f"n_expert must be the same number in all layers for litgpt's router, got {sizes}; choose one of them"
            )
        for keep in keeps:
            experts_of(self.teacher, keep)

    @property
    def layers(self) -> tuple[int, ...]:
        """Index of the teacher's layer for each student layer."""
        return tuple(int(i) for i in self.n_layer.indices)

    def layer(self, index: int) -> LayerUnits:
        """Return the kept units of the student's layer `index`."""
        at = {name: value[index] if isinstance(value := getattr(self, name), tuple) else value for name in PER_LAYER}
        layer = self.layers[index]
        sizes = layer_sizes(self.teacher, layer)
        width = "moe_intermediate_size" if "moe_intermediate_size" in sizes else "intermediate_size"
        names = (*ATTENTION, width, "n_expert")
        return LayerUnits(*(at[name] if name in sizes and layer not in self._without(name) else None for name in names))

    @property
    def drops_sublayers(self) -> bool:
        """True if a kept layer lacks its attention or its MLP."""
        return self.drop_attention is not None or self.drop_mlp is not None

    @cached_property
    def n_intact(self) -> int:
        """Number of leading layers that are equal to the teacher's and that no repair changes.

        A repair changes a layer if the sub-layer after it is dropped, to compensate for that.
        """
        full = SubNet.full(self.teacher)
        if (self.n_embd, self.head_size) != (full.n_embd, full.head_size):
            return 0
        layers, n = [*self.layers, self.teacher.n_layer], 0
        while n < len(self) and layers[n : n + 2] == [n, n + 1] and self.layer(n) == full.layer(n):
            if n + 1 < len(self) and self.begins_inside(n + 1):
                return n
            n += 1
        return n

    def begins_inside(self, index: int) -> bool:
        """Return whether the student's layer `index` lacks its attention, in a model whose MLP follows attention.

        The hidden states before such a layer correspond to the teacher's between attention and MLP.
        """
        return not self.teacher.parallel_residual and self.layer(index).parts == ("mlp",)

    @property
    def begins_late(self) -> bool:
        """True if the teacher's first sub-layers are dropped; a repair replaces their outputs in the embedding."""
        return self.layers[0] > 0 or self.begins_inside(0)

    @cached_property
    def head_cut(self) -> HeadCut:
        """Kept dimensions of a head, and the RoPE settings that preserve their frequencies."""
        return cut_head(self.teacher, self.head_size.indices if not self.head_size.is_prefix else len(self.head_size))

    @cached_property
    def is_uniform(self) -> bool:
        """True if a stock litgpt config describes the student without padding.

        This holds if all layers have the same sizes, and `config` adds no heads for the class in `transformers`.
        """
        return self.layers_are_alike and self.config.n_head == self._widest.n_head

    @cached_property
    def layers_are_alike(self) -> bool:
        """True if all layers have the same sizes; only MLPs of dense layers may differ from those with experts."""
        if self.drops_sublayers:
            return False
        sizes = [self.layer(i).sizes for i in range(len(self))]
        dense = {s for s in sizes if s[3] == 0}
        experts = {s for s in sizes if s[3] > 0}
        attention = {s[:2] for s in sizes}
        return len(attention) == 1 and len(dense) <= 1 and len(experts) <= 1

    @cached_property
    def config(self) -> Config:
        """The student's litgpt config, padded to the widest layer if layers differ in size.

        If the teacher's class in `transformers` requires n_head · head_size = n_embd, heads are added to fulfil that
        where possible, since litgpt's converter and `litgpt evaluate` use this config.
        """
        widest = self._widest
        filled = filled_heads(widest) if shares_channels(self.teacher) else None
        if filled is None:
            return widest
        return dataclasses.replace(widest, n_head=filled[0] * filled[1], n_query_groups=filled[0])

    @cached_property
    def _widest(self) -> Config:
        """Config of the smallest model into which each of the student's layers fits."""
        return self._config([self.layer(i).sizes for i in range(len(self))])

    def layer_config(self, index: int) -> Config:
        """Return the config for litgpt's `Block` to build the student's layer `index` in its true shape.

        A dropped sub-layer gets the smallest or the teacher's size (see `litgpt_whittle.student_block`).
        """
        return self._config([self.layer(index).sizes])

    def _config(self, sizes: list[tuple[int, int, int, int]]) -> Config:
        """Return the student's config with layers as large as the largest of `sizes` (see `LayerUnits.sizes`)."""
        teacher, layers = self.teacher, self.layers
        n_query_groups, heads_per_group = (max(1, *(own[i] for own in sizes)) for i in range(2))
        dense = max((neurons for _, _, neurons, n_expert in sizes if not n_expert), default=0)
        experts = max((neurons for _, _, neurons, n_expert in sizes if n_expert), default=0)
        changes: dict[str, Any] = dict(
            n_embd=len(self.n_embd),
            n_layer=len(layers),
            n_query_groups=n_query_groups,
            n_head=n_query_groups * heads_per_group,
            **self.head_cut.config_changes,
        )
        for name in LAYER_SETTINGS:  # a layer keeps its kind of attention
            if getattr(teacher, name) is not None:
                changes[name] = [getattr(teacher, name)[layer] for layer in layers]
        if teacher.first_k_dense_replace is not None:
            changes["first_k_dense_replace"] = sum(layer < teacher.first_k_dense_replace for layer in layers)
        if dense:
            changes["intermediate_size"] = dense
        if experts:
            width = "moe_intermediate_size" if teacher.moe_intermediate_size is not None else "intermediate_size"
            changes |= {width: experts, "n_expert": max(n_expert for *_, n_expert in sizes)}
        return dataclasses.replace(teacher, **changes)

    @classmethod
    def full(cls, teacher: Config) -> SubNet:
        """Return the sub-network that keeps all units."""
        return cls(teacher)

    def replace(self, **changes: Any) -> SubNet:
        """Return a copy with some fields changed."""
        return SubNet(self.teacher, **({name: getattr(self, name) for name in FIELDS} | changes))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values for YAML or JSON; `from_dict` reads them."""
        choice = {}
        for name in FIELDS:
            value = getattr(self, name)
            if name in DROPS and value is not None:
                choice[name] = value.to_ranges()  # a number of first layers would look like the index of one layer
            elif isinstance(value, tuple):
                choice[name] = [None if keep is None else keep.to_yaml() for keep in value]
            elif value is not None:
                choice[name] = value.to_yaml()
        if self.teacher.n_head == self.teacher.n_query_groups:
            del choice["heads_per_group"]  # each head is its own group
        return choice

    @classmethod
    def from_dict(cls, teacher: Config, choice: Mapping[str, Any]) -> SubNet:
        """Create a sub-network of `teacher` from the output of `to_dict`.

        Raises:
            UserError: If a key is unknown or the sub-network is invalid for this teacher.
        """
        if unknown := set(choice) - set(FIELDS):
            raise UserError(f"a sub-network has no {min(unknown)!r}; its fields are {', '.join(FIELDS)}")
        return cls(teacher, **choice)

    def save(self, path: Path, **provenance: Any) -> None:
        """Save the sub-network as YAML, followed by its provenance."""
        write_choice(path, self.to_dict(), self.teacher, **provenance)

    @classmethod
    def load(cls, path: Path, teacher: Config) -> SubNet:
        """Load a sub-network of `teacher` from YAML.

        Raises:
            UserError: If the file is missing, not YAML, invalid for this teacher, or made for another teacher.
        """
        return cls.from_saved(read_choice(path), teacher, str(path))

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any], teacher: Config, name: str = "sub_network.yaml") -> SubNet:
        """Create a sub-network from the content of a file written by `save`.

        Args:
            saved: Content of the file.
            teacher: The teacher's config.
            name: Name of the file in error messages.

        Raises:
            UserError: If the sub-network is invalid for this teacher, or was made for another teacher.
        """
        choice = without_provenance(saved, teacher, name)
        try:
            return cls.from_dict(teacher, choice)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None

    def __len__(self) -> int:
        """Return the number of kept layers."""
        return len(self.n_layer)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SubNet):
            return NotImplemented
        return self._key == other._key and (
            self.teacher is other.teacher or fingerprint(self.teacher) == fingerprint(other.teacher)
        )

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"SubNet({', '.join(f'{name}={value}' for name, value in self.to_dict().items())})"


def _keep(name: str, value: Any, size: int) -> UnitIndex:
    if value is None:
        return UnitIndex(size)
    try:
        keep = UnitIndex.parse(value)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    if keep.largest >= size:
        what = f"{len(keep)}" if keep.is_prefix else f"index {keep.largest}"
        raise UserError(f"{name} must lie within the teacher's {size}, got {what}; keep at most {size}")
    return keep


def _layers_in(keep: UnitIndex | None) -> frozenset[int]:
    return frozenset() if keep is None else frozenset(keep.indices.tolist())
