"""Reuse the output of the teacher's leading layers for candidates in which these layers are unchanged.

A candidate that changes a single layer shares on average half of its layers with the teacher.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from litgpt.model import GPT
from torch import nn

from litgpt_whittle.blocks import stopping_before


class Prefix:
    """The teacher's residual stream before one of its layers, on the batches that candidates are scored on.

    Only the latest layer's residual stream is kept, in CPU memory. A request for a later layer continues from it; a
    request for an earlier layer starts over.

    Args:
        teacher: The teacher.
        input_ids: Token ids of each forward pass, shape (B, T) each.
    """

    def __init__(self, teacher: GPT, input_ids: Sequence[torch.Tensor]) -> None:
        self.teacher, self.input_ids = teacher, input_ids
        self.layer = 0
        self.streams: list[torch.Tensor] = []

    def before(self, layer: int) -> list[torch.Tensor]:
        """Return the residual stream before layer `layer`, shape (B, T, n_embd), for each forward pass.

        Layer n_layer stands for the output of the last layer.
        """
        if layer < self.layer:
            self.layer, self.streams = 0, []
        if layer > self.layer:
            transformer = self.teacher.transformer
            following = transformer.h[layer] if layer < len(transformer.h) else transformer.ln_f
            found = []
            with starting_at(self.teacher, self.layer, self.streams):
                for ids in self.input_ids:
                    with stopping_before(following) as seen:
                        self.teacher(ids)
                    found.append(seen[0].cpu())
            self.layer, self.streams = layer, found
        return self.streams


@contextmanager
def starting_at(model: GPT, layer: int, streams: Sequence[torch.Tensor]) -> Iterator[None]:
    """Replace a model's first `layer` layers by their known output, inside the context.

    Args:
        model: The model.
        layer: Number of layers to replace.
        streams: Output of the last replaced layer, shape (B, T, n_embd), for each of the next forward passes, in order.
    """
    blocks = model.transformer.h
    replaced = list(blocks[:layer])
    for i in range(layer):
        blocks[i] = _Recall(iter(streams) if i == layer - 1 else None)
    try:
        yield
    finally:
        for i, block in enumerate(replaced):
            blocks[i] = block


class _Recall(nn.Module):
    """Placeholder for a block that returns the next known output, or its input if there is none."""

    def __init__(self, outputs: Iterator[torch.Tensor] | None) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return x if self.outputs is None else next(self.outputs).to(x.device)
