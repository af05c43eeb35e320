"""A fitness: error rate of the most likely next token."""

from __future__ import annotations

import torch

from litgpt_whittle import SubNet
from litgpt_whittle.fitness import WindowFitness, WindowLosses
from litgpt_whittle.tensors import IGNORE_INDEX


class NextTokenError(WindowFitness):
    """Fraction of tokens that are not the sub-network's most likely prediction, between 0 and 1."""

    name = "next_token_error"

    def scores(self, loss: float) -> dict[str, float]:
        """Return a sub-network's scores for a mean loss; the search minimises `name`, and records all of them."""
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
