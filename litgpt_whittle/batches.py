"""Fixed batches of tokens that are read once into memory, for scoring candidates and for calibration."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import lightning as L
import torch
from litgpt.config import Config
from litgpt.data import DataModule

from litgpt_whittle.data.loading import connect, split_batch, train_loader, val_loader
from litgpt_whittle.errors import UserError
from litgpt_whittle.overlap import Sample, common_share, samples_of
from litgpt_whittle.processes import gather, rank
from litgpt_whittle.setting_checks import check_positive
from litgpt_whittle.tensors import IGNORE_INDEX
from litgpt_whittle.training.validation import fixed_randomness

logger = logging.getLogger(__name__)


@dataclass
class BatchArgs:
    """Validation batches on which candidates are scored"""

    micro_batch_size: int = 4
    """Number of samples per forward pass"""
    max_seq_length: int | None = None
    """Length of samples; by default the teacher's block size, up to 2048"""

    def __post_init__(self) -> None:
        check_positive("train", micro_batch_size=self.micro_batch_size, max_seq_length=self.max_seq_length)


@dataclass
class BudgetArgs:
    """Amount of validation data per candidate"""

    max_iters: int = 32
    """Validation batches per candidate"""

    def __post_init__(self) -> None:
        check_positive("eval", max_iters=self.max_iters)


class Batch(NamedTuple):
    """Token ids and next-token targets, each of shape (B, T)."""

    input_ids: torch.Tensor
    targets: torch.Tensor

    @property
    def n_tokens(self) -> int:
        """Number of tokens with a target that is not ignored."""
        return int((self.targets != IGNORE_INDEX).sum())

    @property
    def counts(self) -> torch.Tensor | None:
        """True at positions whose target is not ignored, shape (B, T); None if no target is, as in plain text."""
        counts = self.targets != IGNORE_INDEX
        return None if bool(counts.all()) else counts


def fixed_batches(loader: Iterable, n: int, max_seq_length: int) -> list[Batch]:
    """Read into memory the batches on which all candidates are scored.

    Args:
        loader: A validation dataloader of a litgpt data module.
        n: Maximum number of batches; batches whose targets are all ignored are skipped and not counted.
        max_seq_length: Length to which samples are truncated.

    Raises:
        UserError: If there is no token to predict.
    """
    batches = []
    for raw in loader:
        batch = Batch(*split_batch(raw, max_seq_length))
        if batch.n_tokens:
            batches.append(batch)
        if len(batches) == n:
            break
    if not batches:
        raise UserError(
            "the validation data holds no token to predict; give more data, or raise train.max_seq_length so that "
            "samples keep their answers"
        )
    return batches


def fingerprint(batches: Sequence[Sequence[torch.Tensor]]) -> str:
    """Return a hash of the batches' tokens, order and shapes: sixteen hex digits."""
    digest = hashlib.sha256()
    for batch in batches:
        for tensor in batch:
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def sequence_length(teacher: Config, asked: int | None) -> int:
    """Return the sequence length: `asked`, or by default the smaller of the teacher's block size and 2048.

    Raises:
        UserError: If `asked` exceeds the teacher's block size.
    """
    if asked is not None and asked > teacher.block_size:
        raise UserError(
            f"train.max_seq_length must be at most the teacher's block_size {teacher.block_size}, got {asked}; lower it"
        )
    return asked or min(teacher.block_size, 2048)


def validation_batches(data: DataModule, seq_length: int, n: int) -> list[Batch]:
    """Read the first n validation batches of a connected data module, or all if it has fewer.

    Every run reads the same batches.

    Raises:
        UserError: If the data module has no validation data.
    """
    loader = val_loader(data)
    if loader is None:
        raise UserError(f"{type(data).__name__} has no validation data to score candidates on; choose other data")
    with fixed_randomness(loader):
        batches = fixed_batches(loader, n, seq_length)
    if len(batches) < n:
        logger.info(
            f"The validation data fills {len(batches)} batches, fewer than eval.max_iters = {n}; all of it is used"
        )
    return batches


def batches_after(data: DataModule, seq_length: int, n: int, n_tokens: int) -> list[Batch]:
    """Read the validation batches after the first n, up to about `n_tokens` tokens."""
    found: list[Batch] = []
    loader = val_loader(data)
    with fixed_randomness(loader):  # in the order of `validation_batches`
        for raw in loader or ():
            if sum(batch.n_tokens for batch in found[n:]) >= n_tokens:
                break
            batch = Batch(*split_batch(raw, seq_length))
            found += [batch] if batch.n_tokens else []
    return found[n:]


