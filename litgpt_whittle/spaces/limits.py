"""Limits on the costs of a search's sub-networks, by any measure, in addition to the bin of parameter counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from litgpt.config import Config

from litgpt_whittle.errors import UserError
from litgpt_whittle.metrics import MEASURES, MeasureArgs
from litgpt_whittle.quantities import Range, format_amount, format_range
from litgpt_whittle.spaces.bins import Bin
from litgpt_whittle.subnet import SubNet

_DRAWS = 500
"""Number of random sub-networks to try before limits count as unreachable"""


@dataclass(frozen=True)
class Limits:
    """Ranges of costs, by the names of their measures.

    Closed-form costs are cheap, so sub-networks outside their ranges are rejected before they become candidates
    (`admits`). Latencies vary between measurements, but proposals must depend only on the seed and the scores;
    otherwise a journal could not be resumed. Latency is therefore measured once, when a candidate is evaluated, and a
    candidate outside the range counts as failed (`excess`). A failed candidate uses up one evaluation and the time of
    six generations from a prompt, but is not scored.
    """

    ranges: Mapping[str, Range] = field(default_factory=dict)
    teacher: Config | None = None
    """The teacher's config; required if there is a range"""
    args: MeasureArgs = field(default_factory=MeasureArgs)
    """Intended use of the sub-networks, which the measures depend on"""

    @property
    def settings(self) -> dict[str, list[float]]:
        """Ranges as plain values, by the names of their measures."""
        return {name: list(amounts) for name, amounts in self.ranges.items()}

    def admits(self, subnet: SubNet) -> bool:
        """Return whether all closed-form costs of a sub-network are within their limits."""
        return all(_within(cost, self.ranges[name]) for name, cost in self.costs(subnet).items())

    def fits(self, subnet: SubNet) -> bool:
        """Return whether no closed-form cost of a sub-network exceeds the upper end of its limit."""
        return all(cost <= self.ranges[name][1] for name, cost in self.costs(subnet).items())

    @property
    def is_timed(self) -> bool:
        """True if a limit requires a timed measurement."""
        return any(MEASURES[name].is_timed for name in self.ranges)

    def excess(self, measured: Mapping[str, float]) -> str | None:
        """Return the reason why a candidate with these measured costs fails; None if it is within the limits."""
        for name, amounts in self.ranges.items():
            if name in measured and not _within(measured[name], amounts):
                return f"{name} is outside of its limit {format_range(amounts, MEASURES[name].unit)}"
        return None

    def bin(self, smallest: int, largest: int) -> Bin:
        """Return the default bin: possible counts within the limit on `n_params`, or, if there are none, all
        possible counts."""
        least, most = self.ranges.get("n_params", (0, math.inf))
        lo, hi = max(math.ceil(least), smallest), math.floor(min(most, largest))
        return Bin(lo, hi) if lo <= hi else Bin(smallest, largest)

    def check_reachable(self, sample: Callable[[np.random.Generator], SubNet], bin: Bin) -> None:
        """Check that at least one of 500 random sub-networks is within the limits.

        Args:
            sample: Draws a sub-network of the bin.
            bin: The bin, for the error message.

        Raises:
            UserError: If none is; the message contains the range of their costs.
        """
        rng = np.random.default_rng(0)
        seen: dict[str, list[float]] = {name: [] for name in self.ranges}
        for _ in range(_DRAWS if self.ranges else 0):
            subnet = sample(rng)
            if self.admits(subnet):
                return
            for name, cost in self.costs(subnet).items():
                seen[name].append(cost)
        clauses = []
        for name, costs in seen.items():
            unit = MEASURES[name].unit
            if costs:
                ends = " to ".join(format_amount(cost, unit) for cost in (min(costs), max(costs)))
                clauses.append(f"limit.{name} {format_range(self.ranges[name], unit)} (they have {ends})")
        if clauses:
            raise UserError(
                f"none of {_DRAWS} random sub-networks of the bin {bin} meets {' and '.join(clauses)}; "
                "change the limits or the bin"
            )

    def costs(self, subnet: SubNet) -> dict[str, float]:
        """Return the closed-form costs of a sub-network that have a limit, by name."""
        closed = [name for name in self.ranges if not MEASURES[name].is_timed]
        return {name: MEASURES[name](self.teacher, subnet, self.args) for name in closed}


def _within(cost: float, amounts: Range) -> bool:
    return amounts[0] <= cost <= amounts[1]
