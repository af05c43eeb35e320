"""Sizes of a sub-network as named integers, for generic optimisers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from litgpt_whittle.spaces.args import SUBLAYER_NAMES
from litgpt_whittle.spaces.drops import drops_of
from litgpt_whittle.spaces.sizes import EVERY, GLOBAL, Key, Sizes
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.subnet import SubNet, layer_sizes

_TITLES = {part: name for name, part in SUBLAYER_NAMES.items()}
"""Names of sub-layers in search parameters, by litgpt's names"""


class Choices:
    """Search parameters of a space: integers between two bounds, such as `n_embd` or `intermediate_size.3`.

    Kept layers are encoded as 0 or 1 per layer, such as `layer.3`, and so are sub-layers that may be dropped, such as
    `attention.3`. If only the first or the best layers may be kept, their number is encoded instead, as `n_layer`. The
    kept units are not encoded.

    Args:
        space: The space.
    """

    def __init__(self, space: Space) -> None:
        self.space = space
        self._keys = {_name(key): key for key in _keys(space)}
        grids = space.sizes.grids
        self.bounds = {name: (grids[size][0], grids[size][-1]) for name, (size, _) in self._keys.items()}
        """Smallest and largest value of each search parameter, by name"""
        depths = grids["n_layer"]
        if len(depths) > 1 and space.sizes.layer_order is not None:
            self.bounds["n_layer"] = depths[0], depths[-1]
        elif len(depths) > 1:
            self.bounds |= {f"layer.{layer}": (0, 1) for layer in range(space.teacher.n_layer)}
        for part in space.sizes.args.sublayers if space.sizes.may_drop else ():
            self.bounds |= {f"{_TITLES[part]}.{layer}": (0, 1) for layer in range(space.teacher.n_layer)}

    def of(self, subnet: SubNet) -> dict[str, int]:
        """Return the search parameters of a sub-network; a dropped layer gets the sizes of the nearest kept layer."""
        every = tuple(range(self.space.teacher.n_layer))
        values = self.space.complete(self.space.sizes_of(subnet).values, every)
        numbers = {name: values[key] for name, key in self._keys.items()}
        numbers |= {f"layer.{layer}": int(layer in subnet.layers) for layer in every} | {"n_layer": len(subnet)}
        drops = drops_of(subnet)
        numbers |= {f"{title}.{i}": int(drops.get(i) != part) for part, title in _TITLES.items() for i in every}
        return {name: numbers[name] for name in self.bounds}

    def build(
        self, rng: np.random.Generator, numbers: Mapping[str, int], units_of: SubNet | None = None, exchange: float = 0
    ) -> SubNet:
        """Return the sub-network within the bin that is closest to the search parameters (see `Space.near`)."""
        order = self.space.sizes.layer_order
        if order is not None and "n_layer" in numbers:
            layers = sorted(order[: numbers["n_layer"]])
        else:
            layers = [i for i in range(self.space.teacher.n_layer) if numbers.get(f"layer.{i}", 1)] or [0]
        # of a layer without both sub-layers, only the first one is dropped
        dropped = [(i, part) for part, title in _TITLES.items() for i in layers if not numbers.get(f"{title}.{i}", 1)]
        wish = Sizes(tuple(layers), {key: numbers[name] for name, key in self._keys.items()}, dict(reversed(dropped)))
        return self.space.near(rng, wish, units_of, exchange)


def _name(key: Key) -> str:
    return key[0] if key[1] == EVERY else f"{key[0]}.{key[1]}"


def _keys(space: Space) -> list[Key]:
    """Return the keys of sizes with more than one value."""
    keys = []
    for name, grid in space.sizes.grids.items():
        if name == "n_layer" or len(grid) == 1:
            continue
        if name in GLOBAL or not space.is_layerwise:
            keys.append((name, EVERY))
        else:
            layers = range(space.teacher.n_layer)
            keys += [(name, layer) for layer in layers if name in layer_sizes(space.teacher, layer)]
    return keys
