"""YAML files of sub-networks: their fields, followed by their provenance, which identifies the teacher."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from litgpt.config import Config

from litgpt_whittle.errors import UserError
from litgpt_whittle.files import from_yaml, to_yaml, write_text


def write_choice(path: Path, choice: Mapping[str, Any], teacher: Config, **provenance: Any) -> None:
    """Write the fields of a sub-network of `teacher` as YAML, followed by its provenance."""
    origin = {"teacher": teacher.name, "teacher_config": fingerprint(teacher)} | provenance
    write_text(path, to_yaml({**choice, "provenance": origin}))


def read_choice(path: Path) -> dict[str, Any]:
    """Return the content of a sub-network's YAML file: fields and provenance, not validated against a teacher.

    Raises:
        UserError: If the file is missing or does not have the form of a sub-network.
    """
    try:
        choice = from_yaml(Path(path).read_text())
    except OSError as error:
        raise UserError(f"cannot read the sub-network {str(path)!r}: {error.strerror}; check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise UserError(f"{str(path)!r} is not YAML; a sub-network has lines such as 'n_embd: 512'") from None
    if not isinstance(choice, dict) or not isinstance(choice.get("provenance") or {}, dict):
        raise UserError(f"{str(path)!r} is not a sub-network, which has lines such as 'n_embd: 512'; check the path")
    return choice


def without_provenance(saved: Mapping[str, Any], teacher: Config, name: str) -> dict[str, Any]:
    """Return the fields in the content of a sub-network's file, after checking that it was made for `teacher`.

    Raises:
        UserError: If it was made for another teacher; the message calls the file `name`.
    """
    choice = dict(saved)
    origin = choice.pop("provenance", None) or {}
    made_for = origin.get("teacher_config")
    if made_for is not None and made_for != fingerprint(teacher):
        raise UserError(
            f"{name} is a sub-network of {origin.get('teacher')!r} ({made_for}), not of {teacher.name!r} "
            f"({fingerprint(teacher)}); name the checkpoint that it was searched in"
        )
    return choice


def fingerprint(config: Config) -> str:
    """Return a hash of a teacher's architecture, independent of its name: eight hex digits."""
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("name", "hf_config")}
    # sorted at all levels, since a YAML file does not preserve the order of the RoPE settings
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:8]
