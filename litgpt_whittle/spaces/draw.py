"""Draw the sizes of a sub-network whose parameter count lies in a bin by construction.

The count is affine and increasing in each size. Sizes are therefore drawn one after the other, each from the values for
which the remaining sizes can still reach the bin; the range of the last size is solved for exactly. If the sizes are
too coarse to meet the bin, the draw backtracks, depth first. There is no rejection sampling.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from litgpt_whittle.spaces.bins import Bin
from litgpt_whittle.spaces.sizes import EVERY, GLOBAL, Key, Sizes, SizeSpace
from litgpt_whittle.subnet import ATTENTION

_TRIES = (500,) * 12 + (30_000,)
"""Maximum number of search-tree nodes per attempt. A draw that backtracks often is stuck below an unlucky first choice,
so restarting succeeds sooner. The last attempt is longer, so that it can prove that no sizes meet the bin."""


@dataclass
class Wish:
    """Target sizes of a draw, met as closely as the bin allows; other sizes are drawn at random."""

    layers: tuple[int, ...] | None = None
    """Layers of the teacher to keep; random if None"""
    values: Mapping[Key, int] = field(default_factory=dict)
    """Target sizes, which need not be allowed sizes"""
    drops: Mapping[int, str] | None = None
    """Sub-layer to drop (`attn` or `mlp`), by the teacher's layer; random if None"""
    spread: bool = True
    """If true, all per-layer target sizes are shifted together to meet the bin; if false, as few as needed change"""
    evenness: float | None = None
    """Concentration of the beta distribution of per-layer sizes without a target. Higher values draw layers closer to
    equal shares of the remaining parameters. If None, each size is drawn from its whole range"""


def draw_sizes(space: SizeSpace, rng: np.random.Generator, bin: Bin, wish: Wish | None = None) -> Sizes | None:
    """Draw sizes whose parameter count lies in the bin, as close to the wish as the bin allows.

    Returns:
        The sizes, or None if none were found.
    """
    for n_nodes in _TRIES:
        draw = _Draw(space, rng, bin, wish or Wish(), n_nodes)
        if (sizes := draw.run()) is not None or draw.nodes > 0:
            return sizes
    return None


