"""Batches of text that are read once and kept: those that score candidates, and those that calibrate."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import lightning as L
import torch
from litgpt.config import Config
from litgpt.data import DataModule

from litgpt_whittle.data.loading import connect, train_loader, val_loader
from litgpt_whittle.distillation.losses import IGNORE_INDEX
from litgpt_whittle.errors import UserError
from litgpt_whittle.overlap import Sample, common_share, samples_of
from litgpt_whittle.processes import gather, rank
from litgpt_whittle.training.loop import split_batch
from litgpt_whittle.training.validation import fixed_randomness


class Batch(NamedTuple):
    """Token ids and the tokens that follow them, each of shape (B, T)."""

    input_ids: torch.Tensor
    targets: torch.Tensor

    @property
    def n_tokens(self) -> int:
        """Tokens that count."""
        return int((self.targets != IGNORE_INDEX).sum())


def fixed_batches(loader: Iterable, n: int, max_seq_length: int) -> list[Batch]:
    """Reads the batches that score all candidates, once, into memory.

    Args:
        loader: A validation dataloader of a litgpt data module.
        n: How many to read; fewer when the loader has fewer.
        max_seq_length: Tokens beyond are left out.

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
        raise UserError("the validation data holds no token to predict; give more data or shorten train.max_seq_length")
    return batches


def fingerprint(batches: Sequence[Sequence[torch.Tensor]]) -> str:
    """Sixteen hex digits that tell batches of other tokens, or in another order or shape, apart."""
    digest = hashlib.sha256()
    for batch in batches:
        for tensor in batch:
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def sequence_length(teacher: Config, asked: int | None) -> int:
    """The length of samples: what was asked for, else the teacher's block size, but at most 2048.

    Raises:
        UserError: If that is longer than the teacher's block.
    """
    if asked is not None and asked > teacher.block_size:
        raise UserError(
            f"train.max_seq_length must be at most the teacher's block_size {teacher.block_size}, got {asked}; lower it"
        )
    return asked or min(teacher.block_size, 2048)


def check_seed(seed: int) -> None:
    """Refuses a seed that random generators do not take.

    Raises:
        UserError: If so.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"seed must be from 0 to {2**32 - 1}, got {seed}; choose another")


def validation_batches(data: DataModule, seq_length: int, n: int) -> list[Batch]:
    """The first n validation batches of a connected data module, the same in every run, or all where it has fewer.

    Raises:
        UserError: If it has none.
    """
    loader = val_loader(data)
    if loader is None:
        raise UserError(f"{type(data).__name__} has no validation data to score candidates on; choose other data")
    with fixed_randomness(loader):
        batches = fixed_batches(loader, n, seq_length)
    if len(batches) < n:
        print(f"The validation data fills {len(batches)} batches, fewer than eval.max_iters = {n}; all of it is used")
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
) -> torch.Tensor:
    """Readies a data module and reads what something is calibrated on.

    Args:
        data: The data module.
        checkpoint_dir: Where its tokenizer is.
        batch_size: Windows that it reads at a time.
        seq_length: Their length.
        n_tokens: How many tokens to read.
        seed: The seed of the data's order.
        option: The option that asks for so many, for people to be told that there are fewer.

    Returns:
        Token ids, shape (N, T).

    Raises:
        UserError: As `calibration_windows` does, or if processes read different tokens.
    """
    L.seed_everything(seed, verbose=False)
    connect(data, checkpoint_dir, batch_size, seq_length)
    windows = calibration_windows(data, seq_length, n_tokens)
    if windows.numel() < n_tokens and rank() == 0:
        print(f"The training data has {windows.numel():,} tokens, fewer than {option} = {n_tokens:,}")
    check_shared(data, fingerprint([(windows,)]))
    return windows


def check_shared(data: DataModule, digest: str) -> None:
    """Refuses data of which each process has read a part of its own.

    Args:
        data: The data module.
        digest: Tells what this process has read from what others may have.

    Raises:
        UserError: On all processes, if they differ.
    """
    if len(set(gather(digest))) > 1:
        raise UserError(
            f"all devices must read the same text, and {type(data).__name__} gives each its own; choose other data, or "
            "--devices 1"
        )


def calibration_windows(data: DataModule, seq_length: int, n_tokens: int) -> torch.Tensor:
    """The first tokens that a connected data module would train on.

    Returns:
        Token ids, shape (N, T), with N · T at least `n_tokens`, or all that there are.

    Raises:
        UserError: If there are none, or the validation data has much of the same text.
    """
    samples: list[Sample] = []
    missing = n_tokens
    for raw in train_loader(data):
        if missing <= 0:
            break
        rows = samples_of(*split_batch(raw, seq_length))
        samples += rows
        missing -= sum(len(row.input_ids) for row in rows)
    length = max((len(sample.input_ids) for sample in samples), default=0)
    if not length:
        raise UserError("the training data is empty, so there is nothing to calibrate on; give more data")
    # samples of different lengths, as those of instructions are, follow each other
    windows = torch.cat([sample.input_ids for sample in samples])
    windows = windows[: len(windows) // length * length].view(-1, length)[: -(-n_tokens // length)]
    _check_not_validation(data, samples, seq_length)
    return windows


def _check_not_validation(data: DataModule, samples: Sequence[Sample], seq_length: int) -> None:
    """Refuses calibration data that the student will be judged on. Texts may share a licence here and there."""
    theirs, n_tokens = [], 0
    for raw in val_loader(data) or ():
        rows = samples_of(*split_batch(raw, seq_length))
        theirs += rows
        n_tokens += sum(len(row.input_ids) for row in rows)
        if n_tokens > 10_000_000:  # enough to tell
            break
    if (share := common_share(samples, theirs, seq_length)) > 0.1:
        raise UserError(
            f"calibration data must not be validation data, and {share:.0%} of the text of one is in the other; "
            "give the data module another validation split, or raise train.max_seq_length if it cuts samples off "
            "before they differ"
        )
