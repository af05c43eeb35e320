"""Read litgpt's `model_config.yaml`, validated against the types of litgpt's `Config`."""

from __future__ import annotations

import math
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from litgpt.config import Config

from litgpt_whittle.errors import UserError

MODEL_CONFIG = "model_config.yaml"

_REAL = ("rope_base", "rope_condense_ratio", "attention_scores_scalar")
"""Fields that litgpt annotates as integers, although they take any number; students can have a fractional RoPE base"""


def read_model_config(path: Path) -> Config:
    """Read a `model_config.yaml`.

    A number that YAML reads as a string, such as `1e-5` or `"192"`, is converted to the field's type.

    Raises:
        UserError: If the file cannot be read, a value does not have its field's type, or litgpt rejects the config.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _unusable(path, f"cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise _unusable(path, "is not YAML") from None
    if not isinstance(content, dict):
        raise _unusable(path, "is not a mapping from settings to their values")
    types = get_type_hints(Config)
    for name in types.keys() & content.keys():
        try:
            content[name] = _typed(name, content[name], types[name])
        except _WrongTypeError as error:
            raise UserError(
                f"{name} in {str(path)!r} must be {error}, got {content[name]!r}; correct the file, or copy it from "
                "where the checkpoint came from"
            ) from None
    try:
        return Config(**content)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise _unusable(path, f"is refused by litgpt ({reason})") from None


def _unusable(path: Path, problem: str) -> UserError:
    return UserError(f"{str(path)!r} {problem}; correct it, or copy it from where the checkpoint came from")


class _WrongTypeError(ValueError):
    """A value has the wrong type; the message names the expected one."""


def _typed(name: str, value: Any, of: Any) -> Any:
    """Convert a field's value to the field's type.

    Raises:
        _WrongTypeError: If that is not possible.
    """
    options = get_args(of) if get_origin(of) in (Union, UnionType) else (of,)
    if value is None and NoneType in options:
        return None
    (kind,) = (option for option in options if option is not NoneType)
    if get_origin(kind) is Literal:
        return _one_of(get_args(kind), value)
    if get_origin(kind) is list and isinstance(value, list):
        return [_typed(name, entry, get_args(kind)[0]) for entry in value]
    if kind is dict and isinstance(value, dict):
        # litgpt does not annotate the entries; those of hf_config are not used as numbers
        return value if name == "hf_config" else {key: _number_or_same(entry) for key, entry in value.items()}
    if kind in (int, float):
        return _number(value, is_whole=kind is int and name not in _REAL, as_float=kind is float)
    if kind is bool:
        # a quoted "false" would count as true
        return _one_of((True, False), {"true": True, "false": False}.get(str(value).lower(), value))
    if kind is str and not isinstance(value, str):
        raise _WrongTypeError("text")
    return value


def _one_of(choices: tuple, value: Any) -> Any:
    if value not in choices:
        raise _WrongTypeError(f"one of {', '.join(map(str, choices))}")
    return value


def _number(value: Any, is_whole: bool, as_float: bool) -> int | float:
    """Convert a number or a string to a number.

    Args:
        value: The number or string.
        is_whole: If true, reject fractions and return an `int`.
        as_float: If true, convert strings to `float`, even if they are whole numbers.

    Raises:
        _WrongTypeError: If the value is not such a number.
    """
    number = value
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            number = None
    is_number = isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
    if not is_number or (is_whole and number != int(number)):
        raise _WrongTypeError("a whole number" if is_whole else "a number")
    if is_whole or (isinstance(value, str) and not as_float and number == int(number)):
        return int(number)
    return number


def _number_or_same(value: Any) -> Any:
    try:
        return _number(value, is_whole=False, as_float=False)
    except _WrongTypeError:
        return value
