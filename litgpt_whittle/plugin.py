"""Add commands to `litgpt` without changing litgpt.

litgpt has no hook for plugins, but `import torch` calls every `torch.backends` entry point. Ours (`install`) installs
an import hook that waits for `litgpt.__main__` and adds the commands of the entry-point group `litgpt.commands`. An
exception in `install` would break `import torch` for everyone. So `install` does nothing else, and this file imports
neither torch nor litgpt at the top.
"""

from __future__ import annotations

import errno
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

GROUP = "litgpt.commands"
TARGET = "litgpt.__main__"


def install() -> None:
    """Install the import hook for litgpt's command line; called by every `import torch`."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds `litgpt.__main__` like Python's own finder, but with `_Loader` as its loader."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> Any:
        if name != TARGET:
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
        return spec


class _Loader:
    """Loads `litgpt.__main__` and adds the commands."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: Any) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        try:
            add_commands(module)
        except Exception as error:  # litgpt's own commands must keep working
            warnings.warn(f"litgpt_whittle could not add its commands to litgpt: {error!r}", stacklevel=2)

    def get_code(self, name: str) -> CodeType:
        """Return the code that `python -m litgpt` runs: a call of `main` of `litgpt.__main__`, with our commands."""
        return compile(f"from {TARGET} import main\nmain()\n", f"<{TARGET}>", "exec")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def add_commands(module: ModuleType) -> None:
    """Add the commands to litgpt's table, and to the list that litgpt checks the table against."""
    added = commands(taken=set(module.PARSER_DATA))
    module.PARSER_DATA.update(added)
    names = list(module.parser_commands())
    module.parser_commands = lambda: names + list(added)  # type: ignore[attr-defined]
    show_user_errors_in_one_line(set(added))


def commands(taken: set[str] | None = None) -> dict[str, Callable]:
    """Return the registered commands by name.

    Only the command named on the command line is imported. Stand-ins with the same help line replace other commands, so
    that no litgpt command waits for imports that it does not use.

    Args:
        taken: Names of litgpt's own commands.

    Raises:
        SystemExit: On Windows, if a command of this package is named on the command line.
    """
    from importlib.metadata import entry_points

    found: dict[str, Callable] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        if point.name in (taken or ()) or point.name in found:
            warnings.warn(f"skipping the command {point.name!r} ({point.value}): there is one already", stacklevel=2)
            continue
        is_asked_for = point.name in sys.argv[1:]
        if is_asked_for and sys.platform == "win32" and point.module.startswith("litgpt_whittle."):
            raise SystemExit(
                f"error: litgpt {point.name} needs Linux or macOS; on Windows, install litgpt_whittle in WSL"
            )
        try:
            found[point.name] = point.load() if is_asked_for else _stand_in(point)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            warnings.warn(
                f"skipping the command {point.name!r}: {point.value} cannot be imported ({error!r})", stacklevel=2
            )
    return found


def _stand_in(point: Any) -> Callable:
    """Return a function without arguments, with the docstring of a command that is not imported."""
    import ast
    from importlib.util import find_spec

    spec = find_spec(point.module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named {point.module!r}")
    tree = ast.parse(Path(spec.origin).read_bytes())
    documented = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in tree.body:  # `setup = as_command(SearchConfig)` has the docstring of the config
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            names = [arg.id for arg in node.value.args if isinstance(arg, ast.Name) and arg.id in documented]
            targets = [target.id for target in node.targets if isinstance(target, ast.Name)]
            documented |= {target: documented[names[0]] for target in targets if names}
    if point.attr not in documented:
        return point.load()

    def stand_in() -> None:
        raise AssertionError("a stand-in is replaced before it is called")

    stand_in.__doc__ = ast.get_docstring(documented[point.attr]) or f"See {point.value}."
    return stand_in


def show_user_errors_in_one_line(commands: set[str]) -> None:
    """Print an uncaught UserError, and errors of a full disk or device, without a traceback; the exit code stays 1.

    Args:
        commands: Names of the commands whose parser errors are also printed on one line.
    """
    from litgpt_whittle import console, flags, recipes

    console.show_log()
    flags.install(commands)
    recipes.install()
    show_traceback = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
        from litgpt_whittle.errors import find_user_error

        message = None
        if isinstance(error, ValueError):
            cause = find_user_error(error)
            message = str(cause) if cause else flags.why_not_made(str(error))
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            name = error.filename or "a file"
            message = f"{name} cannot be written ({error.strerror}); make room, or choose another folder"
        if type(error).__name__ == "OutOfMemoryError":  # PyTorch's, which is not imported here
            what = ". ".join(str(error).split(". ")[:2])
            message = (
                f"a model and its activations must fit into the device's memory ({what}); lower "
                "--train.micro_batch_size, or set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
            )
        if message:
            print(f"error: {message}", file=sys.stderr)
        else:
            show_traceback(kind, error, traceback)

    sys.excepthook = show


def save_hyperparameters(function: Callable, out_dir: Path) -> None:
    """Save the command line's settings to `hyperparameters.yaml`, as litgpt's commands do.

    Does nothing if `function` was called from Python, without a command line.
    """
    from importlib.metadata import entry_points

    from litgpt import parser_config

    known = [point.name for point in entry_points(group=GROUP)]
    if not set(known) & set(sys.argv[1:2]):
        return
    argv = list(sys.argv)
    try:
        parser_config.save_hyperparameters(function, Path(out_dir), known_commands=known)
    finally:
        sys.argv[:] = argv  # litgpt removes the command's name from it
