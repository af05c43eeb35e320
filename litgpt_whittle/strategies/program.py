"""Integer program for the cheapest combination of per-layer alternatives within a bin and its limits.

A layer has a binary variable for each combination of its attention's sizes, one for each combination of its MLP's
sizes, and one for dropping the layer. A dropped attention or MLP is a combination of zeros. A size shared by all layers
(the number of experts; in uniform spaces every size) has a variable per level, which bounds the layers' variables.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from litgpt_whittle.metrics import MEASURES
from litgpt_whittle.quantities import Range
from litgpt_whittle.spaces.alternatives import DROPPED, Alternative, Alternatives, LayerChoice, sublayer_sizes
from litgpt_whittle.spaces.sizes import EVERY
from litgpt_whittle.subnet import ATTENTION, DROPS, SubNet
from litgpt_whittle.unit_index import UnitIndex

N_NODES = 20_000
"""Node limit of branch and bound; a time limit would make the result depend on the machine"""

_MAGNITUDE = 1e4
"""Largest coefficient of a row after scaling, so that the solver's tolerance of 1e-6 is far below one parameter"""

Part = tuple[int, tuple[str, ...]]
"""A layer, and the names of the sizes that are chosen together: the sizes of its attention or of its MLP"""

Row = dict[int, float]
"""Coefficients of a constraint by variable"""


def field_of(names: Sequence[str]) -> str:
    """Return the field of `SubNet` that drops the sub-layer with these sizes."""
    return "drop_attention" if names[0] in ATTENTION else "drop_mlp"


