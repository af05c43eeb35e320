"""Test `litgpt extract --repair`: a repaired student as a checkpoint, by one process or several, interrupted or not."""

import math
import os
import re
import shutil
import time

import forked
import pytest
import torch
import yaml
from checkpoints import write_random_model
from litgpt.args import EvalArgs
from litgpt.config import Config
from litgpt.model import GPT
from texts import documents, write_jsonl, write_tokenizer

from litgpt_whittle.batches import BatchArgs, held_out_windows
from litgpt_whittle.checkpoint import load_model
from litgpt_whittle.commands import distill
from litgpt_whittle.commands.extract import ExtractConfig, setup
from litgpt_whittle.data import HFText
from litgpt_whittle.data.loading import connect
from litgpt_whittle.errors import UserError
from litgpt_whittle.repair.args import RepairArgs
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.training.args import TrainArgs

TEACHER = Config.from_name(
    "Llama-3.2-1B",
    n_layer=4,
    n_embd=32,
    n_head=4,
    n_query_groups=2,
    intermediate_size=48,
    block_size=32,
    vocab_size=300,
    padded_vocab_size=300,
)
HALF = SubNet(TEACHER, n_embd=16, n_layer="0,2-3", n_query_groups=1, intermediate_size=24)
LATE = SubNet(TEACHER, n_embd=16, n_layer="1-3", n_query_groups=[1, 2, 1], intermediate_size=[24, 40, 8])
"""Drops the first layer; the layers differ in size"""
TRAIN = BatchArgs(micro_batch_size=8, max_seq_length=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make a teacher, its data, and a sub-network of half its sizes."""
    folder = tmp_path_factory.mktemp("repair")
    write_random_model(write_tokenizer(folder / "teacher"), TEACHER, norm_mean=1.0)
    write_jsonl(folder / "train.jsonl", documents(400))
    write_jsonl(folder / "validation.jsonl", documents(40, seed=1))
    HALF.save(folder / "half.yaml", perplexity=12.5)
    LATE.save(folder / "late.yaml")
    SubNet.full(TEACHER).save(folder / "full.yaml")
    return folder


def data(folder, **changes) -> HFText:
    return HFText(path=str(folder / "train.jsonl"), val_path=str(folder / "validation.jsonl"), **changes)


def extract(folder, out_dir, sub_network="half.yaml", **changes):
    settings = {"repair": RepairArgs(tokens=4000), "data": data(folder), "train": TRAIN} | changes
    setup(folder / "teacher", folder / sub_network, out_dir, **settings)
    return out_dir


def weights(folder) -> dict[str, torch.Tensor]:
    return torch.load(folder / "lit_model.pth", weights_only=True)


@pytest.fixture(scope="module")
def student(folder):
    return extract(folder, folder / "student")


@pytest.fixture(scope="module")
def late(folder):
    return extract(folder, folder / "late", "late.yaml")


@pytest.mark.parametrize("name, sub_network, factor", [("student", "half.yaml", 0.8), ("late", "late.yaml", 1.0)])
def test_stock_litgpt_opens_a_student_that_is_nearer_to_its_teacher(
    name, sub_network, factor, folder, tmp_path, request
):
    student = request.getfixturevalue(name)
    setup(folder / "teacher", folder / sub_network, tmp_path / "cut")
    idx = torch.randint(0, 300, (64, 32), generator=torch.Generator().manual_seed(1))
    logits = []
    with torch.no_grad():
        for path in (folder / "teacher", student, tmp_path / "cut"):
            model = GPT(Config.from_checkpoint(path))
            model.load_state_dict(weights(path))
            logits.append(torch.log_softmax(model(idx), -1))
            same = load_model(path)(idx)
            # padded projections are multiplied in a different order
            torch.testing.assert_close(same, model(idx), rtol=1e-4, atol=1e-5)
            assert name == "late" or torch.equal(same, model(idx))
    teacher, repaired, cut = logits
    assert (repaired - teacher).square().mean() < factor * (cut - teacher).square().mean()


@pytest.mark.pictures
def test_it_says_how_it_was_repaired(folder, student, capsys, tmp_path):
    saved = yaml.safe_load((student / "sub_network.yaml").read_text())
    origin = saved.pop("provenance")
    assert origin["perplexity"] == 12.5  # the entries of the search
    assert origin["repair"]["basis"] == "pca" and origin["repair"]["tokens"] == 4000
    # heads and neurons differ from the cut's, but not in number
    chosen = SubNet.from_dict(TEACHER, saved)
    assert [chosen.layer(i).sizes for i in range(3)] == [HALF.layer(i).sizes for i in range(3)]
    basis = torch.load(student / "basis.pth", weights_only=True)["basis"]
    torch.testing.assert_close(basis @ basis.T, torch.eye(16), rtol=1e-5, atol=1e-5)
    assert not (student.parent / ".student.repair").exists()
    extract(folder, tmp_path / "s", repair=RepairArgs(tokens=4000, choose_units=False, basis="coordinates"))
    assert SubNet.load(tmp_path / "s/sub_network.yaml", TEACHER) == HALF
    assert (tmp_path / "s/repair.png").stat().st_size > 10_000
    assert "after the last block" in capsys.readouterr().out


def kl(printed: str) -> float:
    return float(re.search(r"predictions are ([\d.]+) nats", printed)[1])


@pytest.mark.parametrize("changes", [{}, {"refine_passes": 1}])
def test_the_printed_divergence_is_that_of_validation_text(changes, folder, tmp_path, capsys):
    extract(folder, tmp_path / "s", repair=RepairArgs(tokens=4000, **changes))
    printed = capsys.readouterr().out
    val = data(folder)
    connect(val, folder / "teacher", 8, 32)
    windows = held_out_windows(val, 32, 32, 4000 // 32 // 4).input_ids
    assert f"(KL on {windows.numel()} validation tokens" in printed and "Note: on calibration" not in printed
    log_p = []
    for path in (folder / "teacher", tmp_path / "s"):
        model = GPT(Config.from_checkpoint(path)).double()
        model.load_state_dict(weights(path))
        log_p.append(model(windows).detach().log_softmax(-1))
    expected = (log_p[0].exp() * (log_p[0] - log_p[1])).sum(-1).mean()
    assert kl(printed) == pytest.approx(float(expected), abs=6e-4)


def test_a_student_that_is_far_better_on_its_calibration_text_asks_for_other_text(
    folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("litgpt_whittle.commands.extract.NARROW", 1.05)  # this teacher's predictions are nearly uniform
    narrow = HFText(
        path=str(write_jsonl(tmp_path / "narrow.jsonl", documents(2) * 200)), val_path=str(folder / "validation.jsonl")
    )
    extract(folder, tmp_path / "s", data=narrow, repair=RepairArgs(tokens=4000, refine_passes=4, refine_lr=3e-3))
    printed = capsys.readouterr().out
    assert "Note: on calibration tokens it is only" in printed and "broader text" in printed


def test_the_whole_teacher_is_left_unchanged(folder, tmp_path, caplog):
    extract(folder, tmp_path / "s", "full.yaml")
    assert "nothing to repair" in caplog.text
    same = weights(tmp_path / "s")
    assert all(torch.equal(same[name], tensor) for name, tensor in weights(folder / "teacher").items())


def cli(folder, out_dir, *flags, sub_network="half.yaml") -> list[str]:
    arguments = [folder / "teacher", folder / sub_network, f"--out_dir={out_dir}", "--repair.tokens=4000"]
    arguments += ["--data=HFText", f"--data.path={folder / 'train.jsonl'}"]
    arguments += [f"--data.val_path={folder / 'validation.jsonl'}"]
    arguments += ["--train.micro_batch_size=8", "--train.max_seq_length=32", *flags]
    return ["-m", "litgpt_whittle", "extract", *map(str, arguments)]


def test_two_processes_find_what_one_finds(folder, late, tmp_path):
    done = forked.run(*cli(folder, tmp_path / "two", "--devices=2", sub_network="late.yaml"), n=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Saved") == 1  # written by one process
    one, two = weights(late), weights(tmp_path / "two")
    assert SubNet.load(late / "sub_network.yaml", TEACHER) == SubNet.load(tmp_path / "two/sub_network.yaml", TEACHER)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_processes_train_all_blocks_as_one_does(folder, tmp_path):
    refining = ["--repair.refine_passes=0.5", "--repair.closed_form_tokens=2000"]
    done = forked.run(*cli(folder, tmp_path / "two", "--devices=2", *refining, sub_network="late.yaml"), n=2)
    assert done.returncode == 0, done.stderr
    args = RepairArgs(tokens=4000, refine_passes=0.5, closed_form_tokens=2000)
    one = weights(extract(folder, tmp_path / "one", "late.yaml", repair=args))
    for name, tensor in weights(tmp_path / "two").items():
        torch.testing.assert_close(tensor, one[name], rtol=1e-2, atol=1e-3)


def test_a_killed_repair_goes_on_to_the_same_student(folder, student, tmp_path):
    out_dir, scratch = tmp_path / "killed", tmp_path / ".killed.repair"
    child = forked.Program(*cli(folder, out_dir))
    while not (scratch / "layer-0.pt").is_file() and child.poll() is None:
        time.sleep(0.01)
    child.kill()
    assert not out_dir.exists() and (scratch / "layer-0.pt").is_file()
    extract(folder, out_dir)
    expected = weights(student)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(out_dir).items())
    assert not scratch.exists()


def test_calibration_never_sees_validation_data(folder, tmp_path):
    texts = [" ".join(documents(10, seed)) for seed in range(50)]
    write_jsonl(tmp_path / "train.jsonl", texts)
    write_jsonl(tmp_path / "same.jsonl", texts[::-1])  # the same texts in another order
    same = HFText(path=str(tmp_path / "train.jsonl"), val_path=str(tmp_path / "same.jsonl"))
    with pytest.raises(UserError, match="calibration and validation data must not overlap"):
        extract(folder, tmp_path / "s", data=same)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "a repair needs data to calibrate on"),
        ({"train": BatchArgs(max_seq_length=64)}, "at most the teacher's block_size 32, got 64"),
        ({"devices": 2, "repair": False}, "only a repair can use several devices"),
        ({"devices": 4096}, "devices must be at most"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(folder, tmp_path, changes, message):
    if changes.get("devices") == 2 and (os.cpu_count() or 1) < 2:
        pytest.skip("one core")
    with pytest.raises(UserError, match=message):
        extract(folder, tmp_path / "s", **changes)
    assert not list(tmp_path.iterdir())


def test_a_disk_too_small_for_the_streams_is_told(folder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=200_000))
    with pytest.raises(UserError, match="the repair's scratch files takes .* has 0.2 MB left; free some space"):
        extract(folder, tmp_path / "s")
    assert not list(tmp_path.iterdir())


def test_a_repair_that_cannot_be_leaves_nothing_behind(folder, tmp_path):
    weights = torch.load(folder / "teacher/lit_model.pth", weights_only=True)
    weights["transformer.h.2.mlp.proj.weight"][0, 0] = math.inf
    shutil.copytree(folder / "teacher", tmp_path / "teacher")
    torch.save(weights, tmp_path / "teacher/lit_model.pth")
    settings = {"repair": RepairArgs(tokens=4000), "data": data(folder), "train": TRAIN}
    with pytest.raises(UserError, match="layer 2 gives activations that are not finite"):
        setup(tmp_path / "teacher", folder / "half.yaml", tmp_path / "s", **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_little_data_is_said(folder, tmp_path, caplog):
    extract(folder, tmp_path / "s", repair=RepairArgs(tokens=10**6))
    assert "fewer than repair.tokens = 1,000,000" in caplog.text


# -- as the first stage of `litgpt distill`


def distilled(folder, out_dir, **changes):
    settings = {
        "teacher_checkpoint_dir": folder / "teacher",
        "sub_network": folder / "half.yaml",
        "repair": RepairArgs(tokens=4000, refine_passes=0.25),
        "data": data(folder),
        "train": TrainArgs(
            global_batch_size=8, micro_batch_size=8, max_seq_length=32, max_steps=2, save_interval=1, lr_warmup_steps=0
        ),
        "eval": EvalArgs(interval=10, max_iters=2, initial_validation=True),
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01}},
        "precision": "32-true",
        "devices": 1,
        "logger_name": "csv",
        "compile": False,
    }
    distill.setup(out_dir=out_dir, **settings | changes)
    return out_dir


def test_distill_repairs_and_refines_what_it_cuts(folder, tmp_path):
    expected = extract(folder, tmp_path / "student", repair=RepairArgs(tokens=4000, refine_passes=0.25))
    out = distilled(folder, tmp_path / "out")
    start = weights(out / "start")
    assert all(torch.equal(start[name], weight) for name, weight in weights(expected).items())
    assert torch.equal(*(torch.load(path / "basis.pth")["basis"] for path in (expected, out / "final")))
    # a resumed run does not start again
    shutil.rmtree(out / "start")
    again = distilled(folder, tmp_path / "again", resume=out / "step-00000001")
    assert not (again / "start").exists()
    assert all(torch.equal(weights(again / "final")[name], weight) for name, weight in weights(out / "final").items())


def test_a_start_is_used_again_only_for_what_was_asked_for(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "fit", lambda *_: None)  # ended before its first checkpoint
    repaired = []
    run = distill.ExtractConfig.run
    monkeypatch.setattr(distill.ExtractConfig, "run", lambda self: repaired.append(self.sub_network) or run(self))
    first = RepairArgs(tokens=4000)
    for changes, n in (({}, 1), ({}, 1), ({"repair": RepairArgs(tokens=2000)}, 2), ({"seed": 7}, 3)):
        distilled(folder, tmp_path / "out", resume="auto", **{"repair": first} | changes)
        assert len(repaired) == n, changes
    shutil.copy(folder / "late.yaml", tmp_path / "late.yaml")
    distilled(folder, tmp_path / "out", resume="auto", repair=first, sub_network=tmp_path / "late.yaml")
    assert len(repaired) == 4
    start = SubNet.load(tmp_path / "out/start/sub_network.yaml", TEACHER)
    asked = SubNet.load(folder / "late.yaml", TEACHER)
    assert [start.layer(i).sizes for i in range(len(start))] == [asked.layer(i).sizes for i in range(len(asked))]


def test_students_calibrated_on_other_text_are_not_taken_for_finished(folder, tmp_path):
    found = tmp_path / "search"
    found.mkdir()
    shutil.copy(folder / "half.yaml", found / "best.yaml")
    student, repair = tmp_path / "out/best", RepairArgs(tokens=2000)
    extract(folder, tmp_path / "out", found, repair=repair)
    before = (student / "lit_model.pth").stat().st_mtime_ns
    extract(folder, tmp_path / "out", found, repair=repair)
    assert (student / "lit_model.pth").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="out_dir must be empty or new"):
        extract(folder, tmp_path / "out", found, repair=repair, data=data(folder, max_documents=200))


class Renamed(HFText):
    """A data module that replaces one of its own settings when it is connected."""

    def connect(self, *args, **kwargs):
        super().connect(*args, **kwargs)
        self.val_fraction = 0.5  # not read, because there is a val_path


def test_a_students_key_describes_the_data_module_before_it_is_connected(folder, tmp_path):
    paths = {"path": str(folder / "train.jsonl"), "val_path": str(folder / "validation.jsonl")}
    changes = {"data": Renamed(**paths), "repair": RepairArgs(tokens=2000), "train": TRAIN}
    asked = [folder / "teacher", folder / "half.yaml", tmp_path / "out"]
    setup(*asked, **changes)
    assert changes["data"].val_fraction == 0.5
    assert ExtractConfig(*asked, **changes | {"data": Renamed(**paths)}).is_finished()


def test_a_repair_without_a_cut_or_on_several_devices_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="repair needs a sub-network to repair; set --sub_network"):
        distilled(folder, tmp_path / "out", sub_network=None, initial_checkpoint_dir=folder / "teacher")
    with pytest.raises(
        UserError, match="needs one device in litgpt distill, got 2; run 'litgpt extract --repair true --devices 2'"
    ):
        train = TrainArgs(global_batch_size=8, micro_batch_size=4, max_steps=1)
        distilled(folder, tmp_path / "out", devices=2, train=train)
    assert not (tmp_path / "out").exists()