def read_calibration(
    data: DataModule, checkpoint_dir: Path, batch_size: int, seq_length: int, n_tokens: int, seed: int, option: str
) -> Batch:
    """Connect a data module and read the calibration tokens.

    Args:
        data: The data module.
        checkpoint_dir: Directory of the tokenizer.
        batch_size: Samples per batch of the data module.
        seq_length: Maximum length of samples.
        n_tokens: Number of tokens to read.
        seed: Random seed for the order of the data.
        option: Name of the option that sets `n_tokens`, for the log message if the data has fewer tokens.

    Returns:
        Windows, shape (N, T).

    Raises:
        UserError: As in `calibration_windows`, or if processes read different tokens.
    """
    L.seed_everything(seed, verbose=False)
    connect(data, checkpoint_dir, batch_size, seq_length)
    windows = calibration_windows(data, seq_length, n_tokens)
    n_read = windows.input_ids.numel()
    if n_read < n_tokens and rank() == 0:
        logger.info(f"The training data has {n_read:,} tokens, fewer than {option} = {n_tokens:,}")
    check_shared(data, fingerprint([windows]))
    return windows


def check_shared(data: DataModule, digest: str) -> None:
    """Check that all processes have read the same data.

    Args:
        data: The data module.
        digest: Fingerprint of the data that this process has read.

    Raises:
        UserError: On all processes, if the fingerprints differ.
    """
    if len(set(gather(digest))) > 1:
        raise UserError(
            f"all devices must read the same text, but {type(data).__name__} gives each device different text; choose "
            "other data, or --devices 1"
        )


def calibration_windows(data: DataModule, seq_length: int, n_tokens: int) -> Batch:
    """Read the first training tokens of a connected data module.

    Returns:
        Windows, shape (N, T). N · T is at least `n_tokens`, unless the data has fewer tokens.

    Raises:
        UserError: If there are no training tokens, or more than a tenth of their text is also in the validation data.
    """
    samples = _read_samples(train_loader(data), seq_length, n_tokens)
    length = max((len(sample.input_ids) for sample in samples), default=0)
    if not length:
        raise UserError(
            "the training data has no unmasked labels to calibrate on; give more data, or "
            "raise train.max_seq_length so that samples keep their answers"
        )
    windows = _concatenated(samples, length, -(-n_tokens // length))
    _check_not_validation(data, samples, seq_length)
    return windows


def held_out_windows(data: DataModule, seq_length: int, length: int, n: int) -> Batch | None:
    """Read the first validation tokens of a connected data module; every run reads the same tokens.

    Args:
        data: The data module.
        seq_length: Length to which samples are truncated.
        length: Tokens per window.
        n: Maximum number of windows.

    Returns:
        Windows, shape (N, length); None if the data does not fill a window.
    """
    loader = val_loader(data)
    if loader is None:
        return None
    with fixed_randomness(loader):
        samples = _read_samples(loader, seq_length, n * length)
    windows = _concatenated(samples, length, n) if samples else None
    return windows if windows is not None and len(windows.input_ids) else None


def _read_samples(loader: Iterable, seq_length: int, n_tokens: int) -> list[Sample]:
    """Read whole batches of samples until they have at least `n_tokens` tokens or the data ends."""
    samples: list[Sample] = []
    missing = n_tokens
    for raw in loader:
        if missing <= 0:
            break
        rows = samples_of(*split_batch(raw, seq_length))
        samples += rows
        missing -= sum(len(row.input_ids) for row in rows)
    return samples


def _concatenated(samples: Sequence[Sample], length: int, n: int) -> Batch:
    """Concatenate samples, which may differ in length, and return up to n windows of them, shape (N, length)."""
    n_tokens = min(sum(len(sample.input_ids) for sample in samples) // length, n) * length
    return Batch(*(torch.cat(part)[:n_tokens].view(-1, length) for part in zip(*samples)))


def _check_not_validation(data: DataModule, samples: Sequence[Sample], seq_length: int) -> None:
    """Raise UserError if calibration and validation data share more than 10% of their text.

    Less is allowed, since texts may share boilerplate such as licences.
    """
    theirs = _read_samples(val_loader(data) or (), seq_length, 10_000_000)  # enough to detect an overlap
    if (share := common_share(samples, theirs, seq_length)) > 0.1:
        raise UserError(
            f"calibration and validation data must not overlap, but {share:.0%} of one is in the other; "
            "give the data module another validation split, or raise train.max_seq_length if it truncates samples "
            "before they differ"
        )