class _Draw:
    """One attempt to draw sizes within a bin."""

    def __init__(self, space: SizeSpace, rng: np.random.Generator, bin: Bin, wish: Wish, nodes: int) -> None:
        self.space, self.rng, self.bin, self.wish, self.nodes = space, rng, bin, wish, nodes
        grids = [space.grids.get(name, [0]) for name in GLOBAL]
        self.lo, self.hi = [grid[0] for grid in grids], [grid[-1] for grid in grids]
        self.depths = np.arange(len(space.depths))

    def run(self) -> Sizes | None:
        """Return the sizes, or None if there are none or the node limit is reached (`nodes` is then 0 or less)."""
        names = [*GLOBAL, "n_layer"]
        wished = [
            (name, EVERY) in self.wish.values or (name == "n_layer" and self.wish.layers is not None) for name in names
        ]
        order = self.rng.permutation(len(names)).tolist()
        return self._shared([names[i] for i in sorted(order, key=wished.__getitem__)])

    def _shared(self, names: list[str]) -> Sizes | None:
        """Draw the named shared sizes, then the per-layer sizes."""
        if not names:
            return self._per_layer()
        if names[0] == "n_layer":
            options = self._depth_options()
        else:
            options = self._size_options(names[0])
        lo, hi, depths = list(self.lo), list(self.hi), self.depths
        for option in options:
            if names[0] == "n_layer":
                self.depths = np.array([option])
            else:
                at = GLOBAL.index(names[0])
                self.lo[at] = self.hi[at] = option
            if (sizes := self._shared(names[1:])) is not None or self.nodes <= 0:
                return sizes
            self.lo, self.hi, self.depths = list(lo), list(hi), depths
        return None

    def _size_options(self, name: str) -> Iterator[int]:
        """Return the values of a shared size that can reach the bin."""
        at, grid = GLOBAL.index(name), self.space.grids.get(name, [0])
        depths = self.space.depths[self.depths]

        def reach(value: int) -> tuple[int, int]:
            lo, hi = list(self.lo), list(self.hi)
            lo[at] = hi[at] = value
            return self.space.count_range(lo, hi, depths)

        first = bisect_left(grid, self.bin.lo, key=lambda value: reach(value)[1])
        stop = bisect_right(grid, self.bin.hi, key=lambda value: reach(value)[0])
        return self._ordered(grid, first, stop, self.wish.values.get((name, EVERY)))

    def _depth_options(self) -> Iterator[int]:
        """Return the numbers of layers of each kind that can reach the bin, as indices into `space.depths`."""
        lows, highs = self.space.count_ranges(self.lo, self.hi, self.space.depths)
        depths = np.flatnonzero((lows <= self.bin.hi) & (highs >= self.bin.lo))
        totals = self.space.depths[depths].sum(1)
        if self.wish.layers is not None:
            wished = np.bincount(
                [self.space.kind_of[layer] for layer in self.wish.layers], minlength=len(self.space.kinds)
            )
            off = abs(self.space.depths[depths] - wished).sum(1)
            # ties are broken at random
            return iter(depths[np.lexsort((self.rng.random(len(depths)), off))].tolist())
        # numbers of layers are equally likely, and so are sets of the same number of layers
        keys = self.rng.random(len(depths)) ** (1 / self.space.depth_weights[depths])
        place = {total: i for i, total in enumerate(self.rng.permutation(np.unique(totals)).tolist())}
        return iter(depths[np.lexsort((-keys, np.array([place[total] for total in totals.tolist()])))].tolist())

    def _ordered(self, grid: list[int], first: int, stop: int, wished: float | None) -> Iterator[int]:
        """Yield the values grid[first:stop], nearest to the target first, or in random order without a target."""
        for i in _random_order(self.rng, first, stop) if wished is None else _outwards(grid, first, stop, wished):
            self.nodes -= 1
            if self.nodes <= 0:
                return
            yield grid[i]

    def _choose_layers(self) -> tuple[int, ...]:
        """Choose as many layers of each kind as were drawn: first wished layers, then random layers."""
        space = self.space
        if space.layer_order is not None:
            return tuple(sorted(space.layer_order[: int(space.depths[self.depths[0]].sum())]))
        chosen: list[int] = []
        for kind, n in enumerate(space.depths[self.depths[0]].tolist()):
            layers = [layer for layer, k in enumerate(space.kind_of) if k == kind]
            wished = set(self.wish.layers or ()) & set(layers)
            first, then = (
                self.rng.permutation(sorted(wished)),
                self.rng.permutation([i for i in layers if i not in wished]),
            )
            chosen += [int(i) for i in (*first, *then)][:n]
        return tuple(sorted(chosen))

    def _per_layer(self) -> Sizes | None:
        """Draw the per-layer sizes, given the shared sizes."""
        layers = self._choose_layers()
        table = _LayerTable(self.space, layers, self.lo)
        values = _Descent(self, table).run()
        if values is None:
            return None
        shared = {(name, EVERY): n for name, n in zip(GLOBAL, self.lo) if n}
        if not any(self.space.kinds[self.space.kind_of[layer]].has_experts for layer in layers):
            shared.pop(("n_expert", EVERY), None)
        return Sizes(layers, shared | values)


