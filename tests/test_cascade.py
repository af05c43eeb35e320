"""Test cascades and corrected teachers in `litgpt whittle`, against the commands run by hand."""

# ruff: noqa: F811
import json
import re
import sys

import pytest
import torch
from test_metrics import counted_flops
from test_whittle import SECTIONS, TEACHER, calls, changed, data, run, teacher  # noqa: F401  (fixtures)

from litgpt_whittle import SubNet, load_model
from litgpt_whittle import __main__ as program
from litgpt_whittle.checkpoint import read_weights, weights_fingerprint
from litgpt_whittle.errors import UserError
from litgpt_whittle.pipeline import run as pipeline_module
from litgpt_whittle.pipeline.cascade import CascadeArgs, Chain
from litgpt_whittle.pipeline.stage import Request
from litgpt_whittle.spaces.bins import Bin

TARGET = "30K,18K"
LAYERWISE = SECTIONS["search"] | {"iterations": 3, "space": "fine_layerwise", "simple_starts": False}
SHORT = {"rank": False, "search": LAYERWISE}


def by_hand(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["litgpt-whittle", *map(str, arguments)])
    program.main()


def same_weights(one, other):
    one, other = read_weights(one), read_weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def chain(teacher, data, folder, args, given=None):
    bins = {name: Bin.parse(name) for name in TARGET.split(",")}
    request = Request(teacher, bins, folder / "out", data, 1, 42, False)
    given = {"rank": False, "search": SECTIONS["search"], "distill": SECTIONS["distill"]} | (given or {})
    return Chain.of(request, given, args, folder)


@pytest.mark.slow
def test_a_corrected_teacher_and_each_student_in_turn_are_cut_as_by_hand(teacher, data, tmp_path, calls, monkeypatch):
    """With layer-wise students, whose padded form is the next teacher; and after an interruption."""
    out, in_process = tmp_path / "out", pipeline_module.call
    settings = SHORT | {"target": TARGET, "cascade": True, "correct_teacher": {"max_tokens": 256, "lr": 1e-3}}

    def fails(command, lock_file):
        return 1 if f"--out_dir={out / '18K/start'}" in command else in_process(command, lock_file)

    monkeypatch.setattr(pipeline_module, "call", fails)
    with pytest.raises(UserError, match="stage 18K/start ended with exit code 1"):
        run(teacher, data, out, **settings)
    monkeypatch.setattr(pipeline_module, "call", in_process)
    run(teacher, data, out, **settings)
    assert calls == ["distill", "search", "cache_teacher", "extract", "distill", "search", "extract", "distill"]
    corrected, large, small = (out / name for name in ("corrected_teacher/final", "30K/distilled/final", "18K"))
    for folder, expected in (("30K", corrected), ("18K", large)):
        header = json.loads((out / folder / "search/journal.jsonl").read_text().splitlines()[0])
        assert weights_fingerprint(expected) in json.dumps(header)
        student = load_model(out / folder / "distilled/final")
        assert sum(p.numel() for p in student.parameters()) in Bin.parse(folder)
    index = json.loads((out / "teacher_cache/index.json").read_text())
    assert weights_fingerprint(corrected) in json.dumps(index)

    hand = tmp_path / "hand"
    text = ["--data=HFText", f"--data.path={data.path}", f"--data.val_path={data.val_path}", "--seed=42"]
    text += ["--train.micro_batch_size=4", "--train.max_seq_length=32", "--devices=1"]
    trained = [*text, "--precision=32-true", "--logger_name=csv", "--compile=false", "--train.global_batch_size=4"]
    trained += ["--train.lr_warmup_steps=1", "--eval.max_iters=2", "--eval.initial_validation=true"]
    alone = ["--distill.beta=0", "--distill.alpha=1", "--train.max_tokens=256", "--train.min_lr=4e-5"]
    alone += ["--optimizer.class_path=torch.optim.AdamW", "--optimizer.lr=1e-3", f"--initial_checkpoint_dir={teacher}"]
    by_hand(monkeypatch, "distill", *trained, *alone, f"--out_dir={hand / 'corrected'}")
    assert same_weights(hand / "corrected/final", corrected) and not same_weights(teacher, corrected)
    found = ["--bin=18K", "--space=fine_layerwise", "--iterations=3", "--strategy=RandomSearch", "--eval.max_iters=1"]
    by_hand(monkeypatch, "search", large, *text, *found, "--simple_starts=false", f"--out_dir={hand / 'search'}")
    repair = ["--repair.tokens=1024", f"--out_dir={hand / 'start'}"]
    by_hand(monkeypatch, "extract", large, hand / "search/best.yaml", *text, *repair)
    assert same_weights(hand / "start", small / "start")
    taught = ["--train.max_tokens=768", f"--initial_checkpoint_dir={hand / 'start'}"]
    taught += [f"--teacher_cache={out / 'teacher_cache'}", f"--teacher_checkpoint_dir={hand / 'corrected/final'}"]
    by_hand(monkeypatch, "distill", *trained, *taught, f"--out_dir={hand / 'distilled'}")
    assert same_weights(hand / "distilled/final", small / "distilled/final")

    page = (out / "report.html").read_text()
    assert "corrected teacher" in page and "cut from" in page and "Each student is cut from the one above it" in page


