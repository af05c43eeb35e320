"""Base classes of a command's arguments and results, and the function that litgpt's command line calls."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

from litgpt_whittle.manifest import without
from litgpt_whittle.settings import describe, flatten


@dataclass(frozen=True)
class Result:
    """Output of a command."""

    folder: Path
    """The command's ``out_dir``"""
    summary: str = dataclasses.field(default="", kw_only=True, repr=False, compare=False)
    """Text that the command line prints when the command ends; empty for a result that was read from its folder"""


class Interrupted(SystemExit):
    """Exit of a command after Ctrl-C, with exit code 130.

    Args:
        result: The result so far; None if there is none.
    """

    def __init__(self, result: Result | None) -> None:
        super().__init__(130)
        self.result = result


class CommandConfig(ABC):
    """Arguments of a command, as a dataclass whose attribute docstrings are the help of the flags.

    The command line, the Python API and `litgpt whittle` create an instance, then call `validate`, which is fast, and
    `run`.
    """

    FREE: ClassVar[frozenset[str]] = frozenset()
    """Names of arguments that do not affect the result, so that they may change when a run is resumed. Arguments inside
    a section have dotted names, such as ``train.log_interval``"""

    RESOLVED: ClassVar[frozenset[str]] = frozenset()
    """Names of arguments that a manifest records in another form, such as a checkpoint by the fingerprint of its
    weights, not by its path"""

    @abstractmethod
    def validate(self) -> None:
        """Check everything that can be checked before models or data are loaded.

        Raises:
            UserError: For the first invalid argument.
        """

    @abstractmethod
    def run(self) -> Any:
        """Validate the arguments, and run the command, without printing its result.

        Returns:
            The command's result, usually a `Result`; None on processes that have none.

        Raises:
            UserError: For the first invalid argument, before anything expensive starts.
        """

    def arguments(self) -> dict[str, Any]:
        """Return all arguments as values that YAML can store and the command line can read."""
        return {name: describe(getattr(self, name)) for name in _fields(type(self))}

    def determining_arguments(self) -> dict[str, Any]:
        """Return the arguments that can change the result, by dotted names: all but those in `FREE` and `RESOLVED`."""
        return without(flatten(self.arguments()), self.FREE | self.RESOLVED)


def as_command(config: type[CommandConfig]) -> Callable[..., Any]:
    """Return a function that takes the fields of a config as parameters, runs the command and prints its result.

    litgpt and jsonargparse derive a command's flags and help from the signature and docstring of a function.
    """

    def setup(*args: Any, **kwargs: Any) -> Any:
        try:
            result = config(*args, **kwargs).run()
        except Interrupted as stop:
            _print_summary(stop.result)
            raise
        _print_summary(result)
        return result

    hints, fields = get_type_hints(config), _fields(config)
    parameters = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=_default(f), annotation=hints[name])
        for name, f in fields.items()
    ]
    setup.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    setup.__annotations__ = {name: hints[name] for name in fields}
    setup.__module__ = config.__module__
    docs = attribute_docs(config)
    setup.__doc__ = f"{inspect.getdoc(config)}\n\nArgs:\n" + "\n".join(f"    {name}: {docs[name]}" for name in fields)
    return setup


def _print_summary(result: Any) -> None:
    if isinstance(result, Result) and result.summary:
        print(result.summary)


def attribute_docs(config: type) -> dict[str, str]:
    """Return the docstrings of a dataclass's fields by name, including inherited fields."""
    docs: dict[str, str] = {}
    for base in reversed(config.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for line, below in zip(definition.body, definition.body[1:]):
            if not (isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)):
                continue
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                docs[line.target.id] = " ".join(str(below.value.value).split())
    return docs


def _fields(config: type) -> dict[str, dataclasses.Field]:
    return {f.name: f for f in dataclasses.fields(config)}


def _default(field: dataclasses.Field) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return inspect.Parameter.empty if field.default_factory is dataclasses.MISSING else field.default_factory()