class _LayerTable:
    """Cost of the chosen layers as a function of their per-layer sizes, given the shared sizes."""

    def __init__(self, space: SizeSpace, layers: tuple[int, ...], shared: list[int]) -> None:
        self.root = space.root_count(shared[0])
        # layers with the same kind and the same sizes are counted together
        self.terms: dict[tuple, int] = {}
        self.multiples: list[int] = []
        self.coefficients: list[tuple[int, ...]] = []
        self.users: dict[Key, list[tuple[int, int]]] = {}  # key -> (term, axis)
        forms = {}
        for layer in layers:
            kind = space.kind_of[layer]
            at = layer if space.layerwise else EVERY
            if (kind, at) in self.terms:
                self.multiples[self.terms[kind, at]] += 1
                continue
            self.terms[kind, at] = term = len(self.terms)
            if kind not in forms:
                sizes = shared[:2] + [shared[2] if space.kinds[kind].has_experts else 0]
                forms[kind] = tuple(space.kinds[kind].at(*sizes).ravel().tolist())
            self.coefficients.append(forms[kind])
            self.multiples.append(1)
            for axis, name in enumerate((*ATTENTION, space.kinds[kind].width)):
                if name not in space.kinds[kind].names:
                    continue
                self.users.setdefault((name, at), []).append((term, axis))
        self.grids = {key: space.own_grid(key[0], *shared[:2]) for key in self.users}

    def cost(self, term: int, sizes: list) -> int:
        """Return the cost of the layers of one term, given groups, heads per group and neurons."""
        groups, per_group, neurons = sizes
        c = self.coefficients[term]
        one = c[0] + c[1] * neurons + per_group * (c[2] + c[3] * neurons)
        one += groups * (c[4] + c[5] * neurons + per_group * (c[6] + c[7] * neurons))
        return self.multiples[term] * one


