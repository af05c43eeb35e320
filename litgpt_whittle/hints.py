"""Command lines that a command proposes as the next step."""

from __future__ import annotations

import shlex
from typing import Any


def try_next(*arguments: Any) -> str:
    """Return a hint with a litgpt command line that a shell reads as these arguments, whatever characters they hold."""
    return f"Try: litgpt {shlex.join(map(str, arguments))}"
