"""Steps shared by the training commands: build the model, launch the processes, begin or resume, save."""

from __future__ import annotations

import pprint
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import lightning as L
import torch
import yaml
from lightning.fabric.loggers import CSVLogger
from lightning.fabric.strategies import ModelParallelStrategy, Strategy
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.model import GPT
from litgpt.pretrain import initialize_weights
from litgpt.utils import extend_checkpoint_dir
from torch import nn

from litgpt_whittle.checkpoint import save_checkpoint
from litgpt_whittle.data.loading import packing_of
from litgpt_whittle.document_masks import reset_attention
from litgpt_whittle.errors import UserError
from litgpt_whittle.files import new_folder, write_text
from litgpt_whittle.licenses import FILE as LICENSE
from litgpt_whittle.licenses import license_of
from litgpt_whittle.metrics import BACKWARD, flops
from litgpt_whittle.processes import launch
from litgpt_whittle.sharded_checkpoint import save_parts
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import LayerwiseGPT, tie
from litgpt_whittle.training.checks import make_logger
from litgpt_whittle.training.config import TrainingConfig
from litgpt_whittle.training.data_stream import DataStream
from litgpt_whittle.training.loop import load_data
from litgpt_whittle.training.model_source import BASIS, ModelSource
from litgpt_whittle.training.planned_step import Step
from litgpt_whittle.training.resume import TRAINING_STATE
from litgpt_whittle.training.run import Job, Run, Schedule
from litgpt_whittle.training.sharding import checkpoint_activations, gathered, shard_student
from litgpt_whittle.training.validation import ValidationBatches


def checkpoint_dir_of(path: Path | None) -> Path | None:
    """Return the path of a checkpoint directory, given as a path or as a name under `checkpoints/`."""
    return None if path is None else extend_checkpoint_dir(Path(path))


def build_model(fabric: L.Fabric, config: TrainingConfig, inputs: TrainingInputs) -> GPT:
    """Return the model with its weights; random weights equal those of `litgpt pretrain` with the same seed."""
    fabric.seed_everything(config.seed)
    student = inputs.source
    # a model to be sharded is first built whole, in CPU memory
    device = torch.device("cpu") if isinstance(fabric.strategy, ModelParallelStrategy) else fabric.device
    with Strategy.module_init_context(fabric.strategy, empty_init=True), device:
        model = student.build()
    initialize_weights(fabric, model, n_layer=model.config.n_layer, n_embd=model.config.n_embd)
    if student.is_tied:
        tie(model)
    model.max_seq_length = inputs.step.seq_length
    if student.weights is not None:
        model.load_state_dict(student.weights())
    reset_attention(model, packing_of(inputs.data, inputs.tokenizer_dir))
    if config.activation_checkpointing:
        checkpoint_activations(model)
    return model


class Prepared(NamedTuple):
    """A module that is ready for training, with its data."""

    root: Any
    """The module that Fabric set up"""
    optimizer: torch.optim.Optimizer
    loaders: tuple[Any, ValidationBatches | None]
    """The training dataloader, and the validation batches, if any"""
    schedule: Schedule


def prepare(fabric: L.Fabric, config: TrainingConfig, inputs: TrainingInputs, module: nn.Module) -> Prepared:
    """Set up a module and its optimizer in Fabric, then the data and the schedule, in litgpt's order.

    Raises:
        UserError: If the training or the validation data does not fill one batch.
    """
    train, seq_length = config.train, inputs.step.seq_length
    root = fabric.setup(module)
    optimizer = cast(torch.optim.Optimizer, fabric.setup_optimizers(inputs.step.build_optimizer(root.parameters())))
    loaders = load_data(
        fabric, inputs.data, inputs.tokenizer_dir, train.micro_batch_size, seq_length, config.eval.max_iters
    )
    lr = optimizer.defaults["lr"]
    schedule = Schedule.of(train, seq_length, lr, config.n_local, config.num_nodes, loaders[0])
    return Prepared(root, optimizer, loaders, schedule)


@dataclass(frozen=True)
class TrainingInputs:
    """Inputs of a training run, checked before its processes start."""

    source: ModelSource
    """Source of the trained model"""
    tokenizer_dir: Path | None
    data: DataModule
    arguments: dict[str, Any]
    """The command's arguments as plain values, recorded before training modifies them"""
    step: Step
    """The training step that the memory plan runs"""
    settings: dict[str, Any]
    """Settings that must not change when the run is resumed"""
    state: dict[str, Any] | None
    """Training state to resume from; None for a new run"""


