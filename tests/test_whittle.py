"""Test `litgpt whittle`: its stages, resuming, rejected input, and the printed plan."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import torch
import yaml
from litgpt import GPT
from litgpt.config import Config
from task_files import write_tasks
from test_metrics import counted_flops
from texts import documents, write_jsonl, write_tokenizer

from litgpt_whittle import SubNet, files, load_model, save_checkpoint
from litgpt_whittle import __main__ as program
from litgpt_whittle.commands import distill, search_run
from litgpt_whittle.data import HFText
from litgpt_whittle.errors import UserError
from litgpt_whittle.files import lock
from litgpt_whittle.fitness import RepairedPerplexity
from litgpt_whittle.pipeline import command as whittle
from litgpt_whittle.pipeline import estimates
from litgpt_whittle.pipeline import run as pipeline_module
from litgpt_whittle.pipeline.command import setup
from litgpt_whittle.pipeline.costs import Speed, cost_table
from litgpt_whittle.pipeline.estimates import costs
from litgpt_whittle.pipeline.run import folder_of
from litgpt_whittle.pipeline.sections import Section, merge
from litgpt_whittle.pipeline.stage import Request
from litgpt_whittle.pipeline.stages import Stages
from litgpt_whittle.repair import costs as repair_costs
from litgpt_whittle.repair.from_moments import MomentRepair
from litgpt_whittle.results import TrainingResult, tokens_to_reach
from litgpt_whittle.settings import describe
from litgpt_whittle.spaces.alternatives import Alternatives
from litgpt_whittle.spaces.bins import Bin
from litgpt_whittle.strategies import IntegerProgram
from litgpt_whittle.supergpt import extract_weights, student_model, tie
from litgpt_whittle.tasks import TaskArgs, TaskSet
from litgpt_whittle.tasks.harness import read_tasks

TEACHER = Config(
    name="teacher", block_size=32, vocab_size=300, padded_vocab_size=300, n_layer=3, n_embd=32, n_head=4, bias=True
)
BATCH = {"micro_batch_size": 4, "max_seq_length": 32}
SECTIONS = {
    "rank": {"tokens": 256, "layer_tokens": 0, "train": BATCH},
    "search": {"iterations": 4, "train": BATCH, "eval": {"max_iters": 1}, "strategy": "RandomSearch"},
    "extract": {"repair": {"tokens": 1024}, "train": BATCH},
    "distill": {
        "precision": "32-true",
        "logger_name": "csv",
        "compile": False,
        "train": BATCH | {"global_batch_size": 4, "max_tokens": 768, "lr_warmup_steps": 1, "save_interval": None},
        "eval": {"interval": 3, "max_iters": 2},
    },
}


def changed(section, **settings):
    return {section: SECTIONS[section] | settings}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whittle") / "teacher"
    torch.manual_seed(0)
    save_checkpoint(folder, SubNet.full(TEACHER), GPT(TEACHER).state_dict())
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    train = write_jsonl(folder / "train.jsonl", documents(60))
    validation = write_jsonl(folder / "validation.jsonl", [text.upper() for text in documents(30, seed=1)])
    return HFText(path=str(train), val_path=str(validation))


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Run stages in this process, by the same command line; return the calls."""
    called = []

    def call(command, lock_file):
        called.append(command[3])
        monkeypatch.setattr(sys, "argv", ["litgpt-whittle", *command[3:]])
        program.main()
        return 0

    monkeypatch.setattr(pipeline_module, "call", call)
    # drawing takes longer than the search
    monkeypatch.setattr(search_run, "write_report", lambda out_dir: "the report")
    return called


def run(teacher, data, out_dir, target, **changes):
    setup(teacher, target, data, out_dir, **(SECTIONS | changes))


