"""Test a strategy, a fitness and a loss from another installed package: found by name and used by the commands.

The package has tests of its own, in `tests/example_package/tests`.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_strategies
from test_search import BIN, TEACHER, lines, make_checkpoint
from test_search import run as run_search
from test_train import TokenData, checkpoint, config, rows
from test_train import run as run_distill

from litgpt_whittle import registry
from litgpt_whittle.commands import search_run
from litgpt_whittle.distillation.args import DistillArgs
from litgpt_whittle.errors import UserError
from litgpt_whittle.journal import read_journal
from litgpt_whittle.searching.args import RacingArgs
from litgpt_whittle.strategies import RandomSearch
from litgpt_whittle.subnet import SubNet

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "tests" / "example_package"
ANNEALING, ERROR, RENYI = "SimulatedAnnealing", "next_token_error", "renyi"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Install the package with pip into a separate folder."""
    folder = tmp_path_factory.mktemp("installed")
    shutil.copytree(SOURCE, folder / "source", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*pip, "--target", str(folder / "site"), str(folder / "source")], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return folder / "site"


@pytest.fixture(autouse=True)
def package(installed, monkeypatch):
    monkeypatch.syspath_prepend(str(installed))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("teachers") / "teacher")


@pytest.fixture(scope="module")
def distilled_from(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("teachers") / "wide", n_embd=48)


def strategy(**settings):
    return registry.lookup("litgpt_whittle.strategies", ANNEALING)(**settings)


def test_the_strategys_own_defaults_hold_on_the_command_line(capsys):
    registry.load_all("litgpt_whittle.strategies")
    test_strategies.test_a_strategys_own_defaults_hold_on_the_command_line(ANNEALING, capsys)


# -- the commands


def test_search_uses_the_strategy_and_the_fitness(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(search_run, "write_report", lambda out_dir: "the report")
    annealing = strategy(temperature=0.2)
    run_search(teacher, tmp_path / "out", strategy=annealing, fitness=ERROR, iterations=8)
    header, evaluations = read_journal(tmp_path / "out/journal.jsonl")
    assert header["settings"]["strategy_settings"]["temperature"] == 0.2 and header["settings"]["fitness"] == ERROR
    assert all(0 < evaluation.scores[ERROR] <= 1 for evaluation in evaluations)
    best = min(evaluations, key=lambda evaluation: evaluation.scores[ERROR])
    assert SubNet.load(tmp_path / "out/best.yaml", TEACHER).to_dict() == best.subnet

    # the interrupted and resumed search is the same
    run_search(teacher, tmp_path / "parts", strategy=strategy(temperature=0.2), fitness=ERROR, iterations=5)
    again = strategy(temperature=0.2)
    run_search(teacher, tmp_path / "parts", strategy=again, fitness=ERROR, iterations=8, resume=True)
    assert lines(tmp_path / "parts") == lines(tmp_path / "out")


def test_candidates_race_by_the_fitness(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(search_run, "write_report", lambda out_dir: "the report")
    run_search(teacher, tmp_path / "out", fitness=ERROR, racing=RacingArgs(), strategy=RandomSearch(), iterations=8)
    assert len(read_journal(tmp_path / "out/journal.jsonl")[1]) == 8
    with pytest.raises(UserError, match="SimulatedAnnealing needs exact scores; leave --racing out"):
        run_search(teacher, tmp_path / "no", fitness=ERROR, racing=True, strategy=strategy())


def test_distill_learns_by_the_loss(distilled_from, tmp_path):
    args = DistillArgs(loss={RENYI: {"alpha": 0.3}}, alpha=0.0, beta=1.0, temperature=1.0)
    run_distill(tmp_path, model_config=config(), teacher_checkpoint_dir=distilled_from, distill=args)
    logged = rows(tmp_path)
    assert logged[-1]["distill"] < logged[0]["distill"]


@pytest.mark.slow
def test_the_commands_find_them_by_name(installed, teacher, distilled_from, tmp_path):
    tests = str(ROOT / "tests")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(installed), tests]), "TORCHDYNAMO_DISABLE": "1"}

    def litgpt(*arguments):
        program = [str(Path(sys.executable).with_name("litgpt")), *map(str, arguments)]
        done = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    sizes = ["--train.max_seq_length", 12, "--train.micro_batch_size", 2, "--eval.max_iters", 2, "--iterations", 6]
    named = ["--strategy", ANNEALING, "--strategy.cooling", 0.9, "--fitness", ERROR]
    litgpt("search", teacher, "--bin", BIN, "--data", "test_search.Tokens", *sizes, *named, "--out_dir", tmp_path / "a")
    header, evaluations = read_journal(tmp_path / "a/journal.jsonl")
    assert header["settings"]["strategy_settings"]["cooling"] == 0.9 and len(evaluations) == 6

    student = ["--initial_checkpoint_dir", checkpoint(tmp_path / "student"), "--teacher_checkpoint_dir", distilled_from]
    data = ["--data", f"{TokenData.__module__}.{TokenData.__name__}", "--train.global_batch_size", 4]
    short = ["--train.max_tokens", 4 * 4 * 8, "--train.save_interval", "null", "--logger_name", "csv"]
    loss = ["--distill.loss", f"{{{RENYI}: {{alpha: 0.3}}}}", "--precision", "32-true"]
    litgpt("distill", *student, *data, *short, *loss, "--out_dir", tmp_path / "b")
    assert len(rows(tmp_path / "b")) == 4


# -- the tutorial


def test_the_tutorial_shows_the_packages_code():
    files = [path.read_text() for path in SOURCE.rglob("*") if path.suffix in (".py", ".toml")]
    tutorial = (ROOT / "tutorials/extending.md").read_text()
    shown = [block.partition("\n") for block in tutorial.split("```")[1::2]]
    listings = [text for language, _, text in shown if language in ("python", "toml")]
    assert len(listings) >= 4
    for listing in listings:
        assert any(listing in file for file in files), listing
