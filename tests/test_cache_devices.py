"""Test caching by several processes: the files equal those of one process, also after kills."""

import random
import time
from pathlib import Path

import forked
import pytest
from test_cache_teacher import cache, contents_of
from test_train import checkpoint

from litgpt_whittle.distillation.cache import Cache, Index
from litgpt_whittle.errors import UserError

SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_cache_teacher
from litgpt_whittle.training.teacher import LiveTeacher
said = LiveTeacher.__call__
LiveTeacher.__call__ = lambda self, ids: time.sleep({pause}) or said(self, ids)
test_cache_teacher.cache(Path({teacher!r}), Path({out!r}), **{settings})
"""

CODEC = {"sampled": {"draws": 12}}
SETTINGS = {"codec": CODEC, "shard_size": str(2 * 4 * (16 + 8 * 13))}  # three shards of two batches or one


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("teachers") / "teacher", seed=1, n_embd=48)


@pytest.fixture(scope="module")
def one(teacher_dir, tmp_path_factory):
    """Return the files that one process writes without interruption."""
    return contents_of(cache(teacher_dir, tmp_path_factory.mktemp("one") / "cache", **SETTINGS))


def start(teacher_dir, out, pause=0.0, **settings):
    script = out.with_suffix(".py")
    names = {"tests": str(Path(__file__).parent), "teacher": str(teacher_dir), "out": str(out)}
    script.write_text(SCRIPT.format(pause=pause, settings=SETTINGS | settings, **names))
    return forked.Program(script, n=settings.get("devices", 1))


def finish(process):
    done = process.finish()
    assert done.returncode == 0, done.stderr


def kill(process, out, moment):
    """Kill all processes with an uncatchable signal, some time after the first shard exists."""
    while not list(out.glob("shard-*")):
        assert process.poll() is None, process.finish()
        time.sleep(0.01)
    time.sleep(moment)
    process.kill()


@pytest.mark.slow
def test_killed_caching_is_finished_by_two_processes(teacher_dir, one, tmp_path):
    """The only process dies after the first of three shards, with the second one begun."""
    out = tmp_path / "cache"
    kill(start(teacher_dir, out, pause=0.5), out, random.Random(0).uniform(0.6, 0.9))
    assert not Index.read(out).complete
    assert list(out.glob(".shard-*")), "a shard was begun"
    with pytest.raises(UserError, match="is not finished"):
        Cache(out)
    finish(start(teacher_dir, out, devices=2, resume=True))
    assert contents_of(out) == one


@pytest.mark.slow
@pytest.mark.parametrize("moment", [0.0, 0.3, 0.6, 0.9])
def test_two_killed_processes_are_replaced_by_one(teacher_dir, one, tmp_path, moment):
    out = tmp_path / "cache"
    kill(start(teacher_dir, out, pause=0.5, devices=2), out, moment)
    cache(teacher_dir, out, resume=True, **SETTINGS)
    assert contents_of(out) == one


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(teacher_dir, one, tmp_path):
    finish(start(teacher_dir, tmp_path / "cache", devices=2))
    assert contents_of(tmp_path / "cache") == one


@pytest.mark.slow
def test_two_processes_with_half_a_teacher_each_write_the_files_of_one(teacher_dir, one, tmp_path):
    """Three shards for two processes: in the second round one process has nothing to write."""
    finish(start(teacher_dir, tmp_path / "cache", devices=2, teacher_placement="sharded"))
    assert contents_of(tmp_path / "cache") == one
