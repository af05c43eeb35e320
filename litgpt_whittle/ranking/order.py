"""Order of a teacher's units by importance, and reordering of the teacher's weights.

Permuting channels, query groups, heads within groups, neurons or experts does not change the function of a model. A
teacher sorted by importance is therefore equivalent, and its first n units of any kind form a good sub-network. Layers
also have an order of importance, but are not moved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from litgpt.config import Config
from litgpt.model import GPT

from litgpt_whittle.subnet import PER_LAYER, SubNet, experts_of, layer_sizes
from litgpt_whittle.supergpt import Weights, extract_weights
from litgpt_whittle.unit_index import Ordered, UnitIndex


@dataclass(frozen=True, eq=False)
class Order:
    """Units of a teacher, the most important first.

    If a router chooses between groups of experts, experts are sorted within their groups.
    """

    teacher: Config
    n_embd: np.ndarray
    """Channels"""
    n_layer: np.ndarray
    """Layers"""
    layers: tuple[dict[str, np.ndarray], ...]
    """Per-layer units, by the names of a `SubNet`'s fields"""
    sublayers: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Layers by the importance of their attention (`attn`) and of their MLP (`mlp`), if known"""

    def __post_init__(self) -> None:
        for layer, units in enumerate(self.layers):
            assert {name: len(order) for name, order in units.items()} == layer_sizes(self.teacher, layer)

    @classmethod
    def by(
        cls,
        teacher: Config,
        n_embd: np.ndarray,
        n_layer: np.ndarray,
        layers: tuple[Mapping[str, np.ndarray], ...],
        sublayers: Mapping[str, np.ndarray] = MappingProxyType({}),
    ) -> Order:
        """Sort units by descending score, experts within their groups; ties keep their order."""

        def sort(name: str, scores: np.ndarray) -> np.ndarray:
            groups = (teacher.n_expert_groups or 1) if name == "n_expert" else 1
            each = len(scores) // groups
            best_first = np.argsort(-np.asarray(scores).reshape(groups, each), axis=1, kind="stable")
            return (best_first + np.arange(groups)[:, None] * each).ravel()

        own = tuple({name: sort(name, scores) for name, scores in units.items()} for units in layers)
        parts = {part: sort("n_layer", scores) for part, scores in sublayers.items()}
        return cls(teacher, sort("n_embd", n_embd), sort("n_layer", n_layer), own, parts)

    def best(self, name: str, layer: int, n: int) -> UnitIndex:
        """Return the n most important units of a layer; `layer` is ignored for channels, which all layers share."""
        order = self.n_embd if name == "n_embd" else self.layers[layer][name]
        places = experts_of(self.teacher, UnitIndex(n)) if name == "n_expert" else slice(n)
        return UnitIndex(np.sort(order[places]))

    @property
    def reordered(self) -> SubNet:
        """The whole teacher with its units in this order, as a sub-network that keeps all units."""
        fields: dict[str, Any] = {}
        for name in PER_LAYER:
            if any(name in units for units in self.layers):
                fields[name] = [Ordered(units[name]) if name in units else None for units in self.layers]
        return SubNet(self.teacher, n_embd=Ordered(self.n_embd), **fields)


def reorder(teacher: GPT | Mapping[str, torch.Tensor], order: Order, tied: bool | None = None) -> Weights:
    """Return the teacher's weights with the most important units first; the model computes the same function.

    Args:
        teacher: The teacher, or its weights.
        order: The order.
        tied: If true, the LM head shares the embedding's weights; by default detected from the weights.

    Returns:
        Copies of the weights, for the teacher's config. The best n units of any dimension are now its first n.
    """
    return extract_weights(teacher, order.reordered, tied)
