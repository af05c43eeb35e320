"""Test command-line flags: unknown flags fail with a one-line error, and flags set an optimizer's settings."""

import json
import subprocess
import sys
from argparse import ArgumentError
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import yaml
from jsonargparse import ArgumentParser
from litgpt.data import DataModule

from litgpt_whittle.errors import UserError
from litgpt_whittle.flags import in_one_line, keep_causes, why_not_made
from litgpt_whittle.training.checks import read_optimizer

CASES = [
    ("search", "checkpoint_dir is missing; see 'litgpt search --help'"),
    ("search T --itertions 3", "search has no flag --itertions; did you mean --iterations?"),
    ("search T --zzz=3", "search has no flag --zzz; 'litgpt search --help' lists all options"),
    ("distill T", "distill has no argument T; 'litgpt distill --help' lists all options"),
    ("search T --eval.max_iters x", "eval.max_iters must be a whole number, got x"),
    ("distill --train.max_tokens abc", "train.max_tokens must be a whole number, got abc"),
    ("distill --distill.alpha x", "distill.alpha must be a number or a section of settings, got x"),
    ("distill --distill.alpha.start x", "distill.alpha.start must be a number, got x"),
    ("extract T S --repair maybe", "repair must be true or false or a section of settings, got maybe"),
    ("extract T S --repair.basis coordinate", "repair.basis must be one of pca, coordinates, got 'coordinate'"),
    ("extract T S --repair.tokens x", "repair.tokens must be a whole number, got x"),
    ("extract T S --repair.toknes 3", "repair has no setting toknes"),
    (
        "search T --space fine",
        "space must be one of coarse_uniform, coarse_layerwise, fine_uniform, fine_layerwise, got 'fine'",
    ),
    ("search T --search_space.layers last", "search_space.layers must be one of any, first, best, got 'last'"),
    ("extract T S --dtype int", "dtype must be one of float32, float16, bfloat16, got 'int'"),
    ("search T --data Foo", "data: there is nothing called Foo; name a class, or its path such as package.Class"),
    ("search T --data HFText --data.pth x", "data has no setting pth; it is a litgpt_whittle.data.HFText"),
    ("search T --strategy.foo 3", "strategy has no setting foo; it is a litgpt_whittle.strategies.Evolution"),
    ("search T --precision 33-true", "precision must be one of bf16-true, bf16-mixed, 16-true, 16-mixed, 32-true, "),
    ("distill --config no.yaml", "config: File does not exist"),
]


OPTIMIZER_FLAGS = [
    ("--optimizer.lr=3e-4", {"lr": 3e-4, "weight_decay": 0.1}),
    ("--optimizer.init_args.lr=3e-4", {"lr": 3e-4, "weight_decay": 0.1}),
    ("--optimizer={class_path: torch.optim.AdamW, init_args: {lr: 2.0}}", {"lr": 2.0}),
]


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> Callable[..., tuple[str, str]]:
    """Return standard output and error of a command line, all parsed in one process as `litgpt` would parse each."""
    folder = tmp_path_factory.mktemp("flags")
    settings = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1, "weight_decay": 0.1}}
    (folder / "given.yaml").write_text(yaml.safe_dump({"optimizer": settings}))
    lines = [line.split() for line in [*(line for line, _ in CASES), "pretrain --zzz=3"]]
    lines += [["distill", "--config=given.yaml", flag, "--print_config"] for flag, _ in OPTIMIZER_FLAGS]
    (folder / "run.py").write_text(
        "import contextlib, io, json, sys\n"
        "sys.argv = ['litgpt', 'search', 'distill', 'extract']\n"  # imports only the requested commands
        "from litgpt.__main__ import main\n"
        "printed = []\n"
        "for line in json.loads(sys.stdin.read()):\n"
        "    sys.argv, out, err = ['litgpt', *line], io.StringIO(), io.StringIO()\n"
        "    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.suppress(SystemExit):\n"
        "        main()\n"
        "    printed.append((line, (out.getvalue(), err.getvalue())))\n"
        "print('PRINTED', json.dumps(printed))\n"
    )
    command = [sys.executable, "run.py"]
    done = subprocess.run(command, input=json.dumps(lines), capture_output=True, text=True, timeout=400, cwd=folder)
    assert done.returncode == 0, done.stderr
    by_line = {tuple(line): text for line, text in json.loads(done.stdout.partition("PRINTED")[2])}
    return lambda *line: by_line[line]


@pytest.mark.parametrize("line, expected", CASES)
def test_what_the_parser_cannot_take_ends_in_one_line(printed, line, expected):
    _, error = printed(*line.split())
    assert error.startswith(f"error: {expected}")
    assert error.count("\n") == 1


def test_commands_of_litgpt_keep_their_messages(printed):
    assert printed("pretrain", "--zzz=3")[1].startswith("usage: litgpt")


@dataclass
class Even:
    """A section that accepts even numbers."""

    n: int = 0

    def __post_init__(self):
        if self.n % 2:
            raise UserError(f"n must be even, got {self.n}; add 1")


