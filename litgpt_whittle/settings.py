"""Describe settings as values that YAML can store."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Collection
from enum import Enum
from typing import Any

import numpy as np
import torch
from litgpt.data import DataModule


def describe(value: Any) -> Any:
    """Return a command's argument as a value that YAML can store and jsonargparse can parse.

    Objects become their class path and constructor arguments, functions their import path. Dataclass fields with
    `repr=False`, such as access tokens, are omitted.
    """
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, os.PathLike | torch.dtype | torch.device):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(describe, value), key=repr)
    if hasattr(value, "__qualname__"):
        return import_path(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, DataModule):
        return {field.name: describe(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return {"class_path": import_path(type(value)), "init_args": _init_args(value)}


def import_path(value: Any) -> str:
    """Return the import path of a class or function."""
    return f"{value.__module__}.{value.__qualname__}"


def _init_args(value: Any) -> dict[str, Any]:
    """Return the constructor arguments of an object, read from the attributes of the same names."""
    fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
    hidden = {field.name for field in fields if not field.repr}
    try:
        parameters: Collection[inspect.Parameter] = inspect.signature(type(value)).parameters.values()
    except (TypeError, ValueError):  # a class written in C may have no signature
        parameters = []
    is_list = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    args = {
        p.name: describe(getattr(value, p.name))
        for p in parameters
        if p.kind not in is_list and p.name not in hidden and hasattr(value, p.name)
    }
    # FLAN takes a comma-separated string and stores a list
    texts = [p.name for p in parameters if p.annotation in ("str", "str | None", str, str | None)]
    return args | {name: ",".join(args[name]) for name in texts if isinstance(args.get(name), list)}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts: `{"train": {"seed": 1}}` becomes `{"train.seed": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat
