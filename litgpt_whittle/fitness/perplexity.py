"""Perplexity on fixed validation batches, with or without repair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from litgpt.model import GPT

from litgpt_whittle.batches import Batch
from litgpt_whittle.distillation.head import HeadInput, HeadTap, head_loss, tap_head
from litgpt_whittle.fitness.base import WindowFitness, WindowLosses
from litgpt_whittle.fitness.prefix import Prefix, starting_at
from litgpt_whittle.fitness.repaired import Repaired
from litgpt_whittle.processes import gather, give_back_freed, rank, world_size
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import SuperGPT
from litgpt_whittle.tensors import IGNORE_INDEX, in_sums_dtype
from litgpt_whittle.training.sharding import is_sharded
from litgpt_whittle.vocabulary.text_bytes import bits_per_byte

FORWARD_TOKENS = {"cpu": 2048}
"""Maximum number of tokens per forward pass, by device type. Longer passes are no faster on a CPU and need more memory.
A GPU runs whole batches."""


class Perplexity(WindowFitness):
    """Perplexity, exp(total negative log-likelihood / total tokens), on the same batches for all candidates.

    Args:
        model: The teacher.
        batches: Batches to predict; stored on the model's device.
        autocast: Returns an autocast context, as `Fabric.autocast` does.
    """

    name = "perplexity"
    can_shard = True
    n_bytes: int | None = None
    """Bytes of text of the predicted tokens; None if unknown"""

    def __init__(self, model: SuperGPT, batches: Sequence[Batch], autocast: Any = nullcontext) -> None:
        super().__init__(model, batches, autocast)
        self.is_sharded = is_sharded(model)
        self.prefix = Prefix(model, [rows for batch in self.batches for rows in self._rows(batch.input_ids)])

    def scores(self, loss: float) -> dict[str, float]:
        """Return the `perplexity`, `nll`, its logarithm (nats per token), and `bits_per_byte` if `n_bytes` is known."""
        found = {self.name: math.exp(loss) if loss < 700 else math.inf, "nll": loss}
        return found | ({"bits_per_byte": bits_per_byte(loss * self.n_tokens, self.n_bytes)} if self.n_bytes else {})

    def losses(self, subnet: SubNet, which: slice = slice(None)) -> WindowLosses:
        """Return a sub-network's losses on every window of the selected batches.

        If the teacher is sharded over processes, they score the sub-network together, each with a part of the batches.
        """
        batches = self.batches[which]
        # a running super-network calls the head of its `head_owner`, a model without weights
        if self.is_sharded:
            with torch.no_grad(), self.model.running(subnet):
                return self._losses_together(batches)
        # materialised, so that the weights are sliced only once
        with torch.inference_mode():
            n_intact = self._prepare_prefix(subnet, which)
            with self.model.running(subnet, materialize=True):
                shell = self.model.head_owner
                with starting_at(shell, n_intact, self.prefix.streams):
                    return self._losses(self.model, shell, batches)

    def _prepare_prefix(self, subnet: SubNet, which: slice) -> int:
        """Compute the teacher's hidden states after a sub-network's intact leading layers; return the number of layers.

        Return 0 for a part of the batches, on which running the teacher would save no time. Also return 0 if the
        forward passes are halved, because the stored hidden states belong to whole ones.
        """
        n_intact = subnet.n_intact if which == slice(None) and not self.is_halved else 0
        if n_intact:
            with self.autocast():
                self.prefix.before(n_intact)
        return n_intact

    def _losses_together(self, batches: Sequence[Batch]) -> WindowLosses:
        """Return the losses of a sharded model on all batches, of which each process runs a part."""
        n = world_size()
        own = batches[rank() :: n]
        # a process without a batch must still run, because the other processes need its shard of the weights
        wanted = [*own, *[batches[-1]] * (-(-len(batches) // n) - len(own))]
        parts = [self._losses(self.model, self.model.head_owner, [batch]) for batch in wanted]
        by_process = gather([tuple(part) for part in parts])
        in_order = [by_process[i % n][i // n] for i in range(len(batches))]
        return WindowLosses(*(torch.cat(tensors) for tensors in zip(*in_order)))

    def _losses(self, model: GPT, owner_of_head: GPT, batches: Sequence[Batch]) -> WindowLosses:
        """Return a model's losses; logits are computed in chunks and not kept."""
        tap = tap_head(owner_of_head)
        context: AbstractContextManager = self.autocast()
        with context:
            sums = torch.cat([self._window_sums(model, tap, batch) for batch in batches])
        n_tokens = torch.cat([(batch.targets != IGNORE_INDEX).sum(1) for batch in batches])
        return WindowLosses(sums.cpu().double(), n_tokens.cpu())

    def _window_sums(self, model: GPT, tap: HeadTap, batch: Batch) -> torch.Tensor:
        """Return the loss of each window of a batch, summed over its tokens, float64, shape (B,)."""
        caught = self._caught(model, tap, batch.input_ids)
        windows = (caught._replace(hidden=hidden) for hidden in caught.hidden)
        means = []
        for i, window in enumerate(windows):
            means.append(self._loss(window, batch, i))
            give_back_freed()
        return in_sums_dtype(torch.stack(means)) * (batch.targets != IGNORE_INDEX).sum(1)

    def _loss(self, window: HeadInput, batch: Batch, i: int) -> torch.Tensor:
        """Return the mean loss over the tokens of window i of a batch."""
        return head_loss(window, batch.targets[i], softcap=self.model.config.final_logit_softcapping).ce

    def _caught(self, model: GPT, tap: HeadTap, input_ids: torch.Tensor) -> HeadInput:
        """Run a model and return the inputs of its head."""
        hidden = []
        for rows in self._rows(input_ids):
            caught = _tapped(model, tap, rows)
            hidden.append(caught.hidden)
            give_back_freed()
        return caught._replace(hidden=torch.cat(hidden))

    def _rows(self, input_ids: torch.Tensor) -> Sequence[torch.Tensor]:
        """Split a batch into forward passes."""
        n_rows, n_tokens = input_ids.shape
        # processes that share a sharded model must run the same number of forward passes, so batches stay whole
        most = None if self.is_sharded else FORWARD_TOKENS.get(input_ids.device.type)
        n = n_rows if most is None else min(max(most // n_tokens, 1), n_rows)
        return input_ids.split(-(-n // 2) if self.is_halved else n)


def _tapped(model: GPT, tap: HeadTap, input_ids: torch.Tensor) -> HeadInput:
    """Run a model once and return the input of its head, which `tap` catches."""
    tap.tapping = True
    model(input_ids)
    caught, tap.caught, tap.tapping = tap.caught, None, False
    assert caught is not None, "the sub-network's forward did not reach its head"
    return caught


class RepairedPerplexity(Repaired, Perplexity):
    """Perplexity of a candidate after a repair from moments (`litgpt_whittle.repair.from_moments`).

    Args:
        inputs: Positional arguments of `Perplexity`.
        calibration: Calibration tokens for the repair, shape (N, T).
        more: Keyword arguments of `Perplexity`.
    """

    name = "repaired_perplexity"

    @torch.inference_mode()
    def losses(self, subnet: SubNet, which: slice = slice(None)) -> WindowLosses:
        """Return the repaired student's losses on every window of the selected batches."""
        n_intact = self._prepare_prefix(subnet, which)
        student = self.repair.student(subnet)
        with starting_at(student, n_intact, self.prefix.streams):
            return self._losses(student, student, self.batches[which])
