"""Units of one layer: their numbers in the teacher, and the kept ones in a sub-network."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from litgpt.config import Config

from litgpt_whittle.errors import UserError
from litgpt_whittle.unit_index import UnitIndex

PER_LAYER = ("n_query_groups", "heads_per_group", "intermediate_size", "moe_intermediate_size", "n_expert")
"""The fields of a `SubNet` that may differ from layer to layer."""

ATTENTION = ("n_query_groups", "heads_per_group")
"""The per-layer fields of attention; the others belong to the MLP"""


@dataclass(frozen=True)
class LayerUnits:
    """Kept units of one layer. A dropped sub-layer has None for each of its kinds of units."""

    n_query_groups: UnitIndex | None
    """Query groups (the heads, if each head is a group of its own)"""
    heads_per_group: UnitIndex | None
    """Query heads within each group"""
    intermediate_size: UnitIndex | None
    """Neurons of the MLP, or of each expert"""
    n_expert: UnitIndex | None
    """Experts; None in a dense layer"""

    @property
    def parts(self) -> tuple[str, ...]:
        """The kept sub-layers, by litgpt's names: `attn` and `mlp`, or only one of them."""
        kept = {"attn": self.n_query_groups, "mlp": self.intermediate_size}
        return tuple(name for name, units in kept.items() if units is not None)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Numbers of query groups, heads per group, neurons and experts; 0 for units that the layer does not have."""
        units = self.n_query_groups, self.heads_per_group, self.intermediate_size, self.n_expert
        groups, per_group, neurons, n_expert = (0 if keep is None else len(keep) for keep in units)
        return groups, per_group, neurons, n_expert


def layer_sizes(teacher: Config, layer: int) -> dict[str, int]:
    """Return the sizes of the teacher's layer `layer`, by the names of the per-layer fields of `SubNet`."""
    sizes = {"n_query_groups": teacher.n_query_groups, "heads_per_group": teacher.n_head // teacher.n_query_groups}
    is_dense = teacher.mlp_class_name != "LLaMAMoE" or layer < (teacher.first_k_dense_replace or 0)
    if is_dense:
        return sizes | {"intermediate_size": teacher.intermediate_size}
    if teacher.moe_intermediate_size is not None:
        return sizes | {"moe_intermediate_size": teacher.moe_intermediate_size, "n_expert": teacher.n_expert}
    return sizes | {"intermediate_size": teacher.intermediate_size, "n_expert": teacher.n_expert}


def experts_of(teacher: Config, keep: UnitIndex) -> np.ndarray:
    """Return the indices of the kept experts. In grouped routing, "the first n" are the first n / groups of each group.

    Raises:
        UserError: If too few experts are kept for litgpt's router, or the groups would differ in size.
    """
    n, per_token = len(keep), teacher.n_expert_per_token
    if n < per_token:
        raise UserError(f"n_expert must be at least n_expert_per_token = {per_token}, got {n}; keep more experts")
    groups = teacher.n_expert_groups
    if not groups:
        return keep.indices
    group_size = teacher.n_expert // groups
    if n % groups:
        raise UserError(f"n_expert must be a multiple of n_expert_groups = {groups}, got {n}; keep {n - n % groups}")
    least = max(teacher.n_topk_scores_per_group, -(-per_token // teacher.n_topk_groups))
    if n // groups < least:
        raise UserError(
            f"n_expert must be at least {least * groups}, {least} in each of the {groups} expert groups, got {n}; "
            "keep more experts"
        )
    if keep.is_prefix:
        return (np.arange(groups)[:, None] * group_size + np.arange(n // groups)).ravel()
    if (counts := np.bincount(keep.indices // group_size, minlength=groups)).min() != counts.max():
        raise UserError(f"every expert group must keep the same number, got {counts.tolist()}; balance n_expert")
    return keep.indices
