"""Test measurements before a search: own journal, resumed, shared by bins, and never a result."""

import json
import math
import random
import shutil
from pathlib import Path

import pytest
import test_search
import torch
import yaml
from checkpoints import write_random_model
from litgpt.config import Config
from test_search import TEACHER, lines, run
from test_search_devices import Run

from litgpt_whittle.batches import BudgetArgs
from litgpt_whittle.checkpoint import load_model
from litgpt_whittle.errors import UserError
from litgpt_whittle.fitness.perplexity import Perplexity
from litgpt_whittle.journal import read_journal
from litgpt_whittle.reports import report
from litgpt_whittle.reports.costs import plot_costs, read_costs
from litgpt_whittle.searching.args import RacingArgs
from litgpt_whittle.searching.measuring import MEASUREMENTS
from litgpt_whittle.spaces.alternatives import Alternative
from litgpt_whittle.spaces.bins import Bin
from litgpt_whittle.strategies import IntegerProgram
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import extract_weights, student_model

BINS = "9K-11K,12K-13K"
SHARES = (0.5, 0.25)
N_MEASURED = 1 + 4 * (1 + 2 + 2)  # the teacher; in each layer no layer, two numbers of heads, two of neurons
checkpoint = test_search.checkpoint
_without_pictures = test_search._without_pictures


def search(checkpoint: Path, out_dir: Path, **changes) -> None:
    given = {"bin": BINS, "strategy": IntegerProgram(shares=SHARES), "space": "coarse_layerwise", "iterations": 6}
    run(checkpoint, out_dir, **given | {"simple_starts": False} | changes)


def measured(out_dir: Path) -> list[dict]:
    """Return the measurements without times."""
    rows = [json.loads(line) for line in (out_dir / MEASUREMENTS).read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory):
    """Return an uninterrupted search."""
    out_dir = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_search.search_run, "write_report", lambda out_dir: "the report")
        search(checkpoint, out_dir)
    return out_dir


def test_each_cut_is_measured_once_for_all_bins_by_the_searchs_own_fitness(checkpoint, tmp_path, monkeypatch, caplog):
    scored, score = [], Perplexity.__call__
    monkeypatch.setattr(Perplexity, "__call__", lambda self, subnet: scored.append(subnet) or score(self, subnet))
    search(checkpoint, tmp_path / "out")
    assert f"{N_MEASURED} measurements come first" in caplog.text
    assert len(scored) == N_MEASURED + 2 * 6 and len(set(scored[:N_MEASURED])) == N_MEASURED
    _, evaluations = read_journal(tmp_path / "out" / MEASUREMENTS)
    assert [e.subnet for e in evaluations] == [subnet.to_dict() for subnet in scored[:N_MEASURED]]
    # the oracle scores an extracted litgpt model
    batches, teacher = test_search.Tokens(), load_model(checkpoint, "SuperGPT")
    batches.connect(batch_size=2, max_seq_length=12)
    for evaluation in evaluations[::7]:
        subnet = SubNet.from_dict(TEACHER, evaluation.subnet)
        student = student_model(subnet)
        student.load_state_dict(extract_weights(teacher, subnet))
        rows = torch.cat(batches.val_dataloader()[:2])
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(student(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        assert evaluation.scores["nll"] == pytest.approx(float(loss), rel=1e-5)


def test_measurements_are_never_a_result(whole):
    _header, evaluations = read_journal(whole / "journal.jsonl")
    assert len(evaluations) == 12
    for bin in BINS.split(","):
        own = [e for e in evaluations if e.bin == bin]
        assert len(own) == 6 and all(e.n_params in Bin.parse(bin) for e in own)
        best = yaml.safe_load((whole / f"best-{bin}.yaml").read_text())["provenance"]
        assert best["perplexity"] == min(e.scores["perplexity"] for e in own)


def stopped_after(n: int, monkeypatch) -> None:
    """Interrupt the search with a KeyboardInterrupt while it scores its n-th sub-network."""
    left, score = [n], Perplexity.__call__

    def interrupted(self, subnet):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return score(self, subnet)

    monkeypatch.setattr(Perplexity, "__call__", interrupted)


@pytest.mark.parametrize("n", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (9, N_MEASURED)), N_MEASURED + 7])
def test_a_search_resumes_from_any_measurement_to_the_same_result(checkpoint, whole, tmp_path, n, caplog):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(test_search.search_run, "write_report", lambda out_dir: "the report")
        stopped_after(n, patch)
        search(checkpoint, tmp_path / "out")
    assert stop.value.code == 130 and "continue with --resume true" in caplog.text
    assert len(measured(tmp_path / "out")) == 1 + min(n - 1, N_MEASURED)
    search(checkpoint, tmp_path / "out", resume=True)
    assert lines(tmp_path / "out") == lines(whole) and measured(tmp_path / "out") == measured(whole)


