"""Find components of this project and of other packages by name, through entry points."""

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
    """Return the sorted names in an entry-point group."""
    return sorted(_points(group))


def lookup(group: str, name: str) -> Any:
    """Load the object registered under a name.

    Raises:
        UserError: If the name is unknown, or its object cannot be imported.
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
    """Load all objects of a group, by name; skip objects that cannot be imported, with a warning."""
    found = {}
    for name, point in sorted(_points(group).items()):
        try:
            found[name] = point.load()
        except Exception as error:
            warnings.warn(f"skipping {name!r} of {group}: {point.value} cannot be imported ({error!r})", stacklevel=2)
    return found


def with_settings(group: str, choice: str | dict[str, dict[str, Any]], kind: str, n_given: int) -> dict[str, Any]:
    """Return a chosen name of a group with all of its settings, including defaults.

    Args:
        group: The entry-point group.
        choice: A name, or a name with settings.
        kind: Name for members of the group, for messages.
        n_given: Number of leading parameters that the caller passes, which are not settings.

    Returns:
        A dictionary from the name to its settings.

    Raises:
        UserError: If the choice is not a single name, or the name or one of its settings is unknown.
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
    """Return this project's version."""
    try:
        return metadata.version("litgpt-whittle")
    except metadata.PackageNotFoundError:  # run from its source folder
        return "unknown"
