"""License of the first teacher, in a file that each checkpoint passes on to the checkpoints that are made from it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from litgpt_whittle.files import from_yaml, to_yaml, write_text

FILE = "license.yaml"

_FIELDS = ("license", "license_name", "license_link")
"""Fields of a model card that name a license; the Hub needs the last two if the first is `other`"""


def license_in(content: dict[str, Any]) -> dict[str, str]:
    """Return the fields of a mapping that name a license; empty if it names none."""
    if not isinstance(content.get("license"), str):
        return {}
    return {key: content[key] for key in _FIELDS if isinstance(content.get(key), str)}


def license_of(folder: Path) -> dict[str, str]:
    """Return the license that a checkpoint's file or its model card names; empty if unknown."""
    return license_in(read_mapping(folder / FILE)) or license_in(_front_matter(folder / "README.md"))


def pass_on_license(source: Path, out_dir: Path) -> None:
    """Write the license of a checkpoint into another one, if it is known."""
    if known := license_of(source):
        write_text(out_dir / FILE, to_yaml(known))


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; empty if there is none, or it cannot be read."""
    return _mapping(_read(path))


def _front_matter(path: Path) -> dict[str, Any]:
    """Return the YAML at the start of a Markdown file; empty if there is none."""
    match = re.match(r"---\n(.*?)\n---", _read(path), flags=re.DOTALL)
    return _mapping(match[1]) if match else {}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _mapping(text: str) -> dict[str, Any]:
    try:
        content = from_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError):  # such as a date that does not exist
        content = None
    return content if isinstance(content, dict) else {}
