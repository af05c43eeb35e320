"""Check, prepare and open litgpt's data modules; invalid data fails early with a one-line error."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

import torch
from litgpt.data import JSON, DataModule, LitData, OpenWebText, TextFiles, TinyLlama, TinyStories
from litgpt.tokenizer import Tokenizer

from litgpt_whittle.checkpoint import has_tokenizer
from litgpt_whittle.data.encoding import largest_id
from litgpt_whittle.data.hf_text import HFText
from litgpt_whittle.data.sources import reason
from litgpt_whittle.document_masks import Packing
from litgpt_whittle.errors import UserError
from litgpt_whittle.processes import barrier, on_rank_zero, rank

_TOKENISED = (TinyLlama, LitData)
"""Data modules that read tokens, not text"""

_NEED_LITDATA = (TinyLlama, LitData, TextFiles, OpenWebText, TinyStories)


def check_data(
    data: DataModule | None, tokenizer_dir: Path | None, vocab_size: int, can_reset_attention: bool = False
) -> None:
    """Check that the data exists, and that the tokenizer and the models fit the data.

    Args:
        data: Any data module; most checks are for this project's and litgpt's own.
        tokenizer_dir: Directory of the tokenizer; None without one.
        vocab_size: Number of tokens that every model has an embedding for.
        can_reset_attention: True if the command's models can attend within documents only (`packing_of`).

    Raises:
        UserError: For the first failed check.
    """
    if data is None:
        return
    if resets_attention(data) and not can_reset_attention:
        raise UserError(
            "data.reset_attention is not for repairs and pruning methods, which run models block by block; leave it "
            "out here, and in litgpt whittle set it only in sections such as distill"
        )
    _check_tokenizer(data, tokenizer_dir, vocab_size)
    if isinstance(data, _NEED_LITDATA) and importlib.util.find_spec("litdata") is None:
        raise _needs_package(data, "litdata")
    with explained(data):
        if isinstance(data, HFText):
            data.check()
        elif isinstance(data, JSON):
            for part, records in zip(("training", "validation"), data.get_splits()):
                _check_records(records, part)
        elif isinstance(data, TinyLlama):
            for path in data.required_paths:
                _check_folder(path, f"each part of {type(data).__name__} in data.data_path")
        elif isinstance(data, LitData):
            for name in data.split_names or ("",):
                _check_folder(f"{data.data_path}/{name}".rstrip("/"), "data.data_path")
        elif isinstance(data, TextFiles):
            for option in ("train_data_path", "val_data_path"):
                _check_folder(getattr(data, option), f"data.{option}")


def _check_tokenizer(data: DataModule, tokenizer_dir: Path | None, vocab_size: int) -> None:
    if tokenizer_dir is None or not has_tokenizer(tokenizer_dir):
        if hasattr(data, "tokenizer"):
            where = "" if tokenizer_dir is None else f", and {str(tokenizer_dir)!r} has none"
            raise UserError(
                f"{type(data).__name__} needs a tokenizer{where}; put the model's tokenizer.json into its checkpoint "
                "directory"
            )
        return
    if isinstance(data, _TOKENISED):
        return
    if isinstance(data, HFText):
        data.tokenizer_dir = tokenizer_dir
        data.vocab_size = vocab_size  # tokens without an embedding matter only if they occur in the text
        return
    try:
        largest = largest_id(Tokenizer(tokenizer_dir))
    except Exception as error:
        raise UserError(
            f"the tokenizer in {str(tokenizer_dir)!r} cannot be read ({reason(error)}); fetch it again"
        ) from None
    if largest >= vocab_size:
        raise UserError(
            f"the model must have an embedding for every token, and the tokenizer in {str(tokenizer_dir)!r} has ids up "
            f"to {largest} where padded_vocab_size is {vocab_size}; remove the tokens that were added to "
            "tokenizer.json, or resize the model's embedding and convert it again"
        )


def _check_records(records: Iterable[Any], part: str) -> None:
    """Raise UserError for instruction data that would make litgpt fail in the middle of an epoch."""
    for i, record in enumerate(records):
        if not isinstance(record, Mapping):
            raise UserError(f"JSON data must be a list of records, got also a {type(record).__name__}; correct it")
        for key in ("instruction", "output"):
            if not isinstance(record.get(key), str):
                raise UserError(
                    f"each record of JSON must have the texts 'instruction' and 'output', record {i} of the {part} "
                    f"data has {', '.join(map(repr, record)) or 'none'} and no text {key!r}; rename its keys, or "
                    "choose other data such as HFText"
                )


def _check_folder(path: str | Path | None, option: str) -> None:
    if path is not None and "://" not in str(path) and not Path(path).is_dir():
        raise UserError(f"{option} must be a folder, and there is no {str(path)!r}; check the name")


def connect(
    data: DataModule, tokenizer_dir: Path | None, batch_size: int, seq_length: int, validation_only: bool = False
) -> None:
    """Connect, prepare and set up a data module; rank 0 prepares the data for all ranks.

    Args:
        data: The data module.
        tokenizer_dir: Directory of the tokenizer, if any.
        batch_size: Samples per batch.
        seq_length: Tokens per sample.
        validation_only: If true, the training data is not prepared, where the data module allows it.

    Raises:
        UserError: If a package is missing, or the data cannot be read.
    """
    tokenizer = Tokenizer(tokenizer_dir) if tokenizer_dir is not None and has_tokenizer(tokenizer_dir) else None
    data.connect(tokenizer=tokenizer, batch_size=batch_size, max_seq_length=seq_length)
    if isinstance(data, HFText):
        data.tokenizer_dir = tokenizer_dir
        data.parts = ("validation",) if validation_only else data.parts

    def prepare() -> None:
        with explained(data):
            data.prepare_data()

    on_rank_zero(prepare)
    if rank() > 0:
        prepare()  # no work left, except on another machine that does not share the disk
    barrier()
    with explained(data):
        data.setup()


def packing_of(data: DataModule | None, tokenizer_dir: Path | None) -> Packing | None:
    """Return the tokens that separate documents if attention is to be reset there, else None."""
    if not resets_attention(data):
        return None
    assert tokenizer_dir is not None, "`check_data` has checked it"
    tokenizer = Tokenizer(tokenizer_dir)
    return Packing(tokenizer.eos_id, data.has_bos(tokenizer))


def resets_attention(data: DataModule | None) -> TypeGuard[HFText]:
    """Return whether tokens attend only to tokens of the same document."""
    return isinstance(data, HFText) and data.reset_attention


def train_loader(data: DataModule) -> Any:
    """Return the training dataloader of a connected data module.

    Raises:
        UserError: If a package is missing, or the data cannot be read.
    """
    with explained(data):
        return data.train_dataloader()


def val_loader(data: DataModule) -> Any:
    """Return the validation dataloader of a connected data module.

    Raises:
        UserError: If a package is missing, or the data cannot be read.
    """
    with explained(data):
        return data.val_dataloader()


@contextmanager
def explained(data: DataModule) -> Iterator[None]:
    """Convert a data module's exceptions for invalid input to `UserError`.

    Raises:
        UserError: For a missing package, file or connection; for litgpt's own modules also for invalid contents.
    """
    try:
        yield
    except UserError:
        raise
    except ModuleNotFoundError as error:
        raise _needs_package(data, error.name) from None
    except Exception as error:
        is_litgpts = type(data).__module__.startswith("litgpt.")
        if not isinstance(error, OSError) and not (
            is_litgpts and isinstance(error, ValueError | LookupError | TypeError | AssertionError)
        ):
            raise
        name, cause = type(data).__name__, reason(error)[:200]
        if isinstance(error, ConnectionError) or type(error).__module__.startswith(("requests", "urllib3", "httpx")):
            raise UserError(
                f"{name} downloads its data, which failed ({cause}); connect to the network, or choose other data"
            ) from None
        raise UserError(
            f"{name} cannot read its data ({type(error).__name__}: {cause}); check its settings, or choose other data"
        ) from None


def _needs_package(data: DataModule, package: str | None) -> UserError:
    return UserError(
        f"{type(data).__name__} needs the package {package}; install it, or choose other data such as HFText"
    )


def split_batch(batch: Any, seq_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and next tokens, each (B, T), of a batch of token ids (B, T + 1) or of one with `labels`."""
    ids, labels = (batch["input_ids"], batch["labels"]) if isinstance(batch, Mapping) else (batch, batch)
    length = min(seq_length, ids.size(1) - 1)
    if length < 1:
        raise UserError(f"samples must have at least 2 tokens, got {ids.size(1)}; check the data module")
    return ids[:, :length].contiguous().long(), labels[:, 1 : length + 1].contiguous().long()
