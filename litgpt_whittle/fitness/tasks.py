"""Score a candidate by its answers to tasks of lm-eval, with or without repair."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from litgpt.model import GPT

from litgpt_whittle.batches import Batch
from litgpt_whittle.fitness.base import Fitness
from litgpt_whittle.fitness.prefix import Prefix, starting_at
from litgpt_whittle.fitness.repaired import Repaired
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import SuperGPT
from litgpt_whittle.tasks.scoring import log_likelihoods
from litgpt_whittle.tasks.task_set import LOSS, TaskSet


class Tasks(Fitness):
    """Error rate or negative margin on tasks of lm-eval, averaged over tasks; the same documents for all candidates.

    The scores are those of `TaskSet.scores`.

    Args:
        model: The teacher.
        batches: Not used.
        autocast: Returns an autocast context, as `Fabric.autocast` does.
        tasks: The tasks; their tokens are stored on the model's device.
    """

    name = LOSS
    reads_data = False
    needs_tasks = True

    def __init__(
        self, model: SuperGPT, batches: Sequence[Batch] = (), autocast: Any = nullcontext, *, tasks: TaskSet
    ) -> None:
        super().__init__(model, (), autocast)
        self.tasks = tasks
        self.batches = [batch.to(model.lm_head.weight.device) for batch in tasks.batches]
        self.n_tokens = sum(batch.n_tokens for batch in self.batches)
        self.prefix = Prefix(model, [batch.input_ids for batch in self.batches])

    @torch.inference_mode()
    def __call__(self, subnet: SubNet) -> dict[str, float]:
        """Return a sub-network's scores by name."""
        # the prefix is known for whole batches only
        n_intact = 0 if self.is_halved else subnet.n_intact
        if n_intact:
            with self.autocast():
                self.prefix.before(n_intact)
        batches = [half for batch in self.batches for half in batch.halves()] if self.is_halved else self.batches
        with self._student(subnet) as student, self.autocast():
            # the head's owner also owns the blocks that run
            with starting_at(getattr(student, "head_owner", student), n_intact, self.prefix.streams):
                found = log_likelihoods(student, batches, self.tasks.n_continuations)
        return self.tasks.scores(self.tasks.results(found))

    @contextmanager
    def _student(self, subnet: SubNet) -> Iterator[GPT]:
        """Return the model to score."""
        with self.model.running(subnet, materialize=True):  # materialised, so that the weights are sliced only once
            yield self.model


class RepairedTasks(Repaired, Tasks):
    """`Tasks` for a candidate after a repair from moments (`litgpt_whittle.repair.from_moments`).

    Args:
        inputs: Positional arguments of `Tasks`.
        calibration: Calibration tokens for the repair, shape (N, T).
        more: Keyword arguments of `Tasks`.
    """

    @contextmanager
    def _student(self, subnet: SubNet) -> Iterator[GPT]:
        yield self.repair.student(subnet)
