"""Test `litgpt search` with a surrogate: outputs, resuming, and rejected input."""

import json
from pathlib import Path

import pytest
from scipy.stats import kendalltau
from test_search import BIN, TEACHER, lines, make_checkpoint, run
from test_text_surrogate import make_model

from litgpt_whittle.commands import search_run
from litgpt_whittle.errors import UserError
from litgpt_whittle.journal import read_journal
from litgpt_whittle.reports.report import write_report
from litgpt_whittle.strategies import RandomSearch
from litgpt_whittle.surrogates import trees
from litgpt_whittle.surrogates.args import SurrogateArgs
from litgpt_whittle.testing.inputs import random_ranking


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "teacher")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(search_run, "write_report", lambda out_dir: "the report")
    monkeypatch.setattr(trees, "N_TREES", 10)


def args(**changes) -> SurrogateArgs:
    small = dict(mode="filter", n_initial=12, n_proposals=3, n_inner=20, n_evaluated=4)
    return SurrogateArgs(**(small | changes))


def predictions(out_dir: Path) -> list[float | None]:
    return [e.scores.get("predicted") for e in read_journal(out_dir / "journal.jsonl")[1]]


def test_predictions_are_journalled_and_their_agreement_is_told(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    run(checkpoint, out, surrogate=args(), iterations=24)
    header, evaluations = read_journal(out / "journal.jsonl")
    predicted = predictions(out)
    assert predicted[:12] == [None] * 12 and all(value > 0 for value in predicted[12:])
    tau = kendalltau(predicted[12:], [e.scores["perplexity"] for e in evaluations[12:]]).statistic
    assert (
        f"of {BIN} predicted 12 candidates before they were measured: Kendall's τ {tau:.2f}" in capsys.readouterr().out
    )
    assert header["settings"]["strategy"] == "Evolution" and header["settings"]["surrogate"]["mode"] == "filter"
    assert not (out / "surrogate").exists()  # trees need only the journal
    write_report(out)
    assert "The surrogate" in (out / "report.html").read_text() and (out / "predictions.png").is_file()


@pytest.mark.parametrize("mode", ["filter", "objective"])
@pytest.mark.parametrize("n", [5, 14])
def test_a_resumed_search_is_the_same(checkpoint, tmp_path, mode, n):
    run(checkpoint, tmp_path / "whole", surrogate=args(mode=mode), iterations=20)
    run(checkpoint, tmp_path / "out", surrogate=args(mode=mode), iterations=n)
    run(checkpoint, tmp_path / "out", surrogate=args(mode=mode), iterations=20, resume=True)
    assert lines(tmp_path / "out") == lines(tmp_path / "whole")


def test_bins_have_surrogates_of_their_own(checkpoint, tmp_path, capsys):
    run(checkpoint, tmp_path / "both", surrogate=args(), bin=[BIN, "14K±5%"], iterations=16)
    run(checkpoint, tmp_path / "one", surrogate=args(), iterations=16)
    _, both = read_journal(tmp_path / "both/journal.jsonl")
    _, one = read_journal(tmp_path / "one/journal.jsonl")
    assert [(e.subnet, e.scores) for e in both if e.bin == BIN] == [(e.subnet, e.scores) for e in one]
    assert capsys.readouterr().out.count("Kendall's τ") == 3


def test_another_search_is_learnt_from(checkpoint, tmp_path, caplog):
    run(checkpoint, tmp_path / "other", strategy=RandomSearch(), iterations=20, seed=7)
    surrogate = args(path=tmp_path / "other")
    run(checkpoint, tmp_path / "out", surrogate=surrogate)
    assert f"learnt from 20 candidates of {tmp_path / 'other'}: Kendall's τ" in caplog.text
    assert None not in predictions(tmp_path / "out")
    # after that search has continued, the surrogate would be fitted to different data
    run(checkpoint, tmp_path / "other", strategy=RandomSearch(), iterations=22, seed=7, resume=True)
    with pytest.raises(UserError, match=r"settings\.surrogate\.path was "):
        run(checkpoint, tmp_path / "out", surrogate=surrogate, iterations=20, resume=True)


def test_a_ranking_is_looked_at_where_it_is_given(checkpoint, tmp_path):
    random_ranking(TEACHER).save(tmp_path / "importance.pt")
    run(checkpoint, tmp_path / "blind", surrogate=args(), iterations=40)
    run(checkpoint, tmp_path / "out", surrogate=args(importance=tmp_path / "importance.pt"), iterations=40)
    assert predictions(tmp_path / "out")[12:] != predictions(tmp_path / "blind")[12:]
    settings = read_journal(tmp_path / "out/journal.jsonl")[0]["settings"]
    assert settings["surrogate"]["importance"] == random_ranking(TEACHER).fingerprint and settings["importance"] is None


def test_a_language_model_is_fine_tuned_and_kept(checkpoint, tmp_path):
    model = make_model(tmp_path / "model")
    surrogate = args(kind="text", model=str(model), epochs=1)
    run(checkpoint, tmp_path / "out", surrogate=surrogate, iterations=16)
    assert None not in predictions(tmp_path / "out")[12:]
    assert (tmp_path / "out/surrogate/model.safetensors").is_file()
    again = args(kind="text", model=str(tmp_path / "out/surrogate"), path=tmp_path / "out", epochs=1)
    run(checkpoint, tmp_path / "again", surrogate=again, iterations=4)
    assert None not in predictions(tmp_path / "again")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "crystal_ball"}, "there is no 'crystal_ball' in litgpt_whittle.surrogates; choose from text, trees"),
        ({"path": Path("nowhere")}, "must be the folder or journal of a search, got 'nowhere'"),
        ({"importance": Path("nowhere.pt")}, "there is no 'nowhere.pt'; create it with"),
        ({"kind": "text"}, "surrogate.kind text needs --surrogate.model"),
        ({"kind": "text", "model": "./nowhere"}, "surrogate.model './nowhere' cannot be loaded"),
        ({"model": "./nowhere"}, "surrogate.model is an option of kind text"),
    ],
)
def test_mistakes_are_told_before_anything_is_made(checkpoint, tmp_path, monkeypatch, changes, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=message) as error:
        run(checkpoint, tmp_path / "out", surrogate=args(**changes))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_search_without_a_surrogate_says_nothing_of_it(checkpoint, tmp_path):
    run(checkpoint, tmp_path / "out")
    header = json.loads((tmp_path / "out/journal.jsonl").read_text().splitlines()[0])
    assert "surrogate" not in header["settings"] and predictions(tmp_path / "out") == [None] * 12
