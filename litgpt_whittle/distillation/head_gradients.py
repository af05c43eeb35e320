"""Gradients of an LM head and of its input, summed over chunks of tokens."""

from __future__ import annotations

from functools import cache

import torch
from torch._subclasses.fake_tensor import FakeTensor


class Gradients:
    """Accumulates the gradients of the head and its input from the chunks' logit gradients.

    Args:
        h: Input of the head, shape (N, n_embd), in the dtype of the matmuls.
        w: The head's weight, shape (V, n_embd).
        b: The head's bias, shape (V,), or None.
        needs: Flags of the gradients to compute: for h, w and b.
        exact: Dtype of the sums for w and b, at least fp32.
        kind: Device type that determines the kernels.
    """

    def __init__(
        self,
        h: torch.Tensor,
        w: torch.Tensor,
        b: torch.Tensor | None,
        needs: tuple[bool, bool, bool],
        exact: torch.dtype,
        kind: str,
    ) -> None:
        self.h, self.w, self.kind = h, w, kind
        self.hidden = torch.empty_like(h) if needs[0] else None
        self.weight = torch.zeros_like(w, dtype=exact) if needs[1] else None
        self.bias = torch.zeros_like(b, dtype=exact) if b is not None and needs[2] else None

    def add(self, rows: slice, grad: torch.Tensor) -> None:
        """Add a chunk.

        Args:
            rows: The chunk's tokens.
            grad: Gradient of the loss with respect to the chunk's logits, shape (n, V).
        """
        narrow = grad.to(self.h.dtype)
        if self.hidden is not None:
            torch.mm(narrow, self.w, out=self.hidden[rows])
        if self.weight is not None and self.weight.dtype == narrow.dtype:
            self.weight.addmm_(narrow.t(), self.h[rows])
        elif self.weight is not None and accumulates_products(self.kind, narrow.dtype):
            if not isinstance(narrow, FakeTensor):  # a memory plan lacks the kernel, which takes no memory
                torch.addmm(self.weight, narrow.t(), self.h[rows], out_dtype=self.weight.dtype, out=self.weight)
        elif self.weight is not None:
            self.weight += narrow.t() @ self.h[rows]
        if self.bias is not None:
            self.bias += grad.sum(0)

    def finish(self, *inputs: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients for h, w and b, in the dtypes of these inputs before the cast for the matmuls."""
        grads = (self.hidden, self.weight, self.bias)
        return tuple(None if g is None or x is None else g.to(x.dtype) for g, x in zip(grads, inputs))


@cache
def accumulates_products(device: str, dtype: torch.dtype) -> bool:
    """Return whether a kernel adds products of this dtype to a float32 matrix without rounding them (CUDA, torch 2.8).

    Checked once by a small product, because support depends on the version, the card and the dtype. A memory plan
    computes nothing, so it calls this before it begins. For a plan on a machine without a GPU, only the version counts.
    """
    if device != "cuda" or not hasattr(torch.ops.aten.addmm, "dtype"):
        return False
    if not torch.cuda.is_available():
        return True
    unit, found = torch.eye(16, device=device, dtype=dtype), torch.full((16, 16), 2.0**-12, device=device)
    try:
        torch.addmm(found, unit, unit, out_dtype=torch.float32, out=found)
    except (RuntimeError, TypeError):
        return False
    return torch.equal(found, torch.eye(16, device=device) + 2.0**-12)
