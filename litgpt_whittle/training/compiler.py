"""Check the tools that `torch.compile` needs, so that a missing one is reported before anything expensive starts."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from litgpt_whittle.errors import UserError
from litgpt_whittle.processes import own_device


def check_compiler(device: torch.device | None = None) -> None:
    """Check that the tools that `torch.compile` needs are installed.

    Args:
        device: Device of the compiled model; by default this process's device.

    Raises:
        UserError: If a tool is missing; the message names it.
    """
    if "1" in (os.environ.get("TORCHDYNAMO_DISABLE"), os.environ.get("TORCH_COMPILE_DISABLE")):
        return
    device = device or own_device()
    missing = {"cpu": _missing_on_cpu, "cuda": _missing_on_cuda}.get(device.type, lambda: None)()
    if missing is None and not Path(sysconfig.get_path("include"), "Python.h").is_file():
        missing = "Python's header files (such as the package python3-dev)", "found no Python.h"
    if missing is not None:
        what, found = missing
        raise UserError(f"compile needs {what} on this machine, {found}; use --compile false, or install it")


def uncompiled() -> AbstractContextManager[Any]:
    """Return a context in which compiled modules run uncompiled, for input shapes that are not worth compiling."""
    return torch.compiler.set_stance("force_eager")


def _missing_on_cpu() -> tuple[str, str] | None:
    """Return the missing tool and what was found instead, to compile for a CPU; None if nothing is missing."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
    except ImportError:  # other PyTorch versions, which report a missing compiler themselves
        return None
    try:
        get_cpp_compiler()
    except Exception:
        return "a C++ compiler (g++, or the one that the environment variable CXX names)", "found none"
    return None


def _missing_on_cuda() -> tuple[str, str] | None:
    """Return the missing tool and what was found instead, to compile for a GPU; None if nothing is missing."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton", "found none"
    # triton searches the compiler of its kernel launchers in this way
    if not any(map(shutil.which, (os.environ.get("CC") or "gcc", "gcc", "clang", "cl"))):
        return "a C compiler (gcc, clang, or the one that the environment variable CC names)", "found none"
    return None
