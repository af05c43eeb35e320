"""Test the Python API: search, extract and distil produce the files of the commands."""

import math

import pytest
import yaml
from test_whittle import BATCH, SECTIONS, data, teacher  # noqa: F401  (fixtures)

from litgpt_whittle import distill, extract, search
from litgpt_whittle.commands import search_run
from litgpt_whittle.errors import UserError
from litgpt_whittle.journal import read_journal
from litgpt_whittle.training.args import TrainArgs


@pytest.fixture(scope="module")
def found(teacher, data, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("api") / "search"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_run, "write_report", lambda out_dir: "the report")
        return search(teacher, "14K", data, folder, **SECTIONS["search"])


def test_from_a_search_to_a_trained_student(found, data, tmp_path, capsys):  # noqa: F811
    _, evaluations = read_journal(found.folder / "journal.jsonl")
    perplexities = [e.scores["repaired_perplexity"] for e in evaluations]
    assert found.best.scores["repaired_perplexity"] == min(perplexities)
    assert str(found.best.n_params) in str(found).replace(",", "") and "<table>" in found._repr_html_()

    student = extract(found, data=data, out_dir=tmp_path / "student", **SECTIONS["extract"])
    assert capsys.readouterr().out == "" and "after the last block" in student.summary
    assert student.n_params == found.best.n_params
    assert student.calibration_tokens == 1024
    assert sum(p.numel() for p in student.load().parameters()) == student.n_params

    settings = SECTIONS["distill"] | {"train": TrainArgs(**SECTIONS["distill"]["train"])}
    trained = distill(student, data=data, out_dir=tmp_path / "distilled", **settings)
    assert trained.is_finished and trained.perplexity == math.exp(trained.curve[-1][1])
    assert trained.teacher_val_loss is not None  # the student's config names its teacher
    assert trained.checkpoint.llm().generate("the quick", max_new_tokens=2)
    told = yaml.safe_load((tmp_path / "distilled/final/hyperparameters.yaml").read_text())
    assert told["train"]["max_seq_length"] == BATCH["max_seq_length"]


def test_results_are_where_litgpt_puts_them(found, teacher, data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("LIGHTNING_ARTIFACTS_DIR", str(tmp_path))
    monkeypatch.setattr(search_run, "write_report", lambda out_dir: "the report")
    again = search(teacher, "14K", data, "there", **SECTIONS["search"])
    assert again.folder == tmp_path / "there" and again.best.scores == found.best.scores


def test_bad_input(found, teacher, tmp_path):  # noqa: F811
    with pytest.raises(UserError, match="the section search cannot be read: .*iterationz"):
        search(teacher, "14K", out_dir=tmp_path, iterationz=3)
    with pytest.raises(UserError, match="for more, run 'litgpt search' in a shell"):
        search(teacher, "14K", out_dir=tmp_path, devices=2)
    with pytest.raises(UserError, match="pass it as checkpoint_dir"):
        extract(found.best_path, out_dir=tmp_path / "out")
    with pytest.raises(UserError, match="there is no checkpoint directory 'nofolder'"):
        distill("nofolder", out_dir=tmp_path / "out")
    with pytest.raises(UserError, match="data must be a litgpt data module, .* got 3"):
        search(teacher, "14K", data=3, out_dir=tmp_path)
    with pytest.raises(UserError, match="teacher_checkpoint_dir is called teacher here, got 'other'; pass it as teac"):
        distill(teacher, out_dir=tmp_path / "out", teacher_checkpoint_dir="other")
    with pytest.raises(UserError, match="needs a teacher"):
        distill(teacher, out_dir=tmp_path / "out")
