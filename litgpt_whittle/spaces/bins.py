"""Bins: ranges of parameter counts for the sub-networks of a search."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from litgpt_whittle.errors import UserError

TOLERANCE = Fraction(5, 100)
"""Relative half-width of a bin given as a single target, as in the bins of arXiv 2510.07227."""

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_NUMBER = r"(\d[\d_]*(?:\.\d+)?(?:e\+?\d+)?)\s*([kmb]?)"
_RANGE = re.compile(rf"{_NUMBER}\s*[-–]\s*{_NUMBER}", re.IGNORECASE)
_TARGET = re.compile(rf"{_NUMBER}(?:\s*(?:±|\+-|\+/-)\s*{_NUMBER}(%?))?", re.IGNORECASE)


@dataclass(frozen=True)
class Bin:
    """A range of parameter counts, inclusive of both ends."""

    lo: int
    hi: int

    def __post_init__(self) -> None:
        if self.lo > self.hi:
            raise UserError(f"a bin must ascend, got {short(self.lo)}-{short(self.hi)}; swap its ends")
        if self.hi < 1:
            raise UserError(f"a bin must contain a parameter count of 1 or more, got {self.lo}-{self.hi}")

    def __contains__(self, n_params: int) -> bool:
        return self.lo <= n_params <= self.hi

    def __str__(self) -> str:
        lo, hi = short(self.lo), short(self.hi)
        # `parse` would apply the second number's suffix to a first one without a suffix
        return f"{self.lo}-{self.hi}" if lo.isdigit() and not hi.isdigit() else f"{lo}-{hi}"

    @classmethod
    def parse(cls, text: str | int | float) -> Bin:
        """Parse `385M-426M`, `410M±5%` (or `410M+-5%`, `410M±20M`), or a single target, `410M`, which means ±5 %.

        Numbers may have the suffixes K, M and B; without one, the first number of a range takes the second's.

        Raises:
            UserError: If the text has none of these forms, the range is reversed, or it contains no count of 1 or more.
        """
        given = format(text, "d") if isinstance(text, int) else str(text).strip()
        if match := _RANGE.fullmatch(given):
            lo, lo_unit, hi, hi_unit = match.groups()
            return cls(math.ceil(_number(lo, lo_unit or hi_unit)), math.floor(_number(hi, hi_unit)))
        if match := _TARGET.fullmatch(given):
            target, unit, by, by_unit, percent = match.groups()
            middle = _number(target, unit)
            if middle < 1:
                raise UserError(
                    f"a bin counts parameters, so its target must be 1 or more, got {given!r}; give one such as 410M "
                    "(commas separate several bins)"
                )
            if by is None:
                slack = middle * TOLERANCE
            else:
                slack = middle * _number(by, "") / 100 if percent and not by_unit else _number(by, by_unit)
            if not (percent and by_unit):
                return cls(max(math.ceil(middle - slack), 1), math.floor(middle + slack))
        raise UserError(f"a bin looks like '385M-426M', '410M±5%' or '410M', got {given!r}")


def parse_bins(value: str | int | float | Sequence[str | int | float]) -> list[Bin]:
    """Parse one or more bins, separated by commas or as a list.

    Raises:
        UserError: If there is no bin, a bin cannot be parsed, or two bins are equal.
    """
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, Sequence) else [value]
    bins = [Bin.parse(part) for part in parts]
    if not bins:
        raise UserError("at least one bin is needed, got none; give one such as --bin 410M±5%")
    for i, bin in enumerate(bins):
        if bin in bins[:i]:
            raise UserError(f"bins must differ, got {bin} twice; remove one")
    return bins


def short(n: int) -> str:
    """Format a count with a suffix if that loses no digits: `410M`, `389.5M`, `2.7K`; otherwise as plain digits."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if size <= n < 1000 * size and n * 10_000 % size == 0:
            return f"{n / size:.4f}".rstrip("0").rstrip(".") + unit
    return str(n)


def _number(digits: str, unit: str) -> Fraction:
    return Fraction(digits.replace("_", "")) * _UNITS[unit.lower()]