class Program:
    """Solver for the combination of alternatives with the lowest total cost.

    Args:
        alternatives: Alternatives of a space; solutions are within its bin and its limits in closed form.
    """

    def __init__(self, alternatives: Alternatives) -> None:
        self.alternatives, self.space, self.n_layer = alternatives, alternatives.space, alternatives.teacher.n_layer
        self.n = 0
        self.dropped = {layer: self._new() for layer in sorted(alternatives.droppable)}
        self.parts: dict[Part, dict[tuple[int, ...], int]] = {}
        """Variable of each combination of sizes, by part"""
        for layer, sizes in enumerate(alternatives.sizes):
            for field in DROPS:
                names = tuple(sublayer_sizes(field, sizes))
                levels = list(itertools.product(*(alternatives.offered[name] for name in names)))
                levels += [(0,) * len(names)] if field in alternatives.sublayers else []
                self.parts[layer, names] = {values: self._new() for values in levels}
        self.rows: list[tuple[Row, float, float]] = []
        self._choose_one()
        self._keep_sublayers()
        self.shared = self._share_levels()
        self._bound_depth()
        self._bound_quantities()
        self.costs = self._cost_matrix()

    def solve(self, costs: np.ndarray, others: Sequence[Sequence[LayerChoice]] = ()) -> list[LayerChoice] | None:
        """Return the cheapest combination, or None if none exists or the solver found none within its node limit.

        Args:
            costs: Cost of each alternative, shape (n_alternatives,).
            others: Combinations to exclude.

        Returns:
            The sizes of each layer of the teacher; None for a dropped layer.
        """
        objective = self.costs @ costs
        largest = abs(objective).max(initial=0.0) or 1.0
        # the last bits of fitted costs depend on the number of threads; rounding keeps them from affecting the solution
        objective = np.round(objective / largest, 9)
        rows = [*self.rows, *map(self._cut, others)]
        at = [(i, j, value) for i, (row, _, _) in enumerate(rows) for j, value in row.items()]
        i, j, values = (np.array(column) for column in zip(*at))
        matrix = csr_array((values.astype(float), (i, j)), shape=(len(rows), self.n))
        # scipy 1.13 accepts only 32-bit indices
        matrix.indices, matrix.indptr = matrix.indices.astype(np.int32), matrix.indptr.astype(np.int32)
        lows, highs = (np.array([row[k] for row in rows], dtype=float) for k in (1, 2))
        found = milp(
            objective,
            integrality=np.ones(self.n),
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(matrix, lows, highs),
            options={"node_limit": N_NODES, "mip_rel_gap": 1e-6},
        )
        return None if found.x is None else self._choices(found.x.round().astype(bool))

    def _new(self) -> int:
        self.n += 1
        return self.n - 1

    def _choices(self, chosen: np.ndarray) -> list[LayerChoice]:
        choices: list[LayerChoice] = [{} for _ in range(self.n_layer)]
        for layer, variable in self.dropped.items():
            choices[layer] = None if chosen[variable] else choices[layer]
        for (layer, names), variables in self.parts.items():
            if (choice := choices[layer]) is not None:
                values = next(values for values, variable in variables.items() if chosen[variable])
                choice.update(zip(names, values))
        return choices

    def _cut(self, choices: Sequence[LayerChoice]) -> tuple[Row, float, float]:
        """Return the constraint that excludes a combination (no-good cut)."""
        row: Row = {}
        for (layer, names), variables in self.parts.items():
            choice = choices[layer]
            variable = self.dropped[layer] if choice is None else variables[tuple(choice[name] for name in names)]
            row[variable] = row.get(variable, 0) + 1
        return row, -math.inf, len(self.parts) - 1

    # constraints ------------------------------------------------------------------------------------------------------

    def _choose_one(self) -> None:
        """Constrain each part of a layer to one combination of sizes, unless the layer is dropped."""
        for (layer, _), variables in self.parts.items():
            row = dict.fromkeys(variables.values(), 1.0)
            row |= {self.dropped[layer]: 1.0} if layer in self.dropped else {}
            self.rows.append((row, 1, 1))

    def _keep_sublayers(self) -> None:
        """Keep one of each layer's sub-layers; keep the attention of at least one layer, and the MLP of one."""
        kept: dict[str, Row] = {field: {} for field in self.alternatives.sublayers}
        dropped: dict[int, Row] = {}
        for (layer, names), variables in self.parts.items():
            for values, variable in variables.items():
                if not all(values):
                    dropped.setdefault(layer, {})[variable] = 1.0
                elif (field := field_of(names)) in kept:
                    kept[field][variable] = 1.0
        self.rows += [(row, 0, 1) for row in dropped.values()] + [(row, 1, math.inf) for row in kept.values()]

    def _share_levels(self) -> dict[Alternative, int]:
        """Constrain layers to the same level of each shared size; return the variable of each level."""
        names = self.alternatives.offered if not self.space.is_layerwise else ["n_expert"]
        shared: dict[Alternative, int] = {}
        for name in names:
            own = {n: self._new() for n in self.alternatives.offered.get(name, [])}
            if own:
                self.rows.append((dict.fromkeys(own.values(), 1.0), 1, 1))
            shared |= {Alternative(EVERY, name, n): variable for n, variable in own.items()}
            for (_, part), variables in self.parts.items():
                for n, variable in own.items() if name in part else ():
                    using = [each for values, each in variables.items() if values[part.index(name)] == n]
                    self.rows.append((dict.fromkeys(using, 1.0) | {variable: -1.0}, -math.inf, 0))
        return shared

    def _bound_depth(self) -> None:
        """Constrain the number of layers to the space's grid, and dropped layers to the space's order if it has one."""
        grid, order = self.space.sizes.grids["n_layer"], self.space.sizes.layer_order
        if not self.dropped:
            return
        row = dict.fromkeys(self.dropped.values(), 1.0)
        if len(grid) == grid[-1] - grid[0] + 1:
            self.rows.append((row, 0, self.n_layer - grid[0]))
        else:
            depths = {self._new(): float(n) for n in grid}
            self.rows.append((row | depths, self.n_layer, self.n_layer))
            self.rows.append((dict.fromkeys(depths, 1.0), 1, 1))
        own = [] if order is None else [self.dropped[layer] for layer in order if layer in self.dropped]
        self.rows += [({first: 1.0, second: -1.0}, -math.inf, 0) for first, second in zip(own, own[1:])]

    def _bound_quantities(self) -> None:
        """Constrain the parameters to the bin, and other costs in closed form to their limits."""
        limits = self.space.limits
        ranges: dict[str, Range] = {"n_params": (self.space.bin.lo, self.space.bin.hi)}
        ranges |= {name: bounds for name, bounds in limits.ranges.items() if not MEASURES[name].is_timed}
        if "n_params" in limits.ranges:
            least, most = limits.ranges["n_params"]
            ranges["n_params"] = max(least, self.space.bin.lo), min(most, self.space.bin.hi)
        outside, layers = self._quantities(list(ranges))
        for k, (lo, hi) in enumerate(ranges.values()):
            row = {variable: values[k] for variable, values in layers.items() if values[k]}
            scale = _MAGNITUDE / max(map(abs, row.values()), default=1.0)
            row = {variable: scale * value for variable, value in row.items()}
            self.rows.append((row, scale * (lo - outside[k]), scale * (hi - outside[k])))

    def _quantities(self, names: Sequence[str]) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """Return the costs outside of the layers, and the costs that each variable adds, each of shape (n_names,).

        They are differences between the costs of sub-networks with one or two layers.
        """
        teacher = self.alternatives.teacher

        def measured(layers: Sequence[int], kept: dict[str, UnitIndex]) -> np.ndarray:
            subnet = SubNet(teacher, n_layer=UnitIndex(np.array(layers)), **kept)
            costs = self.space.limits.costs(subnet) | {"n_params": self.space.n_params(subnet)}
            return np.array([costs[name] for name in names], dtype=float)

        first, last = measured([0], {}), measured([self.n_layer - 1], {})
        both = measured([0, self.n_layer - 1], {}) if self.n_layer > 1 else first
        outside = first + last - both if self.n_layer > 1 else np.zeros(len(names))
        added: dict[int, np.ndarray] = {}
        for (layer, part), variables in self.parts.items():
            whole = measured([layer], {})
            # the constant part of a layer's cost is counted once, with its attention
            rest = whole - outside if part == ATTENTION else 0.0
            for values, variable in variables.items():
                if all(values):
                    cut = measured([layer], dict(zip(part, map(UnitIndex, values)))) - whole
                else:  # besides another layer, since one layer must keep each sub-layer
                    pair = sorted([layer, 0 if layer else 1])
                    cut = measured(pair, {field_of(part): UnitIndex([layer])}) - measured(pair, {})
                added[variable] = cut + rest
        return outside, added

    def _cost_matrix(self) -> csr_array:
        """Return the weights of the alternatives in each variable, shape (n_variables, n_alternatives)."""
        index, between = self.alternatives.index, self.alternatives.between
        cuts = [(variable, Alternative(layer, DROPPED, 0), 1.0) for layer, variable in self.dropped.items()]
        for (layer, names), variables in self.parts.items():
            for values, variable in variables.items():
                if not all(values):
                    cuts.append((variable, Alternative(layer, field_of(names), 0), 1.0))
                    continue
                for name, size in zip(names, values):
                    if name != "n_expert":
                        cuts += [(variable, Alternative(layer, name, n), part) for n, part in between(name, size)]
        cuts += [(variable, cut, 1.0) for cut, variable in self.shared.items() if cut.name == "n_expert"]
        entries = [(part, variable, index[cut]) for variable, cut, part in cuts if cut in index]
        parts, rows, columns = zip(*entries) if entries else ((), (), ())
        return csr_array((np.array(parts, dtype=float), (rows, columns)), shape=(self.n, len(index)))
