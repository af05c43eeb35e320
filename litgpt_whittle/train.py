"""The one training loop: `litgpt distill` runs on it, and whatever else trains a model on next tokens can.

What is trained is a `Job`: how a batch becomes gradients, how it is scored, how the weights are saved. The loop brings
the rest: accumulation, clipping, learning rate, validation, logging, checkpoints, stopping and going on. Where
`litgpt pretrain` does the same thing it happens in the same order, so that the random generators, and with them
weights and data order, run in step with litgpt's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.throughput import ThroughputMonitor
from litgpt import Tokenizer
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data import DataModule
from torch import nn

from litgpt_whittle.curves import MetricsLog, plot_training
from litgpt_whittle.errors import UserError
from litgpt_whittle.losses import IGNORE_INDEX
from litgpt_whittle.resume import (
    DataStream,
    generator_states,
    rng_state,
    set_generator_states,
    set_rng_state,
)

Backward = Callable[[torch.Tensor], None]
"""Adds a loss's gradients to those of the optimizer step; it may be called several times per batch."""

TrainingStep = Callable[[torch.Tensor, torch.Tensor, Backward, float], Mapping[str, torch.Tensor]]
"""(input_ids (B, T), targets (B, T), backward, the share of the training that is done) -> scalars to log, "loss" among
them, without gradients."""

Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(input_ids (B, T), targets (B, T)) -> mean cross-entropy over the targets that count."""


@dataclass
class Job:
    """What the loop trains."""

    module: nn.Module
    """The root module, set up by Fabric"""
    optimizer: torch.optim.Optimizer
    """Set up by Fabric"""
    step: TrainingStep
    score: Score
    save: Callable[[Path, dict[str, Any]], None]
    """Writes a checkpoint directory with the weights and the given training state, whole or not at all"""
    teacher_score: Score | None = None
    flops_per_iter: int = 0
    """Floating-point operations of one micro-batch, for the throughput monitor"""


@dataclass(frozen=True)
class Schedule:
    """How long to train, and the learning rate on the way; counted in micro-batches, as litgpt counts."""

    max_iters: int
    warmup_iters: int
    accumulation: int
    tokens_per_iter: int
    max_lr: float
    min_lr: float

    @classmethod
    def of(cls, train: TrainArgs, seq_length: int, lr: float, devices: int, num_nodes: int, loader: Any) -> Schedule:
        """The schedule that litgpt's arguments ask for; it ends where the first of max_tokens and max_steps does."""
        accumulation = train.gradient_accumulation_iters(devices, num_nodes)
        tokens_per_iter = train.micro_batch_size * seq_length
        limits = []
        if train.max_tokens is not None:
            limits.append(train.max_tokens // (devices * num_nodes) // tokens_per_iter)
        if train.max_steps is not None:
            limits.append(train.max_steps * accumulation)
        if min(limits) < 1:
            raise UserError(
                f"train.max_tokens and train.max_steps must allow one batch of {tokens_per_iter:,} tokens, got "
                f"{train.max_tokens} and {train.max_steps}; raise them"
            )
        warmup = train.warmup_iters(devices, num_nodes, min(limits), loader)
        return cls(min(limits), warmup, accumulation, tokens_per_iter, lr, train.min_lr)

    def lr(self, iteration: int) -> float:
        """Linear warm-up, then a half cosine from the peak down to `min_lr`."""
        if iteration < self.warmup_iters:
            return self.max_lr * iteration / self.warmup_iters
        done = (iteration - self.warmup_iters) / max(1, self.max_iters - self.warmup_iters)
        return self.min_lr + (self.max_lr - self.min_lr) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


@dataclass
class Progress:
    """How far a run is, over all its parts."""

    iter_num: int = 0
    step_count: int = 0
    seconds: float = 0.0
    val_loss: float | None = None


@dataclass
class Run:
    """One training run: the job, its data, and where it stands."""

    fabric: L.Fabric
    job: Job
    stream: DataStream
    val_loader: Iterable | None
    schedule: Schedule
    seq_length: int
    out_dir: Path
    settings: dict[str, Any]
    """What must not change when the run is resumed"""
    progress: Progress = field(default_factory=Progress)

    def training_state(self) -> dict[str, Any]:
        """All that a checkpoint needs besides the weights; loads with `weights_only=True`."""
        return {
            "optimizer": self.job.optimizer.state_dict(),
            "iter_num": self.progress.iter_num,
            "step_count": self.progress.step_count,
            "seconds": self.progress.seconds,
            "val_loss": self.progress.val_loss,
            "data": self.stream.state_dict(),
            "val_generators": generator_states(self.val_loader),
            "rng": rng_state(),
            "settings": self.settings,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to where `training_state` was taken. The weights are the caller's to load."""
        self.job.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(state["iter_num"], state["step_count"], state["seconds"], state["val_loss"])
        self.stream.load_state_dict(state["data"])
        set_generator_states(self.val_loader, state["val_generators"])
        # last: finding the place in the data draws random numbers
        set_rng_state(state["rng"])


def load_data(
    fabric: L.Fabric, data: DataModule, tokenizer: Tokenizer | None, batch_size: int, seq_length: int
) -> tuple[Any, Any]:
    """Connects a data module and gives its train and validation dataloaders.

    Raises:
        UserError: If there is less than one batch of either.
    """
    data.connect(tokenizer=tokenizer, batch_size=batch_size, max_seq_length=seq_length)
    with fabric.rank_zero_first():
        data.prepare_data()
    data.setup()
    loaders = data.train_dataloader(), data.val_dataloader()
    for name, loader in zip(("training", "validation"), loaders):
        if loader is not None and hasattr(loader, "__len__") and len(loader) == 0:
            raise UserError(
                f"the {name} data must fill at least one batch of {batch_size} samples of {seq_length + 1} tokens; "
                "add data, or lower train.micro_batch_size or train.max_seq_length"
            )
    return fabric.setup_dataloaders(loaders[0]), None if loaders[1] is None else fabric.setup_dataloaders(loaders[1])


def split_batch(batch: Any, seq_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and next tokens, each (B, T), of a batch of token ids (B, T + 1) or of one with `labels`."""
    ids, labels = (batch["input_ids"], batch["labels"]) if isinstance(batch, Mapping) else (batch, batch)
    length = min(seq_length, ids.size(1) - 1)
    if length < 1:
        raise UserError(f"samples must have at least 2 tokens, got {ids.size(1)}; check the data module")
    return ids[:, :length].contiguous().long(), labels[:, 1 : length + 1].contiguous().long()


def fit(run: Run, train: TrainArgs, eval: EvalArgs) -> None:
    """Trains until the first of max_tokens, max_steps and max_time, and saves the final checkpoint."""
    fabric, job, schedule, progress = run.fabric, run.job, run.schedule, run.progress
    log = _Log(run, train.log_interval, eval)
    _first_validation(run, log, eval)
    started, seconds_before = time.perf_counter(), progress.seconds
    while progress.iter_num < schedule.max_iters:
        if train.max_time is not None and progress.seconds >= train.max_time:
            fabric.print(f"Stopping after {progress.seconds:.0f} s: train.max_time is {train.max_time:.0f} s")
            break
        for _ in range(min(schedule.accumulation, schedule.max_iters - progress.iter_num)):
            log.add(_micro_step(run))
        stepped = progress.iter_num % schedule.accumulation == 0
        if stepped:
            _optimizer_step(run, train.max_norm)
        progress.seconds = seconds_before + time.perf_counter() - started
        log.train_step()
        if stepped and run.val_loader is not None and progress.step_count % eval.interval == 0:
            log.validation(validate(run, job.score, eval.max_iters))
        if stepped and train.save_interval is not None and progress.step_count % train.save_interval == 0:
            _save(run, run.out_dir / f"step-{progress.step_count:08d}")
            log.restart_clock()
    if eval.final_validation and run.val_loader is not None:
        with _random_state_kept(run):
            log.validation(validate(run, job.score, eval.max_iters), final=True)
    _save(run, run.out_dir / "final")
    log.finish()


def _micro_step(run: Run) -> dict[str, torch.Tensor]:
    """Adds one micro-batch's gradients."""
    fabric, job, schedule = run.fabric, run.job, run.schedule
    batch = next(run.stream)
    for group in job.optimizer.param_groups:
        group["lr"] = schedule.lr(run.progress.iter_num)
    run.progress.iter_num += 1
    input_ids, targets = split_batch(batch, run.seq_length)
    is_accumulating = run.progress.iter_num % schedule.accumulation != 0
    with fabric.no_backward_sync(job.module, enabled=is_accumulating):
        done = (run.progress.iter_num - 1) / schedule.max_iters
        scalars = job.step(input_ids, targets, lambda loss: fabric.backward(loss / schedule.accumulation), done)
    return {name: value.detach() for name, value in scalars.items()}


def _optimizer_step(run: Run, max_norm: float | None) -> None:
    if max_norm is not None:
        run.fabric.clip_gradients(run.job.module, run.job.optimizer, max_norm=max_norm)
    run.job.optimizer.step()
    run.job.optimizer.zero_grad()
    run.progress.step_count += 1


def _save(run: Run, folder: Path) -> None:
    run.fabric.print(f"Saving checkpoint to {str(folder)!r}")
    run.job.save(folder, run.training_state())
    run.fabric.barrier()


def _first_validation(run: Run, log: _Log, eval: EvalArgs) -> None:
    """Scores the teacher, and runs the validation once before training, so that a mistake in it shows at once."""
    if run.val_loader is None or run.progress.iter_num > 0:
        return
    if run.job.teacher_score is not None:
        with _random_state_kept(run):
            log.teacher_validation(validate(run, run.job.teacher_score, eval.max_iters))
        run.job.teacher_score = None  # so that nothing keeps a teacher in memory that is not trained with
    if eval.initial_validation:
        log.validation(validate(run, run.job.score, eval.max_iters))
    else:
        validate(run, run.job.score, max_iters=2)


@contextmanager
def _random_state_kept(run: Run) -> Iterator[None]:
    """For what a run without a teacher, or one that goes on after this, would not have done."""
    before, generators = rng_state(), generator_states(run.val_loader)
    yield
    set_rng_state(before)
    set_generator_states(run.val_loader, generators)


@torch.no_grad()
def validate(run: Run, score: Score, max_iters: int) -> float:
    """Mean cross-entropy in nats over all tokens of the first `max_iters` validation batches."""
    run.fabric.barrier()
    run.job.module.eval()
    total = torch.zeros((), dtype=torch.float64, device=run.fabric.device)
    count = torch.zeros_like(total)
    for k, batch in enumerate(run.val_loader):
        if k >= max_iters:
            break
        input_ids, targets = split_batch(batch, run.seq_length)
        n_tokens = (targets != IGNORE_INDEX).sum()
        total += score(input_ids, targets).double() * n_tokens
        count += n_tokens
    run.job.module.train()
    total, count = (run.fabric.all_reduce(x, reduce_op="sum") for x in (total, count))
    if count == 0:
        raise UserError("the validation data must fill at least one batch, got none; add data or raise eval.max_iters")
    return (total / count).item()


class _Log:
    """Sends a run's figures to the terminal, to litgpt's logger and to `metrics.jsonl`."""

    def __init__(self, run: Run, log_interval: int, eval: EvalArgs) -> None:
        self.run = run
        self.interval = log_interval
        self.throughput = ThroughputMonitor(run.fabric, window_size=5)
        self.first_iter, self.first_seconds = run.progress.iter_num, run.progress.seconds
        self.started = self.last_time = time.perf_counter()
        self.last_iter = run.progress.iter_num
        self.sums: dict[str, torch.Tensor] = {}
        self.n = 0
        is_main = run.fabric.global_rank == 0
        self.file = MetricsLog(run.out_dir / "metrics.jsonl", run.progress.iter_num) if is_main else None

    def add(self, scalars: Mapping[str, torch.Tensor]) -> None:
        """Takes in one micro-batch's scalars, without waiting for the device."""
        for name, value in scalars.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.n += 1

    def train_step(self) -> None:
        """Logs the means since the last time, every `log_interval` optimizer steps."""
        run, progress = self.run, self.run.progress
        if progress.iter_num % (self.interval * run.schedule.accumulation) != 0:
            return
        means = {name: (value / self.n).item() for name, value in self.sums.items()}  # waits for the device
        self.sums, self.n = {}, 0
        now = time.perf_counter()
        iters, seconds = progress.iter_num - self.last_iter, now - self.last_time
        self.last_iter, self.last_time = progress.iter_num, now
        done = progress.iter_num - self.first_iter
        tokens_per_second = iters * run.schedule.tokens_per_iter * run.fabric.world_size / max(seconds, 1e-9)
        row = means | {
            "iter": progress.iter_num,
            "step": progress.step_count,
            "epoch": run.stream.epoch,
            "iter_time": seconds / iters,
            "remaining_time": (now - self.started) / done * (run.schedule.max_iters - progress.iter_num),
            "tokens": self._tokens(),
            "total_tokens": self._tokens() * run.fabric.world_size,
            "learning_rate": run.job.optimizer.param_groups[0]["lr"],
            "tokens_per_second": tokens_per_second,
        }
        self._print_step(row)
        self._write(row, progress.iter_num - 1, self._throughput(now))

    def _throughput(self, now: float) -> dict[str, float]:
        done = self.run.progress.iter_num - self.first_iter
        samples_per_iter = self.run.schedule.tokens_per_iter // self.run.seq_length
        self.throughput.update(
            time=now - self.started,
            batches=done,
            samples=done * samples_per_iter,
            lengths=done * self.run.schedule.tokens_per_iter,
            flops=self.run.job.flops_per_iter * self.interval * self.run.schedule.accumulation or None,
        )
        return self.throughput.compute()

    def _print_step(self, row: dict[str, Any]) -> None:
        parts = ", ".join(f"{name} {row[name]:.3f}" for name in ("ce", "distill") if name in row)
        val = "n/a" if self.run.progress.val_loss is None else f"{self.run.progress.val_loss:.3f}"
        self.run.fabric.print(
            f"epoch {row['epoch'] + 1} | step {row['step']} | loss {row['loss']:.3f}{f' ({parts})' if parts else ''} | "
            f"val {val} | lr {row['learning_rate']:.2e} | {row['tokens_per_second']:,.0f} tokens/s | "
            f"{timedelta(seconds=int(row['remaining_time']))} left"
        )

    def validation(self, val_loss: float, final: bool = False) -> None:
        """Logs a validation of the student."""
        progress = self.run.progress
        progress.val_loss = val_loss
        row = {"val_loss": val_loss, "val_ppl": perplexity(val_loss)}
        self.run.fabric.print(
            f"{'final' if final else f'step {progress.step_count}'} | val loss {val_loss:.4f} | "
            f"val perplexity {row['val_ppl']:.3f}"
        )
        where = {"iter": progress.iter_num, "step": progress.step_count, "tokens": self._tokens()}
        self._write(where | row, progress.iter_num - (0 if final else 1), {}, row)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves what was done since the last step out of the next one's time."""
        self.last_time = time.perf_counter()

    def teacher_validation(self, val_loss: float) -> None:
        """Logs the teacher's one validation."""
        row = {"teacher_val_loss": val_loss, "teacher_val_ppl": perplexity(val_loss)}
        self.run.fabric.print(f"teacher | val loss {val_loss:.4f} | val perplexity {row['teacher_val_ppl']:.3f}")
        self._write({"iter": 0, "tokens": 0} | row, 0, {}, row)

    def _tokens(self) -> int:
        return self.run.progress.iter_num * self.run.schedule.tokens_per_iter

    def _write(self, row: dict, step: int, more: dict, logged: dict | None = None) -> None:
        self.run.fabric.log_dict((row if logged is None else logged) | more, step=step)
        if self.file is not None:
            self.file.write(row)

    def finish(self) -> None:
        """Draws the plot and sums the run up."""
        run = self.run
        if self.file is not None:
            plot_training(self.file.path, run.out_dir / "training.png")
        tokens = (run.progress.iter_num - self.first_iter) * run.schedule.tokens_per_iter * run.fabric.world_size
        seconds = max(1e-9, run.progress.seconds - self.first_seconds)
        run.fabric.print(f"Trained on {tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s")
        if run.fabric.device.type == "cuda":
            run.fabric.print(f"Peak memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")


def perplexity(loss: float) -> float:
    """exp(loss), infinite instead of an overflow."""
    return math.exp(loss) if loss < 700 else math.inf
