"""Finds the parts of this project, and of anyone else's, by name through entry points."""

from __future__ import annotations

import inspect
import warnings
from importlib import metadata
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


def with_settings(group: str, choice: str | dict[str, dict[str, Any]], kind: str, n_given: int) -> dict[str, Any]:
    """What is chosen of a group, and all its settings, those left out as they are by default.

    Args:
        group: The entry-point group.
        choice: A name, or a name with settings.
        kind: What the group's things are called.
        n_given: How many arguments they take that are no settings, before these.

    Returns:
        The name, and below it the settings.

    Raises:
        UserError: If there is nothing of that name, or it does not take a setting.
    """
    choice = {choice: {}} if isinstance(choice, str) else choice
    if not isinstance(choice, dict) or len(choice) != 1 or not all(isinstance(s, dict) for s in choice.values()):
        raise UserError(f"{kind} must be one name, or one with its settings such as {{name: {{k: 3}}}}, got {choice}")
    ((name, settings),) = choice.items()
    known = list(inspect.signature(lookup(group, name)).parameters.values())[n_given:]
    if unknown := sorted(set(settings) - {parameter.name for parameter in known}):
        takes = ", ".join(parameter.name for parameter in known) or "none"
        raise UserError(f"the {kind} {name} has no setting {unknown[0]!r}; it takes {takes}")
    return {name: {parameter.name: parameter.default for parameter in known} | settings}


def version() -> str:
    """This project's version."""
    try:
        return metadata.version("litgpt-whittle")
    except metadata.PackageNotFoundError:  # run from its source folder
        return "unknown"
