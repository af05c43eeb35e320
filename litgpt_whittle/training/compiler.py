"""What `torch.compile` calls on the machine: a missing compiler is reported before anything expensive starts."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import torch

from litgpt_whittle.errors import UserError


def check_compiler(device: torch.device | None = None) -> None:
    """Refuse to compile where PyTorch will not find what it needs for that.

    Args:
        device: Where the compiled model will run; by default a GPU where there is one.

    Raises:
        UserError: Naming what is missing.
    """
    if "1" in (os.environ.get("TORCHDYNAMO_DISABLE"), os.environ.get("TORCH_COMPILE_DISABLE")):
        return
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    missing = {"cpu": _missing_on_cpu, "cuda": _missing_on_cuda}.get(device.type, lambda: None)()
    if missing is None and not Path(sysconfig.get_path("include"), "Python.h").is_file():
        missing = "Python's header files (such as the package python3-dev)", "found no Python.h"
    if missing is not None:
        what, found = missing
        raise UserError(f"compile needs {what} on this machine, {found}; use --compile false, or install it")


def _missing_on_cpu() -> tuple[str, str] | None:
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
    except ImportError:  # another PyTorch, whose own message will do
        return None
    try:
        get_cpp_compiler()
    except Exception:
        return "a C++ compiler (g++, or the one that the environment variable CXX names)", "found none"
    return None


def _missing_on_cuda() -> tuple[str, str] | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton", "found none"
    # as triton looks for the compiler of its kernels' launchers
    if not any(map(shutil.which, (os.environ.get("CC") or "gcc", "gcc", "clang", "cl"))):
        return "a C compiler (gcc, clang, or the one that the environment variable CC names)", "found none"
    return None