@pytest.mark.parametrize("is_killed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_measure_what_one_does(checkpoint, tmp_path, is_killed):
    settings = {"strategy": "IntegerProgram", "simple_starts": False, "space": "coarse_layerwise", "iterations": 8}
    run(checkpoint, tmp_path / "one", eval=BudgetArgs(max_iters=3), **settings)
    if is_killed:
        killed = Run(checkpoint, tmp_path / "two", pause=0.02, devices=2, **settings)
        killed.wait_for(random.Random(0).randint(3, 20), MEASUREMENTS)
        killed.kill()
    code, _, err = Run(checkpoint, tmp_path / "two", devices=2, resume=is_killed, **settings).finish()
    assert code == 0 and err.count("measurements come first") == 1, err
    assert lines(tmp_path / "two") == lines(tmp_path / "one")
    assert measured(tmp_path / "two") == measured(tmp_path / "one")


def test_a_copy_of_the_measurements_serves_other_bins(checkpoint, whole, tmp_path, caplog):
    (tmp_path / "out").mkdir()
    shutil.copy(whole / MEASUREMENTS, tmp_path / "out")
    search(checkpoint, tmp_path / "out", bin="14K-15K", iterations=3, seed=5)
    assert "measurements" not in caplog.text
    assert measured(tmp_path / "out") == measured(whole)
    # missing cuts are added
    shutil.copytree(tmp_path / "out", tmp_path / "more", ignore=shutil.ignore_patterns("journal*"))
    search(checkpoint, tmp_path / "more", iterations=3, strategy=IntegerProgram(shares=(0.75, 0.5)))
    assert "8 measurements come first" in caplog.text
    shutil.copytree(tmp_path / "out", tmp_path / "other", ignore=shutil.ignore_patterns("journal*"))
    with pytest.raises(UserError, match=r"measurements.jsonl' must keep its settings: data.batches was 2 and is 1"):
        search(checkpoint, tmp_path / "other", eval=BudgetArgs(max_iters=1))


@pytest.mark.parametrize(
    "changes", [{"racing": RacingArgs(alpha=0.3)}, {"simple_starts": True}, {"space": "fine_uniform"}]
)
def test_it_works_with_races_starts_and_uniform_spaces(checkpoint, tmp_path, changes):
    search(checkpoint, tmp_path / "out", bin="9K-11K", **changes)
    _, evaluations = read_journal(tmp_path / "out" / "journal.jsonl")
    assert len(evaluations) == 6 and all(e.n_params in Bin.parse("9K-11K") for e in evaluations)


def test_experts_are_cut_in_all_layers(tmp_path):
    config = Config.from_name(
        "Mixtral-8x7B-v0.1", n_layer=2, n_embd=16, n_head=4, n_query_groups=2, head_size=8, intermediate_size=24,
        n_expert=8, n_expert_per_token=2, block_size=16, padded_vocab_size=64, vocab_size=61,
    )  # fmt: skip
    teacher = write_random_model(tmp_path / "teacher", config, std=0.3)
    search(teacher, tmp_path / "out", bin="10K-13K", space="coarse_layerwise")
    names = [row.get("origin") for row in measured(tmp_path / "out")]
    assert {"all layers: n_expert 4", "all layers: n_expert 2", "layer 1: dropped"} < set(names)
    costs, unit = read_costs(tmp_path / "out", config, "perplexity")
    plot_costs(costs, tmp_path / "costs.png", config, unit)
    assert len(costs) == len(names) - 2 and unit == "nats per token"


def test_a_bin_that_it_cannot_meet_is_refused_before_anything_is_scored(checkpoint, tmp_path):
    with pytest.raises(UserError, match="IntegerProgram found no combination of layers' alternatives in the bin 2K-3K"):
        search(checkpoint, tmp_path / "out", bin="2K-3K")
    assert not (tmp_path / "out" / "journal.jsonl").exists()


# -- the report


def test_costs_are_rises_of_the_loss_and_drawn(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    report.write_report(tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<h2>Costs</h2>" in page and (tmp_path / "out" / "costs.png").read_bytes().startswith(b"\x89PNG")
    rows = {row["origin"]: row["scores"] for row in measured(whole)[1:]}
    costs, unit = read_costs(whole, TEACHER, "perplexity")
    assert unit == "nats per token" and len(costs) == N_MEASURED - 1
    for alternative, cost in costs.items():
        ratio = rows[str(alternative)]["perplexity"] / rows["teacher"]["perplexity"]
        assert cost == pytest.approx(math.log(ratio), abs=1e-6)


def test_a_search_without_measurements_has_no_costs(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out", ignore=shutil.ignore_patterns(MEASUREMENTS))
    report.write_report(tmp_path / "out")
    assert "<h2>Costs</h2>" not in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("values", [[0.0], [math.inf], [-1.0, 2.0], [1e9, 1e-9, math.inf]])
def test_costs_of_any_kind_are_drawn(tmp_path, values):
    costs = {Alternative(i % 4, "intermediate_size", 10 + i): value for i, value in enumerate(values)}
    plot_costs(costs, tmp_path / "costs.png", TEACHER, "perplexity")
    assert (tmp_path / "costs.png").read_bytes().startswith(b"\x89PNG")
