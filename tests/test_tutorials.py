"""Test that the commands accept the command lines in README.md and the tutorials; nothing is run."""

import importlib
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser, capture_parser, set_docstring_parse_options
from jsonargparse.typehints import ActionTypeHint
from litgpt.utils import CLI

from litgpt_whittle import registry

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "tutorials").glob("*.md"))
PAGES = [ROOT / "README.md", *TUTORIALS]
FOR_DEVELOPERS = [ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKING = [*PAGES, *FOR_DEVELOPERS, *sorted((ROOT / "benchmarks").rglob("*.md"))]
OURS = "litgpt.commands"


def command_lines(page: Path) -> list[str]:
    """Return the litgpt commands in a page's code blocks, joining continued lines."""
    text = page.read_text().replace("\\\n", " ")
    fenced = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL))
    indented = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    return [line for line in [*fenced.splitlines(), *indented] if re.match(r"litgpt(-whittle)? \w+", line)]


@cache
def parser(command: str) -> ArgumentParser:
    """Return the parser of litgpt's command line for a command."""
    from litgpt.__main__ import PARSER_DATA

    ours = command in registry.names(OURS)
    function = registry.lookup(OURS, command) if ours else PARSER_DATA[command]
    return capture_parser(lambda: CLI(function, exit_on_error=False))


def slices(parser: ArgumentParser, option: str) -> bool:
    """Return whether a parser knows an option, or one whose value has fields of such names."""
    options = parser._option_string_actions
    parts = option.split(".")
    above = (options.get(".".join(parts[:n])) for n in range(1, len(parts)))
    return option in options or any(isinstance(action, ActionTypeHint) for action in above)


LINES = list(dict.fromkeys((page.name, line) for page in PAGES for line in command_lines(page)))


@pytest.fixture(autouse=True)
def _examples(monkeypatch):
    """Make the package of extending.md importable."""
    monkeypatch.syspath_prepend(str(ROOT / "tests/example_package"))
    importlib.import_module("whittle_example.annealing")


@pytest.mark.parametrize("page, line", LINES, ids=lambda part: part[:60])
def test_every_command_can_be_typed(page, line, monkeypatch):
    monkeypatch.chdir(ROOT)  # paths in config_hub are relative to this folder
    _, command, *arguments = shlex.split(line, comments=True)
    known = parser(command)
    # help texts are not needed here, and reading them takes most of the time
    set_docstring_parse_options(attribute_docstrings=False)
    assert "--config" not in [word for word in arguments if word.startswith("--")][1:], "it overrides what comes before"
    # as classes, so that settings are checked as far as possible without files
    known.instantiate_classes(known.parse_args(arguments))


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.name)
def test_every_option_exists(page):
    parsers = [parser(command) for command in registry.names(OURS)]
    inline = re.findall(r"`[^`]+`", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))
    options = {option for code in inline for option in re.findall(r"(?<!\S)`?(--[\w.-]*\w)", code)}
    unknown = [option for option in sorted(options) if not any(slices(each, option) for each in parsers)]
    assert not unknown


@pytest.mark.parametrize("command", registry.names(OURS))
def test_every_command_has_a_page_that_shows_it(command):
    lines = command_lines(ROOT / f"tutorials/{command}.md")
    assert any(line.split()[1] == command for line in lines)
    assert f"tutorials/{command}.md" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_within_the_project_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", FOR_DEVELOPERS, ids=lambda page: page.name)
def test_every_source_file_that_is_named_exists(page):
    named = set(re.findall(r"`([\w./-]+(?:\.py|/))`", page.read_text()))
    roots = (ROOT, ROOT / "litgpt_whittle")
    missing = [name for name in named if not any((root / name).exists() for root in roots)]
    assert [name for name in missing if "NAME" not in name] == []
