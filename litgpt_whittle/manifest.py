"""Recognise finished or interrupted work by its inputs and settings.

A manifest is a mapping of plain values: fingerprints of the inputs, and all settings that determine the result. Nested
mappings are compared setting by setting.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import Any

from litgpt_whittle.errors import UserError
from litgpt_whittle.settings import flatten


def changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe each setting that differs between two manifests, as "name was x and is y"."""
    then, now = flatten(dict(saved)), flatten(dict(now))
    names = [*now, *(name for name in then if name not in now)]
    return [f"{name} was {then.get(name)} and is {now.get(name)}" for name in names if then.get(name) != now.get(name)]


def check_unchanged(work: str, saved: Mapping[str, Any], now: Mapping[str, Any], remedy: str) -> None:
    """Check that resumed work has the same manifest as at its start.

    Args:
        work: Name of the work, for the message.
        saved: The manifest at the start.
        now: The current manifest.
        remedy: Advice for the message, besides changing the settings back.

    Raises:
        UserError: If settings differ; the message names each of them.
    """
    if found := changes(saved, now):
        raise UserError(f"{work} must keep its settings: {', '.join(found)}; change back, or {remedy}")


def without(settings: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return settings, by dotted names, without those in `names`; a section's name covers all of its settings."""
    omitted = tuple(f"{name}." for name in names)
    return {name: value for name, value in settings.items() if not f"{name}.".startswith(omitted)}


def digest(manifest: Mapping[str, Any]) -> str:
    """Return sixteen hex digits that identify a manifest."""
    return hashlib.sha256(repr(sorted(flatten(dict(manifest)).items())).encode()).hexdigest()[:16]
