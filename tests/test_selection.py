"""Test selection among a search's best candidates by short distillations."""

import gc
import json
import weakref

import pytest
import torch
import yaml
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.utils import CLI, save_config
from scipy.stats import kendalltau
from texts import documents, write_jsonl, write_tokenizer

from litgpt_whittle.batches import (
    BatchArgs,
    BudgetArgs,
)
from litgpt_whittle.commands import distill, extract, search_run
from litgpt_whittle.commands.search import setup
from litgpt_whittle.data import HFText
from litgpt_whittle.errors import UserError
from litgpt_whittle.journal import (
    Evaluation,
    read_journal,
)
from litgpt_whittle.searching.args import SelectionArgs
from litgpt_whittle.searching.selection import Rung, RungResult, Selection, parse_rungs, read_results, rung_table
from litgpt_whittle.strategies import IntegerProgram, RandomSearch
from litgpt_whittle.subnet import SubNet

TEACHER = Config.from_name(
    "pythia-14m", n_layer=2, n_embd=16, n_head=4, intermediate_size=32, block_size=32, vocab_size=300,
    padded_vocab_size=300,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make a teacher, its data, and the settings of the distillation."""
    folder = tmp_path_factory.mktemp("selection")
    write_tokenizer(folder / "teacher")
    torch.manual_seed(0)
    torch.save(GPT(TEACHER).state_dict(), folder / "teacher/lit_model.pth")
    save_config(TEACHER, folder / "teacher")
    write_jsonl(folder / "train.jsonl", documents(300))
    write_jsonl(folder / "validation.jsonl", documents(20, seed=1))
    paths = {"path": str(folder / "train.jsonl"), "val_path": str(folder / "validation.jsonl")}
    train = {"global_batch_size": 8, "micro_batch_size": 8, "max_tokens": 10**9, "save_interval": 100}
    settings = {
        "data": {"class_path": "HFText", "init_args": paths},
        "train": train | {"log_interval": 1},
        "eval": {"interval": 1000, "max_iters": 2},
        "precision": "32-true",
        "compile": False,
        "logger_name": "csv",
        "out_dir": "elsewhere",
    }
    (folder / "distill.yaml").write_text(yaml.safe_dump(settings))
    return folder


def run(folder, out_dir, rungs, resume=False, config=None, **changes):
    data = HFText(path=str(folder / "train.jsonl"), val_path=str(folder / "validation.jsonl"))
    settings = dict(
        bin="8K-12K",
        strategy=RandomSearch(),
        iterations=5,
        data=data,
        train=BatchArgs(micro_batch_size=4, max_seq_length=32),
        eval=BudgetArgs(max_iters=1),
        out_dir=out_dir,
        precision="32-true",
        selection=SelectionArgs(rungs=rungs, config=config or folder / "distill.yaml", repair=False),
        resume=resume,
    )
    setup(folder / "teacher", **settings | changes)


def test_the_winner_is_the_best_of_the_last_rung(folder, tmp_path, monkeypatch, capsys):
    calls = []

    def call(self, command, *arguments, log):  # in this process, which is faster than starting one
        calls.append(command)
        log.write_text("")
        CLI({"extract": extract, "distill": distill}[command].setup, args=[str(argument) for argument in arguments])

    monkeypatch.setattr(Selection, "_call", call)
    monkeypatch.setattr(search_run, "write_report", lambda out_dir: "the report")
    run(folder, tmp_path / "out", ["3x1024", "2x2048"])
    results = read_results(tmp_path / "out")
    evaluations = read_journal(tmp_path / "out/journal.jsonl")[1]
    by_score = sorted(evaluations, key=lambda e: e.scores["repaired_perplexity"])
    first, last = ({r.evaluation: r for r in results if r.rung == rung} for rung in (0, 1))
    assert list(first) == [e.index for e in by_score[:3]]
    assert set(last) == set(sorted(first, key=lambda i: first[i].val_loss)[:2])
    assert {r.tokens for r in first.values()} == {1024} and {r.tokens for r in last.values()} == {2048}
    winner = min(last.values(), key=lambda r: r.val_loss)
    best = SubNet.load(tmp_path / "out/best.yaml", TEACHER)
    assert best == SubNet.from_dict(TEACHER, evaluations[winner.evaluation].subnet)
    by_score_yaml = SubNet.load(tmp_path / "out/best-by-score.yaml", TEACHER)
    assert by_score_yaml == SubNet.from_dict(TEACHER, by_score[0].subnet)
    # each student was cut once, trained once per rung on the rung's tokens, and validated at its end
    assert calls.count("extract") == 3 and calls.count("distill") == 5
    for result in results:
        metrics = tmp_path / f"out/selection/candidate-{result.evaluation}/trained-{result.tokens}/metrics.jsonl"
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        assert rows[-1]["val_loss"] == result.val_loss and rows[-1]["tokens"] == result.tokens
    assert "Kendall's τ" in capsys.readouterr().out
    # resuming finds all results
    calls.clear()
    run(folder, tmp_path / "out", ["3x1024", "2x2048"], resume=True)
    assert calls == [] and read_results(tmp_path / "out") == results
    # except those with other settings
    settings = yaml.safe_load((folder / "distill.yaml").read_text())
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(settings | {"seed": 7, "eval": {"final_validation": False}}))
    run(folder, tmp_path / "out", ["3x1024", "2x2048"], resume=True, config=tmp_path / "other.yaml")
    assert calls.count("extract") == 0 and calls.count("distill") == 5
    changed = read_results(tmp_path / "out")
    assert all(one.val_loss != other.val_loss for one, other in zip(changed, results))
    calls.clear()
    winner_folder = tmp_path / f"out/selection/candidate-{winner.evaluation}"
    (winner_folder / "sub_network.yaml").write_text("another search's")
    run(folder, tmp_path / "out", ["3x1024", "2x2048"], resume=True, config=tmp_path / "other.yaml")
    assert calls.count("extract") == 1 and read_results(tmp_path / "out") == changed


def live_bytes():
    """Return the bytes of all weights and activations in memory, including reference cycles; tokens are integers."""
    kinds = (torch.Tensor, torch.nn.Parameter)  # ignore the fake tensors left by other tests' memory plans
    found = [each for each in gc.get_objects() if type(each) in kinds and each.is_floating_point()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in found}
    return sum(storages.values())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"fitness": "kl", "racing": True},
        {"fitness": "weight_magnitude"},
        {"fitness": "perplexity", "strategy": IntegerProgram(shares=[0.5])},
    ],
)
def test_the_teacher_and_all_of_the_search_are_gone_before_the_students_are_trained(
    folder, tmp_path, monkeypatch, changes
):
    """They would occupy the device during training, as would memory that PyTorch's allocator caches."""
    searched, events, load = [], [], search_run.load_fitness

    def watched(*args):
        fitness = load(*args)
        searched.extend([weakref.ref(fitness), weakref.ref(fitness.model)])
        searched.extend(weakref.ref(weight) for weight in fitness.model.parameters())
        events.append("loaded")
        return fitness

    def train(self, evaluations, score):
        events.append("trained")
        assert searched and not [ref for ref in searched if ref() is not None]
        assert live_bytes() <= before
        return {}

    monkeypatch.setattr(search_run, "load_fitness", watched)
    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: events.append("emptied"), raising=False)
    monkeypatch.setattr(Selection, "run", train)
    monkeypatch.setattr(search_run, "write_report", lambda out_dir: "the report")
    gc.collect()
    before = live_bytes()
    run(folder, tmp_path / "out", ["2x1024"], iterations=2, **changes)
    assert events == ["loaded", "emptied", "trained"]


