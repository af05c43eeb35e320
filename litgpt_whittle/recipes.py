"""Find recipes by paths that begin with config_hub/, from any working directory, in a clone or installed package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

HUB = "config_hub"
"""Folder of the recipes: at the top of the repository, or in the package once it is installed"""


def find_recipe(path: Path | str) -> Path | str:
    """Return the packaged recipe that a path such as `config_hub/search/pythia-6.9b/410m.yaml` names.

    A file in the working directory takes precedence, and any other path is returned unchanged.
    """
    given = Path(path)
    if given.parts[:1] != (HUB,) or ".." in given.parts or given.exists():
        return path
    package = Path(__file__).resolve().parent
    packaged = (folder / given for folder in (package, package.parent))
    return next((file for file in packaged if file.is_file()), path)


def install() -> None:
    """Make `--config` find packaged recipes."""
    from jsonargparse import ActionConfigFile

    apply = ActionConfigFile.apply_config

    def apply_found(parser: Any, cfg: Any, dest: str, value: Any) -> None:
        # the value may be a YAML text instead of a path
        is_path = isinstance(value, str) and "\n" not in value and value.startswith(HUB)
        apply(parser, cfg, dest, str(find_recipe(value)) if is_path else value)

    ActionConfigFile.apply_config = staticmethod(apply_found)  # type: ignore[method-assign]
