"""Base class of fitness measures that score a candidate after a repair from moments."""

from __future__ import annotations

from typing import Any

import torch
from litgpt.config import Config

from litgpt_whittle.fitness.base import Fitness
from litgpt_whittle.repair.costs import check_memory
from litgpt_whittle.repair.from_moments import MomentRepair


class Repaired(Fitness):
    """Base class of measures that repair candidates from the teacher's moments (`litgpt_whittle.repair.from_moments`).

    Args:
        inputs: Positional arguments of the measure without a repair.
        calibration: Calibration tokens for the repair, shape (N, T).
        more: Keyword arguments of the measure without a repair.
    """

    n_calibration = 32_768
    can_shard = False
    chooses_units = True

    def __init__(self, *inputs: Any, calibration: torch.Tensor, **more: Any) -> None:
        super().__init__(*inputs, **more)
        self.repair = MomentRepair(self.model, calibration)

    @classmethod
    def check(cls, teacher: Config, device: torch.device, beside: int) -> None:
        """Check that the moments of all layers fit into memory."""
        check_memory(teacher, 0, device, beside)
