"""The units of a teacher, the most important first: what "the best n" are, and a teacher that has them in front.

Channels, query groups, heads within groups, neurons and experts may change places without changing what a model
computes. So a teacher sorted by importance is the same teacher, and every prefix of it a good sub-network. Layers
have an order of importance too, but never move.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from litgpt.config import Config
from litgpt.model import GPT

from litgpt_whittle.keep import Keep, Ordered
from litgpt_whittle.subnet import PER_LAYER, SubNet, experts_of, layer_sizes
from litgpt_whittle.supergpt import Weights, extract_weights


@dataclass(frozen=True, eq=False)
class Order:
    """The units of a teacher, the most important first.

    Where a router chooses between groups of experts, experts are sorted within their groups.
    """

    teacher: Config
    n_embd: np.ndarray
    """Channels"""
    n_layer: np.ndarray
    """Layers"""
    layers: tuple[dict[str, np.ndarray], ...]
    """Every layer's own units, by the names of a `SubNet`'s fields"""

    def __post_init__(self) -> None:
        for layer, units in enumerate(self.layers):
            assert {name: len(order) for name, order in units.items()} == layer_sizes(self.teacher, layer)

    @classmethod
    def by(
        cls, teacher: Config, n_embd: np.ndarray, n_layer: np.ndarray, layers: tuple[Mapping[str, np.ndarray], ...]
    ) -> Order:
        """The order of scores, the higher the more important; of equal units the first one comes first."""

        def sort(name: str, scores: np.ndarray) -> np.ndarray:
            groups = (teacher.n_expert_groups or 1) if name == "n_expert" else 1
            each = len(scores) // groups
            best_first = np.argsort(-np.asarray(scores).reshape(groups, each), axis=1, kind="stable")
            return (best_first + np.arange(groups)[:, None] * each).ravel()

        own = tuple({name: sort(name, scores) for name, scores in units.items()} for units in layers)
        return cls(teacher, sort("n_embd", n_embd), sort("n_layer", n_layer), own)

    def best(self, name: str, layer: int, n: int) -> Keep:
        """The n most important units of a layer; channels, which all layers share, whatever the layer."""
        order = self.n_embd if name == "n_embd" else self.layers[layer][name]
        places = experts_of(self.teacher, Keep(n)) if name == "n_expert" else slice(n)
        return Keep(np.sort(order[places]))

    @property
    def reordered(self) -> SubNet:
        """The whole teacher with its units in this order, as a sub-network that takes everything."""
        fields: dict[str, list[Keep | None]] = {}
        for name in PER_LAYER:
            if any(name in units for units in self.layers):
                fields[name] = [Ordered(units[name]) if name in units else None for units in self.layers]
        return SubNet(self.teacher, n_embd=Ordered(self.n_embd), **fields)


def reorder(teacher: GPT | Mapping[str, torch.Tensor], order: Order, tied: bool | None = None) -> Weights:
    """The teacher's weights with the most important units first: another arrangement of the same function.

    Args:
        teacher: The teacher, or its weights.
        order: The order.
        tied: Whether the LM head is the embedding; found out from the weights by default.

    Returns:
        Weights for the teacher's config, copies. The best n units of any dimension are now its first n.
    """
    return extract_weights(teacher, order.reordered, tied)
