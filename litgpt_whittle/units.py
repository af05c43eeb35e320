"""Which heads and neurons of a layer a repaired student keeps: those that the others can least make up for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
from litgpt.model import Block

from litgpt_whittle.basis import Basis
from litgpt_whittle.calibration import Batch, Calibration
from litgpt_whittle.importance import most_important
from litgpt_whittle.index_plan import kept_indices
from litgpt_whittle.keep import Keep
from litgpt_whittle.least_squares import Moments, no_outputs
from litgpt_whittle.subnet import LayerKeep, SubNet


class UnitChooser:
    """Chooses as many units as a layer is to keep, from the moments of what its writing maps read.

    Args:
        subnet: What is to be kept, of which only the numbers count.
        index: The student's layer.
        teacher: The teacher's block behind it.
        basis: The student's channels, whose errors count.
        calibration: What the teacher's block is run on.
    """

    def __init__(self, subnet: SubNet, index: int, teacher: Block, basis: Basis, calibration: Calibration) -> None:
        self.subnet, self.teacher, self.basis, self.calibration = subnet, teacher, basis, calibration
        self.keep, self.full = subnet.layer(index), SubNet.full(subnet.teacher).layer(subnet.layers[index])
        keep, full = self.keep, self.full
        heads_are_cut = (keep.n_query_groups, keep.heads_per_group) != (full.n_query_groups, full.heads_per_group)
        # experts are not chosen between here: which one runs depends on the token
        neurons_are_cut = keep.n_expert is None and keep.intermediate_size != full.intermediate_size
        self.moments = {
            name: Moments(teacher.get_submodule(name).in_features, 0, calibration.device)
            for name, is_cut in (("attn.proj", heads_are_cut), ("mlp.proj", neurons_are_cut))
            if is_cut
        }

    def wanted(self, batch: Batch) -> list[str]:
        """Whose inputs are still wanted: sixteen tokens for each suffice, from the beginning of the data."""
        _, length = self.calibration.shape
        return [name for name, moments in self.moments.items() if batch.start * length < 16 * len(moments.z)]

    def add(self, seen: Mapping[str, torch.Tensor]) -> None:
        """Takes the inputs of modules by name."""
        for name, moments in self.moments.items():
            if name in seen:
                moments.add(seen[name], no_outputs(seen[name]))

    def choose(self) -> LayerKeep:
        """The layer's units, as many of each kind as it is to keep."""
        keep = self.keep
        for moments in self.moments.values():
            moments.over_processes()
        if "attn.proj" in self.moments:
            groups = self._best("attn.proj", self._groups(), len(keep.n_query_groups))
            within = self._best("attn.proj", self._heads_within(groups), len(keep.heads_per_group))
            keep = dataclasses.replace(keep, n_query_groups=groups, heads_per_group=within)
        if "mlp.proj" in self.moments:
            neurons = np.arange(len(self.full.intermediate_size))[:, None]
            kept = self._best("mlp.proj", neurons, len(keep.intermediate_size))
            keep = dataclasses.replace(keep, intermediate_size=kept)
        return keep

    def _best(self, name: str, units: np.ndarray, n: int) -> Keep:
        """The best n of the units, each a row of the columns that it has in a writing map."""
        if n == len(units):
            return Keep(n)
        module = self.teacher.get_submodule(name)
        columns = torch.from_numpy(units.ravel()).to(module.weight.device)
        covariance = self.moments[name].covariances(module.bias is not None)[0][columns][:, columns]
        weight = self.basis.matrix @ module.weight[:, columns]
        places = torch.arange(len(columns), device=columns.device).view(units.shape)
        return Keep(np.array(most_important(covariance, weight, places, n)))

    def _groups(self) -> np.ndarray:
        """Columns of the attention's output map, a row per query group."""
        return np.stack([self._columns(Keep([g]), self.full.heads_per_group) for g in self.full.n_query_groups.indices])

    def _heads_within(self, groups: Keep) -> np.ndarray:
        """The same per place of a head within these groups, which is kept or dropped in all of them."""
        return np.stack([self._columns(groups, Keep([h])) for h in self.full.heads_per_group.indices])

    def _columns(self, groups: Keep, heads: Keep) -> np.ndarray:
        keep = dataclasses.replace(self.full, n_query_groups=groups, heads_per_group=heads)
        return kept_indices(self.subnet.teacher, 0, self.subnet.head_cut.dims, keep)["attention"]
