"""`litgpt prune_vocab`: keep the tokens of a checkpoint's vocabulary that given text needs."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from litgpt.data import DataModule
from litgpt.tokenizer import Tokenizer
from litgpt.utils import extend_checkpoint_dir

from litgpt_whittle.batches import Batch, held_out_windows, read_calibration
from litgpt_whittle.checkpoint import (
    MODEL_CLASS,
    WEIGHTS,
    check_checkpoint,
    read_model_class,
    read_weights,
    save_checkpoint,
)
from litgpt_whittle.command_config import as_command
from litgpt_whittle.commands.prune_base import PruneBase, measure_perplexity
from litgpt_whittle.data.encoding import encode
from litgpt_whittle.data.hf_text import HFText  # noqa: F401 (lets --data HFText be found by its name)
from litgpt_whittle.errors import UserError
from litgpt_whittle.files import check_space
from litgpt_whittle.hints import try_next
from litgpt_whittle.index_plan import n_params
from litgpt_whittle.licenses import pass_on_license
from litgpt_whittle.processes import lock_output, release_memory
from litgpt_whittle.quantities import parse_amount
from litgpt_whittle.results import Checkpoint
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import is_tied
from litgpt_whittle.tensors import IGNORE_INDEX
from litgpt_whittle.unit_index import UnitIndex
from litgpt_whittle.vocabulary.bpe import Bpe, read_bpe
from litgpt_whittle.vocabulary.choose import check_size, choose_tokens
from litgpt_whittle.vocabulary.kept import KeptTokens, tokenizer_fingerprint
from litgpt_whittle.vocabulary.rewrite import TOKENIZER, named_ids, read_json, write_tokenizer
from litgpt_whittle.vocabulary.text_bytes import bits_per_byte
from litgpt_whittle.vocabulary.weights import sliced_to, with_vocabulary


@dataclass
class PruneVocabConfig(PruneBase):
    """Keep the tokens of a checkpoint's vocabulary that given text needs.

    Slices the embedding and the LM head, and rewrites the tokenizer. The result predicts as the checkpoint does, with
    its probabilities renormalised over the kept tokens, and is the teacher of all further commands.
    """

    checkpoint_dir: Path
    """The checkpoint directory; its tokenizer must be a BPE with a ``tokenizer.json``."""
    out_dir: Path = Path("out/prune_vocab")
    """Directory of the checkpoint with the pruned vocabulary."""
    size: str | int | None = None
    """Number of tokens to keep, such as ``32k``; rounded down to a multiple of 64."""
    like: Path | None = None
    """Instead of ``size``: a checkpoint written by ``litgpt prune_vocab``, whose tokens are kept. Its original
    tokenizer must be that of ``checkpoint_dir``, as for a larger model of the same family."""
    data: DataModule | None = None
    """Data whose tokens are counted, and on whose validation text the model is measured: any litgpt data module that
    reads text, or ``--data HFText --data.path PATH``."""
    tokens: int = 10_000_000
    """Number of tokens to count, from the training split."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.like = None if self.like is None else extend_checkpoint_dir(Path(self.like))

    def validate(self) -> None:
        if (self.size is None) == (self.like is None):
            raise UserError(f"exactly one of size and like must be set, got {self.size} and {self.like}; set --size")
        if self.size is not None and self.data is None:
            raise UserError("choosing tokens needs text; for example --data HFText --data.path PATH")
        if self.tokens < 1:
            raise UserError(f"tokens must be at least 1, got {self.tokens}; leave it out for 10,000,000")
        if read_model_class(self.checkpoint_dir):
            raise UserError(
                f"the vocabulary must be pruned before layers differ in size, and {str(self.checkpoint_dir)!r} has a "
                f"{MODEL_CLASS}; prune the vocabulary of its teacher"
            )
        super().validate()
        _ = self._n_kept if self.like is None else self._tokens_of(self.like)

    @cached_property
    def _bpe(self) -> Bpe:
        n_rows, path = check_checkpoint(self.checkpoint_dir).padded_vocab_size, self.checkpoint_dir / TOKENIZER
        return read_bpe(read_json(path), path, n_rows, named_ids(self.checkpoint_dir))

    @property
    def _n_kept(self) -> int:
        assert self.size is not None, "`validate` has checked it"
        return check_size(self._bpe, int(parse_amount(self.size, "tokens")))

    def _tokens_of(self, like: Path) -> UnitIndex:
        """Return the tokens that another checkpoint kept.

        Raises:
            UserError: If its vocabulary was not pruned, was pruned from another tokenizer, or has a token without an
                embedding in this checkpoint.
        """
        check_checkpoint(like)
        kept, n_rows = KeptTokens.read(like), check_checkpoint(self.checkpoint_dir).padded_vocab_size
        if kept is None:
            raise UserError(f"like must name a checkpoint of litgpt prune_vocab, got {str(like)!r}; choose another")
        if not kept.belong_to(self.checkpoint_dir):
            raise UserError(
                f"the tokens of {str(like)!r} are of another tokenizer than that of {str(self.checkpoint_dir)!r}; "
                "choose a checkpoint with the same tokenizer"
            )
        if kept.ids.largest >= n_rows:
            raise UserError(
                f"every kept token needs an embedding, and {str(like)!r} kept the id {kept.ids.largest} where "
                f"{str(self.checkpoint_dir)!r} has {n_rows} rows; choose another checkpoint"
            )
        return kept.ids

    def run(self) -> Checkpoint:
        """Prune the vocabulary.

        Raises:
            UserError: For the first invalid argument, before anything expensive starts.
        """
        with lock_output(self.out_dir):
            self.validate()
            counted = None if self.data is None else self._read(self.data)
            tokens = self._tokens_of(self.like) if self.like is not None else self._choose(counted)
            self._save(tokens)
            lines = self._size_lines(len(tokens)) + ([] if self.data is None else self._loss_lines(self.data))
        lines.append(f"Saved {self.out_dir / WEIGHTS}. {try_next('generate', self.out_dir)}")
        return Checkpoint(self.out_dir, summary="\n".join(lines))

    def _read(self, data: DataModule) -> torch.Tensor:
        """Return the tokens to count, shape (N, T), and connect the data."""
        size, length = self.train.micro_batch_size, self.length
        return read_calibration(data, self.checkpoint_dir, size, length, self.tokens, self.seed, "tokens").input_ids

    def _choose(self, counted: torch.Tensor | None) -> UnitIndex:
        assert counted is not None, "`validate` has checked it"
        counts = torch.bincount(counted.flatten()).numpy()
        return UnitIndex(choose_tokens(self._bpe, counts, self._n_kept))

    def _save(self, tokens: UnitIndex) -> None:
        weights = read_weights(self.checkpoint_dir)
        config = with_vocabulary(check_checkpoint(self.checkpoint_dir), len(tokens))
        smaller = sliced_to(weights, tokens)
        check_space(self.out_dir, sum(weight.nbytes for weight in smaller.values()), "the checkpoint")
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_tokenizer(self.checkpoint_dir, folder, tokens.indices)
            pass_on_license(self.checkpoint_dir, folder)
            KeptTokens(tokens, tokenizer_fingerprint(read_json(self.checkpoint_dir / TOKENIZER))).write(folder)
            save_checkpoint(self.out_dir.resolve(), config, smaller, folder)

    def _size_lines(self, n_tokens: int) -> list[str]:
        """Return lines with the sizes of both checkpoints."""
        tied, configs = is_tied(read_weights(self.out_dir)), map(check_checkpoint, (self.checkpoint_dir, self.out_dir))
        before, after = (n_params(config, SubNet.full(config), tied) for config in configs)
        return [
            f"Pruned the vocabulary of {self.checkpoint_dir}:",
            f"  tokens           {self._bpe.n_tokens:,} -> {n_tokens:,}",
            f"  parameters       {before:,} -> {after:,} ({after / before:.1%})",
        ]

    def _loss_lines(self, data: DataModule) -> list[str]:
        """Return lines with the token counts and losses of both checkpoints on the validation text of `data`.

        Args:
            data: The data, connected.
        """
        length, n = self.length, self.eval.max_iters * self.train.micro_batch_size
        held_out = held_out_windows(data, length, length, n)
        if held_out is None:
            return ["Nothing was measured, because there is no validation data."]
        windows = held_out.input_ids
        tokenizer = Tokenizer(self.checkpoint_dir)
        begins = bool((windows[:, 0] == tokenizer.bos_id).all())
        texts = texts_of(tokenizer, windows[:, 1:] if begins else windows)
        rows = [self._measured(folder, texts, begins) for folder in (self.checkpoint_dir, self.out_dir)]
        return [
            f"On {len(windows) * length:,} validation tokens, {rows[0].n_bytes:,} bytes of text:",
            "  tokens per byte  " + " -> ".join(f"{row.n_tokens / row.n_bytes:.4f}" for row in rows),
            "  perplexity       " + " -> ".join(f"{row.perplexity:.3f}" for row in rows) + " (of different tokens)",
            "  bits per byte    " + " -> ".join(f"{row.bits_per_byte:.4f}" for row in rows),
        ]

    def _measured(self, folder: Path, texts: Sequence[str], begins: bool) -> Measured:
        batches = batches_of(Tokenizer(folder), texts, self.length, self.train.micro_batch_size, begins)
        perplexity = measure_perplexity(folder, None, batches, L.Fabric(devices=1).device)
        assert perplexity is not None  # there are batches
        release_memory()  # of the model
        return Measured(perplexity, sum(batch.n_tokens for batch in batches), sum(len(t.encode()) for t in texts))