@pytest.mark.parametrize("teacher_of", ["first", "nearest"])
def test_students_are_distilled_from_the_first_teacher_or_from_the_nearest(teacher, data, tmp_path, teacher_of):
    stages = {stage.name: stage for stage in chain(teacher, data, tmp_path, CascadeArgs(teacher_of)).all()}
    large = str(tmp_path / "out/30K/distilled/final")
    expected = {"first": str(teacher), "nearest": large}[teacher_of]
    assert stages["18K/distilled"].settings["teacher_checkpoint_dir"] == expected
    assert stages["30K/distilled"].settings["teacher_checkpoint_dir"] == str(teacher)
    for name in ("18K/search", "18K/start"):
        assert str(stages[name].inputs[0]) == large and stages[name].needs(stages["30K/distilled"])
    # students of one teacher share its cache
    assert ("teacher_cache" in stages) == (teacher_of == "first")
    caches = {stages[f"{name}/distilled"].settings.get("teacher_cache") for name in ("30K", "18K")}
    assert caches == {str(tmp_path / "out/teacher_cache") if teacher_of == "first" else None}


def test_a_cache_of_each_teacher_can_be_asked_for(teacher, data, tmp_path):
    """Also if hidden states are matched to the teacher that a student is cut from."""
    hidden = changed("distill", **{"distill.hidden.weight": 1.0})
    links = chain(teacher, data, tmp_path, CascadeArgs("nearest"), {"cache_teacher": True} | hidden)
    stages = {stage.name: stage for stage in links.all()}
    taught = [str(stages[f"{name}/teacher_cache"].inputs[0]) for name in ("30K", "18K")]
    assert taught == [str(teacher), str(tmp_path / "out/30K/distilled/final")]
    assert "teacher_cache" not in stages and links.cache_bytes() > 0


def test_a_cascade_costs_what_its_teachers_and_students_cost(teacher, data, tmp_path):
    """Against PyTorch's own counter."""
    nearest = chain(teacher, data, tmp_path / "nearest", CascadeArgs("nearest"))
    first = chain(teacher, data, tmp_path / "first", CascadeArgs("first"), {"cache_teacher": False})
    example = nearest.links[0].search.examples["30K"]
    assert nearest.links[1].teacher == example.config
    sizes = [counted_flops(SubNet.full(config), 1, 32) for config in (TEACHER, example.config)]
    found = [{cost.name: cost for cost in links.costs()} for links in (first, nearest)]
    assert [cost["18K/distilled"].forward for cost in found] == pytest.approx([768 * size for size in sizes])
    assert found[0]["18K/search"].tokens == found[0]["30K/search"].tokens