def launch_training(config: TrainingConfig, inputs: TrainingInputs, name: str) -> L.Fabric:
    """Start the processes, and send the command's arguments to the terminal and the logger.

    Args:
        config: The command's arguments.
        inputs: The run's other inputs.
        name: Name of the run for the logger.
    """
    is_resumed = inputs.state is not None
    logger = make_logger(config.logger_name, config.out_dir, name, is_resumed, config.train, config.log)
    strategy = make_strategy(config.strategy, config.world_size, config.used_precision)
    fabric = launch(config.n_local, config.used_precision, config.num_nodes, strategy, [logger])
    fabric.print(pprint.pformat(inputs.arguments))
    if not isinstance(logger, CSVLogger):  # the CSV logger does not support it
        fabric.logger.log_hyperparams(inputs.arguments)
    return fabric


def make_strategy(name: str, n_devices: int, precision: str) -> Strategy | str:
    """Return Fabric's strategy: FSDP2, or "ddp" if the model is not sharded.

    Args:
        name: "auto", "fsdp" or "ddp".
        n_devices: Number of devices on all machines; a single device shards nothing.
        precision: Fabric's name of the precision.
    """
    if n_devices == 1 or name == "ddp":
        return "ddp"
    return ModelParallelStrategy(
        lambda root, mesh: shard_student(root, mesh["data_parallel"], precision),
        data_parallel_size=n_devices,
        tensor_parallel_size=1,
        save_distributed_checkpoint=False,
    )


def begin(fabric: L.Fabric, job: Job, prepared: Prepared, inputs: TrainingInputs, out_dir: Path) -> Run:
    """Return a new run, or one restored from the checkpoint to resume from.

    Args:
        fabric: The Fabric.
        job: The model with its optimizer, training step and scores.
        prepared: Data and schedule.
        inputs: The run's other inputs.
        out_dir: Folder of the checkpoints.
    """
    train_loader, val_batches = prepared.loaders
    stream = DataStream(train_loader, fabric.global_rank, fabric.world_size)
    seq_length = inputs.step.seq_length
    run = Run(fabric, job, stream, val_batches, prepared.schedule, seq_length, out_dir, inputs.settings)
    if inputs.state is not None:
        run.restore(inputs.state)
        fabric.print(f"Resuming at step {run.progress.step_count}")
    return run


class Saver:
    """Writes checkpoint directories: stock litgpt checkpoints with the command's arguments and the training state.

    Args:
        fabric: The Fabric; all of its processes must call the saver.
        model: The trained model.
        inputs: The run's inputs.
        kind: "full", or "sharded" for all but the final checkpoint.
    """

    def __init__(self, fabric: L.Fabric, model: GPT, inputs: TrainingInputs, kind: str = "full") -> None:
        self.fabric, self.model, self.kind = fabric, model, kind
        self._fill = partial(save_student, model=model, inputs=inputs)

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
    inputs: TrainingInputs,
    weights: dict[str, torch.Tensor] | None = None,
    training_state: dict[str, Any] | None = None,
) -> None:
    """Write a student's config and training arguments into a folder, and its weights if given.

    With weights, the folder is a stock litgpt checkpoint.
    """
    shape = model.shape if isinstance(model, LayerwiseGPT) else model.config
    extra = {} if training_state is None else {TRAINING_STATE: training_state}
    source = inputs.source
    if source.basis is not None:
        extra[BASIS] = {"basis": source.basis}
    # the tokenizer's directory may have another license
    known = {} if source.weights_dir is None else license_of(source.weights_dir)
    notes = {LICENSE: known} if known else None
    save_checkpoint(folder, shape, weights, inputs.tokenizer_dir, source.sub_network, extra, notes, source.is_tied)
    write_text(folder / "hyperparameters.yaml", yaml.safe_dump(inputs.arguments, sort_keys=False))


def count_flops(model: GPT, micro_batch_size: int, seq_length: int, frozen: Iterable[Config] = ()) -> int:
    """Count the floating-point operations of one micro-batch: forward and backward of the model, forward of `frozen`.

    The count is computed from the configs, because running a mixture of experts would need its router's choices. Only
    the throughput monitor uses the count. It is 0 for architectures that cannot be counted, and no FLOPs are reported.
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
