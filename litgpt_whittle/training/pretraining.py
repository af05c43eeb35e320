"""Shared steps of the training commands: build the model, launch the processes, begin or resume, save."""

from __future__ import annotations

import pprint
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.fabric.loggers import CSVLogger, Logger
from lightning.fabric.strategies import ModelParallelStrategy, Strategy
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.pretrain import initialize_weights
from litgpt.utils import extend_checkpoint_dir

from litgpt_whittle.checkpoint import save_checkpoint
from litgpt_whittle.errors import UserError
from litgpt_whittle.files import new_folder, write_text
from litgpt_whittle.metrics import BACKWARD, flops
from litgpt_whittle.processes import launch
from litgpt_whittle.sharded_checkpoint import save_parts
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import LayerwiseGPT, tie
from litgpt_whittle.training.data_stream import DataStream
from litgpt_whittle.training.model_source import BASIS, ModelSource
from litgpt_whittle.training.resume import TRAINING_STATE
from litgpt_whittle.training.run import Job, Run, Schedule
from litgpt_whittle.training.sharding import checkpoint_activations, gathered, shard_student
from litgpt_whittle.training.validation import ValidationBatches


def checkpoint_dir_of(path: Path | None) -> Path | None:
    """Return a checkpoint directory, given by its path or its name under `checkpoints/`."""
    return None if path is None else extend_checkpoint_dir(Path(path))


def build_model(fabric: L.Fabric, student: ModelSource, seq_length: int, activation_checkpointing: bool) -> GPT:
    """Return the model with its weights; random ones equal those of `litgpt pretrain` with the same seed."""
    # weights to be sharded are first whole, in CPU memory
    device = torch.device("cpu") if isinstance(fabric.strategy, ModelParallelStrategy) else fabric.device
    with Strategy.module_init_context(fabric.strategy, empty_init=True), device:
        model = student.build()
    initialize_weights(fabric, model, n_layer=model.config.n_layer, n_embd=model.config.n_embd)
    if student.is_tied:
        tie(model)
    model.max_seq_length = seq_length
    if student.weights is not None:
        model.load_state_dict(student.weights())
    if activation_checkpointing:
        checkpoint_activations(model)
    return model


def launch_training(
    devices: int, num_nodes: int, precision: str, strategy: str, logger: Logger, arguments: dict[str, Any]
) -> L.Fabric:
    """Start the processes, and send the command's arguments to the terminal and the logger."""
    fabric = launch(devices, precision, num_nodes, make_strategy(strategy, devices * num_nodes, precision), [logger])
    fabric.print(pprint.pformat(arguments))
    if not isinstance(logger, CSVLogger):  # the CSV logger does not support it
        fabric.logger.log_hyperparams(arguments)
    return fabric


def make_strategy(name: str, n_devices: int, precision: str) -> Strategy | str:
    """Return Fabric's strategy for training the student on several devices."""
    if n_devices == 1 or name == "ddp":
        return "ddp"
    return ModelParallelStrategy(
        lambda root, mesh: shard_student(root, mesh["data_parallel"], precision),
        data_parallel_size=n_devices,
        tensor_parallel_size=1,
        save_distributed_checkpoint=False,
    )


def begin(
    fabric: L.Fabric,
    job: Job,
    train_loader: Any,
    validation: ValidationBatches | None,
    schedule: Schedule,
    seq_length: int,
    out_dir: Path,
    settings: dict[str, Any],
    state: dict[str, Any] | None,
) -> Run:
    """Return a new run, or one restored from a checkpoint's `state`."""
    stream = DataStream(train_loader, fabric.global_rank, fabric.world_size)
    run = Run(fabric, job, stream, validation, schedule, seq_length, out_dir, settings)
    if state is not None:
        run.restore(state)
        fabric.print(f"Resuming at step {run.progress.step_count}")
    return run


class Saver:
    """Writes checkpoint directories: stock litgpt checkpoints with the command's arguments and the training state.

    Args:
        fabric: The Fabric; all of its processes must call the saver.
        model: The trained model.
        student: Source of the model.
        tokenizer_dir: Directory to copy the tokenizer from.
        arguments: The command's arguments.
        kind: "full", or "sharded" for all but the final checkpoint.
    """

    def __init__(
        self,
        fabric: L.Fabric,
        model: GPT,
        student: ModelSource,
        tokenizer_dir: Path | None,
        arguments: dict[str, Any],
        kind: str = "full",
    ) -> None:
        self.fabric, self.model, self.kind = fabric, model, kind
        self._fill = partial(
            save_student, model=model, tokenizer_dir=tokenizer_dir, student=student, arguments=arguments
        )

    def __call__(self, folder: Path, training_state: dict[str, Any], is_final: bool) -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        weights = self.model.state_dict()
        if self.model.lm_head.weight is self.model.transformer.wte.weight:
            del weights["lm_head.weight"]  # tied: saved once, as the embedding
        if self.kind == "sharded" and not is_final:
            save_parts(folder, {"weights": weights, "training": training_state}, self._fill)
            return
        weights, training_state = gathered(weights), gathered(training_state)
        if self.fabric.global_rank == 0:
            with new_folder(folder) as inside:
                self._fill(inside, weights=weights, training_state=training_state)


def save_student(
    folder: Path,
    model: GPT,
    tokenizer_dir: Path | None,
    student: ModelSource,
    arguments: dict[str, Any],
    weights: dict[str, torch.Tensor] | None = None,
    training_state: dict[str, Any] | None = None,
) -> None:
    """Fill a folder with a student's config and training arguments; with weights it is a stock litgpt checkpoint."""
    shape = model.shape if isinstance(model, LayerwiseGPT) else model.config
    extra = {} if training_state is None else {TRAINING_STATE: training_state}
    if student.basis is not None:
        extra[BASIS] = {"basis": student.basis}
    save_checkpoint(folder, shape, weights, tokenizer_dir, student.sub_network, extra, tied=student.is_tied)
    write_text(folder / "hyperparameters.yaml", yaml.safe_dump(arguments, sort_keys=False))


def count_flops(model: GPT, micro_batch_size: int, seq_length: int, frozen: Iterable[Config] = ()) -> int:
    """Count the floating-point operations of one micro-batch: forward and backward of the model, forward of `frozen`.

    Nothing is run, because a mixture of experts needs its router's choices. Only the throughput monitor reads the
    count; for an architecture that cannot be counted it is 0, and the monitor reports no FLOPs.
    """
    shape = model.shape if isinstance(model, LayerwiseGPT) else model.config
    try:
        per_token = (1 + BACKWARD) * _forward_flops(shape, seq_length)
        per_token += sum(_forward_flops(config, seq_length) for config in frozen)
    except (TypeError, UserError) as error:
        rank_zero_warn(f"FLOPs cannot be counted: {error}")
        return 0
    return per_token * micro_batch_size * seq_length


def _forward_flops(shape: Config | SubNet, seq_length: int) -> int:
    subnet = shape if isinstance(shape, SubNet) else SubNet.full(shape)
    return flops(subnet.teacher, subnet, seq_length)
