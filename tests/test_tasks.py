"""Test tasks against lm-eval's own model and evaluation, and against one forward pass per answer in float64."""

import random
import re
import shlex
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from checkpoints import write_random_model
from hypothesis import given
from hypothesis import strategies as st
from litgpt import GPT
from task_files import metrics, questions, write_task, write_tasks
from test_ecosystem import HF, TEACHER
from texts import documents, write_jsonl, write_tokenizer

from litgpt_whittle import __main__ as program
from litgpt_whittle.checkpoint import load_model
from litgpt_whittle.commands import search_run
from litgpt_whittle.commands.search import setup as search
from litgpt_whittle.data import HFText
from litgpt_whittle.errors import UserError
from litgpt_whittle.fitness.repaired import Repaired
from litgpt_whittle.fitness.tasks import RepairedTasks, Tasks
from litgpt_whittle.hf.export import export_hf
from litgpt_whittle.journal import read_journal
from litgpt_whittle.ranking.quick import quick_order
from litgpt_whittle.searching.args import SelectionArgs
from litgpt_whittle.searching.loop import within_memory
from litgpt_whittle.searching.selection import Selection, read_results
from litgpt_whittle.searching.starting import text_to_measure
from litgpt_whittle.strategies import NSGA2, RandomSearch
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import SuperGPT, extract_weights, student_model
from litgpt_whittle.tasks import SearchTaskArgs, TaskArgs
from litgpt_whittle.tasks.batches import Continuation, task_batches
from litgpt_whittle.tasks.harness import read_tasks
from litgpt_whittle.tasks.scoring import log_likelihoods

lm_eval_tasks = pytest.importorskip("lm_eval.tasks", reason="needs the extra 'ecosystem'")

CUT = dict(n_embd="0-9,14-27", n_layer="0,2-3", intermediate_size=30)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = write_tokenizer(tmp_path_factory.mktemp("tasks") / "teacher")
    write_random_model(folder, TEACHER)
    HF.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("yaml"))


@pytest.fixture(scope="module", autouse=True)
def only_local_tasks():
    """Index none of lm-eval's own tasks, which would take longer than all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval_tasks, "TaskManager", partial(lm_eval_tasks.TaskManager, include_defaults=False))
        yield


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch):
    monkeypatch.setattr(search_run, "write_report", lambda out_dir: "the report")


def found_by(model, tasks):
    return log_likelihoods(model, tasks.batches, tasks.n_continuations)


def assert_same(found, expected):
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
    np.testing.assert_allclose([value for value, _ in found], [value for value, _ in expected], rtol=1e-4)


def test_log_likelihoods_accuracies_and_errors_are_those_of_lm_eval(teacher, folder, tmp_path):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    tasks, model = read_tasks(TaskArgs([str(folder)]), teacher, 64), load_model(teacher)
    export_hf(teacher, tmp_path / "hf")
    theirs = HFLM(pretrained=str(tmp_path / "hf"), device="cpu", dtype="float32", batch_size=4)
    manager = lm_eval_tasks.TaskManager(include_path=str(folder))
    expected = simple_evaluate(theirs, tasks=["endings", "letters", "words"], task_manager=manager)
    ours = {result.name: result for result in tasks.measure(model)}
    for name, metric in {"endings": "acc_norm", "letters": "acc", "words": "acc"}.items():
        assert ours[name].n_documents == 12
        assert ours[name].accuracy == expected["results"][name][f"{metric},none"]
        assert ours[name].stderr == pytest.approx(expected["results"][name][f"{metric}_stderr,none"])
    assert 0 < ours["endings"].accuracy < 1
    samples = {name: sorted(own, key=lambda each: each["doc_id"]) for name, own in expected["samples"].items()}
    answers = [answer for task in tasks.tasks for each in samples[task.name] for answer in each["filtered_resps"]]
    assert_same(found_by(model, tasks), answers)


@torch.no_grad()
def one_by_one(model, continuations):
    """Return log-likelihoods from the full logits of one forward pass per answer."""
    found = []
    for context, tokens in continuations:
        ids = torch.tensor([[*context, *tokens]])
        logits = model(ids[:, :-1])[0, -len(tokens) :]
        value = logits.log_softmax(-1)[range(len(tokens)), list(tokens)].sum().item()
        found.append((value, logits.argmax(-1).tolist() == list(tokens)))
    return found


def random_continuations(model: GPT, n: int, seed: int = 0) -> list[Continuation]:
    """Return continuations of random tokens; every third is the model's most likely one, others share contexts."""
    rng, found = random.Random(seed), []
    context = [1]
    for i in range(n):
        if i % 4 != 1:
            context = [rng.randrange(300) for _ in range(rng.randint(1, 12))]
        tokens = [rng.randrange(300) for _ in range(rng.randint(1, 5))]
        if i % 3 == 0:
            for k in range(len(tokens)):
                tokens[k] = model(torch.tensor([[*context, *tokens[:k]]]))[0, -1].argmax().item()
        found.append(Continuation(context, tokens))
    return found


