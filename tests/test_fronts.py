"""Test searches with several objectives: a front of sub-network files, a table, a picture."""

import pytest
import yaml
from test_evaluations import is_beaten
from test_search import TEACHER, make_checkpoint, run

from litgpt_whittle.commands.report import setup as report
from litgpt_whittle.index_plan import n_params
from litgpt_whittle.journal import read_journal
from litgpt_whittle.metrics import MEASURES, MeasureArgs
from litgpt_whittle.spaces.args import LimitArgs
from litgpt_whittle.spaces.bins import Bin
from litgpt_whittle.strategies import NSGA2
from litgpt_whittle.subnet import SubNet

OBJECTIVES = ("score", "flops", "kv_cache_bytes")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "teacher")


def objectives(subnet: SubNet, perplexity: float) -> tuple[float, ...]:
    """Return the objectives of a search with sequences of 12 tokens."""
    return perplexity, *(MEASURES[name](TEACHER, subnet, MeasureArgs(12)) for name in OBJECTIVES[1:])


def test_each_member_of_the_front_is_a_file(checkpoint, tmp_path, capsys):
    out, bins = tmp_path / "out", ["8K-10K", "13.3K-14.7K"]
    search = {"bin": bins, "strategy": NSGA2(OBJECTIVES, population_size=5)}
    run(checkpoint, out, iterations=9, **search)
    run(checkpoint, out, iterations=14, resume=True, **search)
    printed = capsys.readouterr().out
    header, evaluations = read_journal(out / "journal.jsonl")
    assert header["settings"]["objectives"] == ["perplexity", "flops", "kv_cache_bytes"]
    for bin in bins:
        own = {e.index: e for e in evaluations if e.bin == bin}
        subnets = {i: SubNet.from_dict(TEACHER, e.subnet) for i, e in own.items()}
        points = {i: objectives(subnets[i], e.scores["perplexity"]) for i, e in own.items()}
        front = {i for i, point in points.items() if not is_beaten(point, list(points.values()))}
        assert len(front) > 1
        # members of the front after 9 evaluations that were later dominated are removed
        files = {path.name: path for path in (out / f"front-{bin}").iterdir()}
        assert set(files) == {f"{i:04d}.yaml" for i in front}
        for i in front:
            assert SubNet.load(files[f"{i:04d}.yaml"], TEACHER) == subnets[i]
            origin = yaml.safe_load(files[f"{i:04d}.yaml"].read_text())["provenance"]
            measured = tuple(origin[name] for name in ("perplexity", "flops", "kv_cache_bytes"))
            assert measured == points[i] and origin["bin"] == bin and origin["evaluation"] == i
            assert n_params(TEACHER, subnets[i]) == origin["n_params"] and origin["n_params"] in Bin.parse(bin)
            [*_, line] = [line for line in printed.splitlines() if f"front-{bin}/{i:04d}.yaml" in line]
            assert f"{points[i][0]:.2f}" in line


def test_the_report_shows_the_front(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    run(checkpoint, out, iterations=10, bin="8K-12K", strategy=NSGA2(population_size=5))
    page = (out / "report.html").read_text()
    assert "<h2>The front</h2>" in page and (out / "front.png").is_file()
    names = [path.name for path in (out / "front").iterdir()]
    assert names and all(f"front/{name}" in page for name in names)
    capsys.readouterr()
    report(out)
    printed = capsys.readouterr().out
    assert all(f"front/{name}" in printed for name in names) and "perplexity  n_params" in printed


def test_a_single_objective_has_no_front(checkpoint, tmp_path):
    run(checkpoint, tmp_path / "one", iterations=3)
    run(checkpoint, tmp_path / "limited", iterations=3, limit=LimitArgs(weight_bytes="1MB"))
    for name in ("one", "limited"):
        assert not list((tmp_path / name).glob("front*"))
        assert "The front" not in (tmp_path / name / "report.html").read_text()