@pytest.mark.pictures
def test_it_ends_with_a_student_and_a_report_also_after_an_interruption(
    teacher, data, tmp_path, calls, monkeypatch, capsys
):
    pytest.importorskip("lm_eval", reason="needs the extra 'ecosystem'")
    tasks = TaskArgs([str(write_tasks(tmp_path / "tasks") / "letters.yaml")], limit=9)
    settings = {"target": "14K", "cache_teacher": False, "baseline": True, "tasks": tasks}
    in_process = pipeline_module.call
    monkeypatch.setattr(pipeline_module, "call", lambda *args: 1 if args[0][3] == "extract" else in_process(*args))
    with pytest.raises(UserError, match="stage 14K/start ended with exit code 1"):
        run(teacher, data, tmp_path / "out", **settings)
    monkeypatch.setattr(pipeline_module, "call", in_process)
    run(teacher, data, tmp_path / "out", **settings)
    assert calls == ["rank", "search", "extract", "distill", "distill"]
    folder = tmp_path / "out/14K"
    assert sum(p.numel() for p in load_model(folder / "distilled/final").parameters()) in Bin.parse("14K")
    trained, alone = TrainingResult(folder / "distilled"), TrainingResult(folder / "baseline")
    assert any("distill" in row for row in trained.rows)
    # the baseline trains without a teacher, from random weights
    assert not any("distill" in row for row in alone.rows)
    assert alone.curve[0][1] == pytest.approx(math.log(300), rel=0.1)
    page = (tmp_path / "out/report.html").read_text()
    assert f"{trained.perplexity:.2f}" in page and f"{alone.perplexity:.2f}" in page and "data:image/png" in page
    commands = (tmp_path / "out/commands.sh").read_text().splitlines()
    assert [line.split()[:2] for line in commands] == [["litgpt", name] for name in calls]
    expected, printed = results_on(tasks, teacher, folder), capsys.readouterr().out
    for name, (result,) in expected.items():
        retained = "" if name == "teacher" else f" ({result.accuracy / expected['teacher'][0].accuracy:.0%})"
        cell = f"{result.accuracy:.1%} ± {100 * result.stderr:.1f}{retained}"
        assert re.search(rf"^ *{name}  +{re.escape(cell)}$", printed, re.MULTILINE)
        assert f"<td>{name}</td><td>{cell}</td>" in page

    monkeypatch.setattr(TaskSet, "measure", None)
    run(teacher, data, tmp_path / "out", **settings)  # nothing is left to do
    assert len(calls) == len(commands)
    with pytest.raises(UserError, match="search.iterations was 4 and is 5"):
        run(teacher, data, tmp_path / "out", **settings, search=SECTIONS["search"] | {"iterations": 5})


def results_on(tasks, teacher, folder):
    """Return the results of the teacher, and of a student's checkpoints in its folder."""
    measured, subnet = read_tasks(tasks, teacher, 32), SubNet.load(folder / "start/sub_network.yaml", TEACHER)
    cut = student_model(subnet)
    cut.load_state_dict(extract_weights(load_model(teacher), subnet))
    models = {"teacher": load_model(teacher), "14K plain cut": cut.eval(), "14K repaired": load_model(folder / "start")}
    models["14K distilled"] = load_model(folder / "distilled/final")
    models["14K from random weights"] = load_model(folder / "baseline/final")
    return {name: measured.measure(model) for name, model in models.items()}


@pytest.mark.slow
def test_students_of_a_tied_teacher_lie_in_their_bin_as_they_are_saved(teacher, data, tmp_path, capsys):
    tied = tmp_path / "tied"
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    save_checkpoint(tied, SubNet.full(TEACHER), tie(GPT(TEACHER)).state_dict(), write_tokenizer(tmp_path))
    run(tied, data, tmp_path / "out", "14K", rank=False)
    final = tmp_path / "out/14K/distilled/final"
    model = load_model(final)
    n = sum(p.numel() for p in model.parameters())
    assert n in Bin.parse("14K") and model.lm_head.weight is model.transformer.wte.weight
    assert json.loads((final / "config.json").read_text())["tie_word_embeddings"]
    assert re.search(rf"14K +{n:,} ", capsys.readouterr().out), "it is reported as it is saved"
    with pytest.raises(UserError, match="tie_embeddings must be true, like the teacher's, got false"):
        run(tied, data, tmp_path / "other", "14K", **changed("distill", **{"train.tie_embeddings": False}))