def test_the_table_has_ranks_and_tau_against_scipy():
    scores, rung = [3.0, 1.0, 2.0, 4.0], {1: 5.0, 2: 4.0, 0: 4.5}
    evaluations = [
        Evaluation(
            index=i,
            bin="b",
            subnet={},
            n_params=1,
            scores={"perplexity": score},
            seed=1,
            batches=1,
            tokens=1,
            seconds=0.1,
        )
        for i, score in enumerate(scores)
    ]
    results = [RungResult(0, "b", i, 100, loss) for i, loss in rung.items()] + [RungResult(1, "b", 2, 200, 3.0)]
    rows = rung_table(results, evaluations, "perplexity")
    assert rows[0] == ["bin", "candidate", "by perplexity", "after 100 tokens", "after 200 tokens"]
    assert rows[1] == ["b", "2", "2 (2)", "1 (4)", "1 (3)"]
    tau = kendalltau([scores[i] for i in rung], list(rung.values())).statistic
    assert rows[-1] == ["b", "Kendall's τ", "", f"{tau:.2f}", ""]


def test_rungs_are_read():
    assert Rung.parse("8x200k") == Rung(8, 200_000) and Rung.parse("2 x 1.5M") == Rung(2, 1_500_000)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"rungs": ["8"]}, "a rung must have the form students x tokens"),
        ({"rungs": ["0x1k"]}, "a rung must have the form students x tokens"),
        ({"rungs": ["8x1k", "8x2k"]}, "fewer students and more tokens than the one before, got 8x1000 and then 8x2000"),
        ({"rungs": ["8x1k", "2x1k"]}, "fewer students and more tokens"),
        ({"rungs": ["8x1k"], "config": None}, "need selection.config"),
        ({"rungs": []}, "has no effect without selection.rungs"),
        ({"rungs": [], "config": None, "repair": False}, "selection.repair has no effect without selection.rungs"),
        ({"rungs": ["8x1k"], "config": "nowhere.yaml"}, "cannot read selection.config 'nowhere.yaml'"),
    ],
)
def test_mistakes_are_told(folder, args, message):
    with pytest.raises(UserError, match=message):
        parse_rungs(SelectionArgs(**({"config": folder / "distill.yaml"} | args)))


@pytest.mark.slow
def test_a_student_that_cannot_be_trained_is_told_with_its_log(folder, tmp_path):
    content = yaml.safe_load((folder / "distill.yaml").read_text())
    content["train"]["micro_batch_size"] = 3  # does not divide the global batch
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "out").mkdir()
    evaluation = Evaluation(
        index=0,
        bin="b",
        subnet=SubNet(TEACHER, n_embd=8).to_dict(),
        n_params=1,
        scores={"perplexity": 1.0},
        seed=1,
        batches=1,
        tokens=1,
        seconds=0.1,
    )
    args = SelectionArgs(rungs=["1x1024"], config=tmp_path / "wrong.yaml", repair=False)
    with pytest.raises(UserError, match="litgpt distill failed within the selection .*train-1024.log"):
        Selection(folder / "teacher", tmp_path / "out", args).run([evaluation], "perplexity")