@pytest.mark.parametrize("max_tokens", [16, 4096])
def test_a_super_network_answers_as_the_extracted_litgpt_model(teacher, max_tokens):
    model, subnet = load_model(teacher, "SuperGPT"), SubNet(TEACHER, **CUT)
    student = student_model(subnet)
    student.load_state_dict(extract_weights(model, subnet))
    given = random_continuations(student.eval(), 24)
    batches = task_batches(given, 64, max_tokens)
    expected = one_by_one(student.double(), given)
    assert {is_greedy for _, is_greedy in expected} == {True, False}
    with model.running(subnet, materialize=True):
        assert_same(log_likelihoods(model, batches, len(given)), expected)


tokens = st.lists(st.integers(0, 3), min_size=1, max_size=6)


@given(
    st.lists(st.builds(Continuation, tokens, tokens), min_size=1, max_size=12), st.integers(6, 9), st.integers(1, 40)
)
def test_batches_hold_every_token_once_after_its_truncated_context(given, max_length, max_tokens):
    seen = {i: [] for i in range(len(given))}
    inputs = []
    for batch in task_batches(given, max_length, max_tokens):
        assert batch.input_ids.numel() <= max_tokens or len(batch.input_ids) == 1
        scored = list(zip(*(part.tolist() for part in batch[1:])))
        assert len(scored) == batch.n_tokens
        for row, position, target, i in scored:
            seen[i].append((batch.input_ids[row, : position + 1].tolist(), target))
        ends = {row: max(position for r, position, *_ in scored if r == row) for row in range(len(batch.input_ids))}
        inputs += [tuple(batch.input_ids[row, : end + 1].tolist()) for row, end in ends.items()]
    for i, (context, answer) in enumerate(given):
        whole = [*context, *answer][-(max_length + 1) :]
        n_context = len(whole) - len(answer)
        assert seen[i] == [(whole[: n_context + k], token) for k, token in enumerate(answer)]
    assert sorted(inputs) == sorted({tuple([*a, *b][-(max_length + 1) : -1]) for a, b in given})
    batches = task_batches(given, max_length, max_tokens)
    rows = [tuple(row) for batch in batches for ids in batch.unpadded() for row in ids.tolist()]
    assert sorted(rows) == sorted(inputs)
    for batch in batches:
        halves = batch.halves()
        sizes = [len(half.input_ids) for half in halves]
        assert len(sizes) == min(len(batch.input_ids), 2) and max(sizes) - min(sizes) <= 1
        assert torch.equal(torch.cat([half.input_ids for half in halves]), batch.input_ids)
        assert sorted(facts(batch)) == sorted(each for half in halves for each in facts(half))


def facts(batch):
    """Return the input before each scored token, the token, and its continuation."""
    return [
        (batch.input_ids[row, : position + 1].tolist(), target, i)
        for row, position, target, i in zip(*(part.tolist() for part in batch[1:]))
    ]


@given(st.lists(st.floats(-50, -0.1), min_size=36, max_size=36))
def test_a_margin_is_positive_where_lm_eval_finds_the_answer_right(endings, values):
    for document in endings.tasks[0].documents:
        own = values[document.continuations.start : document.continuations.stop]
        if len(set(own)) == len(own):
            answers = [(value, False) for value in own]
            assert (document.margin(answers) > 0) == bool(document.accuracy(answers))


@pytest.fixture(scope="module", params=["endings", "letters"])
def endings(request, teacher, folder):
    return read_tasks(TaskArgs([str(folder / f"{request.param}.yaml")]), teacher, 64)


