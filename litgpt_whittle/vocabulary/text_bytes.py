"""Bytes of text, by which models with different tokenizers are compared."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from litgpt_whittle.tensors import IGNORE_INDEX
from litgpt_whittle.vocabulary.bpe import BYTES, METASPACE
from litgpt_whittle.vocabulary.kept import KeptTokens
from litgpt_whittle.vocabulary.rewrite import TOKENIZER, read_json


@dataclass(frozen=True)
class MeanBytes:
    """Mean bytes of text per target, computed like a model's mean loss.

    Args:
        sizes: Bytes of each token, shape (n_ids,).
    """

    sizes: torch.Tensor

    @classmethod
    def of(cls, folder: Path, device: torch.device) -> MeanBytes | None:
        """Return the mean for the tokenizer in a folder; None unless its vocabulary was pruned."""
        if KeptTokens.read(folder) is None:
            return None
        return cls(torch.from_numpy(token_bytes(read_json(folder / TOKENIZER))).to(device))

    def __call__(self, input_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean over the targets, shape (B, T), that are not ignored; 0 without any."""
        counted = targets[targets != IGNORE_INDEX]
        return self.sizes[counted].sum() / max(1, len(counted))


def token_bytes(tokenizer: Mapping[str, Any]) -> np.ndarray:
    """Return the bytes of text that each token of a BPE tokenizer stands for, shape (n_ids,).

    Special tokens have none, because they are no text.

    Args:
        tokenizer: Content of `tokenizer.json`.
    """
    vocab, added = tokenizer["model"]["vocab"], tokenizer.get("added_tokens") or ()
    sizes = np.zeros(1 + max([*vocab.values(), *(token["id"] for token in added)]), dtype=np.int64)
    is_byte_level = '"ByteLevel"' in json.dumps([tokenizer.get("pre_tokenizer"), tokenizer.get("decoder")])
    for token, i in vocab.items():
        if token in BYTES:
            sizes[i] = 1
        else:  # a byte-level tokenizer has a character for each byte
            sizes[i] = len(token) if is_byte_level else len(token.replace(METASPACE, " ").encode())
    for token in added:
        sizes[token["id"]] = 0 if token.get("special") else len(token["content"].encode())
    return sizes


def n_text_bytes(folder: Path, targets: Iterable[torch.Tensor]) -> int | None:
    """Return the number of bytes of text that tokens stand for; None unless a folder's tokenizer is a BPE in JSON.

    Args:
        folder: Directory of the tokenizer.
        targets: Token ids, of any shapes; ignored positions are not counted.
    """
    path = folder / TOKENIZER
    if not path.is_file() or "merges" not in ((content := read_json(path)).get("model") or {}):
        return None
    sizes = torch.from_numpy(token_bytes(content))
    counted = torch.cat([each[each != IGNORE_INDEX].cpu() for each in targets])
    is_known = bool(len(counted)) and int(counted.max()) < len(sizes)
    return (int(sizes[counted].sum()) or None) if is_known else None


def bits_per_byte(nats: float, n_bytes: float) -> float:
    """Return bits per byte for a loss in nats over a number of bytes."""
    return nats / math.log(2) / n_bytes
