"""Arguments shared by the commands that train."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from litgpt.args import EvalArgs, LogArgs
from litgpt.config import Config, name_to_config
from litgpt.data import DataModule
from litgpt.types import LoggerChoice
from litgpt.utils import get_default_supported_precision, init_out_dir

import litgpt_whittle.data  # noqa: F401  lets the command line find HFText by its bare name
from litgpt_whittle.command_config import CommandConfig, Result
from litgpt_whittle.data.tokenizer_content import encoding_fingerprint
from litgpt_whittle.distillation.objective import Objective
from litgpt_whittle.files import check_writable
from litgpt_whittle.processes import lock_dir_for_all, own_device
from litgpt_whittle.setting_checks import check_seed
from litgpt_whittle.settings import describe
from litgpt_whittle.training.args import TrainArgs
from litgpt_whittle.training.checks import check_arguments, check_devices, check_logger, read_optimizer
from litgpt_whittle.training.model_source import ModelSource
from litgpt_whittle.training.planned_step import Step
from litgpt_whittle.training.resume import find_resume
from litgpt_whittle.training.run import n_iters


def _default_train() -> TrainArgs:
    return TrainArgs(
        save_interval=1000,
        log_interval=1,
        global_batch_size=512,
        micro_batch_size=4,
        max_tokens=int(3e12),
        max_norm=1.0,
        min_lr=4e-5,
        lr_warmup_steps=2000,
    )


@dataclass
class TrainingConfig(CommandConfig):
    """Arguments shared by the commands that train: those of `litgpt pretrain` in its order, then further ones."""

    FREE: ClassVar[frozenset[str]] = frozenset(
        ("out_dir", "resume", "eval", "log", "devices", "num_nodes")
        + ("logger_name", "strategy", "activation_checkpointing", "checkpoint_type", "dry_run")
        + ("train.save_interval", "train.log_interval", "train.max_time", "data.init_args.num_workers")
    )
    # `run_settings` records the precision and the tokenizer in use instead; a resumed run has its own weights
    RESOLVED: ClassVar[frozenset[str]] = frozenset(("precision", "tokenizer_dir", "initial_checkpoint_dir"))

    model_name: str | None = None
    """A litgpt model to start from random weights. Use "list" to list them."""
    model_config: Config | None = None
    """A ``litgpt.Config`` to start from random weights. Overrides ``model_name``."""
    out_dir: Path = Path("out/train")
    """Directory for checkpoints, logs, ``metrics.jsonl`` and ``training.png``."""
    precision: Literal["bf16-true", "bf16-mixed", "32-true", None] = None
    """The precision to train in. Determines a compatible precision setting by default."""
    initial_checkpoint_dir: Path | None = None
    """A pretrained litgpt checkpoint directory to start from."""
    resume: bool | Literal["auto"] | Path = False
    """Checkpoint directory of an interrupted run, or ``True`` for the latest checkpoint in ``out_dir``, or ``'auto'``
    to resume only if there is one. Settings that affect the weights must be those of the interrupted run."""
    data: DataModule | None = None
    """Data-related arguments. If not provided, the default is ``litgpt.data.TinyLlama``."""
    train: TrainArgs = field(default_factory=_default_train)
    """Training-related arguments. Training ends when the first of ``max_tokens``, ``max_steps`` and ``max_time`` is
    reached."""
    eval: EvalArgs = field(default_factory=lambda: EvalArgs(interval=1000, max_iters=100))
    """Evaluation-related arguments. See ``litgpt.args.EvalArgs`` for details."""
    log: LogArgs = field(default_factory=LogArgs)
    """Arguments for the logger. See ``litgpt.args.LogArgs`` for details."""
    optimizer: str | dict = "AdamW"
    """An optimizer name (such as "AdamW") or config."""
    devices: int | str = "auto"
    """Number of devices on this machine; ``auto`` for all GPUs, or the CPU if there are none."""
    num_nodes: int = 1
    """Number of machines."""
    tokenizer_dir: Path | None = None
    """Directory of the data module's tokenizer, copied into the checkpoints. By default that of the checkpoint."""
    logger_name: LoggerChoice = "tensorboard"
    """The name of the logger to send metrics to."""
    seed: int = 42
    """The random seed to use for reproducibility."""
    strategy: Literal["auto", "fsdp", "ddp"] = "auto"
    """Distribution of the trained model over several devices: ``fsdp`` shards its weights (FSDP2) and is the default;
    ``ddp`` replicates them, which is faster for small models."""
    activation_checkpointing: bool = False
    """If true, recompute activations in the backward pass, which is slower but takes less memory."""
    checkpoint_type: Literal["full", "sharded"] = "full"
    """Format of intermediate checkpoints. ``full``: the first process gathers all weights and the optimizer state, and
    writes a stock litgpt checkpoint. ``sharded``: every process writes a part. The final checkpoint is always full."""
    dry_run: bool = False
    """If true, check all settings, print the memory that training needs, and stop."""

    def __post_init__(self) -> None:
        self.out_dir = init_out_dir(self.out_dir)

    def validate(self) -> None:
        read_optimizer(self.optimizer)
        check_arguments(self.train, self.eval, self.initial_checkpoint_dir, self.resume)
        check_seed(self.seed)
        check_writable(self.out_dir)
        check_logger(self.logger_name)
        check_devices(self.devices, self.num_nodes, self.train)

    def run(self) -> Any:
        """Train the model.

        Returns:
            The folder of the run, as a `TrainingResult`, or a `Result` with the memory plan after a dry run; None on
            all processes but the first after a dry run.

        Raises:
            UserError: For the first invalid argument, before anything expensive starts.
        """
        if self.model_name == "list":
            return Result(self.out_dir, summary="\n".join(["Available values:", *sorted(name_to_config)]))
        self.validate()
        with nullcontext() if self.dry_run else lock_dir_for_all(self.out_dir):
            return self.train_model(find_resume(self.resume, self.out_dir))

    @abstractmethod
    def train_model(self, resume_dir: Path | None) -> Any:
        """Train, with `out_dir` locked; in a dry run, only plan the memory.

        Args:
            resume_dir: Checkpoint directory to resume from; None for a new run.

        Returns:
            As for `run`.
        """

    def arguments(self) -> dict[str, Any]:
        return super().arguments() | {"optimizer": describe(read_optimizer(self.optimizer))}

    def run_settings(self, model: Config, tokenizer_dir: Path | None) -> dict[str, Any]:
        """Return the settings that determine a run's final weights; a resumed run must not change them.

        Save and log intervals, the time limit and the number of data workers may change, and the tokenizer may move.

        Args:
            model: Config of the trained model.
            tokenizer_dir: Directory of the tokenizer in use, if any.
        """
        found = {
            "precision": self.used_precision,
            "tokenizer's content": None if tokenizer_dir is None else encoding_fingerprint(tokenizer_dir),
            "student's parameters": f"{model.n_layer} layers, {model.n_embd} channels",
        }
        return self.determining_arguments() | found

    @property
    def used_precision(self) -> str:
        """Training precision: `precision`, or the device's default."""
        return self.precision or get_default_supported_precision(training=True)

    @property
    def n_local(self) -> int:
        """Number of devices on this machine."""
        return check_devices(self.devices, self.num_nodes, self.train)

    @property
    def world_size(self) -> int:
        """Number of devices on all machines."""
        return self.n_local * self.num_nodes

    def n_tokens(self, seq_length: int) -> int:
        """Return the number of training tokens on all devices.

        Args:
            seq_length: Tokens per sample.

        Raises:
            UserError: If there are too few tokens for one optimizer step.
        """
        n = n_iters(self.train, seq_length, self.n_local, self.num_nodes)
        return n * self.world_size * self.train.micro_batch_size * seq_length

    def step(self, source: ModelSource, seq_length: int, objective: Objective, **rest: Any) -> Step:
        """Return the training step for the memory plan.

        Args:
            source: Source of the trained model.
            seq_length: Tokens per sample.
            objective: The training objective.
            rest: Further fields of `Step`.
        """
        return Step.of(
            self.train,
            source.build,
            read_optimizer(self.optimizer),
            self.used_precision,
            own_device(),
            self.world_size,
            self.strategy,
            seq_length,
            objective=objective,
            activation_checkpointing=self.activation_checkpointing,
            tie_embeddings=source.is_tied,
            **rest,
        )
