"""Amounts as people write them: `2GB`, `10ms`, `1.5e9`."""

from __future__ import annotations

import math
import re
from typing import Literal

from litgpt_whittle.errors import UserError

Unit = Literal["parameters", "FLOPs per token", "bytes", "seconds"]

_BYTES = {f"{prefix}b": 1000**power for power, prefix in enumerate(("", "k", "m", "g", "t"))}
_BYTES |= {f"{prefix}ib": 1024**power for power, prefix in enumerate(("k", "m", "g", "t"), 1)}

_SUFFIXES: dict[Unit, dict[str, float]] = {
    "parameters": {"": 1, "k": 1e3, "m": 1e6, "b": 1e9},
    "FLOPs per token": {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12},
    "bytes": {"": 1} | _BYTES,
    "seconds": {"": 1, "s": 1, "ms": 1e-3, "us": 1e-6, "\u00b5s": 1e-6, "\u03bcs": 1e-6},  # both of Unicode's µ
}

_EXAMPLES: dict[Unit, str] = {
    "parameters": "410M, 1.5B or 1.5e9",
    "FLOPs per token": "800M, 1.5G or 1.5e9",
    "bytes": "2GB, 512MiB or 1.5e9",
    "seconds": "10ms, 250us or 0.01",
}

_AMOUNT = re.compile(r"(\d[\d_]*(?:\.\d*)?(?:e[+-]?\d+)?)\s*([^\W\d_]*)", re.IGNORECASE)


def parse_amount(text: str | float, unit: Unit) -> float:
    """Reads an amount, with or without a suffix of its unit.

    Raises:
        UserError: If it is none, or not more than 0.
    """
    match = _AMOUNT.fullmatch(str(text).strip())
    size = _SUFFIXES[unit].get(match[2].lower()) if match else None
    amount = float(match[1].replace("_", "")) * size if size else 0.0
    if not 0 < amount < math.inf:
        raise UserError(f"an amount in {unit} looks like {_EXAMPLES[unit]}, got {text!r}")
    return amount
