"""Bins: the range of parameter counts that a searched sub-network must have."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from litgpt_whittle.errors import UserError

TOLERANCE = Fraction(5, 100)
"""How far the bin of a bare target reaches to both sides, as the paper's do around their reference models."""

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_NUMBER = r"(\d[\d_]*(?:\.\d+)?(?:e\+?\d+)?)\s*([kmb]?)"
_RANGE = re.compile(rf"{_NUMBER}\s*[-–]\s*{_NUMBER}", re.IGNORECASE)
_TARGET = re.compile(rf"{_NUMBER}(?:\s*(?:±|\+-|\+/-)\s*{_NUMBER}(%?))?", re.IGNORECASE)


@dataclass(frozen=True)
class Bin:
    """A range of parameter counts, both ends included."""

    lo: int
    hi: int

    def __post_init__(self) -> None:
        if self.lo > self.hi:
            raise UserError(f"a bin runs upwards, got {short(self.lo)}-{short(self.hi)}; swap its ends")
        if self.hi < 1:
            raise UserError(f"a bin holds parameter counts of 1 or more, got {self.lo}-{self.hi}")

    def __contains__(self, n_params: int) -> bool:
        return self.lo <= n_params <= self.hi

    def __str__(self) -> str:
        lo, hi = short(self.lo), short(self.hi)
        # a first number without a suffix would take the second's
        return f"{self.lo}-{self.hi}" if lo.isdigit() and not hi.isdigit() else f"{lo}-{hi}"

    @classmethod
    def parse(cls, text: str | int | float) -> Bin:
        """Reads `385M-426M`, `410M±5%` (or `410M+-5%`, `410M±20M`), or a bare target, `410M`, which means ±5 %.

        Numbers take the suffixes K, M and B; the first number of a range without one takes the second's.

        Raises:
            UserError: If the text is none of these, or the range is reversed.
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
                    f"a bin counts parameters, of which there is at least 1, got {given!r}; give one such as 410M "
                    "(commas separate several)"
                )
            if by is None:
                slack = middle * TOLERANCE
            else:
                slack = middle * _number(by, "") / 100 if percent and not by_unit else _number(by, by_unit)
            if not (percent and by_unit):
                return cls(max(math.ceil(middle - slack), 1), math.floor(middle + slack))
        raise UserError(f"a bin looks like '385M-426M', '410M±5%' or '410M', got {given!r}")


def parse_bins(value: str | int | float | Sequence[str | int | float]) -> list[Bin]:
    """Reads one bin or several, separated by commas or as a list; each once.

    Raises:
        UserError: If there is none, one cannot be read, or two are the same.
    """
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, Sequence) else [value]
    bins = [Bin.parse(part) for part in parts]
    if not bins:
        raise UserError("at least one bin is needed, got none; give one such as --bin 410M±5%")
    for i, bin in enumerate(bins):
        if bin in bins[:i]:
            raise UserError(f"bins must differ, got {bin} twice; leave one out")
    return bins


def short(n: int) -> str:
    """A count in the unit that suits it, without loss: `410M`, `389.5M`, `2700`."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if size <= n < 1000 * size and n * 10_000 % size == 0:
            return f"{n / size:.4f}".rstrip("0").rstrip(".") + unit
    return str(n)


def _number(digits: str, unit: str) -> Fraction:
    return Fraction(digits.replace("_", "")) * _UNITS[unit.lower()]
