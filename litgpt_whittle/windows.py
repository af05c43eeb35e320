"""Sliding-window attention with a vectorised mask, which only sequences longer than the window need.

In every layer and forward pass, litgpt fills the mask row by row, with one kernel per token, a loop that
`torch.compile` unrolls. For sequences that fit into the window, causal attention gives the same result without a mask,
so that flash attention is possible.
"""

from __future__ import annotations

from typing import TypeVar, cast

import torch
from litgpt.model import CausalSelfAttention
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def vectorize_windows(model: Model, masks: WindowMasks | None = None) -> Model:
    """Make litgpt's sliding-window layers within a model use `WindowAttention`, in place; return the model.

    Args:
        model: A litgpt model or block.
        masks: Masks to share with other models.
    """
    masks = masks or WindowMasks()
    for module in model.modules():
        if type(module) is CausalSelfAttention and module.apply_sliding_window_attention:
            module.__class__ = WindowAttention
            attention = cast(WindowAttention, module)
            attention.apply_sliding_window_attention = False
            attention.masks = masks
    return model


class WindowAttention(CausalSelfAttention):
    """litgpt's attention with a sliding window, whose mask does not come from litgpt's forward.

    litgpt's flag for the window is off, so that litgpt's forward builds no mask; only a KV cache needs the flag.
    """

    masks: WindowMasks

    def scaled_dot_product_attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        # with the flag, for a KV cache, litgpt's forward has built the mask
        if not self.apply_sliding_window_attention and q.size(2) > self.config.sliding_window_size:
            window = self.masks(q, self.config.sliding_window_size)
            mask = window if mask is None else mask + window
        return super().scaled_dot_product_attention(q, k, v, mask)

    def build_kv_cache(self, *args, **kwargs) -> nn.Module:
        # the cache holds only the window, and the flag makes litgpt's forward trim its mask to that
        self.apply_sliding_window_attention = True
        return super().build_kv_cache(*args, **kwargs)


class WindowMasks:
    """Additive attention masks, shared by the layers of a model; only the latest is cached."""

    def __init__(self) -> None:
        self._key: tuple | None = None
        self._mask: torch.Tensor | None = None

    def __call__(self, q: torch.Tensor, window: int) -> torch.Tensor:
        """Return the mask of a causal window for queries of shape (B, n_head, T, head_size), shape (1, 1, T, T)."""
        if torch.compiler.is_compiling():
            return _mask(q, window)
        key = q.size(2), window, q.dtype, q.device
        if self._mask is None or key != self._key:
            with torch.inference_mode(False):  # backward cannot use an inference tensor
                self._key, self._mask = key, _mask(q, window)
        return self._mask


def _mask(q: torch.Tensor, window: int) -> torch.Tensor:
    n = q.size(2)
    never = torch.full((n, n), float("-inf"), dtype=q.dtype, device=q.device)
    return never.triu(1).add_(never.tril_(-window)).view(1, 1, n, n)
