"""Draw sub-networks within a bin: which sub-layers to drop, if a space may drop any, and then all sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from litgpt_whittle.errors import UserError
from litgpt_whittle.spaces.bins import Bin
from litgpt_whittle.spaces.draw import Wish, draw_sizes
from litgpt_whittle.spaces.sizes import Sizes, SizeSpace
from litgpt_whittle.subnet import DROPS, SubNet


def draw(space: SizeSpace, rng: np.random.Generator, bin: Bin, wish: Wish | None = None) -> Sizes | None:
    """Draw which sub-layers to drop, if the space may drop any, then sizes whose parameter count lies in the bin.

    Sub-layers are dropped or restored, one by one at random, until the other sizes can reach the bin.

    Returns:
        The sizes, as close to the wish as the bin allows, or None if none were found.
    """
    wish = wish or Wish()
    if not space.may_drop:
        return draw_sizes(space, rng, bin, wish)
    drops = _random_drops(space, rng) if wish.drops is None else dict(wish.drops)
    for _ in range(3 * space.teacher.n_layer):
        less = space.without(drops)
        smallest, largest = less.extent
        if smallest > bin.hi:
            drops = _more_drops(space, rng, drops)
        elif largest < bin.lo:
            drops = _fewer_drops(rng, drops)
        elif (sizes := draw_sizes(less, rng, bin, wish)) is not None:
            sizes.drops = {layer: drops[layer] for layer in sizes.layers if layer in drops}
            if _keeps_both(sizes):
                return sizes
            drops = _fewer_drops(rng, drops)
        else:
            drops = _fewer_drops(rng, drops) if rng.random() < 0.5 else _more_drops(space, rng, drops)
    return None


def change_drops(
    space: SizeSpace, rng: np.random.Generator, layers: Sequence[int], drops: Mapping[int, str]
) -> dict[int, str]:
    """Return new drops: at random, drop one more sub-layer of the kept `layers`, restore one, or do both."""
    change = int(rng.integers(3))
    changed = dict(drops) if change == 0 else _fewer_drops(rng, drops)
    return changed if change == 1 else _more_drops(space, rng, changed, layers)


def drops_of(subnet: SubNet) -> dict[int, str]:
    """Return the dropped sub-layer of each kept layer of the teacher that lacks one, as in `Sizes.drops`."""
    dropped = {part: own for name, part in DROPS.items() if (own := getattr(subnet, name)) is not None}
    return {int(layer): part for part, own in dropped.items() for layer in own.indices}


def _keeps_both(sizes: Sizes) -> bool:
    """Return whether at least one layer keeps its attention, and one its MLP."""
    dropped = list(sizes.drops.values())
    return max(dropped.count("attn"), dropped.count("mlp")) < len(sizes.layers)


def _random_drops(space: SizeSpace, rng: np.random.Generator) -> dict[int, str]:
    """Draw the sub-layers to drop: none in half of the draws, else each kind in up to half of the layers."""
    drops: dict[int, str] = {}
    if rng.random() < 0.5:
        return drops
    for part in space.args.sublayers:
        n = int(rng.integers(space.teacher.n_layer // 2 + 1))
        free = [layer for layer in range(space.teacher.n_layer) if layer not in drops]
        drops |= {int(layer): part for layer in rng.permutation(free)[:n]}
    return drops


def _more_drops(
    space: SizeSpace, rng: np.random.Generator, drops: Mapping[int, str], layers: Sequence[int] | None = None
) -> dict[int, str]:
    """Return the drops and one more, drawn from the `layers` that have both sub-layers (by default, of all layers)."""
    free = [layer for layer in (range(space.teacher.n_layer) if layers is None else layers) if layer not in drops]
    if not free:
        return dict(drops)
    parts = space.args.sublayers
    return {**drops, free[int(rng.integers(len(free)))]: parts[int(rng.integers(len(parts)))]}


def _fewer_drops(rng: np.random.Generator, drops: Mapping[int, str]) -> dict[int, str]:
    """Return the drops without one of them, drawn at random."""
    left = sorted(drops)
    if left:
        del left[int(rng.integers(len(left)))]
    return {layer: drops[layer] for layer in left}


def check_reachable(space: SizeSpace, bin: Bin) -> None:
    """Check that the space has a sub-network in the bin.

    Raises:
        UserError: If none does; the message contains the nearest possible parameter counts.
    """
    if draw(space, np.random.default_rng(0), bin) is None:
        near = " and ".join(f"{n:,}" for n in nearest(space, bin) if n is not None)
        hint = "" if bin.lo <= space.largest else f" (the teacher has {space.largest:,})"
        raise UserError(f"no sub-network lies in the bin {bin}{hint}; the nearest have {near} parameters, change --bin")


def nearest(space: SizeSpace, bin: Bin) -> tuple[int | None, int | None]:
    """Return the nearest possible counts below and above an empty bin, each None if there is no such count."""
    rng, below, above = np.random.default_rng(0), None, None
    if bin.lo > space.largest:
        return space.largest, None
    if bin.hi < space.smallest:
        return None, space.smallest
    if bin.lo > space.smallest:
        below = space.smallest
        while below < bin.lo - 1 and (sizes := draw(space, rng, Bin(below + 1, bin.lo - 1))) is not None:
            below = space.count(sizes)
    if bin.hi < space.largest:
        above = space.largest
        while above > bin.hi + 1 and (sizes := draw(space, rng, Bin(bin.hi + 1, above - 1))) is not None:
            above = space.count(sizes)
    return below, above
