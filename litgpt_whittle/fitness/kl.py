"""Score a candidate by the KL divergence between the teacher's predictions and its own."""

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
    """A batch with the teacher's hidden states."""

    input_ids: torch.Tensor
    """Token ids, shape (B, T)"""
    targets: torch.Tensor
    """Next tokens, used only as a mask of ignored positions, shape (B, T)"""
    hidden: torch.Tensor
    """Inputs of the teacher's LM head, shape (B, T, n_embd)"""

    @property
    def n_tokens(self) -> int:
        """Number of tokens that are not ignored."""
        return Batch(self.input_ids, self.targets).n_tokens


class KLDivergence(Perplexity):
    """KL(teacher ‖ candidate) in nats per token, averaged over the same tokens for all candidates.

    It compares predictions over the whole vocabulary, whereas perplexity considers only the next token. Both use the
    same batches of held-out data, limited by `eval.max_iters`, and are recorded, raced and compared in the same way.

    The teacher runs once. Only the inputs of its LM head are stored, n_tokens · n_embd numbers. Its logits would be
    n_tokens · vocabulary numbers, so they are recomputed in chunks for every candidate.

    Args:
        model: The teacher.
        batches: Batches to score on; stored on the model's device with the teacher's hidden states.
        autocast: Returns an autocast context, as `Fabric.autocast` does.
    """

    name = "kl"
    can_shard = False  # the head's weights are used outside of the teacher's forward

    @torch.inference_mode()
    def __init__(self, model: SuperGPT, batches: Sequence[Batch], autocast: Any = nullcontext) -> None:
        super().__init__(model, batches, autocast)
        # under autocast, some norms return a different dtype than the head's
        dtype = model.lm_head.weight.dtype
        with self.autocast():
            tap = tap_head(model)
            taught = [
                TaughtBatch(batch.input_ids, batch.targets, self._caught(model, tap, batch.input_ids).hidden.to(dtype))
                for batch in self.batches
            ]
        self.batches = taught

    def scores(self, loss: float) -> dict[str, float]:
        """Return the mean loss as the score."""
        return {self.name: loss}

    def _loss(self, window: HeadInput, batch: TaughtBatch, i: int) -> torch.Tensor:  # type: ignore[override]
        head, softcap = self.model.lm_head, self.model.config.final_logit_softcapping
        teacher = TeacherLogits(HeadInput(batch.hidden[i], head.weight, head.bias), softcap)
        return head_loss(window, batch.targets[i], _ONLY_KL, teacher, softcap).distill
