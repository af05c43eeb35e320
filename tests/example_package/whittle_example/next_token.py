"""A fitness: error rate of the most likely next token."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from litgpt_whittle import SubNet, SuperGPT
from litgpt_whittle.batches import Batch
from litgpt_whittle.fitness import WindowLosses
from litgpt_whittle.tensors import IGNORE_INDEX


class NextTokenError:
    """Fraction of tokens that are not the sub-network's most likely prediction, between 0 and 1.

    Args:
        model: The teacher, which can run as any of its sub-networks.
        batches: Batches to predict, the same for all candidates.
        autocast: Returns the autocast context for the forward pass.
    """

    name = "next_token_error"

    def __init__(self, model: SuperGPT, batches: Sequence[Batch], autocast: Any = nullcontext) -> None:
        device = model.lm_head.weight.device
        self.model, self.autocast = model, autocast
        self.batches = [Batch(*(tensor.to(device) for tensor in batch)) for batch in batches]
        self.n_tokens = sum(batch.n_tokens for batch in batches)

    def __call__(self, subnet: SubNet) -> dict[str, float]:
        """Return a sub-network's scores; the search minimises the one called `name` and records all of them."""
        return self.scores(self.losses(subnet).mean)

    def scores(self, loss: float) -> dict[str, float]:
        """Return the scores for a mean loss."""
        return {self.name: loss}

    @torch.inference_mode()
    def losses(self, subnet: SubNet, which: slice = slice(None)) -> WindowLosses:
        """Return the number of wrong tokens per window of some of the batches, for racing."""
        wrong, counted = [], []
        with self.model.running(subnet, materialize=True), self.autocast():
            for input_ids, targets in self.batches[which]:
                guesses = self.model(input_ids).argmax(-1)  # (B, T)
                counts = targets != IGNORE_INDEX
                wrong.append(((guesses != targets) & counts).sum(1).double().cpu())
                counted.append(counts.sum(1).cpu())
        return WindowLosses(torch.cat(wrong), torch.cat(counted))
