"""Test that every measure can be a limit: no candidate beyond it is scored."""

from dataclasses import fields

import numpy as np
import pytest
import yaml
from test_search import TEACHER, cli, lines, make_checkpoint, run

from litgpt_whittle import metrics
from litgpt_whittle.commands import search_run
from litgpt_whittle.errors import UserError
from litgpt_whittle.fitness.perplexity import Perplexity
from litgpt_whittle.journal import read_journal
from litgpt_whittle.latency import Latency
from litgpt_whittle.metrics import MEASURES, MeasureArgs
from litgpt_whittle.quantities import format_amount
from litgpt_whittle.spaces.args import LimitArgs
from litgpt_whittle.spaces.bins import Bin
from litgpt_whittle.spaces.limits import Limits
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.strategies import RandomSearch
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.testing.inputs import LEAN

ARGS = MeasureArgs(seq_length=32)
FULL = {name: measure(LEAN, SubNet.full(LEAN), ARGS) for name, measure in MEASURES.items() if not measure.is_timed}


def limited(name: str = "coarse_layerwise", bin: Bin | None = None, **ranges) -> Space:
    return Space(LEAN, name, bin, limits=Limits(ranges, LEAN, ARGS))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "teacher")


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch):
    monkeypatch.setattr(search_run, "write_report", lambda out_dir: "the report")


@pytest.fixture
def clock(monkeypatch):
    """Replace latencies by a function of the size, and record the timed candidates."""
    timed = []

    def measured(_, subnet, args, length):
        timed.append(subnet)
        return Latency(prefill=len(subnet) * 1e-3, decode=len(subnet.n_embd) * 1e-4)

    monkeypatch.setattr(metrics, "_measured_latency", measured)
    return timed


def test_every_measure_can_be_a_limit():
    assert [field.name for field in fields(LimitArgs)] == list(MEASURES)


def test_limits_are_read_in_their_units():
    args = LimitArgs(n_params="600M-800M", kv_cache_bytes="2MiB", latency_decode=0.01)
    assert args.ranges() == {"n_params": (6e8, 8e8), "kv_cache_bytes": (0, 2**21), "latency_decode": (0, 0.01)}


@pytest.mark.parametrize("measure", FULL)
def test_each_closed_form_limits(measure):
    half, rng = FULL[measure] / 2, np.random.default_rng(0)
    space = limited(**{measure: (0, half)})
    drawn = [space.sample(rng) for _ in range(60)]
    admitted = [space.admits(subnet) for subnet in drawn]
    assert admitted == [MEASURES[measure](LEAN, subnet, ARGS) <= half for subnet in drawn] and any(admitted)
    assert all(admitted) == (measure == "n_params")


def test_without_a_bin_a_limit_on_parameters_is_the_bin():
    space = limited(n_params=(20_000, 21_000.5))
    assert space.bin == Bin(20_000, 21_000)
    assert limited(n_params=(0, 21_000)).bin == Bin(space.sizes.smallest, 21_000)
    assert limited(flops=(0, 1e9)).bin == Bin(space.sizes.smallest, space.sizes.largest)
    assert limited(bin=Bin(9_000, 20_000), n_params=(10_000, 21_000)).bin == Bin(9_000, 20_000)


@pytest.mark.parametrize(
    ("ranges", "bin", "message"),
    [
        ({"flops": (0, 100)}, None, "limit.flops 100 "),
        ({"flops": (1e9, 2e9)}, Bin(9_000, 20_000), "bin 9K-20K meets limit.flops 1G-2G "),
        ({"n_params": (1, 2)}, None, "limit.n_params 1-2 "),
        ({"kv_cache_bytes": (0, 1), "weight_bytes": (0, 1e9)}, None, "kv_cache_bytes 1B .* and limit.weight_bytes 1GB"),
    ],
)
def test_limits_out_of_reach_are_refused_with_what_was_seen(ranges, bin, message):
    with pytest.raises(UserError, match=f"none of 500 random sub-networks .*{message}") as error:
        limited(bin=bin, **ranges)
    assert "\n" not in str(error.value) and "change the limits or the bin" in str(error.value)


def test_the_costs_that_are_told_are_those_of_the_draws():
    with pytest.raises(UserError) as error:
        limited(bin=Bin(9_000, 20_000), flops=(0, 1))
    draws, rng = Space(LEAN, "coarse_layerwise", Bin(9_000, 20_000)), np.random.default_rng(0)
    costs = [MEASURES["flops"](LEAN, draws.sample(rng), ARGS) for _ in range(500)]
    seen = " to ".join(format_amount(cost, "FLOPs per token") for cost in (min(costs), max(costs)))
    assert f"limit.flops 1 (they have {seen})" in str(error.value)


