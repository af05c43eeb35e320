"""Select the heads and neurons of a repaired student: those with the largest Optimal-Brain-Surgeon saliency."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from litgpt.model import Block

from litgpt_whittle.index_plan import kept_indices
from litgpt_whittle.repair.importance import elimination_order
from litgpt_whittle.subnet import LayerUnits, SubNet
from litgpt_whittle.unit_index import UnitIndex

Orders = dict[tuple[str, bytes], list[int]]
"""Elimination orders of units, keyed by the name of the map that reads them and by the bytes of its column indices"""


def maps_to_choose_for(subnet: SubNet, index: int) -> list[str]:
    """Return the names of the output projections of a student's layer that lose inputs."""
    keep, full = subnet.layer(index), SubNet.full(subnet.teacher).layer(subnet.layers[index])
    maps = []
    loses_heads = (keep.n_query_groups, keep.heads_per_group) != (full.n_query_groups, full.heads_per_group)
    if "attn" in keep.parts and loses_heads:
        maps.append("attn.proj")
    # no selection within experts or among them: the experts that run depend on the token
    if "mlp" in keep.parts and keep.n_expert is None and keep.intermediate_size != full.intermediate_size:
        maps.append("mlp.proj")
    return maps


def choose_units(
    subnet: SubNet,
    index: int,
    teacher: Block,
    covariances: Mapping[str, torch.Tensor],
    basis: torch.Tensor | None = None,
    orders: Orders | None = None,
) -> LayerUnits:
    """Return the best units for a student's layer, as many of each kind as the layer keeps.

    Args:
        subnet: The student's sub-network; only the numbers of units matter.
        index: The student's layer.
        teacher: The corresponding block of the teacher.
        covariances: Input covariances of the teacher's output projections to select for, by name, shape (n_in, n_in).
        basis: The student's channels, in which errors are measured, shape (n_embd_student, n_embd); by default all of
            the teacher's channels.
        orders: Cache of complete elimination orders, for callers that try many numbers of units.
    """
    keep, full = subnet.layer(index), SubNet.full(subnet.teacher).layer(subnet.layers[index])
    (n_groups, n_per_group, n_neurons, _), theirs = keep.sizes, full.sizes

    def best(name: str, units: np.ndarray, n: int) -> UnitIndex:
        """Select the best n units; each row of `units` holds the columns of one unit in the map."""
        if n == len(units):
            return UnitIndex(n)
        key = (name, units.tobytes())
        if orders is not None and key in orders:
            removed = orders[key]
        else:
            weight = teacher.get_submodule(name).weight
            columns = torch.from_numpy(units.ravel()).to(weight.device)
            weight = weight[:, columns].float()
            places = torch.arange(len(columns), device=weight.device).view(units.shape)
            removed = elimination_order(
                covariances[name][columns][:, columns],
                weight if basis is None else basis @ weight,
                places,
                n_keep=n if orders is None else 0,
            )
            if orders is not None:
                orders[key] = removed
        return UnitIndex(np.setdiff1d(np.arange(len(units)), removed[: len(units) - n]))

    def columns_of(groups: UnitIndex, heads: UnitIndex) -> np.ndarray:
        of = dataclasses.replace(full, n_query_groups=groups, heads_per_group=heads)
        return kept_indices(subnet.teacher, 0, subnet.head_cut.dims, of)["attention"]

    if "attn.proj" in covariances:
        rows = [columns_of(UnitIndex([group]), UnitIndex(theirs[1])) for group in range(theirs[0])]
        groups = best("attn.proj", np.stack(rows), n_groups)
        # a head's position within its group is kept or dropped in all groups
        rows = [columns_of(groups, UnitIndex([head])) for head in range(theirs[1])]
        heads = best("attn.proj", np.stack(rows), n_per_group)
        keep = dataclasses.replace(keep, n_query_groups=groups, heads_per_group=heads)
    if "mlp.proj" in covariances:
        neurons = best("mlp.proj", np.arange(theirs[2])[:, None], n_neurons)
        keep = dataclasses.replace(keep, intermediate_size=neurons)
    return keep


def with_units(subnet: SubNet, layers: Sequence[LayerUnits]) -> SubNet:
    """Return the sub-network with the given units in each layer.

    Args:
        subnet: The sub-network.
        layers: Units of each of its layers, as many of each kind as it has now.
    """
    width = "moe_intermediate_size" if subnet.teacher.moe_intermediate_size is not None else "intermediate_size"
    fields: dict[str, list[UnitIndex | None]] = {}
    for i, keep in enumerate(layers):
        values = {"n_query_groups": keep.n_query_groups, "heads_per_group": keep.heads_per_group}
        values["intermediate_size" if keep.n_expert is None else width] = keep.intermediate_size
        if keep.n_expert is not None:
            values["n_expert"] = keep.n_expert
        for name, value in values.items():
            fields.setdefault(name, [None] * len(layers))[i] = value
    return subnet.replace(**fields)
