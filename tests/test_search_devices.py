"""Test a search by two processes: its journal equals that of one, also after kills."""

import os
import random
import signal
import time
from pathlib import Path

import forked
import pytest
import test_search
import yaml
from test_search import lines

from litgpt_whittle.batches import BudgetArgs
from litgpt_whittle.commands import search_run
from litgpt_whittle.journal import read_journal
from litgpt_whittle.searching.args import RacingArgs

SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_search
from litgpt_whittle.commands import search_run
from litgpt_whittle.console import show_log
from litgpt_whittle.errors import UserError
from litgpt_whittle.fitness.perplexity import Perplexity
from litgpt_whittle.batches import BudgetArgs
from litgpt_whittle.searching.args import RacingArgs
search_run.write_report = lambda out_dir: "the report"
show_log()
losses = Perplexity.losses
Perplexity.losses = lambda self, *args: time.sleep({pause}) or losses(self, *args)
try:
    test_search.run(Path({checkpoint!r}), Path({out!r}), eval=BudgetArgs(max_iters=3), **{settings})
except UserError as error:
    sys.exit(f"error: {{error}}")
"""

checkpoint = test_search.checkpoint


class Run:
    """A search in separate processes; with `launches`, it starts all but the first one itself."""

    def __init__(self, checkpoint: Path, out: Path, pause: float = 0.0, launches: bool = False, **settings) -> None:
        self.out = out
        script = out.with_suffix(".py")
        tests = str(Path(__file__).parent)
        script.write_text(
            SCRIPT.format(tests=tests, checkpoint=str(checkpoint), out=str(out), pause=pause, settings=settings)
        )
        self.program = forked.Program(script, n=1 if launches else settings.get("devices", 1))

    def finish(self) -> forked.Done:
        return self.program.finish()

    def wait_for(self, n_lines: int, name: str = "journal.jsonl") -> None:
        """Wait until a file has n lines."""
        deadline = time.monotonic() + 120
        while not (self.out / name).exists() or (self.out / name).read_bytes().count(b"\n") < n_lines:
            assert self.program.poll() is None, self.finish()
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def kill(self) -> None:
        self.program.kill()


RACING = {"full": False, "racing": RacingArgs(alpha=0.3)}
EITHER = pytest.mark.parametrize("name", [pytest.param("full", marks=pytest.mark.slow), "racing"])


@pytest.fixture(scope="module")
def one(checkpoint, tmp_path_factory):
    """Run the search by one process, without and with a race."""
    folders = {name: tmp_path_factory.mktemp("one") / name for name in RACING}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_run, "write_report", lambda out_dir: "the report")
        for name, racing in RACING.items():
            settings = {"racing": racing, "iterations": 14, "eval": BudgetArgs(max_iters=3)}
            test_search.run(checkpoint, folders[name], **settings)
    return folders


@EITHER
def test_two_processes_find_what_one_finds(checkpoint, one, tmp_path, name):
    code, out, err = Run(checkpoint, tmp_path / "two", racing=RACING[name], iterations=14, devices=2).finish()
    assert code == 0, err
    assert out.count("Sub-networks, journal and report are in") == 1
    assert lines(tmp_path / "two") == lines(one[name])
    ours, theirs = (yaml.safe_load((folder / "best.yaml").read_text()) for folder in (tmp_path / "two", one[name]))
    assert ours == theirs


@EITHER
def test_a_sharded_teacher_gives_the_same_scores(checkpoint, one, tmp_path, name):
    settings = {"racing": RACING[name], "iterations": 14, "devices": 2, "teacher_placement": "sharded"}
    code, _, err = Run(checkpoint, tmp_path / "two", **settings).finish()
    assert code == 0, err
    (_, found), (_, expected) = (read_journal(folder / "journal.jsonl") for folder in (tmp_path / "two", one[name]))
    assert [e.subnet for e in found] == [e.subnet for e in expected]
    assert [e.tokens for e in found] == [e.tokens for e in expected]
    for ours, theirs in zip(found, expected):
        assert ours.scores == pytest.approx(theirs.scores, rel=1e-6)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_search_with_a_message(checkpoint, one, tmp_path):
    run = Run(checkpoint, tmp_path / "two", pause=0.1, launches=True, iterations=14, devices=2)
    run.wait_for(6)
    (child,) = run.program.children
    os.kill(child, signal.SIGKILL)
    code, _, err = run.finish()
    assert code == 1 and "process 1 of 2 ended with exit code -9" in err and "--resume true" in err
    assert "Traceback" not in err
    code, _, err = Run(checkpoint, tmp_path / "two", iterations=14, devices=2, resume=True).finish()
    assert code == 0, err
    assert lines(tmp_path / "two") == lines(one["full"])


@pytest.mark.parametrize(("devices", "name"), [(1, "racing"), pytest.param(2, "full", marks=pytest.mark.slow)])
def test_a_killed_search_resumes_to_the_same_journal(checkpoint, one, tmp_path, devices, name):
    _kill_and_resume(checkpoint, one, tmp_path / "killed", devices, name, [random.Random(devices).uniform(0, 1.5)])


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "name"), [(1, "full"), (1, "racing"), (2, "full"), (2, "racing")])
def test_twenty_kills(checkpoint, one, tmp_path, devices, name):
    moments = random.Random(name).choices([0.02 * i for i in range(60)], k=20)
    _kill_and_resume(checkpoint, one, tmp_path / "killed", devices, name, moments)


def _kill_and_resume(checkpoint, one, out: Path, devices: int, name: str, moments: list[float]) -> None:
    """Kill a search at several moments after its journal began or resumed, then let it finish."""
    settings = {"racing": RACING[name], "iterations": 14, "devices": devices}
    for moment in moments:
        run = Run(checkpoint, out, pause=0.03, resume=(out / "journal.jsonl").exists(), **settings)
        n_lines = len(read_journal(out / "journal.jsonl")[1]) if (out / "journal.jsonl").exists() else 0
        if n_lines < 14:
            run.wait_for(1)
        time.sleep(moment)
        run.kill()
    code, _, err = Run(checkpoint, out, resume=True, **settings).finish()
    assert code == 0, err
    assert lines(out) == lines(one[name])