def test_after_a_failure_the_settings_of_what_has_not_begun_may_change(teacher, data, tmp_path, monkeypatch):
    settings, codes = {"target": "14K", "rank": False}, {"search": 0, "extract": 0, "distill": 1}

    def call(command, lock_file):
        folder = Path(next(flag for flag in command if flag.startswith("--out_dir=")).partition("=")[2])
        folder.mkdir(parents=True, exist_ok=True)
        return codes[command[3]]

    def again(match, **changes):
        with pytest.raises(UserError, match=match) as error:
            run(teacher, data, tmp_path / "out", **settings | changes)
        return str(error.value)

    monkeypatch.setattr(pipeline_module, "call", call)
    monkeypatch.setattr(distill, "show_plan", lambda *_, **__: False)  # planning takes long, and is tested elsewhere
    assert "run the same command again" not in again("distilled ended with exit code 1; fix the error above")
    codes["distill"] = -9
    # the distillation has no files yet, and devices do not count as a setting
    longer = changed("distill", **{"train.max_tokens": 1024})
    again("distilled ended with exit code -9; run the same command again", **longer, devices="auto")
    (tmp_path / "out/14K/distilled/step-00000002").mkdir()
    (tmp_path / "out/14K/distilled/step-00000002/training_state.pth").touch()
    said = again("distill.train.max_tokens was 1024 and is 768; change back, delete .*14K/distilled, or choose another")
    assert "initial_checkpoint_dir" not in said and "14K/start" not in said
    shorter = longer | changed("search", iterations=3)
    again("search.iterations was 4 and is 3; change back, delete .*out/search, .*start, .*distilled,", **shorter)
    shutil.rmtree(tmp_path / "out/search")
    again("14K/start was started from the output of search, which must run again; delete .*distilled, or", **shorter)
    shutil.rmtree(tmp_path / "out/14K")
    again("ended with exit code -9", **shorter)
    (tmp_path / "out/14K/distilled/step-00000002").mkdir()
    (tmp_path / "out/14K/distilled/step-00000002/training_state.pth").touch()
    # as `litgpt distill --resume`, the pipeline accepts other settings of validation and logging
    often = changed("distill", **longer["distill"] | {"eval.interval": 1, "train.log_interval": 1, "compile": False})
    again("ended with exit code -9", **shorter | often)
    again("distill.precision was 32-true and is bf16-true", **shorter | changed("distill", precision="bf16-true"))
    codes |= {"search": 1, "extract": 1, "distill": 0}
    monkeypatch.setattr(whittle, "write_outcome", lambda *_: [["a student"]])
    run(teacher, data, tmp_path / "out", **settings | shorter)
    shutil.rmtree(tmp_path / "out/search")  # outputs that are no longer needed are not made again
    run(teacher, data, tmp_path / "out", **settings | shorter)
    shutil.rmtree(tmp_path / "out/14K")
    again("stage search ended with exit code 1", **shorter)


@pytest.mark.slow
def test_several_targets_share_ranking_search_and_cache(teacher, data, tmp_path, calls):
    run(teacher, data, tmp_path / "out", "18K,14K")
    assert calls == ["rank", "search", "cache_teacher", *["extract", "distill"] * 2]
    for name in ("18K", "14K"):
        model = load_model(tmp_path / "out" / name / "distilled/final")
        assert sum(p.numel() for p in model.parameters()) in Bin.parse(name)


