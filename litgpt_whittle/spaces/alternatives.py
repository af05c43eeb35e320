"""Alternatives to a layer of the teacher, which a search combines: drop the layer or a sub-layer, or keep fewer units.

Each alternative is measured on its own: as the teacher with this single change. Channels and head size stay at the
teacher's sizes. The parameter count and other closed-form costs of a combination are therefore sums over its layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from litgpt_whittle.ranking.order import Order
from litgpt_whittle.spaces.drops import drops_of
from litgpt_whittle.spaces.sizes import EVERY, nearest_size
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.subnet import ATTENTION, DROPS, SubNet, layer_sizes
from litgpt_whittle.unit_index import UnitIndex

DROPPED = "n_layer"
"""Name of the alternative that drops a layer"""

SUBLAYER_TITLES = {"drop_attention": "attention", "drop_mlp": "MLP"}
"""Titles of the alternatives that drop a sub-layer, by their names, which are fields of `SubNet`"""

_TITLE = re.compile(r"(?:layer (\d+)|all layers): (?:dropped|(attention|MLP) dropped|(\w+) (\d+))")


class Alternative(NamedTuple):
    """A single change of the teacher: a dropped layer or sub-layer, or fewer units of one kind."""

    layer: int
    """The teacher's layer; `EVERY` for experts, because all layers have the same number of them"""
    name: str
    """Name of the reduced size, `DROPPED`, or one of `SUBLAYER_TITLES`"""
    size: int
    """Number of kept units"""

    def __str__(self) -> str:
        where = "all layers" if self.layer == EVERY else f"layer {self.layer}"
        if self.name == DROPPED:
            return f"{where}: dropped"
        title = SUBLAYER_TITLES.get(self.name)
        return f"{where}: {self.name} {self.size}" if title is None else f"{where}: {title} dropped"

    @classmethod
    def parse(cls, text: str) -> Alternative | None:
        """Parse the output of `str`; None if the text does not have this form."""
        match = _TITLE.fullmatch(text)
        if match is None:
            return None
        layer, sublayer, name, size = match.groups()
        if sublayer is not None:
            name = next(field for field, title in SUBLAYER_TITLES.items() if title == sublayer)
        return cls(EVERY if layer is None else int(layer), name or DROPPED, int(size or 0))


LayerChoice = dict[str, int] | None
"""Sizes of a layer, by the names of `layer_sizes`, 0 in a dropped sub-layer; None if the layer is dropped"""


def sublayer_sizes(field: str, choice: Mapping[str, int]) -> dict[str, int]:
    """Return the sizes that belong to a layer's attention (`field` is `drop_attention`) or to its MLP (`drop_mlp`)."""
    return {name: size for name, size in choice.items() if (name in ATTENTION) == (field == "drop_attention")}


