"""The four spaces of sub-networks, which build candidates within a bin.

A strategy asks a `Space` for a random sub-network, a mutation or a crossover; the result is always within the bin.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, get_args

import numpy as np
from litgpt.config import Config

from litgpt_whittle.errors import UserError
from litgpt_whittle.index_plan import n_params
from litgpt_whittle.ranking.order import Order
from litgpt_whittle.spaces.args import SpaceArgs
from litgpt_whittle.spaces.bins import Bin
from litgpt_whittle.spaces.draw import Wish
from litgpt_whittle.spaces.drops import change_drops, check_reachable, draw, drops_of
from litgpt_whittle.spaces.limits import Limits
from litgpt_whittle.spaces.sizes import EVERY, Key, Sizes, SizeSpace
from litgpt_whittle.subnet import ATTENTION, DROPS, SubNet, experts_of
from litgpt_whittle.unit_index import UnitIndex

SpaceName = Literal["coarse_uniform", "coarse_layerwise", "fine_uniform", "fine_layerwise"]
"""Coarse spaces keep the first n units of each dimension, or the n most important units of each layer; fine spaces keep
any n units. Layerwise spaces choose sizes and units per layer. Uniform spaces use the same sizes in all layers; without
an order of importance, a random candidate also keeps the same units in all layers."""

Sets = dict[Key, np.ndarray]
"""Indices of kept units, by the key of their size"""


class Space:
    """The sub-networks of a teacher within one bin.

    Args:
        teacher: The teacher's config.
        name: One of the four spaces.
        bin: Range of parameter counts; by default all possible counts within the limits.
        tied: If true, the teacher's LM head shares the embedding's weights, which then count once.
        args: Dimensions that may shrink, with their smallest sizes and steps.
        order: The teacher's units by importance, of which a coarse space keeps the best n instead of the first n.
        limits: Limits on costs. Sub-networks drawn from the space lie in the bin, but a strategy must check them
            against the limits with `admits`.

    Raises:
        UserError: If the space is unknown, `args` are out of range or need an order, or no sub-network is in the bin or
            within the limits.
    """

    def __init__(
        self,
        teacher: Config,
        name: SpaceName,
        bin: Bin | None = None,
        tied: bool = False,
        args: SpaceArgs | None = None,
        order: Order | None = None,
        limits: Limits = Limits(),
    ) -> None:
        if name not in get_args(SpaceName):
            raise UserError(f"space must be one of {', '.join(get_args(SpaceName))}, got {name!r}")
        args = args or SpaceArgs()
        if args.layers == "best" and order is None:
            raise UserError("search_space.layers 'best' needs --order importance; add it or keep 'any' layers")
        self.teacher, self.name, self.tied, self.order, self.limits = teacher, name, tied, order, limits
        self.is_fine, self.is_layerwise = name.startswith("fine"), name.endswith("layerwise")
        best_layers = None if order is None else order.n_layer.tolist()
        self.sizes = SizeSpace(teacher, self.is_layerwise, tied, args, best_layers)
        self.bin = limits.bin(self.sizes.smallest, self.sizes.largest) if bin is None else bin
        check_reachable(self.sizes, self.bin)
        limits.check_reachable(self.sample, self.bin)

    def n_params(self, subnet: SubNet) -> int:
        """Return the number of parameters of a sub-network, in closed form."""
        return n_params(self.teacher, subnet, self.tied)

    def admits(self, subnet: SubNet) -> bool:
        """Return whether all closed-form costs of a sub-network are within their limits."""
        return self.limits.admits(subnet)

    def smallest(self) -> SubNet:
        """Return a sub-network with the fewest parameters; a fine space keeps random units, from a fixed seed.

        All kept layers have attention and MLP.
        """
        least = copy.copy(self)
        least.sizes = self.sizes.whole
        least.bin = Bin(least.sizes.smallest, least.sizes.smallest)
        return least.sample(np.random.default_rng(0))

    def sample(self, rng: np.random.Generator) -> SubNet:
        """Draw a random sub-network: first sizes from the values that can reach the bin, then units.

        Half of the draws give all layers nearly equal shares of the remaining parameters. Without this rule, draws
        rarely do so in a deep teacher: the first sizes use up the bin, and later ones end at their smallest values.
        """
        evenness = 2.0 ** rng.uniform(-1, 6) if rng.random() < 0.5 else None
        return self._build(rng, Wish(spread=evenness is not None, evenness=evenness), {}, {})

    def split(self, n: int) -> list[Space]:
        """Split the space into n spaces with equal parts of its bin, in ascending order.

        Parts without sub-networks are omitted; if all parts are omitted, the result is the space itself.
        """
        lo, hi = max(self.bin.lo, self.sizes.smallest), min(self.bin.hi, self.sizes.largest)
        edges = [lo + (hi + 1 - lo) * i // n for i in range(n + 1)]
        parts = []
        for part in (Bin(start, end - 1) for start, end in zip(edges, edges[1:]) if start < end):
            if draw(self.sizes, np.random.default_rng(0), part) is not None:
                parts.append(copy.copy(self))
                parts[-1].bin = part
        return parts or [self]

    def mutate(self, rng: np.random.Generator, parent: SubNet, probability: float) -> SubNet:
        """Change some of a sub-network's choices; all other choices change only as much as the bin requires.

        Args:
            rng: Random generator.
            parent: A sub-network of this space.
            probability: Probability of a change for each choice (a size, a set of units, or the set of layers); at
                least one choice changes.
        """
        sizes, sets = self.sizes_of(parent), self._sets_of(parent)
        free, movable = self._free(sizes), self._movable(sets)
        chances = ["layers", *free, *movable, *(["drops"] if self.sizes.may_drop else [])]
        changed = set(np.flatnonzero(rng.random(len(chances)) < probability).tolist())
        if not changed:
            changed = {int(rng.integers(len(chances)))}
        values: dict[Key, int] = dict(sizes.values)
        swaps: dict[Key, float] = {}
        for i in sorted(changed - {0}):
            if chances[i] == "drops":
                continue
            if i <= len(free):
                self._change_size(rng, values, chances[i])
            else:
                swaps[chances[i]] = float(rng.random()) ** 2  # mostly a few units
        layers = self._change_layers(rng, sizes.layers) if 0 in changed else sizes.layers
        is_global = 0 in changed or any(chances[i][1] == EVERY for i in changed - {0})
        spread = is_global or bool(rng.random() < 0.5)
        drops = sizes.drops
        if any(chances[i] == "drops" for i in changed):
            drops = change_drops(self.sizes, rng, layers, drops)
        return self._build(rng, Wish(layers, self._at_layers(values, layers), drops, spread), sets, swaps)

    def crossover(self, rng: np.random.Generator, mother: SubNet, father: SubNet) -> SubNet:
        """Combine two sub-networks: take each size and its units from a random parent, as closely as the bin allows."""
        parents = [(self.sizes_of(parent), self._sets_of(parent)) for parent in (mother, father)]
        values: dict[Key, int] = {}
        sets: Sets = {}
        for key in dict.fromkeys([*parents[0][0].values, *parents[1][0].values]):
            having = [parent for parent in parents if key in parent[0].values]
            sizes, units = having[int(rng.integers(len(having)))]
            values[key] = sizes.values[key]
            sets |= {k: units[k] for k in units if k == key or (k[0] == key[0] and not self.is_layerwise)}
        for key in dict.fromkeys([*parents[0][1], *parents[1][1]]):  # experts: their number has another key
            having = [parent for parent in parents if key in parent[1]]
            chosen = having[int(rng.integers(len(having)))][1][key]
            if self.is_layerwise or (key[0], EVERY) not in sets:
                sets.setdefault(key, chosen)
        ours, theirs = (set(parent[0].layers) for parent in parents)
        mixed = (ours & theirs) | {layer for layer in sorted(ours ^ theirs) if rng.random() < 0.5}
        layers = tuple(sorted(mixed)) or parents[0][0].layers
        drops: dict[int, str] = {}
        for layer in layers if self.sizes.may_drop else ():
            having = [parent for parent in parents if layer in parent[0].layers]
            if (part := having[int(rng.integers(len(having)))][0].drops.get(layer)) is not None:
                drops[layer] = part
        return self._build(rng, Wish(layers, self._at_layers(values, layers), drops), sets, {})

    def trade(self, rng: np.random.Generator, parent: SubNet) -> SubNet:
        """Change one choice and compensate with another size, so that the parameter count stays nearly the same.

        This is the level-switch mutation of EvoPress (arXiv 2410.14649, algorithm 1) for units of different costs. The
        change is, with equal probability among those that the space allows, a step of one size, a change of layers, a
        change of dropped sub-layers, or an exchange of units in a set, which needs no compensation. The target is the
        parent's count, plus or minus a tenth of the bin's width. If one size cannot compensate, other sizes change too.
        """
        sizes, sets = self.sizes_of(parent), self._sets_of(parent)
        free, movable = self._free(sizes), self._movable(sets)
        kinds = ["layers", *(["size"] if free else []), *(["units"] if movable else [])]
        kinds += ["drops"] if self.sizes.may_drop else []
        kind = kinds[int(rng.integers(len(kinds)))]
        if kind == "units":
            swap = {movable[int(rng.integers(len(movable)))]: float(rng.random()) ** 2}
            return self._build(rng, Wish(sizes.layers, sizes.values, sizes.drops), sets, swap)
        values, layers, drops, changed = dict(sizes.values), sizes.layers, sizes.drops, None
        if kind == "size":
            changed = _one_of(rng, free)
            values[changed] = _step(rng, self.sizes.grids[changed[0]], values[changed])
        elif kind == "drops":
            drops = change_drops(self.sizes, rng, layers, drops)
        else:
            layers = self._change_layers(rng, layers)
        wish = Sizes(layers, self.complete(values, layers, drops), drops)
        count, slack = self.sizes.count(sizes), (self.bin.hi - self.bin.lo) // 10
        near = Bin(max(count - slack, self.bin.lo), min(count + slack, self.bin.hi))
        if payers := [key for key in self._free(wish) if key != changed]:
            payer, now = _one_of(rng, payers), self.sizes.count(wish)
            wish.values[payer] += 1
            price = self.sizes.count(wish) - now  # the count is affine in every size
            wish.values[payer] += round((rng.uniform(near.lo, near.hi) - now) / max(price, 1)) - 1
        traded = draw(self.sizes, rng, near, Wish(layers, wish.values, drops))
        if traded is None or traded == sizes:  # sizes are too coarse to come that near
            return self._build(rng, Wish(layers, wish.values, drops), sets, {})
        return self._keep_units(rng, traded, sets, {})

    def near(
        self, rng: np.random.Generator, sizes: Sizes, units_of: SubNet | None = None, exchange: float = 0.0
    ) -> SubNet:
        """Return the sub-network closest to the given sizes within the bin.

        Args:
            rng: Random generator.
            sizes: Layers, and a size for each key that applies to them. Sizes need not be legal.
            units_of: Sub-network whose units a fine space keeps, as far as the sizes allow; by default random units.
            exchange: Probability, for each set of units, that some of its units are exchanged for others.
        """
        sets = {} if units_of is None else self._sets_of(units_of)
        swaps = {key: float(rng.random()) ** 2 for key in sets if rng.random() < exchange}
        return self._build(rng, Wish(sizes.layers, sizes.values, sizes.drops), sets, swaps)

    def build(self, sizes: Sizes, order: Order | None = None) -> SubNet:
        """Return the sub-network with the given sizes and the most important units.

        Args:
            sizes: Layers and legal sizes, which are not adjusted to the bin.
            order: The teacher's units by importance, of which each layer of a fine space keeps the best; by default the
                first units are kept. A coarse space uses its attribute `order` instead.
        """
        sets: Sets = {}

        def note(name: str, layer: int) -> None:
            n = sizes.get(name, layer)
            keep = UnitIndex(n) if order is None else order.best(name, layer, n)
            sets[name, layer] = experts_of(self.teacher, keep) if name == "n_expert" else keep.indices

        if self.is_fine:
            note("n_embd", EVERY)
            for layer in sizes.layers:
                for name in self._names(layer, sizes.drops):
                    note(name, layer)
        return self._keep_units(np.random.default_rng(0), sizes, sets, {})

    # changes to wishes ------------------------------------------------------------------------------------------------

    def _free(self, sizes: Sizes) -> list[Key]:
        """Return the keys of sizes with more than one value."""
        return [key for key in sizes.values if len(self.sizes.grids[key[0]]) > 1]

    def _movable(self, sets: Sets) -> list[Key]:
        """Return the keys of sets that do not keep all units; empty in a coarse space."""
        return [key for key in sets if len(sets[key]) < self.sizes.limits[key[0]]]

    def _change_size(self, rng: np.random.Generator, values: dict[Key, int], key: Key) -> None:
        """With equal probability, remove a size's target, so that any value is drawn, or move the target nearby."""
        if rng.random() < 0.5:
            del values[key]
            return
        grid = self.sizes.grids[key[0]]
        values[key] = round(values[key] + rng.normal() * max((grid[-1] - grid[0]) / 10, 1))

    def _change_layers(self, rng: np.random.Generator, layers: tuple[int, ...]) -> tuple[int, ...]:
        """Add, drop or exchange one layer."""
        left = [layer for layer in range(self.teacher.n_layer) if layer not in layers]
        change = int(rng.integers(3))
        kept = set(layers)
        if change != 0 and len(kept) > 1:
            kept.remove(int(rng.choice(layers)))
        if change != 1 and left:
            kept.add(int(rng.choice(left)))
        return tuple(sorted(kept))

    def _at_layers(self, values: Mapping[Key, int], layers: tuple[int, ...]) -> dict[Key, int]:
        """Extend the target sizes to layers that the parents lack: a new layer gets its nearest neighbour's sizes."""
        wished = dict(values)
        if self.is_layerwise:
            for layer in layers:
                for name in (*ATTENTION, self.sizes.kinds[self.sizes.kind_of[layer]].width):
                    near = [key for key in values if key[0] == name and key[1] != EVERY]
                    if near and (name, layer) not in values:
                        wished.setdefault((name, layer), values[min(near, key=lambda key: abs(key[1] - layer))])
        return wished

    def complete(
        self, values: Mapping[Key, int], layers: tuple[int, ...], drops: Mapping[int, str] = MappingProxyType({})
    ) -> dict[Key, int]:
        """Return the sizes of exactly these layers: the given size, else the nearest layer's, else the teacher's.

        Dropped sub-layers (see `Sizes.drops`) have no sizes.
        """
        wished = self._at_layers(values, layers)
        keys = {(name, EVERY) for name in ("n_embd", "head_size")}
        for layer in layers:
            is_own = {name: self.is_layerwise and name != "n_expert" for name in self._names(layer, drops)}
            keys |= {(name, layer if own else EVERY) for name, own in is_own.items()}
        return {key: wished.get(key, self.sizes.grids[key[0]][-1]) for key in sorted(keys)}

    def _names(self, layer: int, drops: Mapping[int, str]) -> tuple[str, ...]:
        """Return the names of a layer's sizes."""
        kind = self.sizes.kind(layer, drops.get(layer, ""))
        return (*kind.names, *(["n_expert"] if kind.has_experts else []))

    # between sub-networks and sizes -----------------------------------------------------------------------------------

    def sizes_of(self, subnet: SubNet) -> Sizes:
        """Return the sizes of a sub-network."""
        values = {("n_embd", EVERY): len(subnet.n_embd), ("head_size", EVERY): len(subnet.head_size)}
        for i, layer in enumerate(subnet.layers):
            for name, keep in self._own(subnet, i).items():
                values[name, EVERY if name == "n_expert" or not self.is_layerwise else layer] = len(keep)
        return Sizes(subnet.layers, values, drops_of(subnet))

    def _sets_of(self, subnet: SubNet) -> Sets:
        if not self.is_fine:
            return {}
        sets = {("n_embd", EVERY): subnet.n_embd.indices}
        for i, layer in enumerate(subnet.layers):
            for name, keep in self._own(subnet, i).items():
                units = experts_of(self.teacher, keep) if name == "n_expert" else keep.indices
                has_own = self.is_layerwise or isinstance(getattr(subnet, name), tuple)
                sets[name, layer if has_own else EVERY] = units
        return sets

    def _own(self, subnet: SubNet, index: int) -> dict[str, UnitIndex]:
        """Return the kept units of the sub-network's layer `index`, by the names of their sizes."""
        keep, kind = subnet.layer(index), self.sizes.kinds[self.sizes.kind_of[subnet.layers[index]]]
        names = (*ATTENTION, kind.width, "n_expert")
        units = keep.n_query_groups, keep.heads_per_group, keep.intermediate_size, keep.n_expert
        return {name: own for name, own in zip(names, units) if own is not None}

    def _build(self, rng: np.random.Generator, wish: Wish, sets: Sets, swaps: dict[Key, float]) -> SubNet:
        """Draw sizes within the bin, then units."""
        sizes = draw(self.sizes, rng, self.bin, wish)
        if sizes is None and wish.values:  # a nearly empty bin: ignore the wish
            sizes = draw(self.sizes, rng, self.bin)
        if sizes is None:  # the sub-network that `check_reachable` found
            sizes = draw(self.sizes, np.random.default_rng(0), self.bin)
        assert sizes is not None, f"the bin {self.bin} was found reachable before"
        return self._keep_units(rng, sizes, sets, swaps)

    def _keep_units(self, rng: np.random.Generator, sizes: Sizes, sets: Sets, swaps: dict[Key, float]) -> SubNet:
        """Draw units for the sizes: from `sets` as far as possible, except for the shares in `swaps` to exchange."""
        chosen: dict[Key, UnitIndex] = {}

        def keep(name: str, layer: int) -> UnitIndex:
            if self.order is not None and not self.is_fine:
                return self.order.best(name, layer, sizes.get(name, layer))
            at = (name, layer if self.is_layerwise or (name, layer) in sets else EVERY)
            if at not in chosen:
                chosen[at] = self._units(rng, name, sizes.get(name, layer), sets.get(at), swaps.get(at, 0.0))
            return chosen[at]

        fields: dict[str, Any] = {
            "n_layer": UnitIndex(np.array(sizes.layers)),
            "head_size": sizes.get("head_size", EVERY),
        }
        fields["n_embd"] = keep("n_embd", EVERY)
        for i, layer in enumerate(sizes.layers):
            for name in self._names(layer, sizes.drops):
                fields.setdefault(name, [None] * len(sizes.layers))[i] = keep(name, layer)
        for field, part in DROPS.items():
            if dropped := [layer for layer in sizes.layers if sizes.drops.get(layer) == part]:
                fields[field] = UnitIndex(dropped)
        return SubNet(self.teacher, **fields)

    def _units(self, rng: np.random.Generator, name: str, n: int, units: np.ndarray | None, swap: float) -> UnitIndex:
        """Choose n units: the first ones in a coarse space, else the given ones and random others."""
        limit = self.sizes.limits[name]
        if not self.is_fine or n == limit:
            return UnitIndex(n)
        groups = (self.teacher.n_expert_groups or 1) if name == "n_expert" else 1
        each = limit // groups
        parts = []
        for start in range(0, limit, each):  # every group of routed experts keeps the same number
            own = None if units is None else units[(units >= start) & (units < start + each)] - start
            parts.append(start + _choose(rng, n // groups, each, own, swap))
        return UnitIndex(np.concatenate(parts))


def _choose(rng: np.random.Generator, n: int, limit: int, wished: np.ndarray | None, swap: float) -> np.ndarray:
    """Draw n of `limit` units, sorted: the `wished` units, a share `swap` of which is replaced by others."""
    if wished is None:
        return np.sort(rng.permutation(limit)[:n])
    is_wished = np.zeros(limit, dtype=bool)
    is_wished[wished] = True
    others = np.flatnonzero(~is_wished)
    n_stay = min(len(wished), n)
    n_swap = min(round(swap * n_stay) + (swap > 0), n_stay, len(others) - (n - n_stay))
    kept = rng.permutation(wished)[: n_stay - n_swap]
    added = rng.permutation(others)[: n - len(kept)]
    return np.sort(np.concatenate((kept, added)))


def _one_of(rng: np.random.Generator, keys: list[Key]) -> Key:
    """Draw a key: all dimensions are equally likely, whether they have one key or one per layer."""
    names = list(dict.fromkeys(name for name, _ in keys))
    name = names[int(rng.integers(len(names)))]
    own = [key for key in keys if key[0] == name]
    return own[int(rng.integers(len(own)))]


def _step(rng: np.random.Generator, grid: list[int], value: int) -> int:
    """Draw another value of a grid, mostly a nearby one: about a tenth of the grid away."""
    at = grid.index(value)
    by = round(rng.normal() * len(grid) / 10) or (1 if rng.random() < 0.5 else -1)
    if not 0 <= at + by < len(grid):
        by = -by
    return grid[min(max(at + by, 0), len(grid) - 1)]