def test_one_pipeline_at_a_time(teacher, data, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/whittle.yaml").touch()
    with open(tmp_path / "out/.lock", "a") as file:
        assert lock(file)
        with pytest.raises(UserError, match="another process is at work in out_dir .*; wait for it"):
            run(teacher, data, tmp_path / "out", "14K")


STAGE = """
import signal, sys, time
def stop(*_):
    time.sleep(1)
    print("saved", flush=True)
    sys.exit()
signal.signal(signal.SIGTERM, stop)
print("begun", flush=True)
time.sleep(60)
"""
PIPELINE = """
import sys
from litgpt_whittle.files import lock
from litgpt_whittle.pipeline.run import call
with open(sys.argv[1], "a") as file:
    lock(file)
    call([sys.executable, "-c", sys.argv[2]], file)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a process that its parent is gone")
def test_a_stage_whose_pipeline_was_killed_stops_and_keeps_others_out_until_then(tmp_path):
    path = tmp_path / ".lock"
    (tmp_path / "pipeline.py").write_text(PIPELINE)
    pipeline = forked.Program(tmp_path / "pipeline.py", path, STAGE)
    while pipeline.printed() != "begun\n":
        time.sleep(0.01)
    os.kill(pipeline.pid, signal.SIGKILL)  # but not the stage
    pipeline.finish()
    with open(path, "a") as file:
        assert not lock(file)  # the stage holds the lock
        for _ in range(100):
            if lock(file):  # the stage has ended
                assert pipeline.printed() == "begun\nsaved\n"
                return
            time.sleep(0.1)
    raise AssertionError("the lock was never given back")


CASCADE = {"target": "18K,14K", "cascade": True, "correct_teacher": {"max_tokens": 256}, "rank": False}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("settings", [{"target": "14K"}, CASCADE], ids=["one student", "cascade"])
def test_killed_anywhere_it_ends_with_the_same_student(teacher, data, tmp_path, settings):
    """All processes are killed at moments spread over a run's time."""
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(SECTIONS | {"data": describe(data)} | settings))
    command = [sys.executable, "-m", "litgpt_whittle", "whittle", str(teacher), "--config=settings.yaml"]

    def begin(out_dir: str) -> subprocess.Popen:
        return subprocess.Popen([*command, f"--out_dir={out_dir}"], cwd=tmp_path, start_new_session=True)

    started = time.perf_counter()
    assert begin("whole").wait() == 0
    seconds = time.perf_counter() - started
    for i in range(6):
        process = begin("killed")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=seconds * (0.2 + 0.15 * i))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert begin("killed").wait() == 0
    one, other = (torch.load(tmp_path / run / "14K/distilled/final/lit_model.pth") for run in ("whole", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"target": None}, "the target size is missing"),
        ({"target": "14K,14K±3%"}, "targets must differ in the size before '±'"),
        ({"target": "3M"}, "^search: no sub-network lies in the bin .*, change --target"),
        ({"target": "14X"}, "target: a bin looks like"),
        ({"search": {"iterationz": 4}}, "section search cannot be read: .*iterationz"),
        ({"search": {"bin": "14K"}}, "search.bin is set by the pipeline"),
        ({"distill": SECTIONS["distill"] | {"train.max_tokens": None}}, "set --distill.train.max_tokens"),
        ({"distill": {"train.max_time": 60.0}}, "set --distill.train.max_tokens"),
        ({"distill": SECTIONS["distill"] | {"train.global_batch_size": 3}}, "global_batch_size"),
        ({"distill": SECTIONS["distill"] | {"repair": True}}, "set extract.repair instead"),
        ({"search": SECTIONS["search"] | {"strategy": "Foo"}}, "there is no 'Foo' in litgpt_whittle.strategies"),
        (
            {"target": "14K,18K", "distill": SECTIONS["distill"] | {"distill.loss": "no"}},
            "there is no 'no' in litgpt_whit",
        ),
        (
            {"cache_teacher": True, "distill": SECTIONS["distill"] | {"distill.loss": "reverse_kl"}},
            "reverse_kl is biased",
        ),
        ({"out_dir": "."}, "out_dir must be empty, new or a pipeline's"),
        ({"data": HFText(path="missing.jsonl")}, "rank: data.path 'missing.jsonl' cannot be found"),
        (changed("distill", **{"data.path": "missing.jsonl"}), "distill: data.path 'missing.jsonl' cannot be found"),
        (changed("distill", **{"data.text_column": "body"}), "data.text_column 'body' is not in"),
        (changed("distill", **{"train.max_tokens": 10}), "at least one step of 128 tokens, got train.max_tokens = 10 "),
        (
            changed("distill", **{"train.max_tokens": 1000, "train.global_batch_size": 512}),
            "at least one step of 16,384 tokens, got train.max_tokens = 1000 ",
        ),
        (changed("distill", **{"train.tie_embeddings": True}), "must be false, like the teacher's, got true"),
        (changed("distill", optimizer="Nope"), "distill: optimizer 'Nope' cannot be created"),
        (changed("search", iterations=0), "search: iterations must be at least 1, got 0"),
        (changed("search", **{"train.max_seq_length": 64}), "search: train.max_seq_length .* block_size 32, got 64"),
        (
            changed("search", selection={"config": "nofile.yaml"}),
            "selection.config has no effect without",
        ),
        (
            changed("search", selection={"config": "nofile.yaml", "rungs": ["2x256"]}),
            "search: cannot read selection.config 'nofile.yaml'",
        ),
        (
            changed("search", order="importance") | {"rank": False},
            "search: .* needs --search.importance, the importance",
        ),
        (changed("search", teacher_placement="sharded"), "teacher_placement sharded .* raise --devices"),
        (changed("rank", tokens=0), "rank: tokens must be at least 1, got 0"),
        ({"tasks": TaskArgs(limit=10)}, "tasks.limit has no effect without tasks to measure; add --tasks.names"),
        ({"extract": {"repair.tokens": 512, "repair": False}}, "extract.repair is false, and extract.repair.tokens is"),
        (changed("search", tasks={"limit": 10}), "search: tasks.limit has no effect with --search.fitness repaired_"),
        (changed("extract", **{"repair.tokens": 8}), "extract: .* at least 3 windows of calibration data, got 1"),
        (
            changed("distill", **{"distill.hidden.weight": 1}) | {"cache_teacher": True},
            "distill.hidden needs the running teacher, but the cache to come",
        ),
        ({"cache_teacher": {"max_tokens": 10}}, "must be at least the 768 tokens that each student is trained on"),
        (
            {"cache_teacher": {"temperature": 2.0}},
            "distill.temperature must be 2.0, the temperature of the cache to come",
        ),
        (changed("distill", random_weights=True), "distill.random_weights is set by the pipeline"),
        ({"cache_teacher": {"resume": True}}, "cache_teacher.resume is set by the pipeline"),
    ],
)
def test_bad_input_is_told_before_any_stage_runs(teacher, data, tmp_path, calls, changes, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "something").touch()
    settings = {"target": "14K", "out_dir": "out"} | changes
    with pytest.raises(UserError, match=message) as error:
        run(teacher, settings.pop("data", data), settings.pop("out_dir"), **settings)
    assert "\n" not in str(error.value)
    assert not calls and not (tmp_path / "out").exists()