def test_a_margin_is_in_nats_per_character(teacher, folder):
    tasks = read_tasks(TaskArgs([str(folder / "endings.yaml")]), teacher, 64)
    words = read_tasks(TaskArgs([str(folder / "words.yaml")]), teacher, 64)
    question, document = questions(12)[0], tasks.tasks[0].documents[0]
    scores = [-3.0 / len(choice) for choice in question["choices"]]
    right = scores.pop(question["answer"])
    assert document.margin([(-3.0, False)] * 3) == pytest.approx(right - max(scores))
    last = questions(12, 2)[0]
    expected = -2.0 / len(last["choices"][last["answer"]])
    assert words.tasks[0].documents[0].margin([(-2.0, True)]) == pytest.approx(expected)


def test_a_limit_selects_fixed_documents_and_skip_the_following_ones(teacher, folder):
    def of(**settings):
        (task,) = read_tasks(TaskArgs([str(folder / "endings.yaml")], **settings), teacher, 64).tasks
        return {each.doc["text"] for each in task.documents}

    everything = {row["text"] for row in questions(12)}
    assert of() == everything
    assert len(of(limit=5)) == 5 and of(limit=5) == of(limit=5) < of(limit=7)
    assert of(limit=5) | of(skip=5) == everything and not of(limit=5) & of(skip=5)


