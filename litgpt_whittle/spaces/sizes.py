"""Allowed sizes of a teacher's sub-networks, and their parameter counts in closed form.

The count is a polynomial, affine and increasing in each size. The smallest and largest counts of a partial choice
therefore follow without enumeration (see `litgpt_whittle.spaces.draw`).
"""

from __future__ import annotations

import copy
import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
from litgpt.config import Config

from litgpt_whittle.errors import UserError
from litgpt_whittle.families import (
    FAMILIES,
    family_name,
    shares_channels,
)
from litgpt_whittle.index_plan import layer_params, root_params
from litgpt_whittle.rope import legal_head_sizes
from litgpt_whittle.spaces.args import (
    SUBLAYER_NAMES,
    SizeArgs,
    SpaceArgs,
)
from litgpt_whittle.subnet import ATTENTION, experts_of, layer_sizes
from litgpt_whittle.unit_index import UnitIndex

GLOBAL = ("n_embd", "head_size", "n_expert")
"""Sizes that all layers share in every space"""

WIDTHS = ("n_embd", "intermediate_size", "moe_intermediate_size")
"""Dimensions that are sides of large matrix products"""

SMALL = 512
"""Number of channels below which the default step of all dimensions is one unit"""

EVERY = -1
"""Layer index of a key that applies to all layers"""

Key = tuple[str, int]
"""Key of a size to draw: its name, and the teacher's layer that it belongs to, or `EVERY`"""


@dataclass
class Sizes:
    """Sizes of one sub-network: a value for every key that applies to it."""

    layers: tuple[int, ...]
    """Kept layers of the teacher"""
    values: dict[Key, int]
    drops: dict[int, str] = field(default_factory=dict)
    """Dropped sub-layer (`attn` or `mlp`) of kept layers that lack one, by the teacher's layer"""

    def get(self, name: str, layer: int) -> int:
        """Return the size `name` of the teacher's layer `layer`."""
        value = self.values.get((name, layer))
        return self.values[name, EVERY] if value is None else value


