"""Parse and format quantities with units such as `2GB`, `10ms` or `1.5e9`, and ranges such as `600M-800M`."""

from __future__ import annotations

import math
import re
from typing import Literal

from litgpt_whittle.errors import UserError

Unit = Literal["parameters", "tokens", "FLOPs per token", "bytes", "seconds"]

_BYTES = {f"{prefix}b": 1000**power for power, prefix in enumerate(("", "k", "m", "g", "t"))}
_BYTES |= {f"{prefix}ib": 1024**power for power, prefix in enumerate(("k", "m", "g", "t"), 1)}

_SUFFIXES: dict[Unit, dict[str, float]] = {
    "parameters": {"": 1, "k": 1e3, "m": 1e6, "b": 1e9},
    "tokens": {"": 1, "k": 1e3, "m": 1e6, "b": 1e9},
    "FLOPs per token": {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12},
    "bytes": {"": 1} | _BYTES,
    "seconds": {"": 1, "s": 1, "ms": 1e-3, "us": 1e-6, "\u00b5s": 1e-6, "\u03bcs": 1e-6},  # both of Unicode's µ
}

_EXAMPLES: dict[Unit, str] = {
    "parameters": "410M, 1.5B or 1.5e9",
    "tokens": "200k, 1.5M or 1.5e6",
    "FLOPs per token": "800M, 1.5G or 1.5e9",
    "bytes": "2GB, 512MiB or 1.5e9",
    "seconds": "10ms, 250us or 0.01",
}

_PART = r"(\d[\d_]*(?:\.\d*)?(?:e[+-]?\d+)?)\s*([^\W\d_]*)"
_AMOUNT = re.compile(_PART, re.IGNORECASE)
_RANGE = re.compile(rf"{_PART}\s*[-–]\s*{_PART}", re.IGNORECASE)

Range = tuple[float, float]
"""Minimum and maximum, both inclusive"""


def parse_amount(text: str | float, unit: Unit) -> float:
    """Parse a quantity, with or without a suffix of its unit.

    Raises:
        UserError: If the quantity is invalid, not positive or not finite.
    """
    match = _AMOUNT.fullmatch(str(text).strip())
    size = _SUFFIXES[unit].get(match[2].lower()) if match else None
    amount = float(match[1].replace("_", "")) * size if match and size else 0.0
    if not 0 < amount < math.inf:
        raise UserError(f"an amount in {unit} looks like {_EXAMPLES[unit]}, got {text!r}")
    return amount


def parse_range(text: str | float, unit: Unit) -> Range:
    """Parse a range `600M-800M`, or a maximum `800M`, into (minimum, maximum).

    If the first number has no suffix, the second number's suffix applies to both.

    Raises:
        UserError: If the text is neither, or the range is reversed.
    """
    match = _RANGE.fullmatch(str(text).strip())
    if match is None or _AMOUNT.fullmatch(str(text).strip()):  # 1e-3 is an amount
        return 0.0, parse_amount(text, unit)
    lo, lo_suffix, hi, hi_suffix = match.groups()
    least, most = parse_amount(lo + (lo_suffix or hi_suffix), unit), parse_amount(hi + hi_suffix, unit)
    if least > most:
        raise UserError(f"a range must ascend, got {text!r}; swap its ends")
    return least, most


def format_amount(amount: float, unit: Unit) -> str:
    """Format a quantity with four digits, readable by `parse_amount`: `812.3M`, `12.58MB`, `1.5ms`."""
    suffixes = {suffix: size for suffix, size in _SUFFIXES[unit].items() if suffix.isascii() and "i" not in suffix}
    size = max((size for size in suffixes.values() if size <= amount), default=min(suffixes.values()))
    suffix = max((suffix for suffix in suffixes if suffixes[suffix] == size), key=len)
    return f"{amount / size:.4g}{suffix if unit == 'seconds' else suffix.upper()}"


def format_range(amounts: Range, unit: Unit) -> str:
    """Format a range, readable by `parse_range`."""
    least, most = (format_amount(amount, unit) for amount in amounts)
    # `parse_range` would apply the second number's suffix to a first number without one
    if least[-1].isdigit() and not most[-1].isdigit():
        most = f"{amounts[1]:.4g}"
    return f"{least}-{most}" if amounts[0] else format_amount(amounts[1], unit)
