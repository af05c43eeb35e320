"""Sizes of sub-networks, drawn so that the parameter count lands in a bin by construction.

The count is affine in every single size and grows with it. So sizes are drawn one after the other, each among those
values for which the bin stays within reach of the sizes still open; what the last one may be is then solved for
exactly. Where sizes are too coarse for that, the draw backtracks, depth first; nothing is ever drawn anew from scratch
and hoped for.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields

import numpy as np
from litgpt.config import Config

from litgpt_whittle.bins import Bin
from litgpt_whittle.errors import UserError
from litgpt_whittle.rope import legal_head_sizes
from litgpt_whittle.search_args import SizeArgs, SpaceArgs
from litgpt_whittle.subnet import Keep, experts_of, layer_params, layer_sizes, root_params

GLOBAL = ("n_embd", "head_size", "n_expert")
"""Sizes that all layers share in every space"""

ATTENTION = ("n_query_groups", "heads_per_group")

EVERY = -1
"""Stands for all layers in a key"""

Key = tuple[str, int]
"""A size that is drawn: its name, and the teacher layer that it belongs to or `EVERY`"""

_TRIES = (500,) * 12 + (30_000,)
"""Nodes that each attempt at a draw may visit. A draw that backtracks much is stuck below an unlucky first choice, so
that starting over finds a way sooner; only the last attempt may prove that there is none."""


@dataclass
class Sizes:
    """The sizes of one sub-network: a value for every key that applies to it."""

    layers: tuple[int, ...]
    """The teacher's layers that are kept"""
    values: dict[Key, int]

    def get(self, name: str, layer: int) -> int:
        """The size `name` of the teacher's layer `layer`."""
        value = self.values.get((name, layer))
        return self.values[name, EVERY] if value is None else value


@dataclass
class Wish:
    """Sizes that a draw stays as near to as the bin allows; what is not wished for is drawn freely."""

    layers: tuple[int, ...] | None = None
    values: Mapping[Key, int] = field(default_factory=dict)
    spread: bool = True
    """Whether all per-layer sizes give way together when the bin is missed, or only as few as needed"""
    evenness: float | None = None
    """Draws the per-layer sizes that are not wished for around an equal share of what the bin leaves for them, the
    closer the larger this is, instead of each anywhere in its range"""


