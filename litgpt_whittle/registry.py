"""Finds the parts of this project, and of anyone else's, by name through entry points."""

from __future__ import annotations

import warnings
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from litgpt_whittle.errors import UserError


def _points(group: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=group)}


def names(group: str) -> list[str]:
    """The names registered in an entry-point group, sorted."""
    return sorted(_points(group))


def lookup(group: str, name: str) -> Any:
    """Loads what is registered under a name.

    Raises:
        UserError: If nothing is, or it cannot be imported.
    """
    points = _points(group)
    if name not in points:
        raise UserError(f"there is no {name!r} in {group}; choose from {', '.join(sorted(points)) or 'nothing'}")
    try:
        return points[name].load()
    except Exception as error:
        raise UserError(
            f"{name!r} ({points[name].value}) cannot be imported: {error!r}; repair or uninstall its package"
        ) from error


def load_all(group: str) -> dict[str, Any]:
    """Loads everything in a group by name; what cannot be imported is named in a warning and left out."""
    found = {}
    for name, point in sorted(_points(group).items()):
        try:
            found[name] = point.load()
        except Exception as error:
            warnings.warn(f"skipping {name!r} of {group}: {point.value} cannot be imported ({error!r})", stacklevel=2)
    return found