def test_the_help_names_the_commands_whose_settings_the_sections_hold(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["litgpt-whittle", "whittle", "--help"])
    with pytest.raises(SystemExit):
        program.main()
    printed = " ".join(capsys.readouterr().out.split())
    for section in ("rank", "search", "extract", "cache_teacher", "distill"):
        assert f"litgpt {section} --help" in printed and f"--{section}." in printed


def test_text_needs_a_tokenizer(data, tmp_path, calls):
    save_checkpoint(tmp_path / "teacher", SubNet.full(TEACHER), GPT(TEACHER).state_dict())
    with pytest.raises(UserError, match="rank: HFText needs a tokenizer, and .*teacher' has none"):
        run(tmp_path / "teacher", data, tmp_path / "out", "14K")
    assert not calls


def test_a_dry_run_says_what_the_stages_will_take(teacher, data, tmp_path, calls, capsys):
    run(teacher, data, tmp_path / "out", "18K,14K", dry_run=True)
    printed = capsys.readouterr().out
    assert "Training 18K, as a" in printed and "Disk for the teacher's cache: " in printed
    assert "at the peak" in printed and "18K/distilled" in printed and "weights per device" in printed
    assert not calls and not (tmp_path / "out").exists()


def n_bytes(model):
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def test_costs_are_counted_passes(teacher, data, tmp_path):
    """Against PyTorch's own counter, on the sub-networks that represent the students."""
    bins = {"14K": Bin.parse("14K")}
    request = Request(teacher, bins, tmp_path, data, 1, 42, True)
    sections = {name: SECTIONS[name] for name in ("rank", "search", "extract", "distill")}
    sections |= changed("search", fitness="perplexity")
    stages = Stages(request, {"cache_teacher": True} | sections)
    whole, part = (counted_flops(subnet, 1, 32) for subnet in (SubNet.full(TEACHER), stages.search.examples["14K"]))
    found = {cost.name: cost for cost in costs(stages)}
    n = SECTIONS["distill"]["train"]["max_tokens"]
    assert found["rank"].training == pytest.approx(3 * 256 * whole)
    assert found["search"].forward == pytest.approx(4 * 4 * 32 * part)
    assert found["teacher_cache"].forward == pytest.approx(n * whole)
    assert found["14K/distilled"].training == found["14K/baseline"].training == pytest.approx(3 * n * part)
    assert found["14K/distilled"].forward == 0  # the teacher is cached
    meta = GPT(TEACHER)
    assert found["rank"].weights == found["search"].weights == found["teacher_cache"].weights == n_bytes(meta)
    student, block = student_model(stages.search.examples["14K"]), n_bytes(meta.transformer.h[0])
    outside = sum(n_bytes(part) for model in (meta, student) for part in (model.lm_head, model.transformer.wte))
    n_in = student.config.n_head * student.config.head_size + student.config.intermediate_size
    solve = 4 * 8 * n_in * (n_in + student.config.n_embd)  # for the projection with the most inputs
    assert found["14K/start"].weights >= outside + max(2 * block + solve, 5 * n_bytes(student.lm_head))
    plain = Stages(request, {"cache_teacher": True} | sections | {"extract": sections["extract"] | {"repair": False}})
    assert {cost.name: cost for cost in costs(plain)}["14K/start"].weights == block
    refining = sections | changed("extract", repair={"tokens": 4096, "refine_passes": 2})
    refined = {cost.name: cost for cost in costs(Stages(request, {"cache_teacher": True} | refining))}
    assert refined["14K/start"].training == pytest.approx(3 * 2 * 4096 * part) and found["14K/start"].training == 0
    trained = n_bytes(student) - n_bytes(student.transformer.wte)
    assert refined["14K/start"].weights >= outside + 5 * (trained - n_bytes(student.transformer.ln_f))
    assert found["14K/baseline"].weights == n_bytes(student)
    assert {cost.name: cost for cost in costs(Stages(request, {"cache_teacher": False} | sections))}[
        "14K/distilled"
    ].weights == (n_bytes(meta) + found["14K/baseline"].weights)
    rows = cost_table([found["14K/baseline"]], Speed(1.0, 3 * n * part / 9000))
    assert rows[1][-1] == rows[2][-1] == "2.5 h"
    sections["distill"] = sections["distill"] | {"activation_checkpointing": True}
    again = {cost.name: cost for cost in costs(Stages(request, {"cache_teacher": True} | sections))}
    assert again["14K/distilled"].training == pytest.approx(4 * n * part)  # one more forward pass
    # by default litgpt trains in mixed precision: the student's weights are in fp32, and its teacher's in bf16
    sections["distill"] = sections["distill"] | {"precision": None}
    mixed = {cost.name: cost for cost in costs(Stages(request, {"cache_teacher": False} | sections))}
    assert mixed["14K/distilled"].weights == n_bytes(meta) / 2 + n_bytes(student)


