"""Base classes of fitness measures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
from litgpt.config import Config

from litgpt_whittle.batches import Batch
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import SuperGPT


class Fitness(ABC):
    """Scoring function for candidates, found by its name in the entry-point group `litgpt_whittle.fitness`.

    Class attributes declare the inputs and the capabilities of the function.

    Args:
        model: The teacher.
        batches: Batches to score all candidates on; empty unless `reads_data`.
        autocast: Returns an autocast context, as `Fabric.autocast` does.
    """

    name: ClassVar[str]
    """Name of the score to minimise"""
    reads_data: ClassVar[bool] = True
    """True if the function scores candidates on batches"""
    n_calibration: ClassVar[int] = 0
    """Number of calibration tokens N · T to pass to the constructor as `calibration`, shape (N, T); 0 for none"""
    needs_importance: ClassVar[bool] = False
    """True if the teacher's `Ranking` is passed to the constructor as `importance`"""
    needs_tasks: ClassVar[bool] = False
    """True if the tasks of the settings are passed to the constructor as `tasks`, a `TaskSet`; its batches then replace
    those of the data"""
    can_shard: ClassVar[bool] = False
    """True if the teacher may be sharded over processes"""
    chooses_units: ClassVar[bool] = False
    """True if the function selects heads and neurons itself, so that the score depends only on their numbers; experts
    are not selected"""

    model: SuperGPT
    batches: Sequence[Any]
    """Batches on the model's device"""
    n_tokens: int
    """Number of tokens that each candidate is scored on"""
    autocast: Callable[[], AbstractContextManager[Any]]
    is_halved: bool = False
    """True while a candidate should run with half as many windows or inputs per forward pass"""
    is_sharded: bool = False
    """True if the teacher is sharded over processes; all of them then score every candidate together"""

    def __init__(self, model: SuperGPT, batches: Sequence[Batch] = (), autocast: Any = nullcontext) -> None:
        device = model.lm_head.weight.device
        self.model, self.autocast = model, autocast
        self.batches = [Batch(*(tensor.to(device) for tensor in batch)) for batch in batches]
        self.n_tokens = sum(batch.n_tokens for batch in self.batches)

    @abstractmethod
    def __call__(self, subnet: SubNet) -> dict[str, float]:
        """Return a sub-network's scores by name."""

    @classmethod
    def needs_data(cls) -> bool:
        """Return whether a data module is needed, to score candidates or to calibrate on."""
        return cls.reads_data or bool(cls.n_calibration)

    @classmethod  # noqa: B027 (most measures need no check)
    def check(cls, teacher: Config, device: torch.device, beside: int) -> None:
        """Check the memory that the measure needs, before the teacher's weights are loaded.

        Args:
            teacher: The teacher's config.
            device: Device that scores candidates.
            beside: Bytes to reserve for the teacher's weights.

        Raises:
            UserError: If the measure cannot score candidates of this teacher.
        """

    @contextmanager
    def halved(self) -> Iterator[None]:
        """Set `is_halved` inside this context, to score a candidate again after it ran out of memory."""
        self.is_halved = True
        try:
            yield
        finally:
            self.is_halved = False


class WindowLosses(NamedTuple):
    """A candidate's losses per window, in the batches' order; tensors on the CPU, shape (n_windows,)."""

    sums: torch.Tensor
    """Losses summed over the window's tokens, float64"""
    n_tokens: torch.Tensor
    """Number of tokens of the window"""

    @property
    def mean(self) -> float:
        """Mean loss per token."""
        return float(self.sums.sum() / self.n_tokens.sum())


class WindowFitness(Fitness):
    """Fitness that depends only on the mean loss over all tokens; racing computes the loss on a part of the batches.

    Args:
        model: The teacher.
        batches: Batches to score all candidates on.
        autocast: Returns an autocast context, as `Fabric.autocast` does.
    """

    def __call__(self, subnet: SubNet) -> dict[str, float]:
        """Return a sub-network's scores by name."""
        return self.scores(self.losses(subnet).mean)

    @abstractmethod
    def losses(self, subnet: SubNet, which: slice = slice(None)) -> WindowLosses:
        """Return a sub-network's losses on every window of the selected batches."""

    @abstractmethod
    def scores(self, loss: float) -> dict[str, float]:
        """Convert a mean loss to scores by name."""