class SizeSpace:
    """All combinations of sizes of a teacher's sub-networks, and their closed-form parameter counts.

    Args:
        teacher: The teacher's config.
        layerwise: If true, each layer has its own sizes.
        tied: If true, the LM head shares the embedding's weights.
        args: Dimensions that may shrink, with their smallest sizes and steps.
        best_layers: All layers, the most important one first.

    Raises:
        UserError: If `args` are out of range, or set `convertible` for a teacher whose heads do not fill its channels.
    """

    def __init__(
        self,
        teacher: Config,
        layerwise: bool,
        tied: bool,
        args: SpaceArgs,
        best_layers: Sequence[int] | None = None,
    ) -> None:
        self.teacher, self.layerwise, self.args = teacher, layerwise, args
        _check_args(args)
        orders = {"any": None, "first": range(teacher.n_layer), "best": best_layers}
        self.layer_order = orders[args.layers]
        """Order of layers, of which a sub-network keeps the first n; None if it may keep any n layers"""
        self.limits = _limits(teacher)
        self.grids = {name: self._grid(name, limit) for name, limit in self.limits.items()}
        self.sharing = _sharing(teacher) if args.convertible else None
        """Constraint that the heads fit into the channels; None if there is no such constraint"""
        if self.sharing is not None:
            self._keep_convertible(self.sharing)
        self.root = [root_params(teacher, n, tied) for n in (1, 2)]
        self._find_kinds()
        self._find_depths()

    def _grid(self, name: str, limit: int) -> list[int]:
        """Return the allowed sizes of a dimension, ascending; the last one is always the teacher's."""
        if name in self.args.fixed or (name == "n_layer" and "layer" not in self.args.drop):
            return [limit]
        step, least = getattr(self.args.step, name), getattr(self.args.smallest, name)
        step = default_step(self.teacher, name, limit) if step is None else step
        if least > limit:
            raise UserError(
                f"search_space.smallest.{name} must be at most the teacher's {limit}, got {least}; lower it"
            )
        legal = set(_legal(self.teacher, name, limit))
        return [n for n in (*range(-(-least // step) * step, limit, step), limit) if n in legal]

    def _keep_convertible(self, sharing: _Sharing) -> None:
        """Remove the numbers of channels and the head sizes for which added heads of zeros could not fill the channels.

        All remaining values can be combined: head sizes divide the teacher's head size, and numbers of channels are
        multiples of it. The maximum number of heads that fit is then always an allowed size. The parameters of the
        largest layer increase with the channels and with the head size, as the closed form of the counts requires.
        """
        size, heads = self.teacher.head_size, set(self.grids[sharing.name])
        each = size * sharing.groups
        self.grids["head_size"] = [n for n in self.grids["head_size"] if size % n == 0]
        self.grids["n_embd"] = [n for n in self.grids["n_embd"] if n % each == 0 and n // each in heads]

    def own_grid(self, name: str, n_embd: int, head_size: int) -> list[int]:
        """Return the allowed sizes of a per-layer dimension, given the shared sizes."""
        grid, sharing = self.grids[name], self.sharing
        if sharing is None or name != sharing.name:
            return grid
        return grid[: bisect_right(grid, n_embd // (head_size * sharing.groups))]

    # cost of a layer --------------------------------------------------------------------------------------------------

    def _find_kinds(self) -> None:
        """Group layers by cost (such as dense layers and layers with experts), and find each kind's closed form."""
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
        self._kinds_without: dict[tuple[int, str], _Kind] = {}

    def _kind(self, layer: int, sizes: Mapping[str, int], dropped: str = "") -> _Kind:
        width = "moe_intermediate_size" if "moe_intermediate_size" in sizes else "intermediate_size"
        own = (*(() if dropped == "attn" else ATTENTION), *(() if dropped == "mlp" else (width,)))
        names = ("n_embd", "head_size", "n_expert", *ATTENTION, width)
        has_experts = "n_expert" in sizes and dropped != "mlp"
        kept = ("n_embd", "head_size", *own, *(["n_expert"] if has_experts else []))
        grids = [self.grids[name] if name in kept else [0] for name in names]

        def cost(n_embd: int, head_size: int, n_expert: int, groups: int, per_group: int, neurons: int) -> int:
            return layer_params(self.teacher, layer, n_embd, head_size, groups, per_group, neurons, n_expert)

        return _Kind(width, has_experts, own, multi_affine(cost, [(g[0], g[-1]) for g in grids]), grids)

    def kind(self, layer: int, dropped: str = "") -> _Kind:
        """Return the kind of the teacher's layer `layer`, whole or without its attention (`attn`) or MLP (`mlp`)."""
        base = self.kind_of[layer]
        if not dropped:
            return self.kinds[base]
        if (base, dropped) not in self._kinds_without:
            self._kinds_without[base, dropped] = self._kind(layer, layer_sizes(self.teacher, layer), dropped)
        return self._kinds_without[base, dropped]

    @property
    def may_drop(self) -> bool:
        """True if sub-layers may be dropped; at least one layer always keeps its attention, and one its MLP."""
        return bool(self.args.sublayers) and self.teacher.n_layer > 1

    @property
    def whole(self) -> SizeSpace:
        """The same space, except that no sub-layer may be dropped."""
        whole = copy.copy(self)
        whole.args = replace(self.args, drop=[name for name in self.args.drop if name not in SUBLAYER_NAMES])
        return whole

    def without(self, drops: Mapping[int, str]) -> SizeSpace:
        """Return the space in which these layers lack a sub-layer (`attn` or `mlp`) if they are kept."""
        if not drops:
            return self
        less = copy.copy(self)
        keys: dict[tuple[int, str], int] = {}
        for layer, base in enumerate(self.kind_of):
            keys.setdefault((base, drops.get(layer, "")), layer)
        less.kinds = [self.kind(layer, dropped) for (_, dropped), layer in keys.items()]
        place = {key: i for i, key in enumerate(keys)}
        less.kind_of = [place[base, drops.get(layer, "")] for layer, base in enumerate(self.kind_of)]
        less._find_depths()
        return less

    def _find_depths(self) -> None:
        """Find all allowed depths: combinations of a number of layers for each kind."""
        totals = [self.kind_of.count(kind) for kind in range(len(self.kinds))]
        if self.layer_order is not None:
            kinds = [self.kind_of[layer] for layer in self.layer_order]
            depths: list[Sequence[int]] = [
                [kinds[:n].count(kind) for kind in range(len(totals))] for n in self.grids["n_layer"]
            ]
        else:
            allowed = set(self.grids["n_layer"])
            depths = [d for d in itertools.product(*(range(t + 1) for t in totals)) if sum(d) in allowed]
        self.depths = np.array(sorted(depths, key=sum))  # (n_depths, n_kinds)
        # each depth is weighted by its number of sets of layers, so that all sets of n layers are equally likely
        ways = [math.prod(math.comb(t, d) for t, d in zip(totals, depth)) for depth in self.depths.tolist()]
        most = max(ways)
        self.depth_weights = np.array([way / most for way in ways]).clip(1e-300)

    def count(self, sizes: Sizes) -> int:
        """Return the number of parameters of a sub-network with these sizes."""
        shared = [sizes.values.get((name, EVERY), 0) for name in GLOBAL]
        total = self.root_count(shared[0])
        for layer in sizes.layers:
            kind = self.kind(layer, sizes.drops.get(layer, ""))
            own = [sizes.get(name, layer) if name in kind.names else 0 for name in (*ATTENTION, kind.width)]
            total += int(kind.at(*shared[:2], shared[2] if kind.has_experts else 0, *own))
        return total

    def root_count(self, n_embd: int) -> int:
        """Return the number of parameters outside the layers."""
        return self.root[0] + (n_embd - 1) * (self.root[1] - self.root[0])

    @property
    def smallest(self) -> int:
        """Number of parameters of the smallest sub-network; a lower bound if sub-layers may be dropped."""
        return min(self.without(drops).extent[0] for drops in self._most_drops())

    def _most_drops(self) -> list[dict[int, str]]:
        """Return the ways to drop the most sub-layers, and to drop none; one layer keeps each kind of sub-layer."""
        ways: list[dict[int, str]] = [{}]
        last = self.teacher.n_layer - 1
        for part in self.args.sublayers if self.may_drop else ():
            drops = dict.fromkeys(range(last), part)
            for other in self.args.sublayers:
                drops |= {last: other} if other != part else {}
            ways.append(drops)
        return ways

    @property
    def largest(self) -> int:
        """Number of parameters of the largest sub-network, the teacher."""
        return self.extent[1]

    @property
    def extent(self) -> tuple[int, int]:
        """Smallest and largest number of parameters if no more sub-layers are dropped."""
        grids = [self.grids.get(name, [0]) for name in GLOBAL]
        lo, hi = [grid[0] for grid in grids], [grid[-1] for grid in grids]
        return self.count_range(lo, lo, self.depths)[0], self.count_range(hi, hi, self.depths)[1]

    def count_range(self, lo: list[int], hi: list[int], depths: np.ndarray) -> tuple[int, int]:
        """Return the smallest and largest number of parameters.

        Args:
            lo: Smallest values of the shared sizes, in the order of `GLOBAL`.
            hi: Largest values of the shared sizes.
            depths: Allowed numbers of layers of each kind, shape (n_depths, n_kinds).
        """
        lows, highs = self.count_ranges(lo, hi, depths)
        return int(lows.min()), int(highs.max())

    def count_ranges(self, lo: list[int], hi: list[int], depths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the smallest and the largest count for each row of `depths`, both of shape (n_depths,)."""
        low = [_contract(kind.low, [*lo[:2], lo[2] if kind.has_experts else 0]) for kind in self.kinds]
        high = [self._highest(kind, [*hi[:2], hi[2] if kind.has_experts else 0]) for kind in self.kinds]
        return depths @ np.array(low) + self.root_count(lo[0]), depths @ np.array(high) + self.root_count(hi[0])

    def _highest(self, kind: _Kind, shared: list[int]) -> np.ndarray:
        """Return the cost of the largest layer of a kind, given the shared sizes."""
        if self.sharing is None:
            return _contract(kind.high, shared)
        names = (*ATTENTION, kind.width)
        return kind.at(*shared, *(self.own_grid(name, *shared[:2])[-1] if name in kind.names else 0 for name in names))


@dataclass(frozen=True)
class _Sharing:
    """Constraint that the heads fit into the channels: `n_embd >= groups * size * head_size`."""

    name: str
    """Name of the size, one of `ATTENTION`"""
    groups: int
    """Multiplicity of the size in the teacher: 1 for `n_query_groups`, the number of groups for `heads_per_group`"""


class _Kind:
    """Kind of layers with the same parameter count, a polynomial that is affine in each of six sizes."""

    def __init__(
        self, width: str, has_experts: bool, names: tuple[str, ...], coefficients: np.ndarray, grids: list[list[int]]
    ) -> None:
        self.width, self.has_experts, self.coefficients = width, has_experts, coefficients
        self.names = names
        """The per-layer sizes that these layers have, except the number of experts"""
        # polynomials of the three shared sizes, with the per-layer sizes at their smallest and at their largest
        own = grids[len(GLOBAL) :]
        reverse = coefficients.transpose(3, 4, 5, 0, 1, 2)
        self.low = _contract(reverse, [grid[0] for grid in own])
        self.high = _contract(reverse, [grid[-1] for grid in own])

    def at(self, *sizes: int) -> np.ndarray:
        """Evaluate the polynomial in its leading sizes; with all six, the result is the cost."""
        return _contract(self.coefficients, sizes)


def _contract(coefficients: np.ndarray, sizes: tuple | list) -> np.ndarray:
    for size in sizes:
        coefficients = coefficients[0] + size * coefficients[1]
    return coefficients


def multi_affine(function, bounds: list[tuple[int, int]]) -> np.ndarray:
    """Return the coefficients, shape (2,) * n, of a function affine in each of n integers, from its corner values."""
    corners = itertools.product(*(bound if bound[0] < bound[1] else bound[:1] for bound in bounds))
    values = np.array([function(*corner) for corner in corners], dtype=np.int64)
    values = values.reshape([1 if lo == hi else 2 for lo, hi in bounds])
    for axis, (lo, hi) in enumerate(bounds):
        first = values.take([0], axis)
        slope = (values.take([-1], axis) - first) // max(hi - lo, 1)
        values = np.concatenate((first - slope * lo, slope), axis)
    return values


def nearest_size(grid: Sequence[int], share: float) -> int:
    """Return the size of a grid nearest to a share of its largest size; in a tie, the smaller one."""
    aim = share * grid[-1]
    at = bisect_left(grid, aim)
    return min(grid[max(at - 1, 0) : at + 1], key=lambda size: abs(size - aim))


def default_step(teacher: Config, name: str, limit: int) -> int:
    """Return the default step of a dimension, of which the teacher has `limit` units.

    It is the largest of 128 (for teachers with more than 2,048 channels), 64 and 32 that divides the teacher's size and
    leaves at least 16 sizes; 1 for small teachers and for dimensions other than widths.
    """
    if name not in WIDTHS or teacher.n_embd < SMALL:
        return 1
    steps = [128, 64, 32] if teacher.n_embd > 2048 else [64, 32]
    return next((step for step in steps if limit % step == 0 and limit >= 16 * step), 1)


def decided(args: SpaceArgs, teacher: Config) -> SpaceArgs:
    """Return `args`; if `convertible` is None, set it to true if the teacher requires it for the free dimensions."""
    is_needed = shares_channels(teacher) and not {"n_embd", "head_size"} <= set(args.fixed)
    return replace(args, convertible=True) if args.convertible is None and is_needed else args


def _sharing(teacher: Config) -> _Sharing | None:
    """Return the constraint that the heads fit into the channels; None if the teacher's class in transformers has none.

    Raises:
        UserError: If the teacher itself violates it.
    """
    if FAMILIES[family_name(teacher)].free_heads:
        return None
    if not shares_channels(teacher):
        raise UserError(
            f"search_space.convertible needs a teacher with n_embd = n_head * head_size, got {teacher.n_embd}, "
            f"{teacher.n_head} and {teacher.head_size}; leave it out"
        )
    has_own_keys = teacher.n_query_groups == teacher.n_head
    return _Sharing("n_query_groups", 1) if has_own_keys else _Sharing("heads_per_group", teacher.n_query_groups)


def _positional(sizes: Mapping[str, int]) -> tuple[int, int, int, int]:
    width = sizes["moe_intermediate_size" if "moe_intermediate_size" in sizes else "intermediate_size"]
    return sizes["n_query_groups"], sizes["heads_per_group"], width, sizes.get("n_expert", 0)


def _limits(teacher: Config) -> dict[str, int]:
    """Return the teacher's sizes by name: the upper limit of each dimension."""
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
        experts_of(teacher, UnitIndex(n_expert))
    except UserError:
        return False
    return True


def _check_args(args: SpaceArgs) -> None:
    names = [f.name for f in fields(SizeArgs)]
    for section in ("step", "smallest"):
        for name in names:
            if (value := getattr(getattr(args, section), name)) is not None and value < 1:
                raise UserError(f"search_space.{section}.{name} must be at least 1, got {value}; raise it")
    for name in args.fixed:
        if name not in names:
            raise UserError(f"search_space.fixed must contain only dimensions ({', '.join(names)}), got {name!r}")
    for name in args.drop:
        if name not in ("layer", *SUBLAYER_NAMES):
            raise UserError(f"search_space.drop must contain only layer, attention and mlp, got {name!r}")
    if args.layers not in ("any", "first", "best"):
        raise UserError(f"search_space.layers must be 'any', 'first' or 'best', got {args.layers!r}")
