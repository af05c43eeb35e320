"""What a search's sub-networks may cost, in any of the measures; what they may have in parameters is the bin."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from litgpt.config import Config

from litgpt_whittle.amounts import Range, format_amount, format_range
from litgpt_whittle.errors import UserError
from litgpt_whittle.metrics import MEASURES, MeasureArgs
from litgpt_whittle.spaces.bins import Bin
from litgpt_whittle.subnet import SubNet

_DRAWS = 500
"""How many random sub-networks are tried before limits count as out of reach"""


@dataclass(frozen=True)
class Limits:
    """Ranges of costs, by the names of their measures.

    Costs in closed form take no time, so what is outside is turned down before it becomes a candidate (`admits`). A
    latency is another one each time it is taken, while candidates must follow from the seed and the scores alone, or no
    journal could be resumed. So it is measured once, when a candidate is evaluated, and one that is outside counts as
    failed (`excess`). That costs an evaluation of the budget and the time of six answers to a prompt, but not the time
    of scoring.
    """

    ranges: Mapping[str, Range] = field(default_factory=dict)
    teacher: Config | None = None
    """Needed as soon as there is a range"""
    args: MeasureArgs = MeasureArgs()
    """How the sub-networks will be used"""

    @property
    def settings(self) -> dict[str, list[float]]:
        """The ranges as plain values."""
        return {name: list(amounts) for name, amounts in self.ranges.items()}

    def admits(self, subnet: SubNet) -> bool:
        """Whether a sub-network keeps to all limits in closed form."""
        return all(_within(cost, self.ranges[name]) for name, cost in self.costs(subnet).items())

    def fits(self, subnet: SubNet) -> bool:
        """Return whether a sub-network costs no more than the limits in closed form allow, however little that is."""
        return all(cost <= self.ranges[name][1] for name, cost in self.costs(subnet).items())

    @property
    def is_timed(self) -> bool:
        """True if a limit must be measured."""
        return any(MEASURES[name].is_timed for name in self.ranges)

    def excess(self, measured: Mapping[str, float]) -> str | None:
        """Why a candidate fails of which this was measured; None where it keeps to the limits."""
        for name, amounts in self.ranges.items():
            if name in measured and not _within(measured[name], amounts):
                return f"{name} is outside of its limit {format_range(amounts, MEASURES[name].unit)}"
        return None

    def bin(self, smallest: int, largest: int) -> Bin:
        """The bin of a search that names none: all counts that there are, as far as the limits allow."""
        least, most = self.ranges.get("n_params", (0, math.inf))
        lo, hi = max(math.ceil(least), smallest), math.floor(min(most, largest))
        return Bin(lo, hi) if lo <= hi else Bin(smallest, largest)

    def check_reachable(self, sample: Callable[[np.random.Generator], SubNet], bin: Bin) -> None:
        """Refuses limits that no random sub-network keeps to.

        Args:
            sample: Draws a sub-network of the bin.
            bin: For the message.

        Raises:
            UserError: If there is none among 500, with the costs that they have.
        """
        rng, seen = np.random.default_rng(0), {name: [] for name in self.ranges}
        for _ in range(_DRAWS if self.ranges else 0):
            subnet = sample(rng)
            if self.admits(subnet):
                return
            for name, cost in self.costs(subnet).items():
                seen[name].append(cost)
        told = []
        for name, costs in seen.items():
            unit = MEASURES[name].unit
            if costs:
                ends = " to ".join(format_amount(cost, unit) for cost in (min(costs), max(costs)))
                told.append(f"limit.{name} {format_range(self.ranges[name], unit)} (they have {ends})")
        if told:
            raise UserError(
                f"none of {_DRAWS} random sub-networks of the bin {bin} keeps to {' and '.join(told)}; "
                "change the limits or the bin"
            )

    def costs(self, subnet: SubNet) -> dict[str, float]:
        """Return a sub-network's costs for which there is a limit in closed form, by name."""
        closed = [name for name in self.ranges if not MEASURES[name].is_timed]
        return {name: MEASURES[name](self.teacher, subnet, self.args) for name in closed}


def _within(cost: float, amounts: Range) -> bool:
    return amounts[0] <= cost <= amounts[1]
