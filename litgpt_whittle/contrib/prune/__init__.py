"""Pruners, which choose the weights of a linear layer to drop; they register in the group `litgpt_whittle.pruners`."""

from litgpt_whittle.contrib.prune.base import Pruner, Sparsity
from litgpt_whittle.contrib.prune.magnitude import Magnitude
from litgpt_whittle.contrib.prune.sparsegpt import SparseGPT
from litgpt_whittle.contrib.prune.wanda import Wanda

__all__ = ["Magnitude", "Pruner", "SparseGPT", "Sparsity", "Wanda"]
