"""Test commands as configs: their functions, their documented fields, and the arguments that may change on resuming."""

import ast
import dataclasses
import inspect
import typing
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from litgpt_whittle import command_config
from litgpt_whittle.command_config import CommandConfig, Interrupted, Result, as_command, attribute_docs
from litgpt_whittle.commands.distill import DistillConfig
from litgpt_whittle.training.args import TrainArgs

COMMANDS = [point.load() for point in entry_points(group="litgpt.commands") if "litgpt_whittle." in point.value]


def configs(base: type = CommandConfig) -> list[type]:
    return [each for sub in base.__subclasses__() for each in (sub, *configs(sub))]


OURS = [config for config in configs() if config.__module__.startswith("litgpt_whittle.")]


@dataclass
class Greeting(CommandConfig):
    """Greet somebody."""

    name: str
    """Whom to
    greet."""
    times: list[int] = field(default_factory=lambda: [1])
    """How often."""

    def validate(self) -> None: ...

    def run(self):
        return self.name, self.times


@dataclass
class LoudGreeting(Greeting):
    """Greet loudly."""

    FREE: typing.ClassVar = frozenset({"volume"})

    name: str = "you"
    """Whom to greet loudly."""
    volume: int = 11
    """The volume."""


def test_a_command_has_the_fields_of_its_config_as_parameters():
    command = as_command(LoudGreeting)
    parameters = inspect.signature(command).parameters
    assert {name: each.default for name, each in parameters.items()} == {"name": "you", "times": [1], "volume": 11}
    assert typing.get_type_hints(command) == {"name": str, "times": list[int], "volume": int}
    assert command("me", times=[2]) == ("me", [2]) and command() == ("you", [1])
    expected = "Greet loudly.\n\nArgs:\n    name: Whom to greet loudly.\n    times: How often.\n    volume: The volume."
    assert command.__doc__ == expected
    with pytest.raises(TypeError):
        command(length=3)


def test_a_default_is_made_for_each_call():
    command = as_command(Greeting)
    command("me")[1].append(5)
    assert command("me")[1] == [1]
    assert attribute_docs(Greeting)["name"] == "Whom to greet."


@dataclass
class Work(CommandConfig):
    """Work in a folder."""

    is_interrupted: bool = False
    """If true, Ctrl-C ends the work."""

    def validate(self) -> None: ...

    def run(self):
        done = Result(Path("out"), summary="half" if self.is_interrupted else "done")
        if self.is_interrupted:
            raise Interrupted(done)
        return done


@pytest.mark.parametrize("is_interrupted", [False, True])
def test_the_command_line_prints_the_result_and_python_does_not(is_interrupted, capsys):
    with suppress(Interrupted):
        assert Work(is_interrupted).run() == Result(Path("out"))
    assert capsys.readouterr().out == ""
    if is_interrupted:
        with pytest.raises(SystemExit) as stop:
            as_command(Work)(is_interrupted)
        assert stop.value.code == 130
    else:
        assert as_command(Work)() == Result(Path("out"))
    assert capsys.readouterr().out == ("half\n" if is_interrupted else "done\n")


def test_nothing_else_prints_to_standard_output():
    """A training's lines, which litgpt prints as well, are the exception."""
    package = Path(command_config.__file__).parent
    exceptions = {package / "command_config.py", package / "training/memory_plan.py"}
    calls = [
        f"{path}:{node.lineno}"
        for path in set(package.rglob("*.py")) - exceptions
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
        if not any(keyword.arg == "file" for keyword in node.keywords)
    ]
    assert not calls


def test_only_free_arguments_do_not_determine_the_result():
    config = LoudGreeting(times=[3])
    assert config.arguments() == {"name": "you", "times": [3], "volume": 11}
    assert config.determining_arguments() == {"name": "you", "times": [3]}
    settings = DistillConfig(train=TrainArgs(max_steps=3)).determining_arguments()
    assert {"train.max_steps", "seed", "distill.loss"} <= settings.keys()
    assert not {"train.log_interval", "eval.interval", "devices", "compile", "teacher_cache"} & settings.keys()


@pytest.mark.parametrize("config", OURS, ids=lambda config: config.__name__)
def test_every_argument_is_documented_and_free_ones_exist(config):
    names = {each.name for each in dataclasses.fields(config)}
    assert attribute_docs(config).keys() == names
    assert names >= {name.split(".")[0] for name in config.FREE | config.RESOLVED}


def test_every_command_is_a_config():
    assert {command.__module__ for command in COMMANDS} <= {config.__module__ for config in OURS}
