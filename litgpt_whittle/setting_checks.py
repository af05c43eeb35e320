"""Checks of numbers in settings."""

from __future__ import annotations

import math
from dataclasses import MISSING, Field, fields
from typing import Any

from litgpt_whittle.errors import UserError


def check_positive(section: str, **values: int | None) -> None:
    """Raise UserError unless all settings are whole numbers of at least 1; None is allowed."""
    for name, value in values.items():
        if value is not None and not (is_number(value) and value >= 1 and value == int(value)):
            is_small = is_number(value) and value < 1
            raise UserError(
                f"{section}.{name} must be {'' if is_small else 'a whole number, '}at least 1, got {value!r}"
            )


def check_shares(section: str, **values: float) -> None:
    """Raise UserError unless all settings are numbers between 0 and 1."""
    for name, value in values.items():
        if not (is_number(value) and 0 <= value <= 1):
            raise UserError(f"{section}.{name} must be between 0 and 1, got {value!r}")


def changed(settings: Any) -> list[str]:
    """Return the names of the fields of an argument group that differ from their defaults."""
    return [field.name for field in fields(settings) if getattr(settings, field.name) != _default(field)]


def _default(field: Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def check_seed(seed: int) -> None:
    """Validate a random seed.

    Raises:
        UserError: If random generators do not accept it.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"seed must be from 0 to {2**32 - 1}, got {seed}; choose another")


def is_number(value: Any) -> bool:
    """Return whether a setting is a finite number; settings of plugins are not type-checked by the parser."""
    return isinstance(value, int | float) and math.isfinite(value)
