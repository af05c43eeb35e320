"""Token batches of continuations: each distinct input runs once, and only the scored positions reach the LM head."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

FORWARD_TOKENS = 4096
"""Maximum number of tokens per forward pass, padding included; a longer input has a pass of its own"""


class Continuation(NamedTuple):
    """Tokens to score, and the tokens before them."""

    context: Sequence[int]
    tokens: Sequence[int]


class TaskBatch(NamedTuple):
    """Inputs of one forward pass, and the tokens to score in them."""

    input_ids: torch.Tensor
    """Token ids, padded on the right, shape (B, T)"""
    rows: torch.Tensor
    """Input of each scored token, shape (n,)"""
    positions: torch.Tensor
    """Position before each scored token, shape (n,)"""
    targets: torch.Tensor
    """The scored tokens, shape (n,)"""
    continuations: torch.Tensor
    """Index of the continuation of each scored token, shape (n,)"""

    @property
    def n_tokens(self) -> int:
        """Number of scored tokens."""
        return len(self.targets)

    def halves(self) -> list[TaskBatch]:
        """Return two batches with half of the inputs each, or this batch alone if it has a single input."""
        n_inputs = len(self.input_ids)
        cuts = [0, -(-n_inputs // 2), n_inputs] if n_inputs > 1 else [0, 1]
        found = []
        for begin, end in pairwise(cuts):
            own = (self.rows >= begin) & (self.rows < end)
            rest = self.positions[own], self.targets[own], self.continuations[own]
            found.append(TaskBatch(self.input_ids[begin:end], self.rows[own] - begin, *rest))
        return found

    def unpadded(self) -> list[torch.Tensor]:
        """Return the inputs without padding: token ids of shape (n, T) for each length T, the longest first."""
        # the last token of each input precedes a scored one
        lengths = torch.zeros(len(self.input_ids), dtype=torch.long).scatter_reduce(
            0, self.rows.cpu(), self.positions.cpu() + 1, "amax"
        )
        return [
            torch.stack([ids[:length] for ids, own in zip(self.input_ids, lengths.tolist()) if own == length])
            for length in lengths.unique().flip(0).tolist()
        ]

    def to(self, device: torch.device) -> TaskBatch:
        """Return the batch on a device."""
        return TaskBatch(*(tensor.to(device) for tensor in self))


def task_batches(
    continuations: Sequence[Continuation], max_length: int, max_tokens: int = FORWARD_TOKENS
) -> list[TaskBatch]:
    """Pack continuations into batches of inputs of similar length.

    Contexts are truncated on the left, as by lm-eval. The model reads all tokens but the last. Continuations with equal
    inputs, such as the letters of a multiple-choice question, share one row.

    Args:
        continuations: At least one token of context each, and at most `max_length` tokens to score.
        max_length: Maximum length of inputs.
        max_tokens: Maximum number of tokens per batch, padding included.
    """
    users: dict[tuple[int, ...], list[int]] = {}
    for i, (context, tokens) in enumerate(continuations):
        users.setdefault((*context, *tokens)[-(max_length + 1) :][:-1], []).append(i)
    inputs = sorted(users, key=len, reverse=True)
    batches, begin = [], 0
    while begin < len(inputs):
        end = begin + max(max_tokens // len(inputs[begin]), 1)
        batches.append(_batch([(row, users[row]) for row in inputs[begin:end]], continuations))
        begin = end
    return batches


def _batch(rows: Sequence[tuple[tuple[int, ...], list[int]]], continuations: Sequence[Continuation]) -> TaskBatch:
    """Return the batch of some inputs, the longest first, each with the indices of its continuations."""
    input_ids = torch.zeros(len(rows), len(rows[0][0]), dtype=torch.long)
    scored: list[tuple[int, int, int, int]] = []
    for row, (ids, indices) in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        for i in indices:
            tokens = continuations[i].tokens
            scored += [(row, len(ids) - len(tokens) + k, token, i) for k, token in enumerate(tokens)]
    return TaskBatch(input_ids, *torch.tensor(scored).unbind(1))
