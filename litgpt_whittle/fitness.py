"""What a candidate is scored by: its perplexity on fixed validation batches, without any training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch

from litgpt_whittle.batches import Batch
from litgpt_whittle.head import HeadInput, head_loss, tap_head
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import SuperGPT


class Fitness(Protocol):
    """What candidates are scored by, found by its name in the entry-point group `litgpt_whittle.fitness`.

    It is made of the teacher, the batches that score all candidates, and a function that gives the context to compute
    in, as `Fabric.autocast` does.
    """

    name: str
    """Which of the scores counts; lower is better"""
    model: SuperGPT
    batches: Sequence[Batch]
    n_tokens: int
    """Tokens that score each candidate"""

    def __init__(self, model: SuperGPT, batches: Sequence[Batch], autocast: Any = nullcontext) -> None: ...

    def __call__(self, subnet: SubNet) -> dict[str, float]:
        """Scores a sub-network, by one or more names."""


class Perplexity:
    """exp(total negative log-likelihood / total tokens), the same batches for all candidates.

    Args:
        model: The teacher.
        batches: What to predict; kept on the model's device.
        autocast: Gives the context to compute in, as `Fabric.autocast` does.
    """

    name = "perplexity"

    def __init__(self, model: SuperGPT, batches: Sequence[Batch], autocast: Any = nullcontext) -> None:
        self.model, self.autocast = model, autocast
        self.batches = [Batch(*(tensor.to(model.lm_head.weight.device) for tensor in batch)) for batch in batches]
        self.n_tokens = sum(batch.n_tokens for batch in batches)

    @torch.inference_mode()
    def __call__(self, subnet: SubNet) -> dict[str, float]:
        """Scores a sub-network: `perplexity` and `nll`, its logarithm (nats per token)."""
        context: AbstractContextManager = self.autocast()
        # the weights are sliced once, the logits made in chunks that are thrown away
        with self.model.running(subnet, materialize=True), context:
            total = sum(self._loss(batch).double() * batch.n_tokens for batch in self.batches)
        nll = float(total) / self.n_tokens
        return {"perplexity": math.exp(nll) if nll < 700 else math.inf, "nll": nll}

    def _loss(self, batch: Batch) -> torch.Tensor:
        """The mean over one batch's tokens."""
        return head_loss(
            self._head_input(batch.input_ids), batch.targets, softcap=self.model.config.final_logit_softcapping
        ).ce

    def _head_input(self, input_ids: torch.Tensor) -> HeadInput:
        # while it runs as a sub-network, the super-network calls the head of a model without weights of its own
        tap = tap_head(self.model._running.module)
        tap.tapping = True
        self.model(input_ids)
        caught, tap.caught = tap.caught, None
        assert caught is not None, "the sub-network's forward did not reach its head"
        return caught
