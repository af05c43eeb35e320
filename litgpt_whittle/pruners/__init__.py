"""Pruners choose the weights of a linear layer to drop; found by name in the group `litgpt_whittle.pruners`."""

from litgpt_whittle.pruners.base import Pruner, Sparsity
from litgpt_whittle.pruners.magnitude import Magnitude
from litgpt_whittle.pruners.sparsegpt import SparseGPT
from litgpt_whittle.pruners.wanda import Wanda

__all__ = ["Magnitude", "Pruner", "SparseGPT", "Sparsity", "Wanda"]
