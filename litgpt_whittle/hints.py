"""Suggest the command line of the next step."""

from __future__ import annotations

import shlex
from typing import Any


def try_next(*arguments: Any) -> str:
    """Return a hint with a litgpt command line, its arguments quoted for the shell."""
    return f"Try: litgpt {shlex.join(map(str, arguments))}"