class SizeSpace:
    """All combinations of sizes of a teacher's sub-networks, and their closed-form parameter counts.

    Args:
        teacher: The teacher's config.
        layerwise: Whether each layer has its own sizes.
        tied: Whether the LM head is the embedding.
        args: What may shrink, how far and in which steps.

    Raises:
        UserError: If `args` leave a dimension without any size.
    """

    def __init__(self, teacher: Config, layerwise: bool, tied: bool, args: SpaceArgs) -> None:
        self.teacher, self.layerwise, self.args = teacher, layerwise, args
        _check_args(args)
        self.limits = _limits(teacher)
        self.grids = {name: self._grid(name, limit) for name, limit in self.limits.items()}
        self.root = [root_params(teacher, n, tied) for n in (1, 2)]
        self._find_kinds()
        self._find_depths()

    def _grid(self, name: str, limit: int) -> list[int]:
        """The sizes that a dimension may have, ascending; the teacher's own is always the last."""
        if name in self.args.fixed:
            return [limit]
        step, least = getattr(self.args.step, name), getattr(self.args.smallest, name)
        if least > limit:
            raise UserError(f"search_space.smallest.{name} must be at most the teacher's {limit}, got {least}")
        legal = set(_legal(self.teacher, name, limit))
        return [n for n in (*range(-(-least // step) * step, limit, step), limit) if n in legal]

    # what a layer costs -----------------------------------------------------------------------------------------------

    def _find_kinds(self) -> None:
        """Tells layers of different costs apart (dense ones and ones with experts), and each kind's closed form."""
        self.kind_of: list[int] = []
        self.kinds: list[_Kind] = []
        seen: dict[tuple, int] = {}
        for layer in range(self.teacher.n_layer):
            sizes = layer_sizes(self.teacher, layer)
            cost = layer_params(self.teacher, layer, self.teacher.n_embd, self.teacher.head_size, *_positional(sizes))
            key = (tuple(sizes.items()), cost)
            if key not in seen:
                seen[key] = len(self.kinds)
                self.kinds.append(self._kind(layer, sizes))
            self.kind_of.append(seen[key])

    def _kind(self, layer: int, sizes: Mapping[str, int]) -> _Kind:
        width = "moe_intermediate_size" if "moe_intermediate_size" in sizes else "intermediate_size"
        names = ("n_embd", "head_size", "n_expert", *ATTENTION, width)
        grids = [self.grids[name] if name != "n_expert" or name in sizes else [0] for name in names]

        def cost(n_embd: int, head_size: int, n_expert: int, groups: int, per_group: int, neurons: int) -> int:
            return layer_params(self.teacher, layer, n_embd, head_size, groups, per_group, neurons, n_expert)

        return _Kind(width, "n_expert" in sizes, _multi_affine(cost, [(g[0], g[-1]) for g in grids]), grids)

    def _find_depths(self) -> None:
        """All numbers of layers of each kind that a sub-network may have."""
        totals = [self.kind_of.count(kind) for kind in range(len(self.kinds))]
        if self.args.layers == "first":
            depths = [[self.kind_of[:n].count(kind) for kind in range(len(totals))] for n in self.grids["n_layer"]]
        else:
            allowed = set(self.grids["n_layer"])
            depths = [d for d in itertools.product(*(range(t + 1) for t in totals)) if sum(d) in allowed]
        self.depths = np.array(sorted(depths, key=sum))  # (n_depths, n_kinds)
        # as many ways as there are to choose such layers, so that any set of n layers is as likely as any other
        ways = [math.prod(math.comb(t, d) for t, d in zip(totals, depth)) for depth in self.depths.tolist()]
        most = max(ways)
        self.depth_weights = np.array([way / most for way in ways]).clip(1e-300)

    def count(self, sizes: Sizes) -> int:
        """The number of parameters."""
        shared = [sizes.values.get((name, EVERY), 0) for name in GLOBAL]
        total = self._root(shared[0])
        for layer in sizes.layers:
            kind = self.kinds[self.kind_of[layer]]
            own = [sizes.get(name, layer) for name in (*ATTENTION, kind.width)]
            total += int(kind.at(*shared[:2], shared[2] if kind.has_experts else 0, *own))
        return total

    def _root(self, n_embd: int) -> int:
        return self.root[0] + (n_embd - 1) * (self.root[1] - self.root[0])

    @property
    def smallest(self) -> int:
        """Parameters of the smallest sub-network."""
        lo = [self.grids.get(name, [0])[0] for name in GLOBAL]
        return self._reach(lo, lo, self.depths)[0]

    @property
    def largest(self) -> int:
        """Parameters of the largest sub-network, the teacher."""
        hi = [self.grids.get(name, [0])[-1] for name in GLOBAL]
        return self._reach(hi, hi, self.depths)[1]

    # drawing ----------------------------------------------------------------------------------------------------------

    def draw(self, rng: np.random.Generator, bin: Bin, wish: Wish | None = None) -> Sizes | None:
        """Draws sizes whose count lies in the bin, as near as it allows to what is wished for.

        Returns:
            The sizes, or None when nothing in the bin was found.
        """
        for n_nodes in _TRIES:
            draw = _Draw(self, rng, bin, wish or Wish(), n_nodes)
            if (sizes := draw.run()) is not None or draw.nodes > 0:
                return sizes
        return None

    def check_reachable(self, bin: Bin) -> None:
        """Refuses a bin that no sub-network can meet.

        Raises:
            UserError: If there is none, with the nearest sizes that there are.
        """
        if self.draw(np.random.default_rng(0), bin) is None:
            near = " and ".join(f"{n:,}" for n in self.nearest(bin) if n is not None)
            hint = "" if bin.lo <= self.largest else f" (the teacher has {self.largest:,})"
            raise UserError(f"no sub-network lies in the bin {bin}{hint}; the nearest have {near} parameters")

    def nearest(self, bin: Bin) -> tuple[int | None, int | None]:
        """The nearest counts below and above a bin that no sub-network meets; None where there is none."""
        rng, below, above = np.random.default_rng(0), None, None
        if bin.lo > self.largest:
            return self.largest, None
        if bin.hi < self.smallest:
            return None, self.smallest
        if bin.lo > self.smallest:
            below = self.smallest
            while below < bin.lo - 1 and (sizes := self.draw(rng, Bin(below + 1, bin.lo - 1))) is not None:
                below = self.count(sizes)
        if bin.hi < self.largest:
            above = self.largest
            while above > bin.hi + 1 and (sizes := self.draw(rng, Bin(bin.hi + 1, above - 1))) is not None:
                above = self.count(sizes)
        return below, above

    def _reach(self, lo: list[int], hi: list[int], depths: np.ndarray) -> tuple[int, int]:
        """The smallest and largest count with the shared sizes between `lo` and `hi` and one of `depths`."""
        lows, highs = self._reaches(lo, hi, depths)
        return int(lows.min()), int(highs.max())

    def _reaches(self, lo: list[int], hi: list[int], depths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        low = [_contract(kind.low, lo[:2] + [lo[2] if kind.has_experts else 0]) for kind in self.kinds]
        high = [_contract(kind.high, hi[:2] + [hi[2] if kind.has_experts else 0]) for kind in self.kinds]
        return depths @ np.array(low) + self._root(lo[0]), depths @ np.array(high) + self._root(hi[0])


class _Kind:
    """Layers of equal cost: a polynomial that is affine in each of six sizes."""

    def __init__(self, width: str, has_experts: bool, coefficients: np.ndarray, grids: list[list[int]]) -> None:
        self.width, self.has_experts, self.coefficients = width, has_experts, coefficients
        # with the per-layer sizes at their smallest and at their largest, a polynomial of the shared three
        own = grids[len(GLOBAL) :]
        reverse = coefficients.transpose(3, 4, 5, 0, 1, 2)
        self.low = _contract(reverse, [grid[0] for grid in own])
        self.high = _contract(reverse, [grid[-1] for grid in own])

    def at(self, *sizes: int) -> np.ndarray:
        """The polynomial with its leading sizes filled in; the cost itself when all are."""
        return _contract(self.coefficients, sizes)


def _contract(coefficients: np.ndarray, sizes: tuple | list) -> np.ndarray:
    for size in sizes:
        coefficients = coefficients[0] + size * coefficients[1]
    return coefficients


def _multi_affine(function, bounds: list[tuple[int, int]]) -> np.ndarray:
    """Coefficients, shape (2,) * n, of a function that is affine in each of n integers, from its values at the corners."""
    corners = itertools.product(*(bound if bound[0] < bound[1] else bound[:1] for bound in bounds))
    values = np.array([function(*corner) for corner in corners], dtype=np.int64)
    values = values.reshape([1 if lo == hi else 2 for lo, hi in bounds])
    for axis, (lo, hi) in enumerate(bounds):
        first = values.take([0], axis)
        slope = (values.take([-1], axis) - first) // max(hi - lo, 1)
        values = np.concatenate((first - slope * lo, slope), axis)
    return values


class _Draw:
    """One attempt at drawing sizes into a bin."""

    def __init__(self, space: SizeSpace, rng: np.random.Generator, bin: Bin, wish: Wish, nodes: int) -> None:
        self.space, self.rng, self.bin, self.wish, self.nodes = space, rng, bin, wish, nodes
        grids = [space.grids.get(name, [0]) for name in GLOBAL]
        self.lo, self.hi = [grid[0] for grid in grids], [grid[-1] for grid in grids]
        self.depths = np.arange(len(space.depths))

    def run(self) -> Sizes | None:
        """The sizes, or None: nothing is there, or, when no nodes are left, nothing was found."""
        names = [*GLOBAL, "n_layer"]
        wished = [(name, EVERY) in self.wish.values or (name == "n_layer" and self.wish.layers is not None) for name in names]
        order = self.rng.permutation(len(names)).tolist()
        return self._shared([names[i] for i in sorted(order, key=wished.__getitem__)])

    def _shared(self, names: list[str]) -> Sizes | None:
        """Draws the sizes that all layers share, then the rest."""
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
        """The values of a shared size for which the bin is within reach."""
        at, grid = GLOBAL.index(name), self.space.grids.get(name, [0])
        depths = self.space.depths[self.depths]

        def reach(value: int) -> tuple[int, int]:
            lo, hi = list(self.lo), list(self.hi)
            lo[at] = hi[at] = value
            return self.space._reach(lo, hi, depths)

        first = bisect_left(grid, self.bin.lo, key=lambda value: reach(value)[1])
        stop = bisect_right(grid, self.bin.hi, key=lambda value: reach(value)[0])
        return self._ordered(grid, first, stop, self.wish.values.get((name, EVERY)))

    def _depth_options(self) -> Iterator[int]:
        """The numbers of layers of each kind for which the bin is within reach, as indices into all of them."""
        lows, highs = self.space._reaches(self.lo, self.hi, self.space.depths)
        depths = np.flatnonzero((lows <= self.bin.hi) & (highs >= self.bin.lo))
        totals = self.space.depths[depths].sum(1)
        if self.wish.layers is not None:
            wished = np.bincount([self.space.kind_of[layer] for layer in self.wish.layers], minlength=len(self.space.kinds))
            off = abs(self.space.depths[depths] - wished).sum(1)
            # of equally near ones a random one first
            return iter(depths[np.lexsort((self.rng.random(len(depths)), off))].tolist())
        # any number of layers is as likely as any other; within a number, any set of layers
        keys = self.rng.random(len(depths)) ** (1 / self.space.depth_weights[depths])
        place = {total: i for i, total in enumerate(self.rng.permutation(np.unique(totals)).tolist())}
        return iter(depths[np.lexsort((-keys, [place[total] for total in totals.tolist()]))].tolist())

    def _ordered(self, grid: list[int], first: int, stop: int, wished: float | None) -> Iterator[int]:
        """The values grid[first:stop], nearest to the wish first, without one in random order."""
        for i in _random_order(self.rng, first, stop) if wished is None else _outwards(grid, first, stop, wished):
            self.nodes -= 1
            if self.nodes <= 0:
                return
            yield grid[i]

    def _choose_layers(self) -> tuple[int, ...]:
        """Layers of the numbers drawn: those wished for, else random ones."""
        space = self.space
        if space.args.layers == "first":
            return tuple(range(int(space.depths[self.depths[0]].sum())))
        chosen: list[int] = []
        for kind, n in enumerate(space.depths[self.depths[0]].tolist()):
            layers = [layer for layer, k in enumerate(space.kind_of) if k == kind]
            wished = set(self.wish.layers or ()) & set(layers)
            first, then = self.rng.permutation(sorted(wished)), self.rng.permutation([i for i in layers if i not in wished])
            chosen += [int(i) for i in (*first, *then)][:n]
        return tuple(sorted(chosen))

    def _per_layer(self) -> Sizes | None:
        """Draws the layers' own sizes, with the shared ones settled."""
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
    """The cost of the chosen layers as a function of their own sizes, the shared ones being settled."""

    def __init__(self, space: SizeSpace, layers: tuple[int, ...], shared: list[int]) -> None:
        self.root = space._root(shared[0])
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
                self.users.setdefault((name, at), []).append((term, axis))
        self.grids = {key: space.grids[key[0]] for key in self.users}

    def cost(self, term: int, sizes: list) -> int:
        """The cost of the layers of one term: groups, heads per group, neurons."""
        groups, per_group, neurons = sizes
        c = self.coefficients[term]
        one = c[0] + c[1] * neurons + per_group * (c[2] + c[3] * neurons)
        one += groups * (c[4] + c[5] * neurons + per_group * (c[6] + c[7] * neurons))
        return self.multiples[term] * one


class _Descent:
    """Draws the layers' own sizes one after the other, depth first."""

    def __init__(self, draw: _Draw, table: _LayerTable) -> None:
        self.draw, self.table, self.bin = draw, table, draw.bin
        grids = [[None] * 3 for _ in table.multiples]
        for key, users in table.users.items():
            for term, axis in users:
                grids[term][axis] = table.grids[key]
        self.lo = [[grid[0] for grid in own] for own in grids]
        self.hi = [[grid[-1] for grid in own] for own in grids]
        self.wishes = self._wishes()

    def _order(self) -> list[Key]:
        """Free sizes first, then those wished for, each in random order; last the one with the finest steps."""
        rng, keys = self.draw.rng, list(self.table.users)
        order = [keys[i] for i in rng.permutation(len(keys)).tolist()]
        # the finest steps are an MLP's neurons unless they are fixed
        last = max(order, key=lambda key: (key[0].endswith("intermediate_size"), len(self.table.grids[key])))
        return [*sorted((key for key in order if key != last), key=self.wishes.__contains__), last]

    def _wishes(self) -> dict[Key, float]:
        """The sizes wished for; when they are to give way together, shifted so that the count meets the bin."""
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
        """All sizes moved by a share of the way to their smallest (by < 0) or largest."""
        ends = {key: self.table.grids[key][-1 if by > 0 else 0] for key in sizes}
        return {key: size + abs(by) * (ends[key] - size) for key, size in sizes.items()}

    def _shift_into_bin(self, sizes: Mapping[Key, float], others: Mapping[Key, float]) -> float:
        """By which share to shift `sizes` for the count to meet the bin, at fixed `others`."""

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
        """A value for every key, or None: there is none, or no nodes are left."""
        order = self._order()
        # totals with the open sizes at their smallest and at their largest
        totals = [
            self.table.root + sum(self.table.cost(term, own) for term, own in enumerate(ends)) for ends in (self.lo, self.hi)
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
        """The values of a size for which the bin is within reach, and the totals as affine functions of it."""
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
    """All of first … stop - 1, the first one uniformly drawn, each in constant time however many there are."""
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
    """All of first … stop - 1, those whose value is nearest to the wish first."""
    above = min(max(bisect_left(grid, wished), first), stop)
    below = above - 1
    while below >= first or above < stop:
        if above >= stop or (below >= first and wished - grid[below] < grid[above] - wished):
            yield below
            below -= 1
        else:
            yield above
            above += 1


def _positional(sizes: Mapping[str, int]) -> tuple[int, int, int, int]:
    width = sizes.get("moe_intermediate_size", sizes.get("intermediate_size"))
    return sizes["n_query_groups"], sizes["heads_per_group"], width, sizes.get("n_expert", 0)


def _limits(teacher: Config) -> dict[str, int]:
    """The teacher's size of every dimension that it has."""
    limits = {"n_embd": teacher.n_embd, "n_layer": teacher.n_layer, "head_size": teacher.head_size}
    for layer in range(teacher.n_layer):
        limits |= layer_sizes(teacher, layer)
    return limits


def _legal(teacher: Config, name: str, limit: int) -> list[int] | range:
    if name == "head_size":
        return legal_head_sizes(teacher)
    if name == "n_expert":
        return [n for n in range(1, limit + 1) if _is_routable(teacher, n)]
    return range(1, limit + 1)


def _is_routable(teacher: Config, n_expert: int) -> bool:
    try:
        experts_of(teacher, Keep(n_expert))
    except UserError:
        return False
    return True


def _check_args(args: SpaceArgs) -> None:
    names = [f.name for f in fields(SizeArgs)]
    for section in ("step", "smallest"):
        for name in names:
            if (value := getattr(getattr(args, section), name)) < 1:
                raise UserError(f"search_space.{section}.{name} must be at least 1, got {value}")
    for name in args.fixed:
        if name not in names:
            raise UserError(f"search_space.fixed names dimensions ({', '.join(names)}), got {name!r}")
    if args.layers not in ("any", "first"):
        raise UserError(f"search_space.layers must be 'any' or 'first', got {args.layers!r}")