class Alternatives:
    """Alternatives of a space, and sub-networks that combine them.

    Args:
        space: The space.
        shares: Shares of a layer's units to measure, in addition to the full layer.
        n_between: Number of unmeasured MLP widths to offer between two adjacent measured widths.
    """

    def __init__(self, space: Space, shares: Sequence[float], n_between: int = 0) -> None:
        self.space, self.teacher, self.shares, self.n_between = space, space.teacher, tuple(shares), n_between
        self.sizes = [layer_sizes(self.teacher, layer) for layer in range(self.teacher.n_layer)]
        self.units: dict[Alternative, Mapping[int, UnitIndex]] = {}
        """Kept units of each measured alternative, by layer; `_keep` chooses the units of all other sizes"""

    @cached_property
    def levels(self) -> dict[str, list[int]]:
        """Measured sizes by kind of units, each list from the teacher's size downwards."""
        grids, levels = self.space.sizes, {}
        for name in dict.fromkeys(name for sizes in self.sizes for name in sizes):
            grid = grids.own_grid(name, self.teacher.n_embd, self.teacher.head_size)
            found = {nearest_size(grid, share) for share in self.shares}
            levels[name] = [grid[-1], *sorted(found - {grid[-1]}, reverse=True)]
        return levels

    @cached_property
    def offered(self) -> dict[str, list[int]]:
        """Sizes that combinations may have by kind of units, each list from the teacher's size downwards."""
        offered = {name: list(levels) for name, levels in self.levels.items()}
        for name in offered:
            if name.endswith("intermediate_size"):
                grid = self.space.sizes.own_grid(name, self.teacher.n_embd, self.teacher.head_size)
                pairs = pairwise(self.levels[name])
                aims = [size for above, below in pairs for size in np.linspace(above, below, self.n_between + 2)]
                between = {nearest_size(grid, aim / grid[-1]) for aim in aims}
                offered[name] = sorted(between.union(self.levels[name]), reverse=True)
        return offered

    @cached_property
    def droppable(self) -> set[int]:
        """Layers that the space may drop."""
        sizes, n_layer = self.space.sizes, self.teacher.n_layer
        n_kept = sizes.grids["n_layer"][0]
        if n_kept == n_layer:
            return set()
        return set(range(n_layer)) - set(sizes.layer_order[:n_kept] if sizes.layer_order is not None else ())

    @cached_property
    def sublayers(self) -> tuple[str, ...]:
        """Names of the alternatives that drop a sub-layer, for the sub-layers that the space may drop."""
        space = self.space.sizes
        return tuple(name for name, part in DROPS.items() if space.may_drop and part in space.args.sublayers)

    @cached_property
    def all(self) -> list[Alternative]:
        """All alternatives, layer by layer; alternatives for experts come last."""
        found = []
        for layer, sizes in enumerate(self.sizes):
            found += [Alternative(layer, DROPPED, 0)] if layer in self.droppable else []
            found += [Alternative(layer, name, 0) for name in self.sublayers]
            for name in sizes:
                found += [Alternative(layer, name, n) for n in self.levels[name][1:] if name != "n_expert"]
        return found + [Alternative(EVERY, "n_expert", n) for n in self.levels.get("n_expert", [])[1:]]

    @cached_property
    def index(self) -> dict[Alternative, int]:
        """Position of each alternative in `all`."""
        return {alternative: i for i, alternative in enumerate(self.all)}

    # sub-networks -----------------------------------------------------------------------------------------------------

    def alone(self, alternative: Alternative, order: Order | None = None) -> SubNet:
        """Return the teacher with this single change.

        Args:
            alternative: The change.
            order: The teacher's units by importance; by default the first units are kept.
        """
        n_layer = self.teacher.n_layer
        if alternative.name == DROPPED:
            return SubNet(self.teacher, n_layer=UnitIndex(np.delete(np.arange(n_layer), alternative.layer)))
        if alternative.name in DROPS:
            return SubNet.full(self.teacher).replace(**{alternative.name: UnitIndex([alternative.layer])})
        keeps: list[UnitIndex | None] = []
        for layer, sizes in enumerate(self.sizes):
            if alternative.layer not in (layer, EVERY) or alternative.name not in sizes:
                keeps.append(None)
            elif order is None:
                keeps.append(UnitIndex(alternative.size))
            else:
                keeps.append(order.best(alternative.name, layer, alternative.size))
        fields: dict[str, Any] = {alternative.name: keeps}
        return SubNet(self.teacher, **fields)

    def note_units(self, alternative: Alternative, alone: SubNet) -> None:
        """Record the units of a measured alternative, so that combinations keep the same units."""
        if alternative.name != DROPPED and alternative.name not in DROPS:
            layers = range(self.teacher.n_layer) if alternative.layer == EVERY else [alternative.layer]
            field = "intermediate_size" if alternative.name.endswith("intermediate_size") else alternative.name
            self.units[alternative] = {
                layer: getattr(alone.layer(layer), field) for layer in layers if alternative.name in self.sizes[layer]
            }

    def combined(self, choices: Sequence[LayerChoice]) -> SubNet:
        """Return the sub-network that combines the choices, one for each layer of the teacher."""
        kept = {layer: choice for layer, choice in enumerate(choices) if choice is not None}
        fields: dict[str, Any] = {"n_layer": UnitIndex(list(kept))}
        for i, (layer, choice) in enumerate(kept.items()):
            for name, size in choice.items():
                if size:
                    fields.setdefault(name, [None] * len(kept))[i] = self._keep(name, layer, size)
        for field in DROPS:
            lacking = [layer for layer, choice in kept.items() if not all(sublayer_sizes(field, choice).values())]
            fields |= {field: UnitIndex(lacking)} if lacking else {}
        return SubNet(self.teacher, **fields)

    def _keep(self, name: str, layer: int, size: int) -> UnitIndex:
        at = EVERY if name == "n_expert" else layer
        if (measured := self.units.get(Alternative(at, name, size), {}).get(layer)) is not None:
            return measured
        if self.space.order is not None:
            return self.space.order.best(name, layer, size)
        # between two measured sizes: all units of the smaller one, then the first units that only the larger one has
        units: dict[int, None] = {}
        for level in reversed(self.levels[name]):
            known = self.units.get(Alternative(at, name, level), {}).get(layer)
            units |= dict.fromkeys(range(level) if known is None else known.indices)
            if level >= size:
                break
        return UnitIndex(sorted(list(units)[:size]))

    def weights(self, subnet: SubNet) -> np.ndarray | None:
        """Return the weight of each alternative in a sub-network, shape (n_alternatives,): 1 if it occurs, else 0.

        For a size between two measured sizes, both have interpolated weights. None if alternatives cannot
        describe the sub-network, because it has fewer channels or a smaller head size than the teacher, or lacks a
        layer or sub-layer that the space always keeps.
        """
        if len(subnet.n_embd) < self.teacher.n_embd or len(subnet.head_size) < self.teacher.head_size:
            return None
        weights = np.zeros(len(self.all))
        for layer in set(range(self.teacher.n_layer)) - set(subnet.layers):
            if (at := self.index.get(Alternative(layer, DROPPED, 0))) is None:
                return None
            weights[at] = 1.0
        for layer, part in drops_of(subnet).items():
            name = next(name for name, own in DROPS.items() if own == part)
            if (at := self.index.get(Alternative(layer, name, 0))) is None:
                return None
            weights[at] = 1.0
        for i, layer in enumerate(subnet.layers):
            names = [*ATTENTION, next(name for name in self.sizes[layer] if name.endswith("intermediate_size"))]
            names += ["n_expert"] if "n_expert" in self.sizes[layer] else []
            for name, size in zip(names, subnet.layer(i).sizes):
                at = EVERY if name == "n_expert" else layer
                for level, share in self.between(name, size) if size else ():
                    if level < self.levels[name][0]:
                        weights[self.index[Alternative(at, name, level)]] = share
        return weights

    def between(self, name: str, size: int) -> list[tuple[int, float]]:
        """Return the measured sizes adjacent to a size, with their interpolation weights."""
        levels = self.levels[name]
        below = next((level for level in levels if level <= size), levels[-1])
        above = next((level for level in reversed(levels) if level >= size), levels[0])
        if above == below or size < levels[-1]:
            return [(below, 1.0)]
        part = (size - below) / (above - below)
        return [(below, 1.0 - part), (above, part)]
