"""Repair candidates by linear solves, from moments of the teacher that are collected once.

The full repair (`litgpt_whittle.repair.sequential`) runs the student to get the actual inputs of its maps. Here each
map is fitted as if all maps before it were the teacher's, so no token passes through the candidate. The result is
slightly worse than a full repair, but ranks candidates as full repairs do; scores without any repair do not. Dropped
layers and sub-layers are compensated as in a full repair: the maps before such a gap are fitted to the teacher's hidden
states after the gap.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial

import numpy as np
import torch
from litgpt.model import GPT, Block
from torch import nn

from litgpt_whittle.blocks import load_block, read_block, read_outside, run_block, stopping_at
from litgpt_whittle.index_plan import SlicePlan
from litgpt_whittle.least_squares import Fit, Moments, exact_products, no_outputs, solve
from litgpt_whittle.meta import meta_modules
from litgpt_whittle.repair.basis import (
    Basis,
    DirectionImportance,
    affine_part,
    is_centring,
    principal_directions,
    readers,
    set_norm_weight,
    standardised,
    token_weights,
)
from litgpt_whittle.repair.block import post_norm
from litgpt_whittle.repair.costs import check_memory, sites
from litgpt_whittle.repair.cut import TokenMeans, cut_block, cut_outside, not_finite, on
from litgpt_whittle.repair.readers import Find, fit_head, fit_readers, fit_tied_norm
from litgpt_whittle.repair.units import Orders, choose_units, maps_to_choose_for
from litgpt_whittle.student_block import NoSublayer
from litgpt_whittle.subnet import LayerUnits, SubNet
from litgpt_whittle.supergpt import BlocksGPT, SuperGPT

GAPS_KEPT = 64
"""Number of gaps of dropped layers whose moments are kept for later candidates"""

RIDGE = 1e-4
"""Relative strength of the ridge, which a full repair tunes for each map"""


class MomentRepair:
    """Creates repaired students of a teacher, in the teacher's dtype; solves run in float32 or higher.

    Args:
        teacher: The teacher.
        windows: Calibration tokens, shape (N, T).
        micro_batch_size: Windows per forward pass.

    Raises:
        UserError: If the moments of all layers do not fit into memory, or activations are not finite.
    """

    _ids: torch.Tensor
    """Token ids of the current batch, for the hooks"""

    @exact_products()
    @torch.no_grad()
    def __init__(self, teacher: SuperGPT, windows: torch.Tensor, micro_batch_size: int = 8) -> None:
        self.teacher, self.config, self.device = teacher, teacher.config, teacher.lm_head.weight.device
        self.weights = teacher.state_dict()
        tokens = windows.unique().to(self.device)
        check_memory(self.config, len(tokens), self.device, n_calibration=windows.numel())
        self.layers = [_LayerMoments(self, layer, block) for layer, block in enumerate(teacher.transformer.h)]
        self.final = Moments(self.config.n_embd, 0, self.device)
        self.before: dict[int, TokenMeans] = {}
        """Per-token means of the teacher's hidden states, by the layer (except 0) that can be a student's first"""
        self.streams: list[list[torch.Tensor]] = [[] for _ in range(self.config.n_layer + 1)]
        """The teacher's hidden states before each layer and after the last, batch by batch, in main memory"""
        self.block_args: list[tuple] = [()] * self.config.n_layer
        watching = [handle for layer in self.layers for handle in layer.handles]
        for layer, module in enumerate([*teacher.transformer.h, teacher.transformer.ln_f]):
            watching.append(module.register_forward_pre_hook(partial(self._keep_stream, layer)))
        watching.append(
            teacher.transformer.ln_f.register_forward_pre_hook(lambda _, inputs: self._add(self.final, inputs[0]))
        )
        for layer in range(1, 1 if teacher.tied else self.config.n_layer):
            means = self.before[layer] = TokenMeans(tokens, self.config.n_embd)
            block = teacher.transformer.h[layer]
            watching.append(block.register_forward_pre_hook(lambda _, x, means=means: means.add(self._ids, x[0])))
        for ids in windows.to(self.device).split(micro_batch_size):
            self._ids = ids
            with stopping_at(teacher.transformer.ln_f):  # saves the memory of the logits
                teacher(ids)
        for handle in watching:
            handle.remove()
        self.ridge = self._checked_ridge()
        self.norm = copy.deepcopy(teacher.transformer.ln_f).float()
        self._directions = principal_directions(self._worth().form, is_centring(self.config))
        self._basis = lru_cache(maxsize=16)(self._make_basis)
        self._gap = lru_cache(maxsize=GAPS_KEPT)(self._measure_gap)
        self._windows, self._micro_batch_size = windows, micro_batch_size
        self._inside = lru_cache(maxsize=2)(self._means_inside)

    def _keep_stream(self, layer: int, _: nn.Module, inputs: tuple) -> None:
        self.streams[layer].append(inputs[0].cpu())
        if layer < self.config.n_layer:
            self.block_args[layer] = inputs[1:]

    def _measure_gap(
        self, layer: int, names: tuple[str, ...], following: int, inside: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the moments of a layer's output projections, with targets after a gap of dropped sub-layers.

        Args:
            layer: The layer before the gap.
            names: The last output projections before the gap.
            following: The next kept layer, or the number of layers.
            inside: True if that layer begins with its MLP.

        Returns:
            Weighted sums over tokens of y zᵀ, shape (n_embd, n_in), and of y, shape (n_embd,). The projections' inputs
            are z. The difference between the teacher's hidden states after the gap and before these projections is y.
        """
        moments, block = self.layers[layer], self.teacher.transformer.h[layer]
        middle_at = [] if self.config.parallel_residual else ["norm_2"]
        total = Moments(len(moments.moments[names].z), self.config.n_embd, self.device)
        yz, y, dtype = total.yz, total.y, total.product_dtype
        goals: Iterable[torch.Tensor] = self._middles(following) if inside else self.streams[following]
        for before, after, wanted in zip(self.streams[layer], self.streams[layer + 1], goals):
            before, after, wanted = (x.to(self.device) for x in (before, after, wanted))
            seen = run_block(block, before, self.block_args[layer], [*names, *middle_at], stop=True)
            z = torch.cat([seen[name].flatten(0, -2) for name in names], -1).to(dtype)
            start = seen.get("norm_2", before)
            if names == ("attn.proj",):
                start, after = before, seen["norm_2"]
            off = (wanted.float() - start.float()).flatten(0, -2).to(dtype)
            # same weights as the layer's own moments, whose sums over the inputs are used again
            off = off * token_weights(after.float(), self.config).flatten()[:, None].to(dtype)
            yz += off.T @ z
            y += off.sum(0)
        return yz, y

    def _middles(self, layer: int) -> Iterator[torch.Tensor]:
        """Yield the teacher's hidden states between a layer's attention and its MLP, batch by batch."""
        block, args = self.teacher.transformer.h[layer], self.block_args[layer]
        for before in self.streams[layer]:
            yield run_block(block, before.to(self.device), args, ["norm_2"], stop=True)["norm_2"]

    def _means_inside(self, layer: int) -> TokenMeans:
        """Return per-token means of the teacher's hidden states between a layer's attention and its MLP."""
        means = TokenMeans(self._windows.unique().to(self.device), self.config.n_embd)
        for ids, middle in zip(self._windows.split(self._micro_batch_size), self._middles(layer)):
            means.add(ids.to(self.device), middle)
        return means

    def _replace_embedding(self, embedding: torch.Tensor, subnet: SubNet, basis: Basis) -> None:
        """Write the hidden states after dropped first sub-layers into an untied embedding, as far as tokens predict."""
        layer = subnet.layers[0]
        if subnet.begins_late and not self.teacher.tied:
            means = self._inside(layer) if subnet.begins_inside(0) else self.before[layer]
            means.into(embedding, basis, self.config)

    def block(self, layer: int) -> Block:
        """Return one of the teacher's blocks in float32."""
        return load_block(self.config, layer, read_block(self.weights, layer, self.device))

    def _checked_ridge(self) -> float:
        """Return the ridge of all maps, a strong one if the widest map has more inputs than there are tokens."""
        behind = [*(layer.before_attn for layer in self.layers[1:]), self.final]
        for layer, moments in enumerate(self.layers):
            if not all(torch.isfinite(sums.z).all() for sums in (*moments.moments.values(), behind[layer])):
                raise not_finite(layer)
        widest = max(len(sums.z) for layer in self.layers for sums in layer.moments.values())
        if self.final.n >= widest:
            return RIDGE
        warnings.warn(
            f"{self.final.n:,} calibration tokens are fewer than the {widest:,} inputs of the widest map; repairs from "
            "moments hardly change the sliced weights, give more text",
            stacklevel=3,
        )
        return 1e-1

    def _add(self, moments: Moments, stream: torch.Tensor) -> None:
        """Add hidden states to the moments, normalised without the norm's weights."""
        moments.add(standardised(stream.float(), self.config), no_outputs(stream))

    def _worth(self) -> DirectionImportance:
        worth = DirectionImportance()
        for i, layer in enumerate(self.layers):
            block = self.block(i)
            mlp_norm = block.norm_1 if self.config.shared_attention_norm else block.norm_2
            worth.add(layer.before_attn, block.norm_1, readers(block, "attn"))
            worth.add(layer.before_mlp, mlp_norm, readers(block, "mlp"))
        head = self.teacher.lm_head.weight.float()
        worth.add(self.final, self.norm, [head - head.mean(0)], times=len(self.layers))
        return worth

    @exact_products()
    @torch.no_grad()
    def student(self, subnet: SubNet) -> GPT:
        """Return a repaired student with reselected units, in a principal basis if channels are removed."""
        basis = self._basis(len(subnet.n_embd))
        blocks: list[Block] = []
        for i, layer in enumerate(subnet.layers):
            theirs, moments = self.block(layer), self.layers[layer]
            if i < subnet.n_intact:
                blocks.append(theirs)
                continue
            block, slices = cut_block(subnet, i, moments.choose(subnet, i, theirs), basis, theirs)
            writers = moments.last_writers(subnet.layer(i))
            moments.fit(block, theirs, slices, basis, self.ridge, writers, self._gap_after(subnet, i, writers))
            blocks.append(block)
        weights = read_outside(self.weights, self.device)
        with meta_modules():
            shell = BlocksGPT(subnet.config, [])
        shell.load_state_dict(cut_outside(self.config, weights, basis, self.teacher.tied), assign=True)
        self._replace_embedding(shell.transformer.wte.weight, subnet, basis)
        shell.transformer["h"] = nn.ModuleList(blocks)
        shell.max_seq_length = self.teacher.max_seq_length
        shell.cos, shell.sin = shell.rope_cache(device=self.device)
        self._fit_head(shell, basis)
        return shell.eval().requires_grad_(False).to(self.teacher.lm_head.weight.dtype)

    def _gap_after(self, subnet: SubNet, i: int, writers: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the moments of the gap of dropped sub-layers after the student's layer `i`; None if there is none."""
        layer, is_last = subnet.layers[i], i + 1 == len(subnet)
        following = self.config.n_layer if is_last else subnet.layers[i + 1]
        inside = not is_last and subnet.begins_inside(i + 1)
        is_gap = following > layer + 1 or inside or writers == ("attn.proj",)
        return self._gap(layer, writers, following, inside) if writers and is_gap else None

    def _make_basis(self, n_embd: int) -> Basis:
        if n_embd == self.config.n_embd:
            return Basis.coordinates(torch.arange(n_embd, device=self.device), n_embd)
        return Basis.principal(self._directions, n_embd, is_centring(self.config))

    def _fit_head(self, student: GPT, basis: Basis) -> None:
        theirs, ours = self.norm, student.transformer.ln_f
        if not basis.is_coordinates:
            basis.turn_norm(theirs, ours)
        if self.teacher.tied:
            student.lm_head.weight = student.transformer.wte.weight
        if basis.is_whole:
            return
        moments = normalised(self.final, basis, theirs, ours)
        if self.teacher.tied:
            fit_tied_norm(ours, student.lm_head.weight, self.teacher.lm_head.weight, moments)
        else:
            anchor = basis.reconstruction(theirs, moments)
            fit_head(student.lm_head, self.teacher.lm_head, _solution(moments, anchor, self.ridge))


class _LayerMoments:
    """Moments of one teacher block: of the hidden states before attention and MLP, and of its output projections.

    Args:
        repair: The repair that collects the moments.
        layer: Index of the layer.
        block: The teacher's block, watched by hooks while the teacher runs.
    """

    _start: torch.Tensor
    """Hidden states to which the current output projections add"""

    def __init__(self, repair: MomentRepair, layer: int, block: Block) -> None:
        self.config, self.device = repair.config, repair.device
        parallel = self.config.parallel_residual
        self.before_attn = Moments(self.config.n_embd, 0, self.device)
        self.before_mlp = self.before_attn if parallel else Moments(self.config.n_embd, 0, self.device)

        def begin(moments: Moments, _: nn.Module, inputs: tuple) -> None:
            self._start = inputs[0]
            repair._add(moments, inputs[0])

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
        modules = [block.get_submodule(name) for name in names]
        ends = np.cumsum([0, *(module.in_features for module in modules)])
        self.columns[names] = {name: slice(start, end) for name, start, end in zip(names, ends, ends[1:])}
        norm_behind = _post_norm(block, names)
        n_out = 0 if norm_behind is None else self.config.n_embd
        moments = self.moments[names] = Moments(int(ends[-1]), n_out, self.device)
        seen: list[torch.Tensor] = []
        written: list[torch.Tensor] = []
        is_expert = "experts" in names[0]  # unweighted: hidden states of the tokens routed to it are not available here

        def add(_: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            z = torch.cat([x.flatten(0, -2) for x in seen], -1).float()
            after = None if is_expert else sum(written[:-1], self._start) + output
            weights = None if after is None else token_weights(after.float(), self.config)
            moments.add(z, no_outputs(z) if norm_behind is None else output.flatten(0, -2).float(), weights)
            seen.clear()
            written.clear()

        self.handles += [module.register_forward_pre_hook(lambda _, x: seen.append(x[0])) for module in modules]
        self.handles += [module.register_forward_hook(lambda _, __, out: written.append(out)) for module in modules]
        # the MLP computes last
        self.handles.append((modules[-1] if norm_behind is None else norm_behind).register_forward_hook(add))

    def last_writers(self, keep: LayerUnits) -> tuple[str, ...]:
        """Return the last output projections, which compensate for dropped sub-layers; none for experts."""
        return next((names for names in self.moments if f"{keep.parts[-1]}.proj" in names), ())

    def choose(self, subnet: SubNet, index: int, theirs: Block) -> LayerUnits:
        """Select as many units as a candidate keeps of this layer, those with the largest OBS saliency."""
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
            gap: Moments of the gap of dropped sub-layers after them, as `MomentRepair._measure_gap` returns them.
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
            fit_readers(block, slices, theirs, part, _solution(moments, anchor, ridge))
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
        ours = {take.name.removesuffix(".weight"): name.removesuffix(".weight") for name, take in slices.items()}
        kept_names = [name for name in names if name in ours]
        if not kept_names:  # of an expert or a sub-layer that is not kept
            return
        students, moments = [block.get_submodule(ours[name]) for name in kept_names], self.moments[names]
        wide = [theirs.get_submodule(name) for name in names]
        # in coordinates, the norm after the map is the teacher's: the target is its input, which is linear
        is_linear = basis.is_coordinates and gap is None
        norm_behind = None if is_linear else _post_norm(block, names)
        if gap is not None:
            moments = moments.with_outputs(*gap)
        kept = []
        for name in kept_names:
            columns = self.columns[names][name]
            index = on(slices[f"{ours[name]}.weight"].index[1], moments.zz)
            kept.append(torch.arange(columns.start, columns.stop, device=self.device)[index])
        if is_linear and basis.is_whole and sum(map(len, kept)) == len(moments.z):
            return
        has_outputs = gap is not None or norm_behind is not None
        weight = None if has_outputs else torch.cat([module.weight for module in wide], 1)
        bias = sum(module.bias for module in wide) if wide[0].bias is not None else None
        wanted = _writing_moments(moments, torch.cat(kept), basis.matrix, weight, bias)
        anchor = torch.cat([module.weight for module in students], 1)
        found = solve(wanted, anchor, ridge, bias is not None)
        if norm_behind is not None:
            found = self._through_norm(found, wanted, norm_behind)
        for module, part in zip(students, found.weight.split([module.in_features for module in students], 1)):
            module.weight.copy_(part)
            if module.bias is not None:
                module.bias.copy_(found.bias if module is students[-1] else torch.zeros_like(found.bias))

    def _through_norm(self, found: Fit, moments: Moments, norm: nn.Module) -> Fit:
        """Scale each output channel of the fit to unit RMS, and move its size into the norm's weight."""
        size = ((found.weight @ (moments.zz / moments.mass)) * found.weight).sum(1).clamp_min(1e-30).sqrt()
        set_norm_weight(norm, size.float())
        return Fit(found.weight / size[:, None], found.bias / size, found.ridge)


def _solution(moments: Moments, anchor: torch.Tensor, ridge: float) -> Find:
    """Return the regression for `fit_readers` and `fit_head`, from these moments."""
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

    The student's hidden states are approximated by the teacher's, projected onto the basis. A norm over fewer channels
    divides each token by a different value; here one factor, averaged over tokens, replaces it.

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