class _Descent:
    """Depth-first search that draws the per-layer sizes one after the other."""

    def __init__(self, draw: _Draw, table: _LayerTable) -> None:
        self.draw, self.table, self.bin = draw, table, draw.bin
        grids: list[list[list[int]]] = [[[0]] * 3 for _ in table.multiples]
        for key, users in table.users.items():
            for term, axis in users:
                grids[term][axis] = table.grids[key]
        self.lo = [[grid[0] for grid in own] for own in grids]
        self.hi = [[grid[-1] for grid in own] for own in grids]
        self.wishes = self._wishes()

    def _order(self) -> list[Key]:
        """Return the order of the draws: sizes without a target, then sizes with one; the finest grid comes last."""
        rng, keys = self.draw.rng, list(self.table.users)
        order = [keys[i] for i in rng.permutation(len(keys)).tolist()]
        # the neurons of an MLP have the finest grid unless they are fixed
        last = max(order, key=lambda key: (key[0].endswith("intermediate_size"), len(self.table.grids[key])))
        return [*sorted((key for key in order if key != last), key=self.wishes.__contains__), last]

    def _wishes(self) -> dict[Key, float]:
        """Return the target sizes; with `spread`, shifted together so that the count meets the bin."""
        wish, table, rng = self.draw.wish, self.table, self.draw.rng
        wishes = {key: float(wish.values[key]) for key in table.users if key in wish.values}
        if wish.evenness is not None:
            rest = {key: float(grid[0]) for key, grid in table.grids.items() if key not in wishes}
            share = self._shift_into_bin(rest, wishes)
            share = min(max(share, 0.01), 0.99)
            for key in rest:
                lo, hi = table.grids[key][0], table.grids[key][-1]
                wishes[key] = lo + (hi - lo) * rng.beta(wish.evenness * share, wish.evenness * (1 - share))
        if wish.spread and wishes:
            middle = {key: (grid[0] + grid[-1]) / 2 for key, grid in table.grids.items() if key not in wishes}
            wishes = self._shift(wishes, self._shift_into_bin(wishes, middle))
        return wishes

    def _shift(self, sizes: Mapping[Key, float], by: float) -> dict[Key, float]:
        """Move all sizes towards their smallest (by < 0) or largest values, by the fraction |by| of the distance."""
        ends = {key: self.table.grids[key][-1 if by > 0 else 0] for key in sizes}
        return {key: size + abs(by) * (ends[key] - size) for key, size in sizes.items()}

    def _shift_into_bin(self, sizes: Mapping[Key, float], others: Mapping[Key, float]) -> float:
        """Return the fraction by which to shift `sizes` so that the count meets the bin, at fixed `others`."""

        def count(by: float) -> float:
            table = self.table
            own = [[0.0] * 3 for _ in table.multiples]
            for key, value in (*others.items(), *self._shift(sizes, by).items()):
                for term, axis in table.users[key]:
                    own[term][axis] = value
            return table.root + sum(table.cost(term, values) for term, values in enumerate(own))

        now = count(0.0)
        if self.bin.lo <= now <= self.bin.hi:
            return 0.0
        low, high = (-1.0, 0.0) if now > self.bin.hi else (0.0, 1.0)
        target = self.bin.hi if now > self.bin.hi else self.bin.lo
        for _ in range(12):
            middle = (low + high) / 2
            low, high = (low, middle) if count(middle) > target else (middle, high)
        return (low + high) / 2

    def run(self) -> dict[Key, int] | None:
        """Return a size for every key with a count in the bin; None if there are none, or at the node limit."""
        order = self._order()
        # counts with the undrawn sizes at their smallest and at their largest
        totals = [
            self.table.root + sum(self.table.cost(term, own) for term, own in enumerate(ends))
            for ends in (self.lo, self.hi)
        ]
        stack: list[tuple[Iterator[int], list, list, list]] = []
        values: dict[Key, int] = {}
        stack.append(self._open(order[0], totals))
        while stack:
            key = order[len(stack) - 1]
            options, affine, lo, hi = stack[-1]
            value = next(options, None)
            if value is None:
                self._set(key, lo, hi)
                stack.pop()
                if self.draw.nodes <= 0:
                    return None
                continue
            values[key] = value
            if len(stack) == len(order):
                return values
            self._set(key, [value] * len(lo), [value] * len(hi))
            totals = [start + slope * value for start, slope in affine]
            stack.append(self._open(order[len(stack)], totals))
        return None

    def _set(self, key: Key, lo: list[int], hi: list[int]) -> None:
        for (term, axis), smallest, largest in zip(self.table.users[key], lo, hi):
            self.lo[term][axis], self.hi[term][axis] = smallest, largest

    def _open(self, key: Key, totals: list[int]) -> tuple[Iterator[int], list, list, list]:
        """Return the values of a size that can reach the bin, the totals as affine functions of it, and its bounds."""
        users, grid = self.table.users[key], self.table.grids[key]
        affine = []
        for ends, total in zip((self.lo, self.hi), totals):
            start, slope = total, 0
            for term, axis in users:
                sizes = list(ends[term])
                start -= self.table.cost(term, sizes)
                sizes[axis] = 0
                at_0 = self.table.cost(term, sizes)
                sizes[axis] = 1
                start, slope = start + at_0, slope + self.table.cost(term, sizes) - at_0
            affine.append((start, slope))
        (low, low_slope), (high, high_slope) = affine
        first, stop = 0, len(grid)
        if high_slope:
            first = bisect_left(grid, -((high - self.bin.lo) // high_slope))
        elif high < self.bin.lo:
            stop = 0
        if low_slope:
            stop = bisect_right(grid, (self.bin.hi - low) // low_slope)
        elif low > self.bin.hi:
            stop = 0
        options = self.draw._ordered(grid, first, stop, self.wishes.get(key))
        return options, affine, [self.lo[t][a] for t, a in users], [self.hi[t][a] for t, a in users]


def _random_order(rng: np.random.Generator, first: int, stop: int) -> Iterator[int]:
    """Yield the indices first … stop - 1 from a uniform start with a random stride, in constant time per value."""
    n = stop - first
    if n < 1:
        return
    at = int(rng.integers(n))
    yield first + at
    if n == 1:
        return
    stride = int(rng.integers(1, n))
    while math.gcd(stride, n) > 1:
        stride = stride % (n - 1) + 1
    for _ in range(n - 1):
        at = (at + stride) % n
        yield first + at


def _outwards(grid: list[int], first: int, stop: int, wished: float) -> Iterator[int]:
    """Yield the indices first … stop - 1, the one with the value nearest to the target first."""
    above = min(max(bisect_left(grid, wished), first), stop)
    below = above - 1
    while below >= first or above < stop:
        if above >= stop or (below >= first and wished - grid[below] < grid[above] - wished):
            yield below
            below -= 1
        else:
            yield above
            above += 1
