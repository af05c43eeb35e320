"""A training run: its job, schedule and progress, and the state to resume from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import nn

from litgpt_whittle.errors import UserError
from litgpt_whittle.training.args import TrainArgs
from litgpt_whittle.training.data_stream import DataStream
from litgpt_whittle.training.resume import rng_state, set_rng_state
from litgpt_whittle.training.sharding import load_gathered, load_optimizer_state
from litgpt_whittle.training.validation import ValidationBatches

if TYPE_CHECKING:
    from lightning.fabric.wrappers import _FabricModule

Backward = Callable[[torch.Tensor], None]
"""Accumulates a loss's gradients for the next optimizer step; may be called several times per batch."""

TrainingStep = Callable[[torch.Tensor, torch.Tensor, Backward, float], Mapping[str, torch.Tensor]]
"""(input_ids (B, T), targets (B, T), backward, completed fraction of training) -> scalars to log by name, including
"loss". The names are the same at every step; NaN marks a scalar without a value."""

Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(input_ids (B, T), targets (B, T)) -> mean cross-entropy in nats over the targets that are not ignored."""


@dataclass
class Job:
    """A model to train, with its optimizer and the functions that run a step, score a batch and save the weights."""

    module: _FabricModule
    """Root module, set up by Fabric"""
    optimizer: torch.optim.Optimizer
    """Optimizer, set up by Fabric"""
    step: TrainingStep
    score: Score
    save: Callable[[Path, dict[str, Any], bool], None]
    """(folder, training state, is_final) -> None; writes a checkpoint directory with the weights, atomically. All
    processes must call it"""
    look_up: Callable[[torch.Tensor], None] | None = None
    """Called before each `step` with the token ids (B, T) in CPU memory, to look up cached targets"""
    teacher_score: Score | None = None
    """Scores the teacher itself, once before training; None if the teacher does not run"""
    helper: nn.Module | None = None
    """Module that is trained with the model but not saved with its weights, such as learned projections"""
    more_scores: Mapping[str, Score] = field(default_factory=dict)
    """Scores of further models at each validation, such as sub-networks, by name"""
    text_bytes: Score | None = None
    """Computes the mean bytes of text per target, to log losses in bits per byte, too; None to log only nats"""
    flops_per_iter: int = 0
    """Floating-point operations of one micro-batch, for the throughput monitor"""


@dataclass(frozen=True)
class Schedule:
    """Length of training and learning-rate schedule, counted in micro-batches as in litgpt."""

    max_iters: int
    warmup_iters: int
    accumulation: int
    tokens_per_iter: int
    max_lr: float
    min_lr: float
    decay_iters: int | None = None
    """Length of the final decay of a warm-up–stable–decay schedule, in micro-batches; None for a cosine"""

    @classmethod
    def of(cls, train: TrainArgs, seq_length: int, lr: float, devices: int, num_nodes: int, loader: Any) -> Schedule:
        """Return the schedule for litgpt's arguments; it ends at max_tokens or max_steps, whichever comes first."""
        accumulation = train.gradient_accumulation_iters(devices, num_nodes)
        tokens_per_iter = train.micro_batch_size * seq_length
        max_iters = n_iters(train, seq_length, devices, num_nodes)
        warmup = train.warmup_iters(devices, num_nodes, max_iters, loader)
        if warmup == max_iters:
            rank_zero_warn(
                f"the learning rate's warm-up takes all of the training's {-(-warmup // accumulation):,} steps and "
                "never reaches its peak; lower train.lr_warmup_steps"
            )
        decay = round(train.lr_decay_fraction * max_iters) if train.lr_schedule == "wsd" else None
        return cls(max_iters, warmup, accumulation, tokens_per_iter, lr, train.min_lr, decay)

    def lr(self, iteration: int) -> float:
        """Return the learning rate: linear warm-up, then a half cosine, or constant and a final linear decay."""
        if iteration < self.warmup_iters:
            return self.max_lr * iteration / self.warmup_iters
        if self.decay_iters is not None:
            left = (self.max_iters - iteration) / max(1, self.decay_iters)
            return self.min_lr + (self.max_lr - self.min_lr) * min(1.0, left)
        done = (iteration - self.warmup_iters) / max(1, self.max_iters - self.warmup_iters)
        return self.min_lr + (self.max_lr - self.min_lr) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def n_iters(train: TrainArgs, seq_length: int, devices: int, num_nodes: int) -> int:
    """Return the number of micro-batches that each device trains on.

    Raises:
        UserError: If they are fewer than one optimizer step needs, so that nothing would be learned.
    """
    accumulation = train.gradient_accumulation_iters(devices, num_nodes)
    limits, n_tokens = [], train.micro_batch_size * seq_length
    if train.max_tokens is not None:
        limits.append(train.max_tokens // (devices * num_nodes) // n_tokens)
    if train.max_steps is not None:
        limits.append(train.max_steps * accumulation)
    if min(limits) < accumulation:
        raise UserError(
            f"training must take at least one step of {n_tokens * accumulation * devices * num_nodes:,} tokens, got "
            f"train.max_tokens = {train.max_tokens} and train.max_steps = {train.max_steps}; raise them, or lower "
            "train.global_batch_size"
        )
    return min(limits)


@dataclass
class Progress:
    """Progress of a run, including the part before it was resumed."""

    iter_num: int = 0
    step_count: int = 0
    seconds: float = 0.0
    val_loss: float | None = None
    n_skipped: int = 0
    """Number of steps without an update, because the loss or a gradient was not finite"""


@dataclass
class Run:
    """A training run: the job, its data and its progress."""

    fabric: L.Fabric
    job: Job
    stream: DataStream
    validation: ValidationBatches | None
    schedule: Schedule
    seq_length: int
    out_dir: Path
    settings: dict[str, Any]
    """Settings that must not change when the run is resumed"""
    progress: Progress = field(default_factory=Progress)

    def training_state(self) -> dict[str, Any]:
        """Return the state to save in addition to the weights; sharded tensors stay sharded."""
        return {
            "optimizer": self.job.optimizer.state_dict(),
            "helper": {} if self.job.helper is None else self.job.helper.state_dict(),
            "iter_num": self.progress.iter_num,
            "accumulation": self.schedule.accumulation,
            "step_count": self.progress.step_count,
            "seconds": self.progress.seconds,
            "val_loss": self.progress.val_loss,
            "n_skipped": self.progress.n_skipped,
            "data": self.stream.state_dict(),
            "val_generators": [] if self.validation is None else self.validation.state_dict(),
            "rng": rng_state(),
            "settings": self.settings,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a `training_state`. The caller loads the weights."""
        load_optimizer_state(self.job.optimizer, state["optimizer"])
        if self.job.helper is not None:
            load_gathered(self.job.helper, state["helper"])
        # the number of iterations per step depends on the number of devices
        iter_num = state["iter_num"] * self.schedule.accumulation // state["accumulation"]
        self.progress = Progress(iter_num, state["step_count"], state["seconds"], state["val_loss"], state["n_skipped"])
        self.stream.load_state_dict(state["data"])
        if self.validation is not None:
            self.validation.load_state_dict(state["val_generators"])
        # last, because restoring the data position draws random numbers
        set_rng_state(state["rng"])