def test_a_search_within_limits_needs_no_bin(checkpoint, tmp_path):
    full = MEASURES["flops"](TEACHER, SubNet.full(TEACHER), MeasureArgs(12))
    run(checkpoint, tmp_path / "out", bin=None, limit=LimitArgs(flops=full / 2, weight_bytes="20KB"))
    header, evaluations = read_journal(tmp_path / "out/journal.jsonl")
    assert header["settings"]["limits"] == {"flops": [0, full / 2], "weight_bytes": [0, 20_000]}
    assert len(evaluations) == 12 and all(evaluation.error is None for evaluation in evaluations)
    for evaluation in evaluations:
        subnet = SubNet.from_dict(TEACHER, evaluation.subnet)
        assert evaluation.scores["flops"] == MEASURES["flops"](TEACHER, subnet, MeasureArgs(12)) <= full / 2
        assert evaluation.scores["weight_bytes"] == 2 * evaluation.n_params <= 20_000
    best = yaml.safe_load((tmp_path / "out/best.yaml").read_text())["provenance"]
    assert best["flops"] <= full / 2


def test_what_is_too_slow_is_not_scored(checkpoint, tmp_path, clock, monkeypatch):
    scored, score = [], Perplexity.__call__
    monkeypatch.setattr(Perplexity, "__call__", lambda self, subnet: scored.append(subnet) or score(self, subnet))
    changes = {"limit": LimitArgs(latency_prefill="2ms"), "bin": "5K-40K", "strategy": RandomSearch()}
    run(checkpoint, tmp_path / "out", **changes)
    _, evaluations = read_journal(tmp_path / "out/journal.jsonl")
    slow = [e for e in evaluations if len(SubNet.from_dict(TEACHER, e.subnet)) > 2]
    assert 0 < len(slow) < 12 and len(scored) == 12 - len(slow) and len(clock) == 12
    for evaluation in evaluations:
        assert evaluation.error == ("latency_prefill is outside of its limit 2ms" if evaluation in slow else None)
        assert ("perplexity" in evaluation.scores) == (evaluation not in slow)
        n_layer = len(SubNet.from_dict(TEACHER, evaluation.subnet))
        assert evaluation.scores["latency_prefill"] == n_layer * 1e-3
    # timed candidates are not timed again
    clock.clear()
    run(checkpoint, tmp_path / "out", iterations=14, resume=True, **changes)
    run(checkpoint, tmp_path / "whole", iterations=14, **changes)
    assert len(clock) == 2 + 14 and lines(tmp_path / "out") == lines(tmp_path / "whole")


def test_resuming_within_other_limits_is_refused_by_name(checkpoint, tmp_path):
    run(checkpoint, tmp_path / "out", iterations=1, limit=LimitArgs(weight_bytes="1MB"))
    with pytest.raises(UserError, match=r"settings\.limits\.weight_bytes was \[0"):
        run(checkpoint, tmp_path / "out", resume=True, limit=LimitArgs(weight_bytes="2MB"))
    with pytest.raises(UserError, match=r"settings\.limits\.weight_bytes was .* and is None"):
        run(checkpoint, tmp_path / "out", resume=True)
    # equivalent spelling
    run(checkpoint, tmp_path / "out", iterations=1, resume=True, limit=LimitArgs(weight_bytes=1e6))


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ({"flops": "fast"}, "limit.flops: an amount in FLOPs per token looks like 800M"),
        ({"latency_decode": "2GB"}, "limit.latency_decode: an amount in seconds looks like 10ms"),
        ({"weight_bytes": "2GB-1GB"}, "limit.weight_bytes: a range must ascend"),
        ({"flops": 10}, r"none of 500 random sub-networks of the bin 8K-10K meets limit.flops 10 \(they have"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(checkpoint, tmp_path, limit, message):
    with pytest.raises(UserError, match=message) as error:
        run(checkpoint, tmp_path / "out", limit=LimitArgs(**limit))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_limits_are_flags(checkpoint, tmp_path, capsys):
    flags = [checkpoint, "--limit.flops", "20K", "--limit.weight_bytes", "8KB-20KB", "--iterations", 2]
    flags += ["--fitness", "perplexity"]
    flags += ["--data", "test_search.Tokens", "--train.max_seq_length", 8, "--out_dir", tmp_path / "out"]
    with pytest.raises(SystemExit):
        cli(*flags, "--print_config")
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["limit"]["flops"] == "20K" and shown["bin"] is None
    cli(*flags)
    header, evaluations = read_journal(tmp_path / "out/journal.jsonl")
    assert header["settings"]["limits"] == {"flops": [0, 20_000], "weight_bytes": [8_000, 20_000]}
    assert len(evaluations) == 2 and all(8_000 <= 2 * e.n_params <= 20_000 for e in evaluations)


def test_by_a_real_clock_all_or_none_are_fast_enough(checkpoint, tmp_path):
    run(checkpoint, tmp_path / "all", iterations=2, limit=LimitArgs(latency_prefill="1000s", latency_decode="1000s"))
    _, evaluations = read_journal(tmp_path / "all/journal.jsonl")
    assert all(0 < e.scores["latency_decode"] < 1000 and e.scores["perplexity"] for e in evaluations)
    with pytest.raises(UserError, match="no candidate could be scored"):
        run(checkpoint, tmp_path / "none", iterations=2, limit=LimitArgs(latency_prefill="0.001us"))
    _, evaluations = read_journal(tmp_path / "none/journal.jsonl")
    assert [e.error for e in evaluations] == ["latency_prefill is outside of its limit 0.001us"] * 2
