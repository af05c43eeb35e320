"""Moments of one teacher block, and the fit of a student's block from them alone."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from litgpt.config import Config
from litgpt.model import Block
from torch import nn

from litgpt_whittle.index_plan import SlicePlan
from litgpt_whittle.least_squares import Fit, Moments, no_outputs, solve
from litgpt_whittle.repair.basis import Basis, affine_part, set_norm_weight, standardised, token_weights
from litgpt_whittle.repair.block import post_norm
from litgpt_whittle.repair.costs import sites
from litgpt_whittle.repair.cut import on
from litgpt_whittle.repair.readers import Find, fit_readers
from litgpt_whittle.repair.units import Orders, choose_units, maps_to_choose_for
from litgpt_whittle.student_block import NoSublayer
from litgpt_whittle.subnet import LayerUnits, SubNet


class LayerMoments:
    """Moments of one teacher block: of the hidden states before attention and MLP, and of its output projections.

    Args:
        config: The teacher's config.
        layer: Index of the layer.
        block: The teacher's block, watched by hooks while the teacher runs.
    """

    _start: torch.Tensor
    """Hidden states before the sub-layer that is running, to which its output projections add theirs"""

    def __init__(self, config: Config, layer: int, block: Block) -> None:
        self.config, self.device = config, block.attn.proj.weight.device
        parallel = self.config.parallel_residual
        self.before_attn = Moments(self.config.n_embd, 0, self.device)
        self.before_mlp = self.before_attn if parallel else Moments(self.config.n_embd, 0, self.device)

        def begin(moments: Moments, _: nn.Module, inputs: tuple) -> None:
            self._start = inputs[0]
            add_hidden_states(moments, inputs[0], self.config)

        self.handles = [block.register_forward_pre_hook(partial(begin, self.before_attn))]
        if not parallel:
            self.handles.append(block.norm_2.register_forward_pre_hook(partial(begin, self.before_mlp)))
        self.moments: dict[tuple[str, ...], Moments] = {}
        self.columns: dict[tuple[str, ...], dict[str, slice]] = {}
        """Input columns of each projection in a joint regression"""
        for names in sites(self.config, layer):
            self._watch(block, names)
        self._orders: Orders = {}

    def _watch(self, block: Block, names: tuple[str, ...]) -> None:
        """Collect the moments of output projections that one regression fits, by hooks on the teacher's block."""
        modules = [block.get_submodule(name) for name in names]
        ends = np.cumsum([0, *(module.in_features for module in modules)])
        self.columns[names] = {name: slice(start, end) for name, start, end in zip(names, ends, ends[1:])}
        norm_after = _post_norm(block, names)
        n_out = 0 if norm_after is None else self.config.n_embd
        moments = self.moments[names] = Moments(int(ends[-1]), n_out, self.device)
        seen: list[torch.Tensor] = []
        written: list[torch.Tensor] = []
        is_expert = "experts" in names[0]  # unweighted: hidden states of the tokens routed to it are not available here

        def add(_: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            z = torch.cat([x.flatten(0, -2) for x in seen], -1).float()
            after = None if is_expert else sum(written[:-1], self._start) + output
            weights = None if after is None else token_weights(after.float(), self.config)
            moments.add(z, no_outputs(z) if norm_after is None else output.flatten(0, -2).float(), weights)
            seen.clear()
            written.clear()

        self.handles += [module.register_forward_pre_hook(lambda _, x: seen.append(x[0])) for module in modules]
        self.handles += [module.register_forward_hook(lambda _, __, out: written.append(out)) for module in modules]
        # the MLP computes last
        self.handles.append((modules[-1] if norm_after is None else norm_after).register_forward_hook(add))

    def last_writers(self, keep: LayerUnits) -> tuple[str, ...]:
        """Return the names of the block's last output projections, which compensate for dropped sub-layers after them.

        Experts are not fitted to do so; for a mixture of experts, return an empty tuple.
        """
        return next((names for names in self.moments if f"{keep.parts[-1]}.proj" in names), ())

    def choose(self, subnet: SubNet, index: int, theirs: Block) -> LayerUnits:
        """Select the units with the largest OBS saliency, as many of each kind as a candidate's layer keeps."""
        covariances = {}
        for name in maps_to_choose_for(subnet, index):
            names = next(names for names in self.moments if name in names)
            columns = self.columns[names][name]
            intercept = theirs.get_submodule(name).bias is not None
            covariances[name] = self.moments[names].covariances(intercept)[0][columns, columns]
        return choose_units(subnet, index, theirs, covariances, orders=self._orders)

    def fit(
        self,
        block: Block,
        theirs: Block,
        slices: SlicePlan,
        basis: Basis,
        ridge: float,
        writers: tuple[str, ...] = (),
        gap: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Fit all input and output projections of a student's block, in place.

        Projections that lose nothing by slicing do not change: input projections if all channels are kept, and output
        projections if all of their inputs are kept, too.

        Args:
            block: The student's block.
            theirs: The teacher's block.
            slices: The student block's slices of the teacher's parameters.
            basis: Basis of the student's residual stream.
            ridge: Relative strength of the ridge.
            writers: The block's last output projections.
            gap: Moments of the gap of dropped sub-layers after the block, as `MomentRepair._measure_gap` returns them.
        """
        shared = self.config.shared_attention_norm
        for part, stream, norm in (
            ("attn", self.before_attn, "norm_1"),
            ("mlp", self.before_mlp, "norm_1" if shared else "norm_2"),
        ):
            if basis.is_whole or isinstance(block.get_submodule(part), NoSublayer):
                continue
            norms = theirs.get_submodule(norm), block.get_submodule(norm)
            moments = normalised(stream, basis, *norms)
            anchor = basis.reconstruction(norms[0], moments)
            fit_readers(block, slices, theirs, part, solution(moments, anchor, ridge))
        for names in self.moments:
            self._write(names, block, theirs, slices, basis, ridge, gap if names == writers else None)

    def _write(
        self,
        names: tuple[str, ...],
        block: Block,
        theirs: Block,
        slices: SlicePlan,
        basis: Basis,
        ridge: float,
        gap: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> None:
        """Fit the output projections `names` of a student's block by one regression, in place."""
        ours = {take.name.removesuffix(".weight"): name.removesuffix(".weight") for name, take in slices.items()}
        kept_names = [name for name in names if name in ours]
        if not kept_names:  # of an expert or a sub-layer that is not kept
            return
        students, moments = [block.get_submodule(ours[name]) for name in kept_names], self.moments[names]
        wide = [theirs.get_submodule(name) for name in names]
        # in coordinates, the norm after the map is the teacher's: the target is its input, which is linear
        is_linear = basis.is_coordinates and gap is None
        norm_after = None if is_linear else _post_norm(block, names)
        if gap is not None:
            moments = moments.with_outputs(*gap)
        kept = []
        for name in kept_names:
            columns = self.columns[names][name]
            index = on(slices[f"{ours[name]}.weight"].index[1], moments.zz)
            kept.append(torch.arange(columns.start, columns.stop, device=self.device)[index])
        if is_linear and basis.is_whole and sum(map(len, kept)) == len(moments.z):
            return
        has_outputs = gap is not None or norm_after is not None
        weight = None if has_outputs else torch.cat([module.weight for module in wide], 1)
        bias = sum(module.bias for module in wide) if wide[0].bias is not None else None
        wanted = _writing_moments(moments, torch.cat(kept), basis.matrix, weight, bias)
        anchor = torch.cat([module.weight for module in students], 1)
        found = solve(wanted, anchor, ridge, bias is not None)
        if norm_after is not None:
            found = self._through_norm(found, wanted, norm_after)
        for module, part in zip(students, found.weight.split([module.in_features for module in students], 1)):
            module.weight.copy_(part)
            if module.bias is not None:
                module.bias.copy_(found.bias if module is students[-1] else torch.zeros_like(found.bias))

    def _through_norm(self, found: Fit, moments: Moments, norm: nn.Module) -> Fit:
        """Scale each output channel of the fit to unit RMS, and move its size into the norm's weight."""
        size = ((found.weight @ (moments.zz / moments.mass)) * found.weight).sum(1).clamp_min(1e-30).sqrt()
        set_norm_weight(norm, size.float())
        return Fit(found.weight / size[:, None], found.bias / size, found.ridge)


def solution(moments: Moments, anchor: torch.Tensor, ridge: float) -> Find:
    """Return the function that `fit_readers` and `fit_head` call to solve the regression of these moments."""
    return lambda intercept, _: solve(moments, anchor, ridge, intercept)


def _post_norm(block: Block, names: tuple[str, ...]) -> nn.Module | None:
    """Return the norm after output projections, given their names; None if there is none."""
    return post_norm(block, *(name.removesuffix(".proj") for name in names))


def _writing_moments(
    moments: Moments, kept: torch.Tensor, basis: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
) -> Moments:
    """Return the moments of output projections' kept inputs, and of their targets in the student's channels.

    Args:
        moments: Moments of all inputs, and of the targets in the teacher's channels if `weight` is None.
        kept: Indices of the kept inputs.
        basis: The student's channels, shape (n_embd_student, n_embd).
        weight: The teacher's map, shape (n_embd, n_in), if the targets are its outputs; otherwise None.
        bias: Bias of the teacher's map.
    """
    new = Moments(len(kept), len(basis), moments.zz.device)
    basis = basis.to(new.zz.dtype)
    new.n, new.mass, new.z, new.zz = moments.n, moments.mass, moments.z[kept], moments.zz[kept][:, kept]
    if weight is None:
        new.yz, new.y = basis @ moments.yz[:, kept], basis @ moments.y
        return new
    wide = basis @ weight.to(basis.dtype)
    new.yz, new.y = wide @ moments.zz[:, kept], wide @ moments.z
    if bias is not None:
        bias = basis @ bias.to(basis.dtype)
        new.yz, new.y = new.yz + torch.outer(bias, new.z), new.y + moments.mass * bias
    return new


def normalised(stream: Moments, basis: Basis, theirs: nn.Module, ours: nn.Module) -> Moments:
    """Return moments with the student's normalised hidden states as inputs and the teacher's as outputs.

    The student's hidden states are approximated by the teacher's, projected onto the basis. The student's norm divides
    by the size of fewer channels, a different value for each token; here, one average factor corrects all tokens.

    Args:
        stream: Moments of the teacher's hidden states, normalised without the norm's weights.
        basis: Basis of the student's residual stream.
        theirs: The teacher's norm.
        ours: The student's norm.
    """
    turn = basis.matrix.to(stream.zz.dtype)
    n_student, n_teacher = turn.shape
    if isinstance(ours, nn.LayerNorm):
        turn = turn - turn.mean(0)
    if not isinstance(ours, nn.Identity):
        size = ((turn @ (stream.zz / stream.mass)) * turn).sum()
        turn = turn * (n_student / size).sqrt()
    (scale, shift), (out_scale, out_shift) = (
        [part.to(turn) for part in affine_part(norm, n)] for norm, n in ((ours, n_student), (theirs, n_teacher))
    )
    return stream.affine(scale[:, None] * turn, shift, torch.diag(out_scale), out_shift)


def add_hidden_states(moments: Moments, stream: torch.Tensor, config: Config) -> None:
    """Add the teacher's hidden states to the moments, normalised without the norm's weights.

    Args:
        moments: Moments without outputs, changed in place.
        stream: Hidden states, shape (…, n_embd).
        config: The teacher's config.
    """
    moments.add(standardised(stream.float(), config), no_outputs(stream))