setup = as_command(PruneVocabConfig)


class Measured(NamedTuple):
    """Result of predicting a text."""

    perplexity: float
    n_tokens: int
    n_bytes: int

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits over the bytes of the text, including the loss of the tokens that end documents."""
        return bits_per_byte(math.log(self.perplexity) * self.n_tokens, self.n_bytes)


def texts_of(tokenizer: Tokenizer, windows: torch.Tensor) -> list[str]:
    """Return the documents in consecutive windows of tokens, shape (N, T), as text."""
    ids = windows.flatten().numpy()
    documents = np.split(ids, np.flatnonzero(ids == tokenizer.eos_id))
    texts = (
        tokenizer.processor.decode(ids[ids != tokenizer.eos_id].tolist(), skip_special_tokens=False)
        for ids in documents
    )
    return [text for text in texts if text]


def batches_of(tokenizer: Tokenizer, texts: Sequence[str], length: int, size: int, begins: bool) -> list[Batch]:
    """Pack documents into batches of windows in which every token is predicted once.

    Args:
        tokenizer: The tokenizer.
        texts: The documents; EOS comes before the first one and after each.
        length: Tokens per window.
        size: Maximum number of windows per batch.
        begins: If true, windows begin with BOS.
    """
    ids = [
        tokenizer.eos_id,
        *(token for document in encode(tokenizer, texts) for token in [*document.ids, tokenizer.eos_id]),
    ]
    stream = torch.tensor(ids)
    n_missing = -(len(stream) - 1) % length
    targets = F.pad(stream[1:], (0, n_missing), value=IGNORE_INDEX).view(-1, length)
    inputs = F.pad(stream[:-1], (0, n_missing), value=tokenizer.eos_id).view(-1, length)
    if begins:
        first = torch.full((len(targets), 1), tokenizer.bos_id)
        inputs = torch.cat((first, targets[:, :-1].masked_fill(targets[:, :-1] == IGNORE_INDEX, tokenizer.eos_id)), 1)
    return [Batch(*rows) for rows in zip(inputs.split(size), targets.split(size))]