def test_a_dry_run_shows_all_stages_of_a_cascade(teacher, data, tmp_path, calls, capsys):
    settings = SHORT | {"target": TARGET, "cascade": True, "correct_teacher": {"max_tokens": 256}}
    run(teacher, data, tmp_path / "out", **settings, dry_run=True)
    printed = capsys.readouterr().out
    for name in ("corrected_teacher", "30K/search", "teacher_cache", "30K/distilled", "18K/search", "18K/distilled"):
        assert re.search(rf"^ *{name} ", printed, flags=re.MULTILINE)
    assert "Training 30K, as a" in printed and "Training 18K, as a" in printed
    assert not calls and not (tmp_path / "out").exists()


def test_a_correction_learns_at_a_fifth_of_the_distillations_rate_unless_told_otherwise(teacher, data, tmp_path):
    def stage(**given):
        links = chain(teacher, data, tmp_path, None, {"correct_teacher": {"max_tokens": 256} | given})
        return links.links[0].correct_teacher

    one, other = stage(), stage(**{"lr": "1e-5", "train.global_batch_size": 8})
    assert [each.args.optimizer["init_args"]["lr"] for each in (one, other)] == pytest.approx([2e-4, 1e-5])
    # in proportion to AdamW's default of 1e-3 in PyTorch, and litgpt's minimum
    assert [each.args.train.min_lr for each in (one, other)] == pytest.approx([8e-6, 4e-7])
    assert [each.args.train.global_batch_size for each in (one, other)] == [4, 8]
    assert one.args.train.max_tokens == 256 and one.args.precision == "32-true" and not one.args.distill.uses_teacher
    (cost,) = one.costs()
    whole = counted_flops(SubNet.full(TEACHER), 1, 32)
    assert (cost.name, cost.tokens, cost.training) == ("corrected_teacher", 256, pytest.approx(3 * 256 * whole))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"target": "18K"}, "a cascade needs at least two targets, got 18K; add one, or remove --cascade"),
        ({"target": "18K,30K"}, "must descend, .* got 18K .* before 30K .*; change --target"),
        ({"target": "20K,19K"}, "must descend, each range below the one before"),
        ({"target": "30K,3K"}, "^search: no sub-network lies in the bin .*, change --target"),
        (changed("distill", **{"distill.hidden.weight": 1.0}), "set --cascade.teacher nearest, or"),
        (
            {"cascade": CascadeArgs("nearest")} | changed("distill", teacher_checkpoint_dir="TEACHER"),
            "cascade.teacher nearest and distill.teacher_checkpoint_dir name two teachers",
        ),
        (
            {"correct_teacher": {"max_tokens": 256, "distill.alpha": 0.5}},
            "correct_teacher.distill.alpha has no effect, since no other teacher takes part in the correction",
        ),
        (
            {"correct_teacher": {"max_tokens": 256, "teacher_checkpoint_dir": "TEACHER"}},
            "correct_teacher.teacher_checkpoint_dir has no effect",
        ),
        ({"correct_teacher": {"lr": 1e-5}}, "set --correct_teacher.max_tokens"),
        ({"correct_teacher": {"max_tokens": 256, "lr": 0}}, "correct_teacher.lr must be a positive number, got 0"),
        (
            {"correct_teacher": {"max_tokens": 10}},
            "correct_teacher: training must take at least one step",
        ),
        ({"correct_teacher": {"max_tokens": 256, "resume": True}}, "correct_teacher.resume is set by the pipeline"),
        ({"correct_teacher": {"max_tokens": 256, "trane": 1}}, "section correct_teacher cannot be read: .*trane"),
    ],
)
def test_mistakes_are_told_before_any_stage_runs(teacher, data, tmp_path, calls, changes, message):
    settings = {"target": TARGET, "cascade": True, "rank": False} | changes
    for section in (settings.get(name, {}) for name in ("distill", "correct_teacher")):
        if "teacher_checkpoint_dir" in section:
            section["teacher_checkpoint_dir"] = str(teacher)
    with pytest.raises(UserError, match=message) as error:
        run(teacher, data, tmp_path / "out", **settings)
    assert "\n" not in str(error.value)
    assert not calls and not (tmp_path / "out").exists()