def test_measurements_of_a_strategy_are_counted(teacher, data, tmp_path):
    request = Request(teacher, {"30K": Bin.parse("30K"), "40K": Bin.parse("40K")}, tmp_path, data, 1, 42, False)

    def stages(**changes):
        return Stages(request, {"search": SECTIONS["search"] | changes, "distill": SECTIONS["distill"]})

    plain, measuring = (stages(fitness="perplexity", strategy=name) for name in ("RandomSearch", "IntegerProgram"))
    assert plain.search.n_measurements == 0
    n = measuring.search.n_measurements
    assert n == len(Alternatives(measuring.search.spaces["30K"], IntegerProgram().shares).all) + 1  # once for both bins
    forward = [next(c.forward for c in costs(each) if c.name == "search") for each in (plain, measuring)]
    assert forward[1] - forward[0] == pytest.approx(n * 4 * 32 * counted_flops(SubNet.full(TEACHER), 1, 32))


def test_a_repair_for_every_candidate_is_counted(teacher, data, tmp_path):
    request = Request(teacher, {"14K": Bin.parse("14K")}, tmp_path, data, 1, 42, False)

    def cost(**changes):
        found = costs(Stages(request, {"search": SECTIONS["search"] | changes, "distill": SECTIONS["distill"]}))
        return next(cost for cost in found if cost.name == "search")

    plain, repaired, twice = cost(fitness="perplexity"), cost(), cost(iterations=8)
    whole = counted_flops(SubNet.full(TEACHER), 1, 32)
    assert repaired.tokens - plain.tokens == RepairedPerplexity.n_calibration
    assert repaired.forward - plain.forward > RepairedPerplexity.n_calibration * whole
    solves = (twice.forward - repaired.forward) / 4 - plain.forward / 4
    n_in = 32 + 128  # inputs of an output projection, of attention and the parallel MLP
    assert 3 * (0.2 * n_in) ** 3 < solves < 3 * 200 * n_in**3
    model = load_model(teacher, "SuperGPT")
    repair = MomentRepair(model, torch.arange(300).view(-1, 30))
    moments = [m for layer in repair.layers for m in (layer.before_attn, *layer.moments.values())]
    held = sum(m.zz.numel() * 8 for m in moments) + sum(means.total.numel() * 4 for means in repair.before.values())
    assert repaired.weights - plain.weights == held + repair_costs.candidate_bytes(TEACHER, torch.device("cpu"))


