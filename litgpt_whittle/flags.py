"""One-line messages for parser errors, in place of jsonargparse's usage text and one error per type that it tried."""

from __future__ import annotations

import difflib
import re
import sys
from functools import cache
from typing import Any, Literal, get_args, get_origin

from litgpt_whittle.errors import find_user_error


def install(commands: set[str]) -> None:
    """Make the parser print one-line errors for these commands; messages of other commands do not change."""
    from jsonargparse import ArgumentParser

    tell_at_length = ArgumentParser.error

    def error(parser: Any, message: str, ex: Exception | None = None) -> Any:
        if not parser.exit_on_error or not commands & set(sys.argv[1:2]):
            return tell_at_length(parser, message, ex)
        print(f"error: {in_one_line(message, sys.argv[1], names_of(parser, sys.argv[1]), ex)}", file=sys.stderr)
        sys.exit(2)

    ArgumentParser.error = error  # type: ignore[assignment, method-assign]
    keep_causes()
    _name_choices()
    _replace_whole()


def in_one_line(message: str, command: str, flags: list[str], error: BaseException | None = None) -> str:
    """Return a one-line version of a parser's message, without the list of types that it tried.

    Args:
        message: jsonargparse's message.
        command: Name of the command, such as "search".
        flags: All flags of the command, such as "--out_dir".
        error: The exception with this message. If a UserError caused it, its message is returned.
    """
    if (cause := find_user_error(error)) is not None:
        return str(cause)
    if (why := why_not_made(message)) is not None:
        return why
    if unknown := re.fullmatch(r"[Uu]nrecognized arguments: (.+)", message):
        return _unknown(unknown[1].split(), command, flags)
    missing = re.search(r'Key "(?:\w+\.)?(\w+)" is required|arguments are required: (?:\w+\.)?(\w+)$', message)
    if missing:
        return f"{missing[1] or missing[2]} is missing; see 'litgpt {command} --help'"
    unknown = re.fullmatch(r"Validation failed: Key '([^']+)' is not expected", message)
    if unknown:
        return _unknown([f"--{unknown[1]}"], command, flags)
    nested = re.search(r"Subcommand '[^']+' does not accept (?:nested key|option) '([^']+)'", message)
    if nested:
        return _unknown([f"--{nested[1]}"], command, flags)
    if message.startswith("Unexpected config:"):
        given = " ".join(message.partition(":")[2].split())
        return f"config must be a YAML of settings, each with its name, got {given or 'an empty one'}"
    if message.startswith("Parser key "):
        return _wrong_value(message)
    return " ".join(message.split())


def why_not_made(message: str) -> str | None:
    """Return the error that an argument's class raised, from a message about all types that jsonargparse tried.

    None if there is no such error.
    """
    if not message.startswith("Does not validate against any of the Union subtypes"):
        return None
    bullets = re.split(r"^  - ", message.split("\n  Given value type: ")[0], flags=re.MULTILINE)[1:]
    found = [" ".join(bullet.split()) for bullet in bullets if not re.match(r"Expected an? <class", bullet)]
    return "; ".join(found) or None


def names_of(parser: Any, command: str) -> list[str]:
    """Return the flags of a command, given its parser or the parser of all commands."""
    subcommands = getattr(parser, "_subcommands_action", None)
    if subcommands is not None and command in subcommands.choices:
        parser = subcommands.choices[command]
    return [flag for flag in parser._option_string_actions if flag.startswith("--")]


def _unknown(arguments: list[str], command: str, flags: list[str]) -> str:
    first = next((a for a in arguments if a.startswith("-")), arguments[0]).partition("=")[0]
    near = difflib.get_close_matches(first, flags, n=1)
    remedy = f"did you mean {near[0]}?" if near else f"'litgpt {command} --help' lists all options"
    return f"{command} has no {'flag' if first.startswith('-') else 'argument'} {first}; {remedy}"


