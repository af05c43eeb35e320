"""How a cached teacher's predictions are stored: so many bytes for every token.

A codec turns logits into an array of fixed shape per token, and that back into what a loss learns from. `litgpt
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
"""A codec's name, or that and its settings: `{"top_k": {"k": 32}}`"""


class Codec(ABC):
    """Stores a teacher's predictions. A subclass takes its settings as keyword arguments after these.

    Args:
        vocab_size: The teacher's padded vocabulary, V.
        temperature: Divides logits before they become probabilities.
    """

    gives: Literal["logits", "distributions", "samples"]
    """What `decode` gives. Logits serve any temperature and any loss; distributions, over some tokens and one event
    that stands for all others, serve losses of probabilities; samples serve those that are linear in them."""
    dtype: str
    """What a token's array holds, as NumPy names it"""
    shape: tuple[int, ...]
    """Its shape"""
    n_uniform: int = 0
    """Random numbers that a token takes"""

    def __init__(self, vocab_size: int, temperature: float) -> None:
        self.vocab_size, self.temperature = vocab_size, temperature

    @property
    def n_bytes(self) -> int:
        """Bytes per token."""
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)

    @abstractmethod
    def encode(self, logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """What to store.

        Args:
            logits: The teacher's, shape (n, V), at least fp32, to be overwritten at will.
            uniform: Random numbers in [0, 1), fp64, shape (n, n_uniform).

        Returns:
            Shape (n, *shape), of type `dtype`.
        """

    @abstractmethod
    def decode(self, stored: torch.Tensor) -> torch.Tensor | SparseTargets:
        """What a loss learns from: new tensors, of n tokens, from those of `encode`."""


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
    """The k most likely tokens, their probabilities, and that of all others together: 4 · k bytes.

    A token takes 32 bits: its id as many as the vocabulary needs, then, in up to 16, how much less likely it is than
    the most likely one, in nats from 0 to 64, as which still less likely ones count. A probability is off by at most
    0.05 % for V up to 65,536. The most likely token has no such distance from itself; in its place stands that of the
    tail, from -16 to 48. What is decoded adds up to 1.

    Args:
        vocab_size: The teacher's padded vocabulary, V.
        temperature: Divides logits before they become probabilities.
        k: Tokens that are stored.
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
        # a tail is at most V times as likely as the most likely token: its distance is above -16
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
    """Random draws from the teacher's distribution, which equal it on average (arXiv 2503.16870): 2 or 3 bytes each.

    One draw comes from each of `draws` equal parts of the distribution (stratified sampling): unbiased as independent
    draws are, and never of higher variance.

    Args:
        vocab_size: The teacher's padded vocabulary, V.
        temperature: Divides logits before they become probabilities.
        draws: How many; each stands for a probability of 1 / draws.
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
        # in fp64, because a sum of many small numbers would lose those of unlikely tokens
        cumulative = torch.softmax(logits.double() / self.temperature, dim=-1).cumsum(-1)
        part = torch.arange(self.draws, device=logits.device)
        total = cumulative[:, -1:]
        places = torch.minimum((part + uniform) / self.draws * total, torch.nextafter(total, torch.zeros_like(total)))
        ids = torch.searchsorted(cumulative, places, right=True)  # the first token whose sum is above
        return pack_ids(ids, self.vocab_size)

    def decode(self, stored: torch.Tensor) -> SparseTargets:
        """Equal draws, which lie side by side, become one with their probabilities' sum, so that a KL has a meaning."""
        ids = unpack_ids(stored)
        counts = (ids.unsqueeze(2) == ids.unsqueeze(1)).sum(2)
        is_first = torch.ones_like(ids, dtype=torch.bool)
        is_first[:, 1:] = ids[:, 1:] != ids[:, :-1]
        return SparseTargets(ids, torch.where(is_first, (counts / self.draws).log(), -torch.inf), None)


def make_codec(choice: CodecChoice, vocab_size: int, temperature: float) -> Codec:
    """The codec of a name, with its settings.

    Raises:
        UserError: If there is none of that name, or it does not take a setting.
    """
    ((name, settings),) = with_settings(choice).items()
    return registry.lookup(GROUP, name)(vocab_size, temperature, **settings)


def with_settings(choice: CodecChoice) -> dict[str, dict[str, Any]]:
    """A codec's name and all its settings, those left out as they are by default.

    Raises:
        UserError: As `make_codec` does.
    """
    return registry.with_settings(GROUP, choice, "codec", n_given=2)


def id_bytes(vocab_size: int) -> int:
    """Bytes that a token id takes."""
    return -(-max(vocab_size - 1, 1).bit_length() // 8)


def pack_ids(ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Token ids as bytes, the lowest first: shape (…, id_bytes)."""
    shifts = 8 * torch.arange(id_bytes(vocab_size), device=ids.device)
    return (ids.long().unsqueeze(-1) >> shifts & 0xFF).to(torch.uint8)


def unpack_ids(stored: torch.Tensor) -> torch.Tensor:
    """Token ids, int64, of what `pack_ids` gave."""
    shifts = 8 * torch.arange(stored.size(-1), device=stored.device)
    return (stored.long() << shifts).sum(-1)