def test_speed_is_measured_on_a_block(teacher, data, tmp_path, monkeypatch):
    """Whatever the teacher's size, and quickly."""
    request = Request(teacher, {"14K": Bin.parse("14K")}, tmp_path, data, 1, 42, False)
    stages, built = Stages(request, {"search": SECTIONS["search"], "distill": SECTIONS["distill"]}), []
    monkeypatch.setattr(estimates, "student_model", lambda subnet: built.append(subnet) or student_model(subnet))
    speed = estimates.measure_speed(stages, budget=0.1)
    assert speed.forward > 0 and speed.training > 0
    assert [len(subnet) for subnet in built] == [1, 1] and len(built[1].n_embd) == TEACHER.n_embd


def test_moments_that_cannot_fit_are_told_before_the_ranking(teacher, data, tmp_path, calls, monkeypatch):
    monkeypatch.setattr(repair_costs, "free_memory", lambda *_: 1000)
    with pytest.raises(UserError, match="search: a repair from moments keeps .*; choose --search.fitness perplexity"):
        run(teacher, data, tmp_path / "out", "14K")
    assert not calls


def test_the_search_selects_with_the_trainings_settings(teacher, data, tmp_path):
    request = Request(teacher, {"14K": Bin.parse("14K")}, tmp_path, data, 1, 42, False)
    searched = SECTIONS["search"] | {"selection": {"rungs": ["2x256"]}}
    distilled = SECTIONS["distill"] | {"train.max_norm": 0.5}
    stages = Stages(request, {"rank": False, "search": searched, "distill": distilled})
    ((path, text),) = stages.files().items()
    assert stages.search.args.selection.config == path
    assert yaml.safe_load(text)["train"]["max_norm"] == 0.5  # including command-line flags


