"""Attention within documents: masks for windows that hold several of them.

The masks enter a litgpt model as an argument of its blocks: a hook on the model finds the documents in the token ids,
and hooks on the blocks pass the mask. Rotary embeddings depend only on differences of positions, so that a document's
outputs equal those that it has on its own, and its positions need not start again at 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
from litgpt.model import GPT
from torch import nn

Model = TypeVar("Model", bound=GPT)

_MASK = 3
"""Position of the mask among the arguments of a block's forward"""


class Packing(NamedTuple):
    """Tokens that separate the documents of a block."""

    end_id: int
    """Token that ends each document"""
    has_bos: bool = False
    """True if blocks begin with BOS, which the tokens of all their documents see: some models need it"""


def reset_attention(model: Model, packing: Packing | None) -> Model:
    """Make each token attend only to tokens of its own document, in place; return the model.

    Args:
        model: A litgpt model, or a super-network.
        packing: Tokens that separate documents; None leaves the model as it is.
    """
    if packing is not None:
        masks = _DocumentMasks(packing)
        model.register_forward_pre_hook(masks.find_documents)
        for block in model.transformer.h:
            block.register_forward_pre_hook(masks.pass_mask)
    return model


class _DocumentMasks:
    """Hooks that compute the mask of the running batch, once for all blocks."""

    def __init__(self, packing: Packing) -> None:
        self.packing = packing
        self._documents: torch.Tensor | None = None
        self._mask: torch.Tensor | None = None

    def find_documents(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        self._documents, self._mask = documents_in(args[0], self.packing.end_id), None

    def pass_mask(self, block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if len(args) <= _MASK or args[_MASK] is not None:  # a dropped block, or a KV cache
            return None
        assert self._documents is not None, "the model's hook comes first"
        if self._mask is None:
            self._mask = document_mask(self._documents, args[0].dtype, self.packing.has_bos)
        return (*args[:_MASK], self._mask, *args[_MASK + 1 :])


def documents_in(input_ids: torch.Tensor, end_id: int) -> torch.Tensor:
    """Number the documents in each row: token ids to indices, both of shape (B, T); `end_id` ends a document."""
    ends = (input_ids == end_id).long()
    return ends.cumsum(1) - ends


def document_mask(documents: torch.Tensor, dtype: torch.dtype, has_bos: bool = False) -> torch.Tensor:
    """Return the additive mask of causal attention within documents: (B, T) to (B, 1, T, T).

    With `has_bos`, all tokens also see the first one.
    """
    n = documents.size(1)
    before = torch.ones(n, n, dtype=torch.bool, device=documents.device).tril()
    own = documents[:, :, None] == documents[:, None, :]
    own[:, :, 0] |= has_bos
    allowed = own & before
    zeros = torch.zeros((), dtype=dtype, device=documents.device)
    return zeros.masked_fill(~allowed, float("-inf"))[:, None]