def _wrong_value(message: str) -> str:
    keys = re.findall(r'Parser key "([^"]+)":', message)
    if not keys:
        return " ".join(message.split())
    in_full = " ".join(f"{keys[0]}: {message.partition(':')[2]}".split())
    if not _is_known(message):
        return in_full
    nested = re.search(r"NestedArg\(key='([^']*)', val='?(.*?)'?\)", message)
    # if one of several types is a section of settings, a separate message names its keys
    if nested and nested[1] not in keys[1:]:
        keys.append(nested[1])
    if "Unrecognized arguments: " in message and nested:
        return f"{keys[0]} has no setting {nested[1]}"
    unknown = re.search(r"Key '([^']+)' is not expected|Option '([^']+)' is not accepted", message)
    if unknown:
        owner = re.findall(r"class_path '([^']+)'", message)
        # a section of settings is one of the argument's types, not a class that the user named
        is_section = owner and f"<class '{owner[-1]}'>" in message
        return f"{keys[0]} has no setting {unknown[1] or unknown[2]}" + (
            f"; it is a {owner[-1]}" if owner and not is_section else ""
        )
    name = ".".join(keys)
    choices = re.search(r"must be one of .*", message)
    if choices:
        return f"{name} {choices[0]}"
    kinds = list(dict.fromkeys(re.findall(r"Expected an? <class '([^']+)'>", message)))
    name_of_class = re.search(r"Expected a dot import path string: (.*)", message)
    if name_of_class and set(kinds) <= {"NoneType"}:
        return f"{name}: there is nothing called {name_of_class[1]}; name a class, or its path such as package.Class"
    if nested and len(kinds) > 1:
        kinds = kinds[1:]  # the first kind is the alternative to the section
    if name_of_class or "expects a dict or Namespace" in message:
        kinds.append("a section of settings")
    given = re.findall(r"(?:Got value|Given value): (.*)", message)
    kinds = [kind for kind in kinds if kind != "NoneType"]
    if kinds and given:
        wanted = " or ".join(_KINDS.get(kind, kind) for kind in kinds)
        return f"{name} must be {wanted}, got {nested[2] if nested else given[-1]}"
    return in_full


_WORDINGS = (
    r'Parser key "[^"]+":',
    r"Does not validate against any of the Union subtypes",
    r"Subtypes: .*",
    r"Errors:",
    r"Expected an? <class '[^']+'>(\. Got value: .*)?",
    r"Expected a( config)? path but .* either not accessible or invalid",
    r"Expected a dot import path string: .*",
    r"Type <class '[^']+'> expects a dict or Namespace.*",
    r"Problem with given class_path '[^']+':",
    r"(Validation failed: )?Key '[^']+' is not expected",
    r"Option '[^']+' is not accepted",
    r"Unrecognized arguments: .*",
    r"must be one of .*",
    r"Given value( type)?: .*",  # of a nested union
)
"""Patterns of all lines in messages about values, from jsonargparse 4.39 to 4.53. A message with another line is shown
in full, since that line may change the meaning"""


def _is_known(message: str) -> bool:
    """Return whether every line of a message, up to the value at its end, matches a known pattern."""
    body = message.split("\n  Given value type: ")[0]
    lines = [line.strip().removeprefix("- ") for line in body.replace('": ', '":\n').splitlines()]
    return all(not line or any(re.fullmatch(known, line) for known in _WORDINGS) for line in lines)


_KINDS = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text", "list": "a list"}


@cache
def keep_causes() -> None:
    """Make a UserError the cause of the parser's error about a union of types.

    jsonargparse tries all types of the union. Without this patch, the cause is the error of the first type.
    """
    from jsonargparse import _typehints

    refuse = getattr(_typehints, "raise_union_unexpected_value", None)
    if refuse is None:  # another version of jsonargparse; the UserError is then one of several errors in the message
        return

    def refuse_with_cause(subtypes: Any, value: Any, errors: list[Exception]) -> Any:
        try:
            refuse(subtypes, value, errors)
        except ValueError as error:
            causes = [cause for cause in map(find_user_error, errors) if cause is not None]
            raise error from (causes[-1] if causes else errors[0])

    _typehints.raise_union_unexpected_value = refuse_with_cause  # type: ignore[assignment]


def _name_choices() -> None:
    """Make the parser list an argument's choices if a string is none of them; without this, jsonargparse 4.41 fails."""
    from jsonargparse import _typehints

    adapt = getattr(_typehints, "adapt_typehints", None)
    if adapt is None:  # another version of jsonargparse; its own message is good enough
        return

    def adapt_or_tell(value: Any, typehint: Any, *args: Any, **kwargs: Any) -> Any:
        allowed = get_args(typehint) if get_origin(typehint) is Literal else ()
        choices = [choice for choice in allowed if choice is not None]
        if choices and isinstance(value, str) and value not in choices and all(isinstance(c, str) for c in choices):
            raise ValueError(f"must be one of {', '.join(choices)}, got {value!r}")
        return adapt(value, typehint, *args, **kwargs)

    _typehints.adapt_typehints = adapt_or_tell  # type: ignore[assignment]


def _replace_whole() -> None:
    """Let a flag replace a whole dictionary that a YAML file has set; without this, jsonargparse 4.41 fails."""
    from jsonargparse import _typehints

    action = getattr(_typehints, "ActionTypeHint", None)
    if action is None:
        return
    call = action.__call__

    def call_on_nothing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 4 and args[3] == f"--{self.dest}" and type(args[1].get(self.dest)) is dict:
            args[1][self.dest] = None
        return call(self, *args, **kwargs)

    action.__call__ = call_on_nothing