@pytest.mark.parametrize("kind", [Even, Even | None, bool | Even, int | None | Even])
def test_the_message_of_a_section_is_found_whichever_types_the_parser_tried(kind):
    keep_causes()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--x", type=kind)
    with pytest.raises((ValueError, TypeError, ArgumentError)) as error:
        parser.instantiate_classes(parser.parse_args(["--x.n=3"]))
    assert in_one_line(str(error.value), "search", [], error.value) == "n must be even, got 3; add 1"


def test_an_earlier_user_error_is_not_taken_for_the_cause():
    with pytest.raises(UserError):
        Even(3)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--x", type=int | None)
    with pytest.raises(ArgumentError) as error:
        parser.parse_args(["--x=n must be even, got 3; add 1"])
    assert in_one_line(str(error.value), "search", [], error.value).startswith("x must be a whole number")


def test_a_class_tells_what_it_has_against_its_settings():
    """For instance litgpt's data modules, with their own messages."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=DataModule | None)
    config = parser.parse_args(["--data=JSON", "--data.json_path=no/such/file"])
    with pytest.raises(ValueError) as error:
        parser.instantiate_classes(config)
    told = why_not_made(str(error.value))
    assert told.startswith("The `json_path` must be a file or a directory") and "\n" not in told
    assert why_not_made("another mistake") is None


def test_an_empty_config_is_told(tmp_path):
    path = tmp_path / "empty.yaml"
    path.touch()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    with pytest.raises(Exception) as error:
        parser.parse_args([f"--config={path}"])
    assert in_one_line(str(error.value), "search", []) == (
        "config must be a YAML of settings, each with its name, got an empty one"
    )


def test_what_is_not_known_is_at_least_one_line():
    assert in_one_line("something\n  else", "search", []) == "something else"
    assert in_one_line('Parser key "x":\n  is\n  odd', "search", []) == "x: is odd"


UNION = (
    'Parser key "x":\n  Does not validate against any of the Union subtypes\n'
    "  Subtypes: [<class 'bool'>, <class 'pkg.Args'>]\n  Errors:\n    - {}\n    - {}\n"
    "  Given value type: <class 'str'>\n  Given value: {}"
)
A_BOOL = "Expected a <class 'bool'>"
IN_ARGS = "Problem with given class_path 'pkg.Args':\n        {}"


@pytest.mark.parametrize(
    "line",
    [
        "the sky is not blue",
        "Expected a <class 'int'> that is odd",
        IN_ARGS.format("'y' cannot be reached"),
        "y: wrong",
    ],
)
def test_a_wording_that_is_not_known_passes_through_in_full(line):
    """Messages of later jsonargparse versions are not shortened or replaced."""
    got = in_one_line(UNION.format(A_BOOL, line, "3"), "search", [])
    assert " ".join(line.split()) in got and got.startswith("x: Does not validate") and "must be" not in got
    assert in_one_line(f'Parser key "x":\n  {line}', "search", []) == f"x: {' '.join(line.split())}"
    assert in_one_line(line, "search", ["--line"]) == " ".join(line.split())


@pytest.mark.parametrize("line", ["Parser key", "Parser key x: is odd", "Unrecognized arguments: "])
def test_half_of_a_known_wording_passes_through(line):
    assert line.strip() in in_one_line(line, "search", ["--x"])


def test_a_class_reports_all_lines_of_its_reason():
    union = UNION.format(A_BOOL, IN_ARGS.format("y must be even"), 3).split("\n", 1)[1].replace("    - ", "  - ")
    reason = "Problem with given class_path 'pkg.Args': y must be even"
    assert why_not_made(union.lstrip()) == reason


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("the following arguments are required: search.checkpoint_dir", "checkpoint_dir is missing; see "),
        ("unrecognized arguments: --iterration 3", "search has no flag --iterration; did you mean --iterations?"),
        (UNION.format(A_BOOL, IN_ARGS.format("Option 'y' is not accepted"), "NestedArg(key='y', val='3')"),
         "x has no setting y"),
        (UNION.format(A_BOOL, "Expected a dot import path string: maybe", "maybe"),
         "x must be true or false or a section of settings, got maybe"),
        (UNION.format(A_BOOL, IN_ARGS.format('Parser key "y":\n          Expected a <class \'int\'>. Got value: z'),
                      "NestedArg(key='y', val='z')"),
         "x.y must be a whole number, got z"),
    ],
)  # fmt: skip
def test_the_wordings_of_jsonargparse_4_53_are_known(message, expected):
    assert in_one_line(message, "search", ["--iterations"]).startswith(expected)


@pytest.mark.parametrize("key", ["lr", "init_args.lr"])
@pytest.mark.parametrize("value", ["3e-4", "0.0003", 3e-4])
def test_settings_beside_init_args_go_into_them(key, value):
    given = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0, "weight_decay": 0.1}, key: value}
    assert read_optimizer(given) == {
        "class_path": "torch.optim.AdamW",
        "init_args": {"lr": 3e-4, "weight_decay": 0.1},
    }
    assert given["init_args"]["lr"] == 1.0


@pytest.mark.parametrize("flag, expected", OPTIMIZER_FLAGS)
def test_flags_change_the_optimizer_of_a_yaml(printed, flag, expected):
    settings, error = printed("distill", "--config=given.yaml", flag, "--print_config")
    assert not error
    settings = settings[settings.index("model_name:") :]  # litserve may print before it
    assert read_optimizer(yaml.safe_load(settings)["optimizer"])["init_args"] == expected
