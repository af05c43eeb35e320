"""Data-free proxies of a candidate's fitness, from the kept share of the teacher's weights, units or layers.

They rank candidates without a forward pass, but less accurately than a measured loss (arXiv 2510.07227). Each score is
the lost share: 0 for the whole teacher, up to nearly 1. Lower is better, as for all scores.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from litgpt_whittle.batches import Batch
from litgpt_whittle.fitness.base import Fitness
from litgpt_whittle.index_plan import ParamSlice, axes_of, plan
from litgpt_whittle.subnet import SubNet, experts_of
from litgpt_whittle.supergpt import SuperGPT
from litgpt_whittle.tensors import upcast
from litgpt_whittle.unit_index import UnitIndex

if TYPE_CHECKING:
    from litgpt_whittle.ranking.ranking import Ranking

CHUNK_ELEMENTS = 2**22
"""Number of weights per chunk; limits the memory of their float32 copies"""

_NEVER_CUT = {"vocab", "q_lora_rank", "kv_lora_rank"}
"""Axes of weights that all candidates keep whole"""


class _Proxy(Fitness):
    """Base class of fitness functions without data.

    Args:
        model: The teacher.
        batches: Not used.
        autocast: Not used.
    """

    reads_data = False

    def __init__(self, model: SuperGPT, batches: Sequence[Batch] = (), autocast: Any = nullcontext) -> None:
        super().__init__(model, (), autocast)
        self.config = model.config


class WeightMagnitude(_Proxy):
    """Share of Σ |w| over all of the teacher's parameters that a candidate lacks; tied weights count once.

    The sum of each row or column of a weight depends only on the kept channels, and many candidates keep the same
    channels. These sums are therefore cached; a candidate's score adds up the sums of its units.
    """

    name = "magnitude_lost"

    def __init__(self, model: SuperGPT, batches: Sequence[Batch] = (), autocast: Any = nullcontext) -> None:
        super().__init__(model, batches, autocast)
        named = model.named_parameters(remove_duplicate=False)  # the plan uses a tied weight's other name
        self._weights = {name: _Weight.of(name, tensor) for name, tensor in named}
        self._sums = lru_cache(maxsize=8 * len(self._weights))(self._sums_over)
        self._total = self._kept(SubNet.full(self.config))

    def __call__(self, subnet: SubNet) -> dict[str, float]:
        """Return a sub-network's `magnitude_lost`."""
        return {self.name: 1 - self._kept(subnet) / self._total}

    def _kept(self, subnet: SubNet) -> float:
        """Return Σ |w| of a sub-network."""
        slices = {take.name: take for take in plan(self.config, subnet, self.model.tied).values() if not take.is_buffer}
        return sum(self._kept_of(take, subnet.n_embd) for take in slices.values())

    def _kept_of(self, take: ParamSlice, n_embd: UnitIndex) -> float:
        """Return Σ |w| of a slice, given the kept channels."""
        weight = self._weights[take.name]
        sums = self._sums(take.name, n_embd if weight.over_channels else None)
        index = take.index[0 if weight.summed is None else 1 - weight.summed]
        return float(sums[index if isinstance(index, slice) else index.numpy()].sum())

    @torch.no_grad()
    def _sums_over(self, name: str, n_embd: UnitIndex | None) -> np.ndarray:
        """Return Σ |w| along a weight's summed dimension, over the kept channels if that is the channels' dimension."""
        tensor, dim, _ = self._weights[name]
        if dim is None:
            return upcast(tensor).abs().cpu().double().numpy()
        channels: slice | torch.Tensor
        if n_embd is None or n_embd.is_prefix:
            channels = slice(None if n_embd is None else len(n_embd))
        else:
            channels = torch.tensor(n_embd.indices, device=tensor.device)
        parts = []
        for part in tensor.split(max(CHUNK_ELEMENTS // tensor.shape[dim], 1), 1 - dim):
            part = part[channels] if dim == 0 else part[:, channels]
            parts.append(torch.linalg.vector_norm(upcast(part), 1, dim=dim).cpu().double())
        return torch.cat(parts).numpy()


class _Weight(NamedTuple):
    """A parameter, and the dimension to sum over once for many candidates."""

    tensor: torch.Tensor
    summed: int | None
    """The dimension to sum over; None for a parameter with a single dimension"""
    over_channels: bool
    """True if `summed` is the dimension of the channels, of which candidates keep a part"""

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> _Weight:
        if tensor.dim() == 1:
            return cls(tensor, None, False)
        axes = axes_of(re.sub(r"^transformer\.h\.\d+\.", "", name).rpartition(".")[0])
        whole = [dim for dim, axis in enumerate(axes) if axis in _NEVER_CUT]
        return cls(tensor, whole[0], False) if whole else cls(tensor, axes.index("n_embd"), True)


class ImportanceMass(_Proxy):
    """Share of the units' importance that a candidate lacks, averaged over the kinds of units.

    The kinds are channels, query groups, heads within groups, neurons and experts. The share of a kind sums over all
    layers; a dropped layer loses all of its units. Shares are averaged, not scores, because the scores of different
    kinds have different scales. Kinds with a single unit per layer are skipped.

    Args:
        model: The teacher.
        batches: Not used.
        autocast: Not used.
        importance: Ranking from `litgpt rank`; the scores of its `metric` are used.
    """

    name = "importance_lost"
    needs_importance = True

    def __init__(
        self, model: SuperGPT, batches: Sequence[Batch] = (), autocast: Any = nullcontext, *, importance: Ranking
    ) -> None:
        super().__init__(model, batches, autocast)
        units = importance.scores.units[importance.metric]
        self._channels = units.n_embd.numpy()  # (n_layer + 1, n_embd)
        self._units = [{kind: own.numpy() for kind, own in layer.items() if len(own) > 1} for layer in units.layers]
        self._totals = self._kept(SubNet.full(self.config))

    def __call__(self, subnet: SubNet) -> dict[str, float]:
        """Return a sub-network's `importance_lost`."""
        kept = self._kept(subnet)
        shares = [kept.get(kind, 0.0) / total for kind, total in self._totals.items() if total > 0]
        return {self.name: 1 - sum(shares) / len(shares) if shares else 0.0}

    def _kept(self, subnet: SubNet) -> dict[str, float]:
        """Return the kept importance of a sub-network by kind of units."""
        rows = [*subnet.layers, self.config.n_layer]  # the last row is for modules outside of the layers
        mass = {"n_embd": float(self._channels[rows][:, subnet.n_embd.indices].sum())}
        for i, layer in enumerate(subnet.layers):
            own = subnet.layer(i)
            for kind, scores in self._units[layer].items():
                keep = getattr(own, "intermediate_size" if kind == "moe_intermediate_size" else kind)
                if keep is None:  # of a dropped sub-layer
                    continue
                indices = experts_of(self.config, keep) if kind == "n_expert" else keep.indices
                mass[kind] = mass.get(kind, 0.0) + float(scores[indices].sum())
        return mass


class BlockInfluence(_Proxy):
    """Share of the layers' block influence (ShortGPT) that a candidate lacks, regardless of its layers' widths.

    A layer without its attention or its MLP counts half.

    Args:
        model: The teacher.
        batches: Not used.
        autocast: Not used.
        importance: Ranking from `litgpt rank`.
    """

    name = "influence_lost"
    needs_importance = True

    def __init__(
        self, model: SuperGPT, batches: Sequence[Batch] = (), autocast: Any = nullcontext, *, importance: Ranking
    ) -> None:
        super().__init__(model, batches, autocast)
        self._influence = importance.scores.layers["block_influence"].numpy()  # (n_layer,)

    def __call__(self, subnet: SubNet) -> dict[str, float]:
        """Return a sub-network's `influence_lost`."""
        parts = [len(subnet.layer(i).parts) / 2 for i in range(len(subnet))]
        return {self.name: 1 - float(self._influence[list(subnet.layers)] @ parts / self._influence.sum())}
