"""Scores a candidate by how far its predictions are from its teacher's, on text that needs no right answers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from litgpt_whittle.batches import Batch
from litgpt_whittle.distillation.head import HeadInput, TeacherLogits, head_loss, tap_head
from litgpt_whittle.distillation.objective import Objective
from litgpt_whittle.fitness.perplexity import Perplexity
from litgpt_whittle.supergpt import SuperGPT

_ONLY_KL = Objective(alpha=0.0, beta=1.0)


class TaughtBatch(NamedTuple):
    """A batch, and what the teacher makes of it."""

    input_ids: torch.Tensor
    """Token ids, shape (B, T)"""
    targets: torch.Tensor
    """The tokens that follow them, of which only matters which ones count, shape (B, T)"""
    hidden: torch.Tensor
    """What the teacher's LM head is called with, shape (B, T, n_embd)"""

    @property
    def n_tokens(self) -> int:
        """Tokens that count."""
        return Batch(self.input_ids, self.targets).n_tokens


class KLDivergence(Perplexity):
    """KL(teacher ‖ candidate) in nats per token, a mean over the same tokens for all candidates.

    Every token is compared over the whole vocabulary, where perplexity sees the one token that follows. The batches are
    those of the perplexity: held-out text, on which the teacher says what it will say when it is used, and as many
    tokens as `eval.max_iters` asks for, so that both measures are journalled, raced and compared alike.

    The teacher runs once. What is kept of it are the inputs of its LM head, n_tokens · n_embd numbers: its logits
    would be n_tokens · vocabulary, and are made anew, chunk by chunk, for every candidate.

    Args:
        model: The teacher.
        batches: What to predict; kept on the model's device with the teacher's hidden states.
        autocast: Gives the context to compute in, as `Fabric.autocast` does.
    """

    name = "kl"
    can_shard = False  # the teacher's head is needed outside of its forward

    @torch.inference_mode()
    def __init__(self, model: SuperGPT, batches: Sequence[Batch], autocast: Any = nullcontext) -> None:
        super().__init__(model, batches, autocast)
        # under autocast some norms give another type than the head has
        dtype = model.lm_head.weight.dtype
        with self.autocast():
            tap = tap_head(model)
            self.batches = [
                TaughtBatch(*batch, self._caught(model, tap, batch.input_ids).hidden.to(dtype))
                for batch in self.batches
            ]

    def scores(self, loss: float) -> dict[str, float]:
        """The mean loss is the score."""
        return {self.name: loss}

    def _loss(self, window: HeadInput, batch: TaughtBatch, i: int) -> torch.Tensor:
        head, softcap = self.model.lm_head, self.model.config.final_logit_softcapping
        teacher = TeacherLogits(HeadInput(batch.hidden[i], head.weight, head.bias), softcap)
        return head_loss(window, batch.targets[i], _ONLY_KL, teacher, softcap).distill
