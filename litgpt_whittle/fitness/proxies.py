"""Fitness that no text is read for: how much a candidate keeps of the teacher's weights, of its units, of its layers.

They rank candidates without a forward pass, and worse than a measured loss does (arXiv 2510.07227). Each score is the
share that is lost, from 0 for the whole teacher to nearly 1, so that lower is better as everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from litgpt_whittle.batches import Batch
from litgpt_whittle.distillation.losses import wide
from litgpt_whittle.index_plan import Take, axes_of, plan
from litgpt_whittle.keep import Keep
from litgpt_whittle.ranking.ranking import Ranking
from litgpt_whittle.subnet import SubNet, experts_of
from litgpt_whittle.supergpt import SuperGPT

CHUNK_ELEMENTS = 2**22
"""Weights that are looked at together, since those in bf16 are widened meanwhile"""

_NEVER_CUT = {"vocab", "q_lora_rank", "kv_lora_rank"}


class _Proxy:
    """A fitness that sees no tokens.

    Args:
        model: The teacher.
        batches: Not looked at.
        autocast: Not needed.
    """

    name: str
    reads_data = False

    def __init__(self, model: SuperGPT, batches: Sequence[Batch] = (), autocast: Any = nullcontext) -> None:
        self.model, self.config = model, model.config
        self.batches, self.n_tokens = (), 0


class WeightMagnitude(_Proxy):
    """The share of the teacher's Σ |w| that a candidate leaves out, over all parameters, tied ones once.

    What each row or column of a weight sums up to depends on the kept channels alone, which many candidates have in
    common. These sums are remembered for a few choices of channels; a candidate adds up those of the units that it has.
    """

    name = "magnitude_lost"

    def __init__(self, model: SuperGPT, batches: Sequence[Batch] = (), autocast: Any = nullcontext) -> None:
        super().__init__(model, batches, autocast)
        named = model.named_parameters(remove_duplicate=False)  # a tied weight goes by its other name in the plan
        self._weights = {name: _Weight.of(name, tensor) for name, tensor in named}
        self._sums = lru_cache(maxsize=8 * len(self._weights))(self._sums_over)
        self._total = self._kept(SubNet.full(self.config))

    def __call__(self, subnet: SubNet) -> dict[str, float]:
        """Scores a sub-network: `magnitude_lost`."""
        return {self.name: 1 - self._kept(subnet) / self._total}

    def _kept(self, subnet: SubNet) -> float:
        """Σ |w| of a sub-network."""
        takes = {take.name: take for take in plan(self.config, subnet, self.model.tied).values() if not take.is_buffer}
        return sum(self._kept_of(take, subnet.n_embd) for take in takes.values())

    def _kept_of(self, take: Take, n_embd: Keep) -> float:
        weight = self._weights[take.name]
        sums = self._sums(take.name, n_embd if weight.over_channels else None)
        index = take.index[0 if weight.summed is None else 1 - weight.summed]
        return float(sums[index if isinstance(index, slice) else index.numpy()].sum())

    @torch.no_grad()
    def _sums_over(self, name: str, n_embd: Keep | None) -> np.ndarray:
        """Σ |w| along a weight's summed dimension, of which only some channels count where it has channels."""
        tensor, dim, _ = self._weights[name]
        if dim is None:
            return wide(tensor).abs().double().cpu().numpy()
        if n_embd is None or n_embd.is_prefix:
            channels = slice(None if n_embd is None else len(n_embd))
        else:
            channels = torch.tensor(n_embd.indices, device=tensor.device)
        parts = []
        for part in tensor.split(max(CHUNK_ELEMENTS // tensor.shape[dim], 1), 1 - dim):
            part = part[channels] if dim == 0 else part[:, channels]
            parts.append(torch.linalg.vector_norm(wide(part), 1, dim=dim).double().cpu())
        return torch.cat(parts).numpy()


class _Weight(NamedTuple):
    """A parameter, and the dimension of it that is summed up for many candidates at once."""

    tensor: torch.Tensor
    summed: int | None
    """None where there is one dimension only"""
    over_channels: bool
    """Whether that is the channels' dimension, of which candidates have a part"""

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> _Weight:
        if tensor.dim() == 1:
            return cls(tensor, None, False)
        axes = axes_of(re.sub(r"^transformer\.h\.\d+\.", "", name).rpartition(".")[0])
        whole = [dim for dim, axis in enumerate(axes) if axis in _NEVER_CUT]
        return cls(tensor, whole[0], False) if whole else cls(tensor, axes.index("n_embd"), True)


class ImportanceMass(_Proxy):
    """The share of the units' importance that a candidate leaves out, a mean over the kinds of units.

    Channels, query groups, heads within groups, neurons and experts each have a share, summed over the layers; a layer
    that goes takes its units with it. A mean of shares, since measures of different kinds have different scales. Kinds
    that have one unit per layer say nothing.

    Args:
        model: The teacher.
        batches: Not looked at.
        autocast: Not needed.
        importance: What `litgpt rank` found; its `metric` counts.
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
        """Scores a sub-network: `importance_lost`."""
        kept = self._kept(subnet)
        shares = [kept.get(kind, 0.0) / total for kind, total in self._totals.items() if total > 0]
        return {self.name: 1 - sum(shares) / len(shares) if shares else 0.0}

    def _kept(self, subnet: SubNet) -> dict[str, float]:
        """The importance that a sub-network has, by the kinds of units."""
        rows = [*subnet.layers, self.config.n_layer]  # the last row is what lies outside of the layers
        mass = {"n_embd": float(self._channels[rows][:, subnet.n_embd.indices].sum())}
        for i, layer in enumerate(subnet.layers):
            keep = subnet.layer(i)
            for kind, scores in self._units[layer].items():
                if kind == "n_expert":
                    indices = experts_of(self.config, keep.n_expert)
                else:
                    width = "intermediate_size" if kind == "moe_intermediate_size" else kind
                    indices = getattr(keep, width).indices
                mass[kind] = mass.get(kind, 0.0) + float(scores[indices].sum())
        return mass


class BlockInfluence(_Proxy):
    """The share of the layers' block influence that a candidate leaves out, whatever its layers' widths (ShortGPT).

    Args:
        model: The teacher.
        batches: Not looked at.
        autocast: Not needed.
        importance: What `litgpt rank` found.
    """

    name = "influence_lost"
    needs_importance = True

    def __init__(
        self, model: SuperGPT, batches: Sequence[Batch] = (), autocast: Any = nullcontext, *, importance: Ranking
    ) -> None:
        super().__init__(model, batches, autocast)
        self._influence = importance.scores.layers["block_influence"].numpy()  # (n_layer,)

    def __call__(self, subnet: SubNet) -> dict[str, float]:
        """Scores a sub-network: `influence_lost`."""
        return {self.name: 1 - float(self._influence[list(subnet.layers)].sum() / self._influence.sum())}
