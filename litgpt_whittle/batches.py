"""Batches of text that are read once and kept: those that score candidates, and those that calibrate."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import lightning as L
import numpy as np
import torch
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.tokenizer import Tokenizer

from litgpt_whittle.checkpoint import has_tokenizer
from litgpt_whittle.data.hf_text import HFText
from litgpt_whittle.distillation.losses import IGNORE_INDEX
from litgpt_whittle.errors import UserError
from litgpt_whittle.extras import naming_packages
from litgpt_whittle.processes import first_does, gather, rank
from litgpt_whittle.training.loop import split_batch


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


def check_data(data: DataModule | None, checkpoint_dir: Path | None) -> None:
    """Refuses text that is not there or that nobody can tokenise, before anything expensive starts.

    Args:
        data: Any data module; only our own can be asked.
        checkpoint_dir: Where its tokenizer is to come from; None where no folder has one.

    Raises:
        UserError: In both cases.
    """
    if not isinstance(data, HFText):
        return
    if checkpoint_dir is None or not has_tokenizer(checkpoint_dir):
        where = "" if checkpoint_dir is None else f", and {str(checkpoint_dir)!r} has none"
        raise UserError(
            f"HFText needs a tokenizer{where}; put the model's tokenizer.json into its checkpoint directory"
        )
    data.check()


def connect(
    data: DataModule, checkpoint_dir: Path, batch_size: int, seq_length: int, validation_only: bool = False
) -> None:
    """Readies a data module, with the checkpoint's tokenizer if it has one; the first process prepares for all."""
    tokenizer = Tokenizer(checkpoint_dir) if has_tokenizer(checkpoint_dir) else None
    data.connect(tokenizer=tokenizer, batch_size=batch_size, max_seq_length=seq_length)
    if validation_only and isinstance(data, HFText):
        data.parts = ("validation",)
    with naming_packages(data):
        first_does(data.prepare_data)
        if rank() > 0:
            data.prepare_data()  # finds everything there
        data.setup()


def validation_batches(data: DataModule, seq_length: int, n: int) -> list[Batch]:
    """The first n validation batches of a connected data module, or all where it has fewer.

    Raises:
        UserError: If it has none.
    """
    loader = data.val_dataloader()
    if loader is None:
        raise UserError(f"{type(data).__name__} has no validation data to score candidates on; choose other data")
    batches = fixed_batches(loader, n, seq_length)
    if len(batches) < n:
        print(f"The validation data fills {len(batches)} batches, fewer than eval.max_iters = {n}; all of it is used")
    return batches


def batches_after(data: DataModule, seq_length: int, n: int, n_tokens: int) -> list[Batch]:
    """Read the validation batches after the first n, with about so many tokens, or fewer where the data ends."""
    found: list[Batch] = []
    for raw in data.val_dataloader() or ():
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
    samples: list[torch.Tensor] = []
    missing = n_tokens
    for raw in data.train_dataloader():
        if missing <= 0:
            break
        rows = _without_padding(*split_batch(raw, seq_length))
        samples += rows
        missing -= sum(map(len, rows))
    length = max(map(len, samples), default=0)
    if not length:
        raise UserError("the training data is empty, so there is nothing to calibrate on; give more data")
    # samples of different lengths, as those of instructions are, follow each other
    windows = torch.cat(samples)
    windows = windows[: len(windows) // length * length].view(-1, length)[: -(-n_tokens // length)]
    _check_not_validation(data, windows, seq_length)
    return windows


def _without_padding(input_ids: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
    """A batch's rows, each up to its last token that counts."""
    counts = (targets != IGNORE_INDEX).flip(1)
    ends = input_ids.shape[1] - counts.int().argmax(1)  # the first one from behind
    return [row[:end] for row, end, any_counts in zip(input_ids, ends.tolist(), counts.any(1).tolist()) if any_counts]


def _check_not_validation(data: DataModule, windows: torch.Tensor, seq_length: int) -> None:
    """Refuses calibration data that the student will be judged on.

    Both are cut into windows at other places, so runs of tokens are compared, wherever they stand. Texts may share a
    licence here and there.
    """
    size = min(32, max(windows.shape[1] // 2, 8), windows.shape[1])  # shorter runs may be chance
    seen, n_tokens = [], 0
    for raw in data.val_dataloader() or ():
        rows = split_batch(raw, seq_length)[0]
        if rows.shape[1] >= size:
            seen.append(_runs(rows, size))
        n_tokens += rows.numel()
        if n_tokens > 10_000_000:  # enough to tell
            break
    if not seen:
        return
    ours, theirs = _runs(windows, size), np.concatenate(seen)
    # a validation split that is small may be a small part of what has it all
    share = max(np.isin(ours, theirs).mean(), np.isin(theirs, ours).mean())
    if share > 0.1:
        raise UserError(
            f"calibration data must not be validation data, and {share:.0%} of the text of one is in the other; "
            "give the data module another validation split"
        )


def _runs(rows: torch.Tensor, size: int) -> np.ndarray:
    """A number for every run of `size` tokens, equal for equal runs."""
    ids = rows.numpy().astype(np.uint64) + np.uint64(1)
    runs = np.zeros((ids.shape[0], ids.shape[1] - size + 1), np.uint64)
    for i in range(size):
        runs = runs * np.uint64(6364136223846793005) + ids[:, i : i + runs.shape[1]]  # modulo 2**64
    return runs.ravel()
