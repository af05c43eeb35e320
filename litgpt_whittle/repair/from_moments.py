"""Repair candidates by linear solves, from moments of the teacher that are collected once.

The full repair (`litgpt_whittle.repair.sequential`) runs the student to get the actual inputs of its maps. Here each
map is fitted as if all maps before it were the teacher's, so no token passes through the candidate. The result is worse
than a full repair, but its loss predicts the ranking of full repairs far better than the loss without any repair.
Dropped layers and sub-layers are compensated as in a full repair: the maps before such a gap are fitted to the
teacher's hidden states after the gap.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial

import torch
from litgpt.model import GPT, Block
from torch import nn

from litgpt_whittle.blocks import load_block, read_block, read_outside, run_block, stopping_at
from litgpt_whittle.least_squares import Moments, exact_products
from litgpt_whittle.meta import meta_modules
from litgpt_whittle.repair.basis import (
    Basis,
    DirectionImportance,
    is_centring,
    principal_directions,
    readers,
    token_weights,
)
from litgpt_whittle.repair.costs import check_memory
from litgpt_whittle.repair.cut import TokenMeans, cut_block, cut_outside, not_finite
from litgpt_whittle.repair.layer_moments import LayerMoments, add_hidden_states, normalised, solution
from litgpt_whittle.repair.readers import fit_head, fit_tied_norm
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import BlocksGPT, SuperGPT

GAPS_KEPT = 64
"""Maximum number of gaps of dropped layers whose moments are cached for later candidates"""

RIDGE = 1e-4
"""Strength of the ridge relative to the mean squares of the inputs; a full repair tunes it for each map"""


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
        self.layers = [LayerMoments(self.config, layer, block) for layer, block in enumerate(teacher.transformer.h)]
        self.final = Moments(self.config.n_embd, 0, self.device)
        self.before: dict[int, TokenMeans] = {}
        """For each layer but the first, the mean hidden state before it per token id: the embedding of students whose
        first layer it is; empty if the teacher's head is tied"""
        self.streams: list[list[torch.Tensor]] = [[] for _ in range(self.config.n_layer + 1)]
        """The teacher's hidden states before each layer and after the last, batch by batch, in main memory"""
        self.block_args: list[tuple] = [()] * self.config.n_layer
        watching = [handle for layer in self.layers for handle in layer.handles]
        for layer, module in enumerate([*teacher.transformer.h, teacher.transformer.ln_f]):
            watching.append(module.register_forward_pre_hook(partial(self._keep_stream, layer)))
        add_final = lambda _, inputs: add_hidden_states(self.final, inputs[0], self.config)
        watching.append(teacher.transformer.ln_f.register_forward_pre_hook(add_final))
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
        self._directions = principal_directions(self._direction_importance().form, is_centring(self.config))
        self._basis = lru_cache(maxsize=16)(self._make_basis)
        self._gap = lru_cache(maxsize=GAPS_KEPT)(self._measure_gap)
        self._windows, self._micro_batch_size = windows, micro_batch_size
        self._inside = lru_cache(maxsize=2)(self._means_inside)

    def _keep_stream(self, layer: int, _: nn.Module, inputs: tuple) -> None:
        """Store the hidden states before a layer, and the layer's other arguments (a forward pre-hook)."""
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
            inside: True if the next kept layer begins with its MLP.

        Returns:
            Weighted sums over tokens of y zᵀ, shape (n_embd, n_in), and of y, shape (n_embd,). Here, z are the
            projections' inputs, and y is the difference between the teacher's hidden states after the gap and those
            before the projections.
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
            # token weights as in the layer's own moments, which provide the sums over the inputs
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
        """Write mean hidden states after dropped first sub-layers, one per token id, into an untied embedding."""
        layer = subnet.layers[0]
        if subnet.begins_late and not self.teacher.tied:
            means = self._inside(layer) if subnet.begins_inside(0) else self.before[layer]
            means.into(embedding, basis, self.config)

    def block(self, layer: int) -> Block:
        """Return one of the teacher's blocks in float32."""
        return load_block(self.config, layer, read_block(self.weights, layer, self.device))

    def _checked_ridge(self) -> float:
        """Check that all moments are finite, and return the ridge strength for all maps.

        The ridge is strong if there are fewer tokens than inputs of the widest map.
        """
        following = [*(layer.before_attn for layer in self.layers[1:]), self.final]
        for layer, moments in enumerate(self.layers):
            if not all(torch.isfinite(sums.z).all() for sums in (*moments.moments.values(), following[layer])):
                raise not_finite(layer)
        widest = max(len(sums.z) for layer in self.layers for sums in layer.moments.values())
        if self.final.n >= widest:
            return RIDGE
        warnings.warn(
            f"{self.final.n:,} calibration tokens are fewer than the {widest:,} inputs of the widest map; repairs from "
            "moments hardly change the sliced weights, use more text",
            stacklevel=3,
        )
        return 1e-1

    def _direction_importance(self) -> DirectionImportance:
        """Return the importance of the residual stream's directions for all input projections and the LM head."""
        importance = DirectionImportance()
        for i, layer in enumerate(self.layers):
            block = self.block(i)
            mlp_norm = block.norm_1 if self.config.shared_attention_norm else block.norm_2
            importance.add(layer.before_attn, block.norm_1, readers(block, "attn"))
            importance.add(layer.before_mlp, mlp_norm, readers(block, "mlp"))
        head = self.teacher.lm_head.weight.float()
        importance.add(self.final, self.norm, [head - head.mean(0)], times=len(self.layers))
        return importance

    @exact_products()
    @torch.no_grad()
    def student(self, subnet: SubNet) -> GPT:
        """Return the repaired student of a sub-network.

        Its heads and neurons are selected by their saliency, as many as the sub-network has. If channels are removed,
        its channels are principal directions of the teacher's residual stream.
        """
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
        """Return the basis of students with `n_embd` channels."""
        if n_embd == self.config.n_embd:
            return Basis.coordinates(torch.arange(n_embd, device=self.device), n_embd)
        return Basis.principal(self._directions, n_embd, is_centring(self.config))

    def _fit_head(self, student: GPT, basis: Basis) -> None:
        """Fit a student's LM head, or the weight of its final norm if the head is tied, in place."""
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
            fit_head(student.lm_head, self.teacher.lm_head, solution(moments, anchor, self.ridge))
