"""Base class of the commands that write a pruned checkpoint of the same architecture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from litgpt.data import DataModule
from litgpt.utils import extend_checkpoint_dir

from litgpt_whittle.batches import Batch, BatchArgs, BudgetArgs, sequence_length
from litgpt_whittle.checkpoint import WEIGHTS, check_checkpoint, load_model
from litgpt_whittle.command_config import CommandConfig
from litgpt_whittle.data.hf_text import HFText  # noqa: F401 (lets --data HFText be found by its name)
from litgpt_whittle.data.loading import check_data
from litgpt_whittle.files import check_out_dir
from litgpt_whittle.fitness.perplexity import Perplexity
from litgpt_whittle.setting_checks import check_seed
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import Weights


@dataclass
class PruneBase(CommandConfig):
    """Arguments of a command that prunes a checkpoint on data."""

    checkpoint_dir: Path
    """The checkpoint directory."""
    out_dir: Path
    """Directory of the pruned checkpoint."""
    data: DataModule | None = None
    """Data to prune and to measure on."""
    train: BatchArgs = field(default_factory=BatchArgs)
    """Micro batch size and sequence length."""
    eval: BudgetArgs = field(default_factory=BudgetArgs)
    """Number of validation batches for measuring the model before and after."""
    overwrite: bool = False
    """Replace the checkpoint in ``out_dir``."""
    seed: int = 42
    """Seed of the data order."""

    def __post_init__(self) -> None:
        self.checkpoint_dir, self.out_dir = extend_checkpoint_dir(Path(self.checkpoint_dir)), Path(self.out_dir)

    def validate(self) -> None:
        """Check the arguments that both commands share.

        Raises:
            UserError: For the first invalid argument.
        """
        check_seed(self.seed)
        config = check_checkpoint(self.checkpoint_dir)
        _ = self.length  # raises if it exceeds the model's
        check_data(self.data, self.checkpoint_dir, config.padded_vocab_size)
        check_out_dir(self.out_dir, self.overwrite, (self.checkpoint_dir,), WEIGHTS)

    @property
    def length(self) -> int:
        """Tokens per sample."""
        return sequence_length(check_checkpoint(self.checkpoint_dir), self.train.max_seq_length)


def measure_perplexity(
    checkpoint_dir: Path, weights: Weights | None, batches: Sequence[Batch], device: torch.device
) -> float | None:
    """Return the perplexity of a checkpoint.

    Args:
        checkpoint_dir: The checkpoint directory.
        weights: Weights to measure instead of the checkpoint's own; None for its own.
        batches: Validation batches; if there are none, the perplexity is None.
        device: Device to run on.
    """
    if not batches:
        return None
    model = load_model(checkpoint_dir, "SuperGPT")
    if weights is not None:
        model.load_state_dict(weights, assign=True)
    # half precision is slow on CPUs
    model = model.to(device, torch.float32 if device.type == "cpu" else None)
    return Perplexity(model, batches)(SubNet.full(model.config))["perplexity"]
