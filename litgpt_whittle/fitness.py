"""What a candidate is scored by: its perplexity on fixed validation batches, without any training."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from litgpt_whittle.errors import UserError
from litgpt_whittle.head import HeadInput, head_loss, tap_head
from litgpt_whittle.losses import IGNORE_INDEX
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import SuperGPT
from litgpt_whittle.train import split_batch


class Batch(NamedTuple):
    """Token ids and the tokens that follow them, each of shape (B, T)."""

    input_ids: torch.Tensor
    targets: torch.Tensor

    @property
    def n_tokens(self) -> int:
        """Tokens that count."""
        return int((self.targets != IGNORE_INDEX).sum())


def fixed_batches(loader: Iterable, n: int, max_seq_length: int) -> list[Batch]:
    """Reads the batches that score all candidates, once, into memory.

    Args:
        loader: A validation dataloader of a litgpt data module.
        n: How many to read; fewer when the loader has fewer.
        max_seq_length: Tokens beyond are left out.

    Raises:
        UserError: If there is no token to predict.
    """
    batches = []
    for raw in loader:
        batch = Batch(*split_batch(raw, max_seq_length))
        if batch.n_tokens:
            batches.append(batch)
        if len(batches) == n:
            break
    if not batches:
        raise UserError("the validation data holds no token to predict; give more data or shorten train.max_seq_length")
    return batches


def fingerprint(batches: Sequence[Batch]) -> str:
    """Sixteen hex digits that tell batches of other tokens, or in another order or shape, apart."""
    digest = hashlib.sha256()
    for batch in batches:
        for tensor in batch:
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


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