def test_a_group_is_one_task_and_a_folder_one_task_per_file(teacher, folder, tmp_path):
    group = {"group": "all", "task": ["endings", "letters"]}
    for name in ("endings", "letters"):
        (tmp_path / f"{name}.yaml").write_text((folder / f"{name}.yaml").read_text())
    (tmp_path / "group.yml").write_text(yaml.safe_dump(group))
    names = [task.name for task in read_tasks(TaskArgs([str(tmp_path)]), teacher, 64).tasks]
    assert names == ["endings", "letters"]
    whole, model = read_tasks(TaskArgs([str(folder)]), teacher, 64), load_model(teacher)
    expected = np.mean([result.accuracy for result in whole.measure(model)[:2]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval_tasks, "TaskManager", partial(lm_eval_tasks.TaskManager, include_path=str(tmp_path)))
        (tmp_path / "group.yml").rename(tmp_path / "group.yaml")
        (found,) = read_tasks(TaskArgs(["all"]), teacher, 64).measure(model)
    assert (found.name, found.n_documents) == ("all", 24) and found.accuracy == pytest.approx(expected)


def test_answers_and_tokens_make_the_fingerprint(teacher, tmp_path):
    def of(rows):
        path = write_task(tmp_path, "one", rows, doc_to_choice="choices", doc_to_target="answer")
        return read_tasks(TaskArgs([str(path)]), teacher, 64).fingerprint

    rows = questions(4)
    others = [rows[0] | {"answer": (rows[0]["answer"] + 1) % 3}, *rows[1:]]
    assert of(rows) == of(rows) != of(others) and of(rows) != of(rows[::-1])


def test_the_fitness_averages_tasks_and_sees_candidates_as_extracted(teacher, folder):
    model, subnet = load_model(teacher, "SuperGPT"), SubNet(TEACHER, **CUT)
    student = student_model(subnet)
    student.load_state_dict(extract_weights(model, subnet))
    for score in ("margin", "accuracy"):
        tasks = read_tasks(TaskArgs([str(folder)]), teacher, 64, score)
        results = tasks.measure(student.eval())
        found = Tasks(model, tasks=tasks)(subnet)
        mean = {name: np.mean([getattr(result, name) for result in results]) for name in ("accuracy", "margin")}
        assert {name: found[name] for name in mean} == pytest.approx(mean, rel=1e-4)
        assert [found[f"accuracy.{result.name}"] for result in results] == [result.accuracy for result in results]
        assert found["task_loss"] == (-found["margin"] if score == "margin" else 1 - found["accuracy"])


def test_layers_before_the_first_cut_are_computed_once_with_the_same_scores(teacher, folder):
    model = load_model(teacher, "SuperGPT")
    tasks = read_tasks(SearchTaskArgs([str(folder)]), teacher, 64)
    late = SubNet(TEACHER, intermediate_size=[48, 48, 48, 20])
    assert late.n_intact == 3
    score = Tasks(model, tasks=tasks)
    with model.running(late):
        expected = np.mean([result.margin for result in tasks.measure(model)])
    assert score(late)["margin"] == pytest.approx(expected, rel=1e-4) and score.prefix.layer == 3
    with score.halved():
        assert score(late)["margin"] == pytest.approx(expected, rel=1e-4)
    whole = score(SubNet.full(TEACHER))
    assert whole["margin"] == pytest.approx(np.mean([each.margin for each in tasks.measure(model)]), rel=1e-4)


def test_a_candidate_that_runs_out_of_memory_is_scored_again_with_half_as_many_inputs_per_pass(
    teacher, folder, monkeypatch
):
    model, subnet = load_model(teacher, "SuperGPT"), SubNet(TEACHER, **CUT)
    score = Tasks(model, tasks=read_tasks(SearchTaskArgs([str(folder)]), teacher, 64))
    expected, forward = score(subnet), SuperGPT.forward
    sizes = [len(batch.input_ids) for batch in score.batches]

    def within(self, idx, *args, **kwargs):
        if len(idx) > -(-max(sizes) // 2):
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, idx, *args, **kwargs)

    monkeypatch.setattr(SuperGPT, "forward", within)
    assert within_memory(score, lambda: score(subnet)) == pytest.approx(expected, rel=1e-4)


def test_simple_starts_are_measured_on_the_tasks_inputs_without_padding(teacher, folder):
    model, tasks = load_model(teacher, "SuperGPT"), read_tasks(SearchTaskArgs([str(folder)]), teacher, 64)
    batches = tasks.batches
    text = text_to_measure(None, 64, batches)
    found = quick_order(model, text, n_tokens=10**9)
    ends = [[int(batch.positions[batch.rows == i].max()) + 1 for i in range(len(batch.input_ids))] for batch in batches]
    rows = [row[None, :end] for batch, own in zip(batches, ends) for row, end in zip(batch.input_ids, own)]
    alone = quick_order(model, rows, n_tokens=10**9)
    assert found.n_embd.tolist() == alone.n_embd.tolist() and found.n_layer.tolist() == alone.n_layer.tolist()
    padded = quick_order(model, [batch.input_ids for batch in batches], n_tokens=10**9)
    assert padded.n_embd.tolist() != alone.n_embd.tolist()


def test_bf16_is_used_where_asked_for(teacher, folder):
    model, subnet = load_model(teacher, "SuperGPT"), SubNet(TEACHER, **CUT)
    tasks = read_tasks(SearchTaskArgs([str(folder)]), teacher, 64)
    exact = Tasks(model, tasks=tasks)(subnet)["margin"]
    mixed = Tasks(model, tasks=tasks, autocast=lambda: torch.autocast("cpu", torch.bfloat16))(subnet)["margin"]
    assert mixed != exact and mixed == pytest.approx(exact, rel=0.05)


def test_a_repair_does_not_change_the_whole_teacher_and_helps_a_cut(teacher, folder):
    model, calibration = load_model(teacher, "SuperGPT"), torch.randint(0, 300, (64, 32))
    tasks = read_tasks(SearchTaskArgs([str(folder)]), teacher, 64)
    plain, repaired = Tasks(model, tasks=tasks), RepairedTasks(model, tasks=tasks, calibration=calibration)
    whole = SubNet.full(TEACHER)
    assert repaired(whole) == pytest.approx(plain(whole), rel=1e-3)
    subnet = SubNet(TEACHER, intermediate_size=24)
    expected = tasks.measure(repaired.repair.student(subnet))
    assert repaired(subnet)["margin"] == pytest.approx(np.mean([each.margin for each in expected]), rel=1e-4)


GENERATE = dict(output_type="generate_until", doc_to_target="text")
ROLLING = dict(output_type="loglikelihood_rolling", doc_to_target="text")


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            GENERATE | {"metric_list": metrics("exact_match")},
            "'odd' is a generate_until task, and only",
        ),
        (
            {
                "output_type": "loglikelihood_rolling",
                "doc_to_target": "text",
                "metric_list": metrics("word_perplexity"),
            },
            "'odd' is a loglikelihood_rolling task",
        ),
        ({"metric_list": metrics("f1")}, r"'odd' must have the metric acc or acc_norm, got \['f1'\]"),
        ({"metric_list": metrics("acc", "acc_mutual_info")}, "'odd' asks for mutual information"),
        ({"doc_to_choice": ["A", " ".join(["fox"] * 90)]}, "the answers of the task 'odd' must have 1 to 64 tokens"),
        ({"dataset_kwargs": {"data_files": {"test": "none.jsonl"}}}, "lm-eval cannot load .*odd.yaml.*none.jsonl"),
    ],
)
def test_tasks_that_cannot_be_measured_are_refused(teacher, tmp_path, settings, message):
    given = {"doc_to_choice": "choices", "doc_to_target": "answer"} | settings
    rows = [row | {"answer": row["answer"] % 2} for row in questions(3)]
    path = write_task(tmp_path, "odd", rows, **given)
    with pytest.raises(UserError, match=message) as error:
        read_tasks(TaskArgs([str(path)]), teacher, 64)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "args, message",
    [
        ({"names": ["none.yaml"]}, "there is no file 'none.yaml'"),
        ({"names": ["hellaswagg"]}, "lm-eval cannot load 'hellaswagg': .*not a registered task"),
        ({"names": ["empty"]}, "the folder 'empty' has no task of lm-eval"),
        ({"names": []}, "tasks.names must name at least one task"),
        ({"names": ["FOLDER"], "skip": 12}, "tasks.skip must be less than the 12 documents of 'endings', got 12"),
        ({"names": ["FOLDER", "FOLDER/words.yaml"]}, "gives the task 'words' twice"),
    ],
)
def test_settings_that_select_nothing_are_refused(teacher, folder, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    args = args | {"names": [name.replace("FOLDER", str(folder)) for name in args["names"]]}
    with pytest.raises(UserError, match=message) as error:
        read_tasks(TaskArgs(**args), teacher, 64)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "args, message",
    [
        ({"limit": 0}, "tasks.limit must be at least 1, got 0"),
        ({"skip": -1}, "tasks.skip must be 0 or more, got -1"),
        ({"names": ["a", "a"]}, "tasks.names must differ"),
        ({"score": "f1"}, "tasks.score must be margin or accuracy, got 'f1'"),
    ],
)
def test_invalid_settings_are_refused(args, message):
    with pytest.raises(UserError, match=message):
        SearchTaskArgs(**args)


