"""What a candidate is scored by: its perplexity on fixed validation batches, as it is cut or repaired."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from litgpt.config import Config
from litgpt.model import GPT

from litgpt_whittle.batches import Batch
from litgpt_whittle.distillation.head import HeadInput, HeadTap, head_loss, tap_head
from litgpt_whittle.distillation.losses import IGNORE_INDEX
from litgpt_whittle.processes import gather, give_back_freed, rank, world_size
from litgpt_whittle.repair.costs import check_memory
from litgpt_whittle.repair.from_moments import QuickRepair
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import SuperGPT
from litgpt_whittle.training.sharding import is_sharded

FORWARD_TOKENS = {"cpu": 2048}
"""Tokens per forward pass. More are no faster on a CPU, and their activations take memory for nothing."""


class Fitness(Protocol):
    """What candidates are scored by, found by its name in the entry-point group `litgpt_whittle.fitness`.

    It is made of the teacher, the batches that score all candidates, and a function that gives the context to compute
    in, as `Fabric.autocast` does. Class attributes say what else it wants and can do: with `n_calibration`, it is also
    given so many training tokens, as `calibration`, shape (N, T); with `needs_importance` true the teacher's `Ranking`,
    as `importance`; with `reads_data` false there are no batches; with `can_shard` true it can work with a teacher that
    is spread over processes; with `chooses_units` true the numbers of units alone count, except of experts. One that
    gives losses by window (`losses`, `scores`) lets candidates race. A static `check` of the teacher's config, the
    device and the bytes of the teacher's weights may refuse before they are read.
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


class WindowLosses(NamedTuple):
    """What a candidate loses on each window of text, in the batches' order; both on the CPU, shape (n_windows,)."""

    sums: torch.Tensor
    """Losses added up over the window's tokens, float64"""
    n_tokens: torch.Tensor
    """How many tokens those are"""

    @property
    def mean(self) -> float:
        """The loss per token."""
        return float(self.sums.sum() / self.n_tokens.sum())


class Perplexity:
    """exp(total negative log-likelihood / total tokens), the same batches for all candidates.

    Args:
        model: The teacher.
        batches: What to predict; kept on the model's device.
        autocast: Gives the context to compute in, as `Fabric.autocast` does.
    """

    name = "perplexity"
    can_shard = True

    def __init__(self, model: SuperGPT, batches: Sequence[Batch], autocast: Any = nullcontext) -> None:
        self.model, self.autocast = model, autocast
        self.is_sharded = is_sharded(model)
        self.batches = [Batch(*(tensor.to(model.lm_head.weight.device) for tensor in batch)) for batch in batches]
        self.n_tokens = sum(batch.n_tokens for batch in batches)

    def __call__(self, subnet: SubNet) -> dict[str, float]:
        """Scores a sub-network: `perplexity` and `nll`, its logarithm (nats per token)."""
        return self.scores(self.losses(subnet).mean)

    def scores(self, loss: float) -> dict[str, float]:
        """The scores that a mean loss stands for."""
        return {self.name: math.exp(loss) if loss < 700 else math.inf, "nll": loss}

    def losses(self, subnet: SubNet, which: slice = slice(None)) -> WindowLosses:
        """A sub-network's losses on every window of some of the batches.

        Where the teacher's weights are spread over processes, they score together, every one some of the batches.
        """
        batches = self.batches[which]
        # while it runs as a sub-network, the super-network calls the head of a model without weights of its own
        if self.is_sharded:
            with torch.no_grad(), self.model.running(subnet):
                return self._losses_together(batches)
        # the weights are sliced once
        with torch.inference_mode(), self.model.running(subnet, materialize=True):
            return self._losses(self.model, self.model._running.module, batches)

    def _losses_together(self, batches: Sequence[Batch]) -> WindowLosses:
        n = world_size()
        own = batches[rank() :: n]
        # a process without a batch of its own takes part all the same: the others need its part of the weights
        wanted = [*own, *[batches[-1]] * (-(-len(batches) // n) - len(own))]
        parts = [self._losses(self.model, self.model._running.module, [batch]) for batch in wanted]
        by_process = gather([tuple(part) for part in parts])
        in_order = [by_process[i % n][i // n] for i in range(len(batches))]
        return WindowLosses(*(torch.cat(tensors) for tensors in zip(*in_order)))

    def _losses(self, model: GPT, owner_of_head: GPT, batches: Sequence[Batch]) -> WindowLosses:
        """A model's losses, the logits made in chunks that are thrown away."""
        tap = tap_head(owner_of_head)
        context: AbstractContextManager = self.autocast()
        with context:
            sums = torch.cat([self._window_sums(model, tap, batch) for batch in batches])
        n_tokens = torch.cat([(batch.targets != IGNORE_INDEX).sum(1) for batch in batches])
        return WindowLosses(sums.cpu(), n_tokens.cpu())

    def _window_sums(self, model: GPT, tap: HeadTap, batch: Batch) -> torch.Tensor:
        """The loss of each of a batch's windows, added up over its tokens, float64, shape (B,)."""
        caught = self._caught(model, tap, batch.input_ids)
        windows = (caught._replace(hidden=hidden) for hidden in caught.hidden)
        means = []
        for i, window in enumerate(windows):
            means.append(self._loss(window, batch, i))
            give_back_freed()
        return torch.stack(means).double() * (batch.targets != IGNORE_INDEX).sum(1)

    def _loss(self, window: HeadInput, batch: Batch, i: int) -> torch.Tensor:
        """The mean over the tokens of a batch's window i."""
        return head_loss(window, batch.targets[i], softcap=self.model.config.final_logit_softcapping).ce

    def _caught(self, model: GPT, tap: HeadTap, input_ids: torch.Tensor) -> HeadInput:
        """What a model's head is called with."""
        n_rows, n_tokens = input_ids.shape
        # processes that score together must make the same number of passes, whatever their batches are
        most = None if self.is_sharded else FORWARD_TOKENS.get(input_ids.device.type)
        if most is not None:
            n_rows = max(most // n_tokens, 1)
        hidden = []
        for rows in input_ids.split(n_rows):
            tap.tapping = True
            model(rows)
            caught, tap.caught = tap.caught, None
            assert caught is not None, "the sub-network's forward did not reach its head"
            hidden.append(caught.hidden)
            give_back_freed()
        tap.tapping = False
        return caught._replace(hidden=torch.cat(hidden))


class RepairedPerplexity(Perplexity):
    """The perplexity of a candidate after a quick repair (`litgpt_whittle.repair.from_moments`).

    Args:
        model: The teacher.
        batches: What to predict.
        autocast: Gives the context to compute in.
        calibration: Training tokens to repair on, shape (N, T).
    """

    name = "repaired_perplexity"
    n_calibration = 32_768
    can_shard = False
    chooses_units = True

    def __init__(
        self, model: SuperGPT, batches: Sequence[Batch], autocast: Any = nullcontext, *, calibration: torch.Tensor
    ) -> None:
        super().__init__(model, batches, autocast)
        self.repair = QuickRepair(model, calibration)

    @staticmethod
    def check(teacher: Config, device: torch.device, beside: int) -> None:
        """Refuses a teacher whose moments cannot fit; which tokens the text has is not known yet."""
        check_memory(teacher, 0, device, beside)

    @torch.inference_mode()
    def losses(self, subnet: SubNet, which: slice = slice(None)) -> WindowLosses:
        """The repaired student's losses on every window of some of the batches."""
        student = self.repair.student(subnet)
        return self._losses(student, student, self.batches[which])
