"""Parse a command's settings from a section of `litgpt whittle`, with the command's own parser and names."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

from jsonargparse import CLI, ArgumentParser, Namespace, capture_parser, set_parsing_settings

from litgpt_whittle.command_config import CommandConfig, as_command
from litgpt_whittle.errors import UserError
from litgpt_whittle.files import to_yaml
from litgpt_whittle.flags import in_one_line, keep_causes, names_of

C = TypeVar("C", bound=CommandConfig)


class Section(Generic[C]):
    """The settings of one command.

    Args:
        name: Name of the section, for errors.
        config: The command's config class.
        given: The settings, as in a YAML. Dotted names such as ``eval.max_iters``, which come from a command line,
            override the others.
        defaults: Settings to use where `given` has none.
    """

    def __init__(
        self, name: str, config: type[C], given: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
    ) -> None:
        self.name, self.config = name, config
        self.settings = merge(defaults or {}, {key: value for key, value in given.items() if "." not in key})
        self.flags = [f"--{key}={_as_text(value)}" for key, value in given.items() if "." in key]

    @property
    def parser(self) -> ArgumentParser:
        """The command's own parser."""
        return _parser_of(self.config)

    def parse(self, **inputs: Any) -> C:
        """Return the command's config.

        Args:
            inputs: Arguments that are not part of the settings.

        Raises:
            UserError: If the command does not accept the settings.
        """
        return self._in_one_line(lambda: self.config(**vars(self.parser.instantiate_classes(self._read(inputs)))))

    def dump(self, **inputs: Any) -> str:
        """Return all arguments of the command as YAML."""
        return self._in_one_line(lambda: self.parser.dump(self._read(inputs)))

    def _read(self, inputs: Mapping[str, Any]) -> Namespace:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{self.name}.yaml"
            path.write_text(to_yaml(self.settings | {name: str(value) for name, value in inputs.items()}))
            # exactly as the command will read it
            read = self.parser.parse_args([f"--config={path}", *self.flags])
        del read["config"]
        return read

    def _in_one_line(self, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from None
        except Exception as error:
            message = in_one_line(str(error), self.name, names_of(self.parser, self.name), error)
            raise UserError(f"the section {self.name} cannot be read: {message}") from None

    def run_check(self, check: Callable[[], Any]) -> Any:
        """Return the result of one of the command's checks.

        Raises:
            UserError: If the check fails; the message uses the flags of `litgpt whittle`.
        """
        try:
            return check()
        except UserError as error:
            raise UserError(f"{self.name}: {own_flags(str(error), self.name)}") from None


@cache
def _parser_of(config: type[CommandConfig]) -> ArgumentParser:
    keep_causes()
    # parsing help texts takes most of the time, and they are not shown here
    set_parsing_settings(docstring_parse_attribute_docstrings=False)
    try:
        parser: ArgumentParser = capture_parser(lambda: CLI(as_command(config)))
    finally:
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser.exit_on_error = False
    return parser


OWN_FLAGS = {name: name for name in ("data", "devices", "seed", "target")} | {
    "bin": "target",
    "codec": "cache_teacher.codec",
}
"""Flags of `litgpt whittle` itself, keyed by the commands' flags that they replace"""


def own_flags(message: str, section: str) -> str:
    """Return a command's message with its flags renamed to those of `litgpt whittle`."""
    return re.sub(r"--([a-z_]+)", lambda flag: f"--{OWN_FLAGS.get(flag[1], f'{section}.{flag[1]}')}", message)


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two mappings of settings recursively; `above` takes precedence."""
    merged = {**below}
    for name, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping) and "class_path" not in value
        merged[name] = merge(merged[name], value) if both else value
    return merged


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    return str(value) if isinstance(value, Path | str | int | float) else repr(value)