def test_a_tokenizer_is_needed(folder, tmp_path):
    write_random_model(tmp_path / "without", TEACHER)
    with pytest.raises(UserError, match="needs the tokenizer in .*without', which litgpt cannot read"):
        read_tasks(TaskArgs([str(folder)]), tmp_path / "without", 64)
    write_tokenizer(tmp_path / "endless", eos=False)
    with pytest.raises(UserError, match="needs a tokenizer with a BOS or EOS token"):
        read_tasks(TaskArgs([str(folder)]), tmp_path / "endless", 64)


def run(teacher, out_dir, folder, **changes):
    settings = dict(
        bin="10K-20K", fitness="tasks", tasks=SearchTaskArgs([str(folder)], limit=6), iterations=6, seed=1,
        out_dir=out_dir, strategy=RandomSearch(), precision="32-true",
    )  # fmt: skip
    search(teacher, **(settings | changes))


def test_a_search_scores_candidates_by_tasks_without_data_and_resumes(teacher, folder, tmp_path):
    run(teacher, tmp_path / "out", folder)
    header, evaluations = read_journal(tmp_path / "out/journal.jsonl")
    assert header["settings"]["tasks"]["limit"] == 6 and header["settings"]["score"] == "task_loss"
    tasks = read_tasks(SearchTaskArgs([str(folder)], limit=6), teacher, 64)
    assert header["data"]["tasks"] == tasks.fingerprint and evaluations[0].tokens == header["data"]["tokens"]
    model = load_model(teacher, "SuperGPT")
    for evaluation in evaluations[-2:]:
        subnet = SubNet.from_dict(TEACHER, evaluation.subnet)
        assert evaluation.scores == pytest.approx(Tasks(model, tasks=tasks)(subnet))
    best = min(evaluations, key=lambda each: each.scores["task_loss"])
    saved = yaml.safe_load((tmp_path / "out/best.yaml").read_text())
    assert (
        saved["provenance"]["evaluation"] == best.index and saved["provenance"]["accuracy"] == best.scores["accuracy"]
    )
    run(teacher, tmp_path / "out", folder, iterations=8, resume=True)
    run(teacher, tmp_path / "whole", folder, iterations=8)
    one, other = (read_journal(tmp_path / name / "journal.jsonl")[1] for name in ("out", "whole"))
    assert [each.scores for each in one] == [each.scores for each in other]
    with pytest.raises(UserError, match="tasks.score was margin and is accuracy"):
        changed = SearchTaskArgs([str(folder)], limit=6, score="accuracy")
        run(teacher, tmp_path / "out", folder, iterations=8, resume=True, tasks=changed)


