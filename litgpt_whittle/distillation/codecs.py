"""Codecs that store a cached teacher's predictions in a fixed number of bytes per token.

A codec encodes logits as an array of fixed shape per token, and decodes it to the targets of a loss. `litgpt
cache_teacher --codec NAME` finds these and those of other packages in the entry-point group `litgpt_whittle.codecs`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Literal

import numpy as np
import torch

from litgpt_whittle import registry
from litgpt_whittle.distillation.objective import SparseTargets, log_rest
from litgpt_whittle.errors import UserError

GROUP = "litgpt_whittle.codecs"

CodecChoice = str | dict[str, dict[str, Any]]
"""A codec's name, or its name with settings: `{"top_k": {"k": 32}}`"""


class Codec(ABC):
    """Base class of codecs. A subclass takes its settings as further keyword arguments.

    Args:
        vocab_size: The teacher's padded vocabulary, V.
        temperature: Divides logits before they become probabilities.
    """

    gives: Literal["logits", "distributions", "samples"]
    """Kind of targets that `decode` returns. Logits suit any temperature and any loss. Distributions, over some tokens
    and one event for all others, suit losses of probabilities. Samples suit losses linear in the probabilities."""
    dtype: str
    """NumPy dtype of a token's array"""
    shape: tuple[int, ...]
    """Shape of what is stored for one token"""
    n_uniform: int = 0
    """Random numbers that `encode` needs per token"""

    def __init__(self, vocab_size: int, temperature: float) -> None:
        self.vocab_size, self.temperature = vocab_size, temperature

    @property
    def n_bytes(self) -> int:
        """Bytes per token."""
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)

    @abstractmethod
    def encode(self, logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """Encode logits for storage.

        Args:
            logits: The teacher's logits, shape (n, V), at least fp32; may be overwritten.
            uniform: Random numbers in [0, 1), fp64, shape (n, n_uniform).

        Returns:
            The array to store, shape (n, *shape), of type `dtype`.
        """

    @abstractmethod
    def decode(self, stored: torch.Tensor) -> torch.Tensor | SparseTargets:
        """Decode to the targets of a loss, in new tensors.

        Args:
            stored: Arrays for n tokens, as returned by `encode`, shape (n, *shape).
        """


class Full(Codec):
    """All logits in fp32: 4 · V bytes, exact. For tests and tiny vocabularies."""

    gives = "logits"
    dtype = "<f4"

    def __init__(self, vocab_size: int, temperature: float) -> None:
        super().__init__(vocab_size, temperature)
        self.shape = (vocab_size,)

    def encode(self, logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        return logits.float()

    def decode(self, stored: torch.Tensor) -> torch.Tensor:
        return stored.clone()


class TopK(Codec):
    """The k most likely tokens, their probabilities, and the total probability of all others: 4 · k bytes.

    A stored token takes 32 bits. The lower bits, as many as the vocabulary needs, hold its id. Up to 16 of the others
    hold the gap between its log-probability and that of the most likely token, from 0 to 64 nats; larger gaps are
    clamped. A probability is off by at most 0.05 % for V up to 65,536. The most likely token's own gap is 0, so its
    bits hold the gap of the tail (all tokens that are not stored) instead, from -16 to 48 nats. Decoded probabilities
    add up to 1.

    Args:
        vocab_size: The teacher's padded vocabulary, V.
        temperature: Divides logits before they become probabilities.
        k: Number of tokens to store.
    """

    gives = "distributions"
    dtype = "<i4"

    def __init__(self, vocab_size: int, temperature: float, k: int = 64) -> None:
        super().__init__(vocab_size, temperature)
        if not isinstance(k, int) or not 1 <= k <= vocab_size:
            raise UserError(f"top_k's k must be between 1 and the vocabulary's {vocab_size} tokens, got {k}; change it")
        self.k, self.shape = k, (k,)
        self._id_bits = max(vocab_size - 1, 1).bit_length()
        self._none = 2 ** min(16, 32 - self._id_bits) - 1  # stands for a probability of 0
        self._step = 64 / self._none

    def encode(self, logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        log_p = torch.log_softmax(logits / self.temperature, dim=-1)
        top, ids = log_p.topk(self.k)
        first = top[:, :1]
        # the tail is less than V times as likely as the most likely token, so its gap is above -16 nats
        distances = torch.cat((first - log_rest(log_p, ids) + 16, first - top[:, 1:]), 1)
        codes = (distances / self._step).round().clamp(0, self._none - 1)
        codes = torch.where(distances.isinf(), float(self._none), codes).long()
        return (ids | codes << self._id_bits).to(torch.int32)

    def decode(self, stored: torch.Tensor) -> SparseTargets:
        words = stored.long() & 0xFFFFFFFF
        codes = words >> self._id_bits
        log_p = torch.where(codes == self._none, -torch.inf, -self._step * codes)
        log_tail = log_p[:, :1] + 16
        log_p[:, 0] = 0.0
        total = torch.logaddexp(log_p.logsumexp(-1, keepdim=True), log_tail)
        return SparseTargets(words & (1 << self._id_bits) - 1, log_p - total, log_tail - total)


class Sampled(Codec):
    """Random draws from the teacher's distribution, unbiased (arXiv 2503.16870): 1 to 3 bytes per draw.

    One draw comes from each of `draws` equal parts of the distribution (stratified sampling): unbiased like independent
    draws, and never of higher variance.

    Args:
        vocab_size: The teacher's padded vocabulary, V.
        temperature: Divides logits before they become probabilities.
        draws: Number of draws; each stands for a probability of 1 / draws.
    """

    gives = "samples"
    dtype = "|u1"

    def __init__(self, vocab_size: int, temperature: float, draws: int = 12) -> None:
        super().__init__(vocab_size, temperature)
        if not isinstance(draws, int) or draws < 1:
            raise UserError(f"sampled's draws must be at least 1, got {draws}; 12 are usual")
        self.draws = self.n_uniform = draws
        self.shape = (draws, id_bytes(vocab_size))

    def encode(self, logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        # fp64, because unlikely tokens would be lost in an fp32 cumulative sum
        cumulative = torch.softmax(logits.double() / self.temperature, dim=-1).cumsum(-1)
        part = torch.arange(self.draws, device=logits.device)
        total = cumulative[:, -1:]
        places = torch.minimum((part + uniform) / self.draws * total, torch.nextafter(total, torch.zeros_like(total)))
        ids = torch.searchsorted(cumulative, places, right=True)  # the first token whose cumulative sum is larger
        return pack_ids(ids, self.vocab_size)

    def decode(self, stored: torch.Tensor) -> SparseTargets:
        """Return the distinct drawn tokens, each with the sum of its draws' probabilities, as a KL divergence requires.

        Equal draws are adjacent; the first one carries the sum, and the others are unused entries.
        """
        ids = unpack_ids(stored)
        counts = (ids.unsqueeze(2) == ids.unsqueeze(1)).sum(2)
        is_first = torch.ones_like(ids, dtype=torch.bool)
        is_first[:, 1:] = ids[:, 1:] != ids[:, :-1]
        return SparseTargets(ids, torch.where(is_first, (counts / self.draws).log(), -torch.inf), None)


def make_codec(choice: CodecChoice, vocab_size: int, temperature: float) -> Codec:
    """Return the codec of the given name and settings.

    Raises:
        UserError: If the name is unknown, or the codec does not accept a setting.
    """
    ((name, settings),) = with_settings(choice).items()
    return registry.lookup(GROUP, name)(vocab_size, temperature, **settings)


def with_settings(choice: CodecChoice) -> dict[str, dict[str, Any]]:
    """Return a codec's name and all of its settings, including defaults.

    Raises:
        UserError: As in `make_codec`.
    """
    return registry.with_settings(GROUP, choice, "codec", n_given=2)


def id_bytes(vocab_size: int) -> int:
    """Return the number of bytes that `pack_ids` stores per token id."""
    return -(-max(vocab_size - 1, 1).bit_length() // 8)


def pack_ids(ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Pack token ids into bytes, lowest byte first, shape (…, id_bytes)."""
    shifts = 8 * torch.arange(id_bytes(vocab_size), device=ids.device)
    return (ids.long().unsqueeze(-1) >> shifts & 0xFF).to(torch.uint8)


def unpack_ids(stored: torch.Tensor) -> torch.Tensor:
    """Return the token ids, int64, packed by `pack_ids`."""
    shifts = 8 * torch.arange(stored.size(-1), device=stored.device)
    return (stored.long() << shifts).sum(-1)
