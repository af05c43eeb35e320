"""Test failures during training: a one-line error, saved progress, and the same result after resuming."""

import random
import resource
import signal
import time
from pathlib import Path

import forked
import pytest
import torch
from test_train import interrupted, rows, run, same, train_args

from litgpt_whittle.checkpoint import load_model
from litgpt_whittle.distillation.head import LossModel
from litgpt_whittle.errors import UserError
from litgpt_whittle.metrics_log import read_metrics
from litgpt_whittle.training.args import TrainArgs
from litgpt_whittle.training.resume import find_resume
from litgpt_whittle.training.run import Schedule


@pytest.fixture
def broken_at(monkeypatch):
    """Make the training losses of some micro-batches NaN, counted from 0."""
    forward = LossModel.forward

    def break_at(*numbers):
        count = iter(range(10**6))

        def broken(self, *args):
            losses = forward(self, *args)
            if torch.is_grad_enabled() and next(count) in numbers:
                return losses._replace(loss=losses.loss * torch.nan)
            return losses

        monkeypatch.setattr(LossModel, "forward", broken)

    return break_at


@pytest.mark.parametrize("max_norm", [0.5, None])
def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, broken_at, max_norm):
    broken_at(6)  # two micro-batches per step, three steps per epoch
    with pytest.raises(UserError) as stopped:
        run(tmp_path, train=train_args(save_interval=2, max_norm=max_norm))
    last = str(tmp_path / "step-00000002")
    assert str(stopped.value).startswith("the loss or a gradient is not finite at step 4 (epoch 1, batch 6 to epoch 2")
    assert f"the last good checkpoint is {last!r}" in str(stopped.value) and "\n" not in str(stopped.value)
    assert all(weight.isfinite().all() for weight in load_model(tmp_path / "step-00000002").state_dict().values())


def test_without_a_checkpoint_none_is_named(tmp_path, broken_at):
    broken_at(0)
    with pytest.raises(UserError, match=r"at step 1 \(epoch 1, batch 0 to epoch 1, batch 2\); there is no checkpoint"):
        run(tmp_path)


def test_such_steps_may_be_left_out(tmp_path, broken_at, capsys):
    broken_at(3, 4)
    weights = run(tmp_path, train=train_args(skip_nan=True))
    assert "step 2 skipped, its loss or gradient is not finite (1 so far)" in (printed := capsys.readouterr().out)
    assert "step 3 skipped, its loss or gradient is not finite (2 so far)" in printed
    assert all(weight.isfinite().all() for weight in weights.values()) and len(rows(tmp_path)) == 6


def test_skipped_steps_are_counted_over_a_resumption(tmp_path, broken_at, monkeypatch, capsys):
    broken_at(1, 8)
    interrupted(tmp_path, monkeypatch, 2, train=train_args(save_interval=1, skip_nan=True))
    assert "(2 so far)" in capsys.readouterr().out


def test_a_full_disk_is_told_and_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    kwargs = {"train": train_args(save_interval=2)}
    unbroken = run(tmp_path / "unbroken", **kwargs)
    import litgpt_whittle.training.loop

    save, limits = litgpt_whittle.training.loop._save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def without_room(run, folder):
        if folder.name == "step-00000004":
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        save(run, folder)

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    monkeypatch.setattr(litgpt_whittle.training.loop, "_save", without_room)
    try:
        with pytest.raises(UserError, match="step-00000004' could not be written .*the last good checkpoint is .*2'"):
            run(tmp_path / "full", **kwargs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    monkeypatch.setattr(litgpt_whittle.training.loop, "_save", save)
    assert {path.name for path in (tmp_path / "full").glob("*step*")} == {"step-00000002"}
    assert same(unbroken, run(tmp_path / "full", resume=True, **kwargs))


def test_a_warm_up_stable_decay_schedule():
    train = TrainArgs(lr_schedule="wsd", lr_decay_fraction=0.25, max_steps=20, min_lr=0.1, lr_warmup_steps=4)
    train.global_batch_size = train.micro_batch_size = 1
    schedule = Schedule.of(train, 8, 1.0, 1, 1, None)
    rates = [schedule.lr(i) for i in range(20)]
    assert rates[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])
    assert rates[4:16] == pytest.approx([1.0] * 12)
    assert rates[15:] == pytest.approx([1.0, 0.82, 0.64, 0.46, 0.28])


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_decay_must_be_a_share_of_the_training(share):
    with pytest.raises(UserError, match="train.lr_decay_fraction must be above 0 and at most 1"):
        TrainArgs(lr_decay_fraction=share)


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
from test_train import TokenData, run, train_args
torch.set_num_threads(1)
run(Path({out!r}), data=TokenData(n_train=20), train=train_args(save_interval=2, max_tokens={n_steps} * 64),
    resume="auto", devices={devices})
"""


class Training:
    """A run in separate processes."""

    def __init__(self, out: Path, n_steps: int, devices: int = 1) -> None:
        self.out = out
        script = SCRIPT.format(tests=str(Path(__file__).parent), out=str(out), n_steps=n_steps, devices=devices)
        path = out.with_suffix(".py")
        path.write_text(script)
        self.process = forked.Program(path, n=devices)

    def wait_for(self, n_rows: int) -> None:
        deadline = time.monotonic() + 200
        while len(read_metrics(self.out / "metrics.jsonl")) < n_rows:
            assert self.process.poll() is None, self.process.finish()
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def end(self, sent: int | None = None) -> tuple[int, str]:
        """Send a signal to all of its processes; return the exit code and the output."""
        if sent is not None:
            self.process.send(sent)
        code, printed, errors = self.process.finish()
        return code, printed + errors


def figures(out):
    keep = ("iter", "step", "epoch", "loss", "val_loss", "learning_rate")
    return [{key: row.get(key) for key in keep} for row in read_metrics(out / "metrics.jsonl")]


def test_sigterm_saves_and_the_run_goes_on_to_the_same_weights(tmp_path):
    whole = Training(tmp_path / "whole", 120)
    told = Training(tmp_path / "told", 120)
    told.wait_for(20)
    code, printed = told.end(signal.SIGTERM)
    assert code == 143 and "Stopped by SIGTERM after step" in printed and "--resume auto" in printed
    assert not (tmp_path / "told/final").exists()
    assert Training(tmp_path / "told", 120).end()[0] == whole.end()[0] == 0
    ours, theirs = (load_model(tmp_path / name / "final").state_dict() for name in ("told", "whole"))
    assert same(ours, theirs) and figures(tmp_path / "told") == figures(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("devices", [1, 2])
def test_killed_at_twenty_moments_a_run_ends_as_if_it_had_not_been(tmp_path, devices):
    n_steps, moments = 200, random.Random(devices)
    assert Training(tmp_path / "whole", n_steps, devices).end()[0] == 0
    n_rows = len(figures(tmp_path / "whole"))
    for i in range(20):
        training = Training(tmp_path / "killed", n_steps, devices)
        # every save is soon followed by a log row, so some of these moments fall within a write
        training.wait_for(n_rows * i // 20 + moments.randrange(1, 5))
        time.sleep(moments.random() * 0.02)
        training.end(signal.SIGKILL)
        latest = find_resume("auto", tmp_path / "killed")
        assert latest is None or load_model(latest)
    assert Training(tmp_path / "killed", n_steps, devices).end()[0] == 0
    ours, theirs = (load_model(tmp_path / name / "final").state_dict() for name in ("killed", "whole"))
    assert same(ours, theirs) and figures(tmp_path / "killed") == figures(tmp_path / "whole")