def test_tasks_trade_against_a_cost_and_score_repaired_candidates(teacher, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Repaired, "n_calibration", 2048)
    texts = [write_jsonl(tmp_path / f"{i}.jsonl", documents(n, seed=i)) for i, n in enumerate((200, 20))]
    data = HFText(path=str(texts[0]), val_path=str(texts[1]))
    strategy = NSGA2(objectives=("score", "flops"), population_size=4)
    run(teacher, tmp_path / "out", folder, bin="8K-30K", fitness="repaired_tasks", data=data, strategy=strategy)
    header, evaluations = read_journal(tmp_path / "out/journal.jsonl")
    assert header["settings"]["objectives"] == ["task_loss", "flops"] and header["data"]["calibration"]
    assert all({"task_loss", "accuracy", "flops"} <= each.scores.keys() for each in evaluations)
    assert list((tmp_path / "out/front").iterdir())


def test_a_selection_ranks_trained_students_by_the_tasks(teacher, folder, tmp_path, monkeypatch):
    def train(self, evaluation, rung):
        write_random_model(self._trained(evaluation, rung) / "final", TEACHER, seed=evaluation.index)
        return float(evaluation.index)

    monkeypatch.setattr(Selection, "_train", train)
    (tmp_path / "distill.yaml").write_text(yaml.safe_dump({"data": "any", "compile": False}))
    rungs = SelectionArgs(rungs=["4x1k", "2x2k"], config=tmp_path / "distill.yaml")
    run(teacher, tmp_path / "out", folder, selection=rungs)
    tasks, results = read_tasks(SearchTaskArgs([str(folder)], limit=6), teacher, 64), read_results(tmp_path / "out")
    for result in results:
        trained = tmp_path / f"out/selection/candidate-{result.evaluation}/trained-{result.tokens}/final"
        margins = [each.margin for each in tasks.measure(load_model(trained))]
        assert result.loss == result.task_loss == pytest.approx(-np.mean(margins))
    first, last = ([each for each in results if each.rung == rung] for rung in (0, 1))
    assert [each.evaluation for each in last] == [
        each.evaluation for each in sorted(first, key=lambda each: each.task_loss)[:2]
    ]
    best = yaml.safe_load((tmp_path / "out/best.yaml").read_text())["provenance"]
    assert best["evaluation"] == min(last, key=lambda each: each.task_loss).evaluation


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tasks": SearchTaskArgs()}, "tasks.names must name at least one task"),
        (
            {"fitness": "perplexity", "data": HFText(path="a.jsonl")},
            "tasks.names has no effect with --fitness perplexity, which reads no tasks",
        ),
        (
            {"fitness": "perplexity", "data": HFText(path="a.jsonl"), "tasks": SearchTaskArgs(limit=3)},
            "tasks.limit has no effect with --fitness perplexity",
        ),
        ({"fitness": "repaired_tasks"}, "data must be chosen"),
        ({"racing": True}, "racing needs losses per window, which fitness 'tasks' does not give"),
    ],
)
def test_a_search_refuses_what_does_not_fit(teacher, folder, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        run(teacher, tmp_path / "out", folder, **changes)
    assert not (tmp_path / "out").exists()


def test_the_tutorials_task_runs_as_shown(teacher, tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "tutorials/tasks.md").read_text()
    for name, kind in {"capitals.yaml": "yaml", "capitals.jsonl": "json"}.items():
        (text,) = re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL)
        (tmp_path / name).write_text(text)
    (line,) = (line for line in page.replace("\\\n", " ").splitlines() if "out/capitals" in line)
    words = {"out/demo/pretrained/final": str(teacher), "450K-550K": "10K-20K", "24": "3", "litgpt": "litgpt-whittle"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [words.get(word, word) for word in shlex.split(line)])
    program.main()
    header, evaluations = read_journal(tmp_path / "out/capitals/journal.jsonl")
    assert header["settings"]["tasks"]["limit"] is None and len(evaluations) == 3
    assert all(each.scores["task_loss"] == 1 - each.scores["accuracy"] in (0, 0.5, 1) for each in evaluations)


def test_lm_eval_is_optional(teacher, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"measuring tasks needs lm_eval .* pip install 'litgpt-whittle\[ecosystem\]'"):
        run(teacher, tmp_path / "out", folder)