def test_coarse_spaces_are_searched_by_importance(teacher, data, tmp_path):
    request = Request(teacher, {"14K": Bin.parse("14K")}, tmp_path, data, 1, 42, False)
    rest = {"distill": SECTIONS["distill"]}
    coarse = Stages(request, {"search": {"space": "coarse_uniform"}, **rest})
    assert [stage.command for stage in coarse.all()][:2] == ["rank", "search"]
    assert coarse.search.section.settings["order"] == "importance"
    fine = Stages(request, rest)
    assert fine.all()[0].command == "search" and "order" not in fine.search.section.settings
    given = {"space": "coarse_layerwise", "order": "importance", "importance": "mine.pt"}
    own = Stages(request, {"search": given, **rest})
    assert own.all()[0].command == "search" and own.search.section.settings["importance"] == "mine.pt"


def test_simple_starts_are_passed_on_and_take_the_ranking_where_there_is_one(teacher, data, tmp_path):
    request = Request(teacher, {"14K": Bin.parse("14K")}, tmp_path, data, 1, 42, False)

    def stages(rank, **searched) -> Stages:
        return Stages(request, {"rank": rank, "search": SECTIONS["search"] | searched, "distill": SECTIONS["distill"]})

    importance = str(tmp_path / "rank/importance.pt")
    plain, without = stages(True), stages(True, simple_starts=False)
    assert plain.search.args.simple_starts and plain.search.section.settings["importance"] == importance
    plain.check()
    assert not without.search.args.simple_starts and "importance" not in without.search.section.settings
    assert "importance" not in stages(None).search.section.settings


def test_stages_are_told_what_their_commands_take(teacher, data, tmp_path):
    """Settings of one stage that affect the others."""
    request = Request(teacher, {"14K": Bin.parse("14K"), "18K": Bin.parse("18K")}, tmp_path, data, 2, 42, True)

    def stages(distilled=(), extract=(), cache=None) -> Stages:
        told = {"train.max_tokens": None, "train.max_steps": 5} | dict(distilled)
        return Stages(
            request,
            {"search": SECTIONS["search"], "extract": dict(extract), "cache_teacher": cache}
            | {"distill": SECTIONS["distill"] | told},
        )

    plain = stages()
    assert plain.cache_teacher.is_used and plain.cache_teacher.args.max_tokens == 5 * 4 * 32  # as many as the steps use
    assert not stages({"distill.loss": "reverse_kl"}).cache_teacher.is_used  # it cannot learn from samples
    assert not stages({"teacher_checkpoint_dir": "another"}).cache_teacher.is_used
    assert (plain.extract.args.devices, stages(extract={"repair": False}).extract.args.devices) == (2, 1)
    for settings in ({"distill.alpha": 0, "distill.beta": 1}, {"distill.hidden.weight": 1.0}):
        baseline = stages(settings).all()[-1]
        section = Section("distill", distill.DistillConfig, baseline.settings)
        section.flags = baseline.flags
        learned = section.parse().distill
        assert not learned.uses_teacher and learned.alpha == 1


def test_settings_are_merged():
    below = {"a": 1, "b": {"c": 2, "d": 3}, "data": {"class_path": "A", "init_args": {"x": 1}}}
    above = {"b": {"c": 4}, "data": {"class_path": "B"}}
    assert merge(below, above) == {"a": 1, "b": {"c": 4, "d": 3}, "data": {"class_path": "B"}}


@pytest.mark.parametrize("target, folder", [("410M±5%", "410M"), ("385M-426M", "385M-426M"), (" 1B+-2%", "1B")])
def test_students_folders_have_the_targets_names(target, folder):
    assert folder_of(target) == folder


def test_tokens_to_reach_a_loss():
    curve = [(0, 5.0), (10, 4.0), (20, 4.5)]
    assert tokens_to_reach(curve, 4.2) == 10 and tokens_to_reach(curve, 3.0) is None
