"""Test the training loop against `litgpt pretrain`, and a resumed run against an uninterrupted one."""

import contextlib
import csv
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import litgpt.pretrain
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.loggers import CSVLogger
from litgpt import GPT, Config
from litgpt.args import EvalArgs
from litgpt.data import DataModule
from litgpt.utils import save_config
from texts import write_tokenizer
from torch.utils.data import DataLoader, TensorDataset

from litgpt_whittle import files
from litgpt_whittle.checkpoint import load_model
from litgpt_whittle.commands.distill import setup
from litgpt_whittle.data.loading import split_batch
from litgpt_whittle.distillation.args import DistillArgs
from litgpt_whittle.errors import UserError
from litgpt_whittle.licenses import license_of
from litgpt_whittle.metrics_log import read_metrics
from litgpt_whittle.supergpt import tie
from litgpt_whittle.training import log, loop
from litgpt_whittle.training.args import TrainArgs
from litgpt_whittle.training.data_stream import DataStream
from litgpt_whittle.training.resume import rng_state, set_rng_state
from litgpt_whittle.training.run import Schedule

SEQ = 8
VOCAB = 100


@dataclass
class TokenData(DataModule):
    """Noisy counting: learnable, and reshuffled in every epoch from the global generator, as in litgpt's modules."""

    n_train: int = 24
    n_val: int = 8

    def __post_init__(self):
        super().__init__()

    def connect(self, tokenizer=None, batch_size=1, max_seq_length=None):
        self.batch_size, self.length = batch_size, max_seq_length + 1

    def samples(self, n, seed):
        generator = torch.Generator().manual_seed(seed)
        start = torch.randint(VOCAB, (n, 1), generator=generator)
        noise = torch.randint(3, (n, self.length), generator=generator)
        return (start + torch.arange(self.length) + noise) % VOCAB

    def loader(self, n, seed, shuffle):
        return DataLoader(self.samples(n, seed), batch_size=self.batch_size, shuffle=shuffle, drop_last=True)

    def train_dataloader(self):
        return self.loader(self.n_train, 0, True)

    def val_dataloader(self):
        return self.loader(self.n_val, 1, False)


def config(**kwargs):
    sizes = {"block_size": SEQ, "vocab_size": VOCAB, "padded_vocab_size": VOCAB, "n_layer": 2, "n_head": 4}
    return Config(**(sizes | {"n_embd": 32, "name": "tiny"} | kwargs))


def train_args(**kwargs):
    defaults = {"save_interval": None, "log_interval": 1, "global_batch_size": 8, "micro_batch_size": 4}
    limits = {"max_tokens": 6 * 8 * SEQ, "max_norm": 0.5, "min_lr": 1e-4, "lr_warmup_steps": 2}
    return TrainArgs(**(defaults | limits | kwargs))


def run(out_dir, **kwargs):
    """Run `litgpt distill` in this process, by default with a random-weight student."""
    defaults = {
        "model_config": config(),
        "out_dir": out_dir,
        "precision": "32-true",
        "data": TokenData(),
        "train": train_args(),
        "eval": EvalArgs(interval=2, max_iters=2),
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2}},
        "devices": 1,
        "logger_name": "csv",
        "distill": DistillArgs(beta=0),
        "compile": False,
    }
    if any(key in kwargs for key in ("initial_checkpoint_dir", "sub_network")):
        del defaults["model_config"]
    setup(**(defaults | kwargs))
    return load_model(out_dir / "final").state_dict()


