"""Simple starts of a search: sub-networks reduced in only a few dimensions, as large as the bin allows.

A sub-network reduced at random in all dimensions loses too much of a real pretrained model. One with only fewer neurons
or only fewer layers does not. Each idea meets the bin by construction: all dimensions but one are set, and the last
dimension is solved for.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from litgpt_whittle.ranking.order import Order
from litgpt_whittle.spaces.sizes import EVERY, Sizes, nearest_size
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.subnet import SubNet

DIMENSIONS = {
    "neurons": ("intermediate_size", "moe_intermediate_size"),
    "heads": ("n_query_groups",),
    "heads within groups": ("heads_per_group",),
    "channels": ("n_embd",),
    "experts": ("n_expert",),
}
"""Names of the sizes that belong to each dimension of an idea"""

Layers = tuple[int, ...]


class Kept(NamedTuple):
    """Kept layers, and the dropped sub-layer of each layer that lacks one (see `Sizes`)."""

    layers: Layers
    drops: Mapping[int, str] = MappingProxyType({})


class Start(NamedTuple):
    """A sub-network to evaluate at the start of a search."""

    origin: str
    """Name of the idea that it implements"""
    subnet: SubNet


class Idea(NamedTuple):
    """A way to remove the parameters above the bin: a portion by dropping layers, the rest by reducing dimensions.

    The dimensions are all reduced to about the same share of the teacher's sizes.
    """

    dimensions: tuple[str, ...] = ()
    """Names in `DIMENSIONS`; the last one that may shrink is solved for"""
    layers: str = ""
    """Method of choosing layers, by its name in `Builder.choosers`; all layers are kept by default"""
    portion: float = 1.0
    """Share of the parameters above the bin to remove by dropping layers or sub-layers"""
    sublayer: str = ""
    """Sub-layer to drop instead of whole layers, where it matters least: `attn` or `mlp`"""

    @property
    def name(self) -> str:
        part = "" if not self.dimensions else f"{self.portion:.0%} by "
        dropped = {"attn": "attention", "mlp": "MLPs"}.get(self.sublayer) or (self.layers and f"layers ({self.layers})")
        return " and ".join(filter(None, (dropped and part + dropped, *self.dimensions)))


def ideas(best: str, sublayers: Sequence[str] = ()) -> list[Idea]:
    """Return all ideas, the most different ones first, because a short search tries only the first of them.

    Args:
        best: Method of choosing layers for the ideas that are tried with a single method.
        sublayers: Sub-layers that may be dropped, by litgpt's names.
    """
    ways = dict.fromkeys((best, "evenly", "middle", "evenly inside"))
    second = next(way for way in ways if way != best)
    return [
        Idea(("neurons",)),
        Idea((), best),
        *(Idea((), sublayer=part) for part in sublayers),
        *(Idea(("neurons",), portion=0.25, sublayer=part) for part in sublayers if part == "attn"),
        Idea(("experts",)),
        Idea(("heads", "neurons")),
        Idea(("neurons",), best, 0.5),
        Idea(("channels",)),
        Idea(("heads within groups", "neurons")),
        *(Idea((), way) for way in ways if way != best),
        Idea(("experts", "neurons")),
        Idea(("channels", "neurons")),
        Idea(("neurons",), best, 0.25),
        Idea(("neurons",), best, 0.75),
        Idea(("neurons",), second, 0.5),
        Idea(("heads", "neurons"), best, 0.5),
        Idea(("channels", "heads", "neurons")),
    ]


def simple_starts(space: Space, order: Order | None = None, by_units: bool = True, n_sizes: int = 1) -> list[Start]:
    """Build the simple starts of a space; ideas that cannot meet its bin are omitted.

    Args:
        space: The space. A coarse space keeps the first units, or the best units by its `order`.
        order: The teacher's layers and units by importance, if known.
        by_units: If true, choose units and layers by `order`; if false, only layers.
        n_sizes: Number of target sizes per idea, evenly spaced from the bin's upper end downwards.

    Returns:
        Distinct sub-networks of the space, each as large as its target size and the limits allow.
    """
    lo, hi = max(space.bin.lo, space.sizes.smallest), min(space.bin.hi, space.sizes.largest)
    found: dict[SubNet, Start] = {}
    for i in range(n_sizes):
        builder = Builder(space, hi - (hi - lo) * i // n_sizes, order, by_units)
        for idea in ideas(builder.best, space.sizes.args.sublayers if space.sizes.may_drop else ()):
            subnet = builder.build(idea)
            if subnet is not None:
                found.setdefault(subnet, Start(idea.name, subnet))
    return list(found.values())


class Builder:
    """Builder of sub-networks of a maximum size from ideas.

    Args:
        space: The space.
        most: Maximum number of parameters.
        order: The teacher's layers and units by importance.
        by_units: If true, choose units and layers by `order`; if false, only layers.
    """

    def __init__(self, space: Space, most: int, order: Order | None, by_units: bool) -> None:
        self.space, self.most, self.order = space, most, order
        self.units = order if by_units else None
        self.n_layer, self.grids = space.teacher.n_layer, space.sizes.grids

    @cached_property
    def choosers(self) -> dict[str, Callable[[int], Layers]]:
        """Methods of choosing n layers, by name."""
        if (prescribed := self.space.sizes.layer_order) is not None:
            return {self.space.sizes.args.layers: lambda n: tuple(sorted(prescribed[:n]))}
        ways: dict[str, Callable[[int], Layers]] = {
            "evenly": self._evenly,
            "middle": self._around_middle,
            "evenly inside": self._evenly_inside,
        }
        if (order := self.order) is not None:
            ways["importance"] = lambda n: tuple(sorted(order.n_layer[:n].tolist()))
        return ways

    @property
    def best(self) -> str:
        """Name of the method of choosing layers for the ideas that are tried with a single method."""
        return next(way for way in ("importance", "middle", *self.choosers) if way in self.choosers)

    def build(self, idea: Idea) -> SubNet | None:
        """Return an idea's sub-network, or None if the space has none in the bin."""
        free = [name for name in idea.dimensions if any(len(grid) > 1 for grid in self._grids(name).values())]
        kept = self._fewer_layers(idea)
        if kept is None or (idea.dimensions and not free):
            return None
        shares = self._solve(kept, free)
        if shares is None:
            return None
        sizes = self._sizes(kept, shares)
        subnet = self.space.build(sizes, self.units)
        return subnet if self.space.sizes.count(sizes) in self.space.bin and self.space.admits(subnet) else None

    # layers -----------------------------------------------------------------------------------------------------------

    def _evenly(self, n: int) -> Layers:
        """Drop layers evenly; keep the first and the last one."""
        return tuple(np.linspace(0, self.n_layer - 1, n).round().astype(int).tolist())

    def _evenly_inside(self, n: int) -> Layers:
        """Drop layers evenly; keep the first two and the last two."""
        if n < 5:
            return self._evenly(n)
        inside = 2 + np.arange(n - 4) * (self.n_layer - 4) // (n - 4)
        return (0, 1, *inside.tolist(), self.n_layer - 2, self.n_layer - 1)

    def _around_middle(self, n: int) -> Layers:
        """Drop consecutive layers, with two fifths of the kept layers before them."""
        before = round(0.4 * n)
        return (*range(before), *range(self.n_layer - (n - before), self.n_layer))

    def _fewer_layers(self, idea: Idea) -> Kept | None:
        """Choose the layers, or sub-layers, that an `Idea` keeps; None if no choice fits, or none can be ranked."""
        every = tuple(range(self.n_layer))
        if idea.sublayer:
            dropped = self._least_important(idea.sublayer)
            options = [Kept(every, dict.fromkeys(dropped[:n], idea.sublayer)) for n in range(self.n_layer - 1, 0, -1)]
        elif idea.layers:
            choose = self.choosers.get(idea.layers)
            options = [Kept(choose(n)) for n in self.grids["n_layer"][:-1]] if choose else []
        else:
            return Kept(every)
        if not idea.dimensions:
            fitting = [kept for kept in options if self._fits(kept, {})]
            return fitting[-1] if fitting else None
        aim = self.space.sizes.largest - idea.portion * (self.space.sizes.largest - self.most)
        return min(options, key=lambda kept: abs(self._count(kept, {}) - aim), default=None)

    def _least_important(self, sublayer: str) -> list[int]:
        """Return the layers by the importance of their sub-layer, ascending; without an order, the last layer first."""
        if self.order is None:
            return list(range(self.n_layer))[::-1]
        return self.order.sublayers.get(sublayer, self.order.n_layer)[::-1].tolist()

    # other dimensions -------------------------------------------------------------------------------------------------

    def _solve(self, kept: Kept, free: Sequence[str]) -> dict[str, float] | None:
        """Return the largest shares of the `free` dimensions that fit, all about equal; None if no shares fit."""
        if not free:
            return {} if self._fits(kept, {}) else None
        *others, last = free
        together = self._largest(sorted({s for name in free for s in self._shares(name)}), kept, free, {})
        if together is None:
            return None
        shares = {}
        for name in others:  # reduced by at least one step, or this would be another idea
            options = self._shares(name)[:-1]
            shares[name] = min(options, key=lambda share: abs(share - together))
        found = self._largest(self._shares(last), kept, [last], shares)
        return None if found is None else shares | {last: found}

    def _largest(
        self, options: Sequence[float], kept: Kept, names: Sequence[str], fixed: dict[str, float]
    ) -> float | None:
        """Return the largest option that fits as the share of the dimensions `names`, given the `fixed` shares.

        Costs grow with the share, so bisection applies: all options that fit come before the first that does not.
        """

        def exceeds(share: float) -> bool:
            return not self._fits(kept, fixed | dict.fromkeys(names, share))

        n = bisect_right(options, False, key=exceeds)
        return options[n - 1] if n else None

    def _fits(self, kept: Kept, shares: Mapping[str, float]) -> bool:
        """Return whether a sub-network with these shares is within the maximum size and all limits' upper ends."""
        if self._count(kept, shares) > self.most:
            return False
        limits = self.space.limits
        return not limits.ranges or limits.fits(self.space.build(self._sizes(kept, shares)))

    def _count(self, kept: Kept, shares: Mapping[str, float]) -> int:
        return self.space.sizes.count(self._sizes(kept, shares))

    def _grids(self, dimension: str) -> dict[str, list[int]]:
        return {name: self.grids[name] for name in DIMENSIONS[dimension] if name in self.grids}

    def _shares(self, dimension: str) -> list[float]:
        """Return the distinct shares of a dimension's grids, ascending up to 1."""
        return sorted({n / grid[-1] for grid in self._grids(dimension).values() for n in grid})

    def _sizes(self, kept: Kept, shares: Mapping[str, float]) -> Sizes:
        """Return the legal sizes nearest to the shares of the teacher's sizes; sizes without a share stay whole."""
        of = {size: share for name, share in shares.items() for size in DIMENSIONS[name]}
        values = self.space.complete({}, kept.layers, kept.drops)
        for key in values:
            values[key] = nearest_size(self.grids[key[0]], of.get(key[0], 1.0))
        shared = [values[name, EVERY] for name in ("n_embd", "head_size")]
        for key in values:  # fewer heads where they must fit into the channels
            values[key] = min(values[key], self.space.sizes.own_grid(key[0], *shared)[-1])
        return Sizes(kept.layers, values, dict(kept.drops))
