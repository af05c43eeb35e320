"""Fit the linear maps of one student block, in the order of the forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from litgpt.model import Block, LLaMAMLP
from torch import nn

from litgpt_whittle.blocks import input_of, routing, run_block
from litgpt_whittle.calibration import Batch, Calibration
from litgpt_whittle.index_plan import SUBLAYERS, SlicePlan
from litgpt_whittle.least_squares import Fit, Moments, fit
from litgpt_whittle.processes import all_reduce_sum
from litgpt_whittle.repair.basis import (
    Basis,
    affine_part,
    norm_weight,
    scale_norm_weight,
    standardised,
    token_weights,
)
from litgpt_whittle.repair.cut import linear_names
from litgpt_whittle.repair.readers import fit_readers
from litgpt_whittle.scratch import Activations
from litgpt_whittle.student_block import NoSublayer
from litgpt_whittle.tensors import in_sums_dtype, sums_dtype

POST_NORMS = {name: after for name, (_, after) in SUBLAYERS.items()}
"""litgpt's names of the norms after attention and MLP, before the residual addition"""


Examples = Callable[[Batch], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""Function that returns a linear map's inputs, targets and token weights for a batch"""


@dataclass
class BlockStreams:
    """Residual streams (hidden states) of both models around a block, on the calibration tokens."""

    teacher: Activations
    """The teacher's hidden states before the block; before the block's MLP if the student drops its attention and the
    block is not parallel"""
    student: Activations
    """The student's hidden states before the block"""
    middle: Activations | None
    """The teacher's hidden states before the block's MLP; None in a parallel block, where they are `teacher`"""
    ahead: Activations
    """The teacher's hidden states after the block and the dropped sub-layers that follow it"""
    sizes: dict[tuple[str, int], torch.Tensor]
    """RMS of each token's input of the teacher's norms after output projections, shape (B, T, 1). Keys are the name of
    the norm and the first window of the batch"""

    @property
    def before_mlp(self) -> Activations:
        """The teacher's hidden states before the block's MLP."""
        return self.teacher if self.middle is None else self.middle


def post_norm(block: Block, *parts: str) -> nn.Module | None:
    """Return the norm between a block's attention or MLP and the residual addition; None if it has no weight.

    Args:
        block: The block.
        parts: Name of the sub-layer, "attn" or "mlp". The result is None for an expert (`mlp.experts.0`), and for both
            sub-layers of a parallel block.
    """
    norm = getattr(block, POST_NORMS[parts[0]]) if len(parts) == 1 and parts[0] in POST_NORMS else None
    return None if norm is None or norm_weight(norm) is None else norm


class BlockRepair:
    """Fits the linear maps of a student's block.

    Args:
        block: The student's block, fitted in place.
        slices: The block's slices of the teacher's parameters.
        teacher: The teacher's block.
        args: Arguments of the student's block besides the hidden states.
        streams: Residual streams of both models.
        basis: Basis of the student's residual stream.
        calibration: The calibration tokens.
        ridges: Candidate ridge strengths.
    """

    def __init__(
        self,
        block: Block,
        slices: SlicePlan,
        teacher: Block,
        args: tuple,
        streams: BlockStreams,
        basis: Basis,
        calibration: Calibration,
        ridges: tuple[float, ...],
    ) -> None:
        self.block, self.slices, self.teacher, self.args = block, slices, teacher, args
        self.streams, self.basis, self.calibration, self.ridges = streams, basis, calibration, ridges
        self.is_parallel = streams.middle is None
        self.parts = [part for part in SUBLAYERS if not isinstance(getattr(block, part), NoSublayer)]
        """The student's sub-layers"""
        self.left_as_cut = linear_names(slices, "inner")
        # cached while they fit into memory, since several maps need them
        self._of_attn, self._of_middle, self._of_mlp = (calibration.cache() for _ in range(3))
        self._is_fitted = False
        self._before: tuple[Moments, Moments] | None = None
        """Moments of the hidden states before a parallel block, the input of both attention and MLP"""

    def fit(self) -> None:
        """Fit all linear maps of the block, in place."""
        block, teacher = self.block, self.teacher
        for part in self.parts:
            before = "norm_1" if part == "attn" or block.config.shared_attention_norm else "norm_2"
            self._read(part, getattr(teacher, before), getattr(block, before))
            if part == "mlp" and hasattr(block.mlp, "experts"):
                self._write_experts()
            elif not self.is_parallel:
                self._write(part)
        if self.is_parallel:
            self._write(*self.parts)
        self._is_fitted = True

    def output(self, batch: Batch) -> torch.Tensor:
        """Return the student's hidden states after this block, shape (B, T, n_embd_student)."""
        block = self.block
        if self.is_parallel or not self._is_fitted or hasattr(block.mlp, "experts"):
            return block(self._student(batch), *self.args)
        if "mlp" not in self.parts:
            return self._middle(batch)
        norm = block.post_mlp_norm
        return self._middle(batch) + norm(block.mlp.proj(self._mlp_inputs(batch)))

    def restore(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Restore earlier weights of the block."""
        self.block.load_state_dict(weights)
        self._is_fitted = False  # cached activations belong to the fitted weights

    def error(self, batches: Iterable[Batch]) -> float:
        """Return the student's squared error after this block, relative to the teacher's squared hidden states.

        Errors and hidden states are weighted by `token_weights`.

        Args:
            batches: The batches to evaluate: held-out batches for reports, tuning batches for decisions.
        """
        sums = torch.zeros(2, dtype=sums_dtype(self.calibration.device), device=self.calibration.device)
        for batch in batches:
            target, weights = self._goal(batch), self._weights(batch)
            off = in_sums_dtype((self.output(batch) - target).square().sum(-1) * weights).sum()
            sums += torch.stack([off, in_sums_dtype(target.square().sum(-1) * weights).sum()])
        off, total = all_reduce_sum(sums).tolist()
        return off / max(total, 1e-30)

    # input projections ------------------------------------------------------------------------------------------------

    def _read(self, part: str, teacher_norm: nn.Module, student_norm: nn.Module) -> None:
        """Fit all input projections of `attn` or `mlp`.

        Experts share the regression, so each expert is also fitted to tokens that are not routed to it.
        """
        moments = self._normalised(part, teacher_norm, student_norm)
        anchor = self.basis.reconstruction(teacher_norm, moments[0])

        def find(intercept: bool, metric: torch.Tensor) -> Fit:
            return fit(*moments, anchor, intercept, metric, self.ridges)

        for name, found in fit_readers(self.block, self.slices, self.teacher, part, find).items():
            self._reported(found, name)

    def _normalised(self, part: str, teacher_norm: nn.Module, student_norm: nn.Module) -> tuple[Moments, Moments]:
        """Return the moments of the inputs of `attn` or `mlp`, which are the outputs of these norms.

        Returns:
            Moments of the fitting tokens and of the tuning tokens, with the student's states as inputs and the
            teacher's as outputs.
        """
        n_in, n_out = self.basis.matrix.shape
        if self.is_parallel:
            # attention and MLP have the same hidden states as input, and their norms differ only in the weights
            self._before = self._before or self.calibration.moments(
                n_in,
                n_out,
                lambda batch: (
                    standardised(self._student(batch), self.block.config),
                    standardised(self.streams.teacher[batch], self.teacher.config),
                ),
            )
            ours, theirs = affine_part(student_norm, n_in), affine_part(teacher_norm, n_out)
            fitted, tuning = (moments.scaled(*ours, *theirs) for moments in self._before)
            return fitted, tuning
        inside = part == "mlp"

        def pair(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
            theirs = (self.streams.before_mlp if inside else self.streams.teacher)[batch]
            ours = self._middle(batch) if inside else self._student(batch)
            return student_norm(ours), teacher_norm(theirs)

        return self.calibration.moments(n_in, n_out, pair)

    # output projections -----------------------------------------------------------------------------------------------

    def _write(self, *parts: str) -> None:
        """Fit the output projection of `attn` or `mlp`, or both jointly.

        The block's last output projection also compensates for dropped sub-layers that follow it in the teacher.
        """
        names = [f"{part}.proj" for part in parts]
        modules = [self.block.get_submodule(name) for name in names]
        inside = parts == ("mlp",) and not self.is_parallel

        stream = self.streams.ahead if parts[-1] == self.parts[-1] else self.streams.middle

        def examples(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            if self.is_parallel:
                seen = self._run(batch, names)
                z = torch.cat([seen[name] for name in names], -1)
            else:
                z = self._mlp_inputs(batch) if inside else self._attn_inputs(batch)
            start = self._middle(batch) if inside else self._student(batch)
            return z, self._goal(batch, stream) - start, self._weights(batch, stream)

        norm = post_norm(self.block, *parts)
        if norm is not None:
            self._write_through_norm(parts[0], norm, examples)
            return
        sizes = [module.in_features for module in modules]
        moments = self.calibration.moments(sum(sizes), self.basis.matrix.shape[0], examples)
        anchor, last = torch.cat([module.weight for module in modules], 1), modules[-1]
        found = self._reported(fit(*moments, anchor, last.bias is not None, ridges=self.ridges), *names)
        for module, weight in zip(modules, found.weight.split(sizes, 1)):
            module.weight.copy_(weight)
            if module.bias is not None:
                module.bias.copy_(found.bias if module is last else torch.zeros_like(found.bias))

    def _write_through_norm(self, part: str, norm: nn.Module, examples: Examples) -> None:
        """Fit an output projection that is followed by a norm.

        A norm divides by the size of its input, so its output is not linear in the projection's inputs. It becomes
        linear if each token is divided by the size at the teacher's norm instead. The fit is kept unless it increases
        the error after the student's norm.
        """
        name = f"{part}.proj"
        module, kind = self.block.get_submodule(name), POST_NORMS[part]
        weight = norm_weight(norm)
        assert weight is not None, "`post_norm` gives only norms with a weight"
        weight = torch.where(weight.abs() < 1e-3, 1e-3, weight)  # avoids division by zero in channels the norm disables

        def through(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            z, y, weights = examples(batch)
            size = self.streams.sizes[kind, batch.start]
            bias = 0.0 if module.bias is None else module.bias / size
            return z / size, y / weight - bias, weights

        moments = self.calibration.moments(module.in_features, self.basis.matrix.shape[0], through)
        before, start = self._error_after(norm, module, examples), module.weight.clone()
        module.weight.copy_(self._reported(fit(*moments, start, False, ridges=self.ridges), name).weight)
        if self._error_after(norm, module, examples) > before:
            module.weight.copy_(start)
            self.left_as_cut.append(name)
        self._refit_post_norm(norm, module, examples)

    def _error_after(self, norm: nn.Module, module: nn.Module, examples: Examples) -> float:
        """Return the weighted squared error after an output projection and its norm, on the tuning tokens."""
        total = torch.zeros((), dtype=sums_dtype(self.calibration.device), device=self.calibration.device)
        for batch in self.calibration.tuning_batches:
            z, y, weights = examples(batch)
            total += in_sums_dtype((norm(module(z)) - y).square().sum(-1) * weights).sum()
        return float(all_reduce_sum(total))

    def _refit_post_norm(self, norm: nn.Module, module: nn.Module, examples: Examples) -> None:
        """Fit the weight of the norm after an output projection, channel by channel.

        A channel keeps its weight unless the weight fitted to the fitting tokens decreases the error on tuning tokens.
        """
        sums = torch.zeros(
            2, 2, self.basis.matrix.shape[0], dtype=sums_dtype(self.calibration.device), device=self.calibration.device
        )
        for batch in self.calibration.fitted_batches:
            z, y, weights = examples(batch)
            normed = norm(module(z))
            part = sums[int(self.calibration.is_tuning(batch))]
            part += (torch.stack([normed * y, normed.square()]) * weights[..., None]).flatten(1, -2).sum(1)
        (products, squares), (held_products, held_squares) = all_reduce_sum(sums)
        scale = products / squares.clamp_min(1e-30)
        # ‖scale · normed − y‖² against ‖normed − y‖²
        is_better = scale.square() * held_squares - 2 * scale * held_products < held_squares - 2 * held_products
        scale_norm_weight(norm, torch.where(is_better, scale, 1.0))

    def _reported(self, found: Fit, *names: str) -> Fit:
        """Return the fit, and list its maps in `left_as_cut` if no ridge improves on their sliced weights."""
        if math.isinf(found.ridge):
            self.left_as_cut += names
        return found

    def _write_experts(self) -> None:
        """Fit the output projections of the experts, then of the shared experts.

        On the tokens routed to an expert, its target has two parts: the output of the same expert in the teacher, and a
        share of the remaining difference to the teacher's hidden states. Shared experts, which process all tokens, are
        fitted to the difference that then remains.
        """
        mlp, theirs = self.block.mlp, self.teacher.mlp
        if len(mlp.experts) > self.basis.matrix.shape[0]:  # `routing` needs a unit vector per expert
            self.left_as_cut += [name for name in linear_names(self.slices, "writing") if name.startswith("mlp")]
            return
        of = [self.slices[f"mlp.experts.{j}.proj.weight"].name.split(".")[2] for j in range(len(mlp.experts))]
        experts = [theirs.experts[int(j)] for j in of]
        project, shared = self.basis.project, getattr(theirs, "shared_experts", None)
        size, width = self.basis.matrix.shape[0], mlp.experts[0].proj.in_features
        device = self.calibration.device
        sums = [[Moments(width, size, device) for _ in range(2)] for _ in experts]
        for batch in self.calibration.fitted_batches:
            start, x = self._before_mlp(batch)
            weights = self._weights(batch).flatten()
            theirs_x = self.teacher.norm_2(self.streams.before_mlp[batch]).flatten(0, -2)
            parts = routing(mlp, x)  # (B · T, n_expert)
            flat, left = x.flatten(0, -2), (self._goal(batch) - start).flatten(0, -2)
            answers = [project(expert(theirs_x[parts[:, j] > 0])) for j, expert in enumerate(experts)]
            for j, answer in enumerate(answers):
                left[parts[:, j] > 0] -= parts[parts[:, j] > 0, j, None] * answer
            if shared is not None:
                left = left - project(shared(theirs_x))
            left = left / parts.sum(1, keepdim=True).clamp_min(1e-6)
            for j, (ours, answer) in enumerate(zip(mlp.experts, answers)):
                rows = parts[:, j] > 0
                if rows.any():
                    part, y = parts[rows, j, None], answer + left[rows]
                    if ours.proj.bias is not None:
                        y = y - ours.proj.bias
                    z = input_of(ours.proj, ours, flat[rows])
                    sums[j][self.calibration.is_tuning(batch)].add(part * z, part * y, weights[rows])
        for j, (ours, pair) in enumerate(zip(mlp.experts, sums)):
            fitted, tuning = (moments.over_processes() for moments in pair)
            if fitted.n >= width and tuning.n:
                found = fit(fitted, tuning, ours.proj.weight, False, ridges=self.ridges)
                ours.proj.weight.copy_(self._reported(found, f"mlp.experts.{j}.proj").weight)
            else:  # too few tokens are routed to this expert
                self.left_as_cut.append(f"mlp.experts.{j}.proj")
        if shared is not None:
            self._write_shared_experts(mlp.shared_experts)

    def _write_shared_experts(self, shared: LLaMAMLP) -> None:
        """Fit the output projection of the shared experts, given those of all others."""

        def examples(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            start, x = self._before_mlp(batch)
            left = self._goal(batch) - start - (self.block.mlp(x) - shared(x))
            return input_of(shared.proj, shared, x), left, self._weights(batch)

        moments = self.calibration.moments(shared.proj.in_features, self.basis.matrix.shape[0], examples)
        intercept = shared.proj.bias is not None
        found = fit(*moments, shared.proj.weight, intercept, ridges=self.ridges)
        self._reported(found, "mlp.shared_experts.proj")
        shared.proj.weight.copy_(found.weight)
        if intercept:
            shared.proj.bias.copy_(found.bias)

    def _before_mlp(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the student's hidden states before its MLP, without and with the norm."""
        start = self._middle(batch)
        return start, self.block.norm_2(start)

    # ------------------------------------------------------------------------------------------------------------------

    def _run(self, batch: Batch, wanted: list[str]) -> dict[str, torch.Tensor]:
        """Run the student's block up to the last of the wanted modules; return the input of each."""
        return run_block(self.block, self._student(batch), self.args, wanted, stop=True)

    def _attn_inputs(self, batch: Batch) -> torch.Tensor:
        """Return the inputs of the output projection of attention."""
        return self._of_attn.get(batch, lambda batch: self._run(batch, ["attn.proj"])["attn.proj"])

    def _middle(self, batch: Batch) -> torch.Tensor:
        """Return the student's hidden states between attention and MLP; attention must be fitted already."""
        if "attn" not in self.parts:
            return self._student(batch)

        def compute(batch: Batch) -> torch.Tensor:
            attn, norm = self.block.attn, self.block.post_attention_norm
            return self._student(batch) + norm(attn.proj(self._attn_inputs(batch)))

        return self._of_middle.get(batch, compute)

    def _mlp_inputs(self, batch: Batch) -> torch.Tensor:
        """Return the inputs of the output projection of the MLP."""
        mlp, norm = self.block.mlp, self.block.norm_2
        return self._of_mlp.get(batch, lambda batch: input_of(mlp.proj, mlp, norm(self._middle(batch))))

    def _weights(self, batch: Batch, stream: Activations | None = None) -> torch.Tensor:
        """Return token weights from the teacher's hidden states, by default after the block: shape (B, T)."""
        stream = self.streams.ahead if stream is None else stream
        return token_weights(stream[batch], self.teacher.config)

    def _student(self, batch: Batch) -> torch.Tensor:
        """Return the student's hidden states before the block."""
        return self.streams.student[batch]

    def _goal(self, batch: Batch, stream: Activations | None = None) -> torch.Tensor:
        """Return the teacher's hidden states in the student's basis, by default after the block."""
        return self.basis.project((self.streams.ahead if stream is None else stream)[batch])