def checkpoint(folder, seed=0, **kwargs):
    """Write a litgpt checkpoint with random weights."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    model = GPT(config(**kwargs))
    torch.save(model.state_dict(), folder / "lit_model.pth")
    save_config(model.config, folder)
    return folder


def rows(out_dir, key="loss"):
    return [row for row in read_metrics(out_dir / "metrics.jsonl") if key in row]


def predict(weights):
    model = GPT(config())
    model.load_state_dict(weights)
    return model(torch.arange(SEQ).unsqueeze(0))


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def litgpt_pretrain(out_dir, monkeypatch, precision="32-true", initial_checkpoint_dir=None, **train):
    """Run stock `litgpt pretrain` without torch.compile, as an oracle; return logged losses and final weights."""
    monkeypatch.setattr(torch, "compile", lambda model: model)
    monkeypatch.setattr(litgpt.pretrain, "save_hyperparameters", lambda *args: None)
    logger = CSVLogger(out_dir / "logs", flush_logs_every_n_steps=1)
    fabric = L.Fabric(devices=1, precision=precision, loggers=[logger])
    litgpt.pretrain.main(
        fabric=fabric,
        devices=1,
        seed=42,
        initial_checkpoint_dir=initial_checkpoint_dir,
        resume=False,
        config=config(),
        data=TokenData(),
        out_dir=out_dir,
        tokenizer_dir=None,
        tokenizer=None,
        train=train_args(**train),
        eval=EvalArgs(interval=10, max_iters=2),
        optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2}},
    )
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        logged = list(csv.DictReader(file))
    return logged, torch.load(out_dir / "final" / "lit_model.pth", weights_only=False)["model"]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_without_a_teacher_it_is_litgpt_pretrain_step_for_step(tmp_path, monkeypatch, precision):
    tokens = 50 * 8 * SEQ  # 50 steps, over many epochs of the data
    logged, weights = litgpt_pretrain(tmp_path / "litgpt", monkeypatch, precision, max_tokens=tokens)
    ours = run(
        tmp_path / "ours",
        precision=precision,
        train=train_args(max_tokens=tokens),
        eval=EvalArgs(interval=10, max_iters=2),
    )

    atol = 1e-5 if precision == "32-true" else 3e-2
    theirs = {int(row["step"]): row for row in logged if row["loss"]}
    assert len(rows(tmp_path / "ours")) == 50
    for i, row in enumerate(rows(tmp_path / "ours")):
        expected = list(theirs.values())[i]
        assert row["loss"] == pytest.approx(float(expected["loss"]), abs=atol)
        assert row["learning_rate"] == pytest.approx(float(expected["learning_rate"]), abs=1e-12)
    assert rows(tmp_path / "ours")[-1]["loss"] < rows(tmp_path / "ours")[0]["loss"] - 1, "it learns"
    val = [float(row["val_loss"]) for row in logged if row.get("val_loss")]
    assert [row["val_loss"] for row in rows(tmp_path / "ours", "val_loss")] == pytest.approx(val, abs=atol)
    if precision == "32-true":
        # not the weights themselves: Adam amplifies rounding in key biases, which have no effect and no true gradient
        logits = [predict(state) for state in (ours, weights)]
        assert torch.allclose(*logits, atol=1e-4)


def test_a_given_tied_checkpoint_trains_as_litgpt_trains_it(tmp_path, monkeypatch):
    start = checkpoint(tmp_path / "start")
    torch.save(tie(GPT(config())).state_dict(), start / "lit_model.pth")
    logged, _ = litgpt_pretrain(tmp_path / "litgpt", monkeypatch, initial_checkpoint_dir=start, tie_embeddings=True)
    run(tmp_path / "ours", initial_checkpoint_dir=start, eval=EvalArgs(interval=10, max_iters=2))
    expected = [float(row["loss"]) for row in logged if row["loss"]]
    assert [row["loss"] for row in rows(tmp_path / "ours")] == pytest.approx(expected, abs=1e-5)


def interrupted(tmp_path, monkeypatch, at_step, **kwargs):
    """Run, kill right after the checkpoint of a step, and resume."""
    import litgpt_whittle.training.loop

    save, out_dir = litgpt_whittle.training.loop._save, tmp_path / "broken"

    def save_and_die(run, folder):
        save(run, folder)
        if folder.name == f"step-{at_step:08d}":
            raise KeyboardInterrupt

    monkeypatch.setattr(litgpt_whittle.training.loop, "_save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        run(out_dir, **kwargs)
    monkeypatch.setattr(litgpt_whittle.training.loop, "_save", save)
    kwargs.pop("initial_checkpoint_dir", None)
    return run(out_dir, resume=True, **kwargs)


@pytest.mark.parametrize("at_step", [1, 3, 8])
@pytest.mark.parametrize("n_train", [24, 20])
def test_a_resumed_run_ends_bit_for_bit_like_an_unbroken_one(tmp_path, monkeypatch, at_step, n_train):
    """24 samples are 3 steps per epoch, 20 end an epoch within a step: stops at and within later epochs."""
    teacher = checkpoint(tmp_path / "teacher", n_embd=48)
    kwargs = {
        "train": train_args(save_interval=1, max_tokens=10 * 8 * SEQ),
        "data": TokenData(n_train=n_train),
        "teacher_checkpoint_dir": teacher,
        "distill": DistillArgs(),
    }
    unbroken = run(tmp_path / "unbroken", **kwargs)
    resumed = interrupted(tmp_path, monkeypatch, at_step, **kwargs)
    assert same(unbroken, resumed)
    keep = ("iter", "step", "epoch", "loss", "val_loss", "learning_rate", "teacher_val_loss")
    logs = [
        [{key: row.get(key) for key in keep} for row in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("unbroken", "broken")
    ]
    assert logs[0] == logs[1]


def test_a_half_written_checkpoint_is_never_resumed_from(tmp_path, monkeypatch):
    import litgpt_whittle.training.pretraining as command

    write = command.save_checkpoint

    def die_in_step_two(folder, *args, **kwargs):
        if "step-00000002" in folder.name:
            torch.save({}, folder / "lit_model.pth")
            raise KeyboardInterrupt
        write(folder, *args, **kwargs)

    kwargs = {"train": train_args(save_interval=1)}
    unbroken = run(tmp_path / "unbroken", **kwargs)
    monkeypatch.setattr(command, "save_checkpoint", die_in_step_two)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", **kwargs)
    assert [path.name for path in (tmp_path / "broken").glob("step-*")] == ["step-00000001"]
    monkeypatch.setattr(command, "save_checkpoint", write)
    assert same(unbroken, run(tmp_path / "broken", resume="auto", **kwargs))


def times_of_files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_another_trainings_folder_is_not_trained_in(tmp_path):
    run(tmp_path / "a", train=train_args(max_steps=1))
    before = times_of_files(tmp_path)
    with pytest.raises(UserError, match="has checkpoints of another training; resume it with --resume auto"):
        run(tmp_path / "a", train=train_args(max_steps=1))
    with pytest.raises(UserError, match="out_dir must not be a checkpoint directory, as training would write into it"):
        run(tmp_path / "a/final", train=train_args(max_steps=1))
    assert times_of_files(tmp_path) == before


def test_one_training_at_a_time_in_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0)
    folder = tmp_path / "new/a"
    with files.lock_dir(folder), pytest.raises(UserError, match="another process is at work in out_dir .*a'; wait"):
        run(folder, train=train_args(max_steps=1))
    assert not folder.parent.exists()
    run(folder, train=train_args(max_steps=1))
    assert not (folder / files.LOCK).exists()
    run(folder, train=train_args(max_steps=1), resume="auto")


def test_who_waits_for_another_training_goes_on_from_what_it_saves(tmp_path, monkeypatch):
    unbroken = run(tmp_path / "whole", train=train_args(save_interval=1))
    other = contextlib.ExitStack()
    other.enter_context(files.lock_dir(tmp_path / "broken"))

    def wait(seconds):
        shutil.copytree(tmp_path / "whole/step-00000003", tmp_path / "broken/step-00000003")
        other.close()

    monkeypatch.setattr(files.time, "sleep", wait)
    assert same(unbroken, run(tmp_path / "broken", train=train_args(save_interval=1), resume="auto"))
    assert not (tmp_path / "broken/step-00000002").exists()


def test_a_package_that_data_need_is_named(tmp_path):
    class NeedsMore(TokenData):
        def prepare_data(self):
            import no_such_package  # noqa: F401

    with pytest.raises(UserError, match="NeedsMore needs the package no_such_package; install it, or choose other"):
        run(tmp_path, data=NeedsMore())


def test_resume_auto_starts_where_there_is_nothing_and_a_path_resumes_from_it(tmp_path):
    kwargs = {"train": train_args(save_interval=2)}
    unbroken = run(tmp_path / "a", resume="auto", **kwargs)
    assert same(unbroken, run(tmp_path / "b", resume=tmp_path / "a" / "step-00000002", **kwargs))
    assert rows(tmp_path / "b")[0]["step"] == 3


def test_max_time_stops_early_and_can_be_raised_on_resuming(tmp_path):
    unbroken = run(tmp_path / "a")
    run(tmp_path / "b", train=train_args(max_time=1e-9))
    assert rows(tmp_path / "b")[-1]["step"] == 1
    assert same(unbroken, run(tmp_path / "b", train=train_args(), resume=True))


@pytest.mark.parametrize(
    "limits, steps", [({"max_tokens": 3 * 64}, 3), ({"max_steps": 2}, 2), ({"max_tokens": None, "max_steps": 4}, 4)]
)
def test_training_ends_at_the_first_of_max_tokens_and_max_steps(tmp_path, limits, steps):
    run(tmp_path, train=train_args(**limits))
    assert len(rows(tmp_path)) == steps
    assert (tmp_path / "final" / "lit_model.pth").is_file()


def test_the_schedule_is_litgpts():
    train = train_args(max_tokens=40 * 4 * SEQ, lr_warmup_steps=5)
    schedule = Schedule.of(train, SEQ, 3e-3, 1, 1, [])
    for i in range(40):
        assert schedule.lr(i) == pytest.approx(litgpt.pretrain.get_lr(3e-3, i, 10, 40, train.min_lr), abs=1e-15)


def test_a_warm_up_without_an_end_is_told():
    train = train_args(max_tokens=40 * 4 * SEQ, lr_warmup_steps=20)
    with pytest.warns(UserWarning, match="warm-up takes all of the training's 20 steps"):
        Schedule.of(train, SEQ, 3e-3, 1, 1, [])


def test_validation_is_weighted_by_tokens_and_ignores_masked_ones(tmp_path):
    """Against one plain pass over all samples, with a smaller last batch."""

    class Uneven(TokenData):
        def val_dataloader(self):
            return DataLoader(masked(self.samples(6, 1)), batch_size=4, collate_fn=collate)

    def masked(ids):
        labels = ids.clone()
        labels[:3, 4:] = -100
        return TensorDataset(ids, labels)

    def collate(samples):
        ids, labels = map(torch.stack, zip(*samples))
        return {"input_ids": ids, "labels": labels}

    data = Uneven()
    weights = run(tmp_path, data=data, eval=EvalArgs(interval=100, max_iters=10))
    model = GPT(config())
    model.load_state_dict(weights)
    ids, labels = masked(data.samples(6, 1)).tensors
    expected = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), labels[:, 1:].flatten()).item()
    logged = rows(tmp_path, "val_loss")[-1]
    assert logged["val_loss"] == pytest.approx(expected, abs=1e-6)
    assert logged["val_ppl"] == pytest.approx(math.exp(expected), rel=1e-5)


def test_accumulated_micro_batches_give_the_gradients_of_one_batch(tmp_path):
    """Without warm-up, whose length litgpt counts in micro-batches, the first step has the same learning rate."""
    kwargs = {"max_steps": 1, "lr_warmup_steps": 0}
    whole = run(tmp_path / "whole", train=train_args(micro_batch_size=8, **kwargs))
    parts = run(tmp_path / "parts", train=train_args(micro_batch_size=2, **kwargs))
    assert rows(tmp_path / "whole")[0]["loss"] == pytest.approx(rows(tmp_path / "parts")[0]["loss"], abs=1e-5)
    moments = [
        torch.load(tmp_path / name / "final" / "training_state.pth")["optimizer"]["state"]
        for name in ("whole", "parts")
    ]
    for a, b in zip(*(state.values() for state in moments)):
        assert torch.allclose(a["exp_avg"], b["exp_avg"], atol=1e-7)
    assert whole.keys() == parts.keys()


@pytest.mark.pictures
def test_a_run_leaves_its_log_its_plot_and_its_arguments(tmp_path):
    run(tmp_path, train=train_args(save_interval=3))
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (tmp_path / "final").iterdir()} == {
        "hyperparameters.yaml",
        "lit_model.pth",
        "model_config.yaml",
        "training_state.pth",
    }
    assert (tmp_path / "step-00000003").is_dir() and (tmp_path / "step-00000006").is_dir()
    for file in ("lit_model.pth", "training_state.pth"):
        assert torch.load(tmp_path / "final" / file, weights_only=True)
    row = rows(tmp_path)[-1]
    assert row["tokens"] == 6 * 8 * SEQ and row["tokens_per_second"] > 0
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["val_loss"] > 0


def test_a_student_keeps_the_license_of_its_weights_whatever_its_tokenizers(tmp_path):
    student, other = checkpoint(tmp_path / "student", padded_vocab_size=300), write_tokenizer(tmp_path / "other")
    for folder, name in ((student, "mit"), (other, "gpl")):
        (folder / "license.yaml").write_text(f"license: {name}\n")
    run(tmp_path / "out", initial_checkpoint_dir=student, tokenizer_dir=other, train=train_args(max_steps=1))
    assert license_of(tmp_path / "out/final") == {"license": "mit"}


def test_throughput_and_time_left_leave_out_validation_and_saving(tmp_path, monkeypatch):
    """With a clock that a micro-batch advances by a second, and a validation or a saved checkpoint by 100."""
    now = 0.0

    def slow(function, seconds):
        def run_slowly(*args, **kwargs):
            nonlocal now
            now += seconds
            return function(*args, **kwargs)

        return run_slowly

    monkeypatch.setattr(log, "time", SimpleNamespace(perf_counter=lambda: now))
    for name, seconds in (("_micro_step", 1), ("_validate", 100), ("_save", 100)):
        monkeypatch.setattr(loop, name, slow(getattr(loop, name), seconds))
    train = train_args(micro_batch_size=8, log_interval=2, save_interval=3)
    run(tmp_path, train=train, eval=EvalArgs(interval=3, max_iters=1, initial_validation=True))
    found = rows(tmp_path)
    assert [row["tokens_per_second"] for row in found] == [8 * SEQ] * 3
    assert found[0]["remaining_time"] == 4


def test_random_states_survive_a_weights_only_file(tmp_path):
    import random

    import numpy as np

    draw = lambda: (random.random(), np.random.rand(), torch.rand(1).item())
    state = rng_state()
    expected = draw()
    torch.save(state, tmp_path / "state.pth")
    draw()
    set_rng_state(torch.load(tmp_path / "state.pth", weights_only=True))
    assert draw() == expected


@pytest.mark.parametrize("generator", [None, 7])
@pytest.mark.parametrize("batches", [0, 2, 3, 8, 9])
def test_a_data_stream_goes_on_where_it_was(generator, batches):
    """Including a shuffle with its own generator, in later epochs and between two."""

    def stream():
        own = None if generator is None else torch.Generator().manual_seed(generator)
        return DataStream(DataLoader(torch.arange(9), batch_size=3, shuffle=True, generator=own))

    torch.manual_seed(3)
    first = stream()
    for _ in range(batches):
        next(first)
    state, rng = first.state_dict(), rng_state()
    expected = [next(first).tolist() for _ in range(7)]
    torch.manual_seed(99)
    second = stream()
    second.load_state_dict(state)
    set_rng_state(rng)
    assert [next(second).tolist() for _ in range(7)] == expected
    assert second.epoch == first.epoch


def test_a_data_stream_without_data_says_so():
    with pytest.raises(UserError, match="at least one batch"):
        next(DataStream([]))


def test_batches_shorter_than_asked_for_are_used_whole():
    input_ids, targets = split_batch(torch.arange(10).view(2, 5), seq_length=8)
    assert input_ids.tolist() == [[0, 1, 2, 3], [5, 6, 7, 8]]
    assert targets.tolist() == [[1, 2, 3, 4], [6, 7, 8, 9]]
