"""Sequential repair: fit the linear maps of a pruned student in closed form, block by block, before any training.

Most of the contribution of removed channels, neurons, heads and layers is a linear function of the kept ones. So
teacher and student advance through their blocks side by side on the same calibration tokens, and every linear map of
the student is fitted to the teacher's counterpart, given the actual inputs from the already repaired student:

- The targets of input projections (queries, keys, values, the MLP's inputs, routers, the LM head) are the teacher's
  pre-activations, which are linear in the teacher's normalised hidden states. One regression of these states on the
  student's therefore fits all projections after a norm, including the LM head, without computing logits.
- The target of output projections is the difference between the teacher's hidden states after them and the student's
  before them, so each block also corrects the error of earlier blocks. Before a gap of dropped layers or sub-layers,
  the target uses the teacher's hidden states after the gap.
- The LM head is then trained on the teacher's predictions (`litgpt_whittle.repair.head`), since squared errors of
  logits are only a proxy.

Only moments are kept in memory (`litgpt_whittle.least_squares`). The hidden states of both models, called streams in
this package, are in scratch files, and the teacher is read block by block.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any, Literal

import torch
from litgpt.config import Config
from litgpt.model import Block
from tqdm import tqdm

from litgpt_whittle.blocks import NonBlockModules, load_block, load_student_block, read_block, read_outside, run_block
from litgpt_whittle.calibration import Calibration
from litgpt_whittle.errors import UserError
from litgpt_whittle.files import readable_size
from litgpt_whittle.least_squares import RIDGES, Moments, exact_products, fit, no_outputs
from litgpt_whittle.processes import all_reduce_sum, barrier, free_memory, gather, n_sharing
from litgpt_whittle.repair.args import RepairArgs
from litgpt_whittle.repair.basis import Basis, is_centring, principal_directions, token_weights
from litgpt_whittle.repair.block import POST_NORMS, BlockRepair, Streams, post_norm
from litgpt_whittle.repair.costs import (
    head_bytes,
    outside_bytes,
    refine_bytes,
    repair_bytes,
    sums_bytes,
    widest_map,
)
from litgpt_whittle.repair.cut import KINDS, FiniteCheck, TokenMeans, cut_block, cut_outside, linear_names
from litgpt_whittle.repair.directions import direction_importance
from litgpt_whittle.repair.end_to_end import EndToEnd
from litgpt_whittle.repair.head import HeadRepair
from litgpt_whittle.repair.readers import fit_head, fit_tied_norm
from litgpt_whittle.repair.refine import Errors
from litgpt_whittle.repair.repaired import LayerReport, Repaired
from litgpt_whittle.repair.units import choose_units, maps_to_choose_for
from litgpt_whittle.scratch import Activations, OwnActivations, Scratch, SharedActivations
from litgpt_whittle.student_block import part_of
from litgpt_whittle.subnet import LayerUnits, SubNet
from litgpt_whittle.supergpt import Weights, is_tied
from litgpt_whittle.unit_index import UnitIndex


class SequentialRepair:
    """Fits a student to its teacher, one block at a time.

    With several processes, each process computes its share of the tokens, and all processes get the same student.

    Args:
        weights: The teacher's weights; memory-mapped weights are read one block at a time.
        subnet: The student's sub-network.
        calibration: The calibration tokens and the device; computation is in float32.
        args: Repair settings.
        scratch: Folder for streams and finished blocks; an interrupted repair resumes from its content.

    Raises:
        UserError: If activations of the teacher are not finite, or the repair does not fit into memory.
    """

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        subnet: SubNet,
        calibration: Calibration,
        args: RepairArgs,
        scratch: Scratch,
    ) -> None:
        self.weights, self.subnet, self.args, self.scratch = weights, subnet, args, scratch
        self.calibration, self.device = calibration, torch.device(calibration.device)
        self.teacher, self.tied = subnet.teacher, is_tied(weights)
        self.n_embd = len(subnet.n_embd)
        self.basis_name = "coordinates" if self.n_embd == self.teacher.n_embd else args.basis
        self._check_memory()
        scratch.device, scratch.budget = self.device, min(gather(self._streams_budget()))
        self.ridges = self._ridges(widest_map(subnet.config))

    def _check_memory(self) -> None:
        """Check that the moments, joint training of the blocks and training of the LM head fit into memory.

        Raises:
            UserError: If one of them does not.
        """
        free = free_memory(self.device, n_sharing(self.device)) - sum(outside_bytes(self.subnet, self.tied))
        free = max(free, 0)
        if (needed := sums_bytes(self.subnet, self.args.choose_units, self.device)) > free:
            raise UserError(
                f"the repair takes {readable_size(needed)} for the moments of its widest maps, and "
                f"{readable_size(free)} are free; keep fewer neurons, or choose another device"
            )
        if self.args.refine_passes and (needed := refine_bytes(self.subnet, self.tied)) > free:
            raise UserError(
                f"training all blocks together takes {readable_size(needed)} without activations, and "
                f"{readable_size(free)} are free; leave out --repair.refine_passes and use `litgpt distill`, which "
                "shards the student"
            )
        trains_head = self.args.head_passes and not self.tied
        if trains_head and (needed := head_bytes(self.subnet)) > free:
            raise UserError(
                f"fitting the LM head to the teacher's predictions takes {readable_size(needed)}, and "
                f"{readable_size(free)} are free; give --repair.head_passes 0, or choose another device"
            )

    def _streams_budget(self) -> int:
        """Return the bytes of the device's memory for streams: half of the memory that the repair does not need.

        0 on a CPU, where files are cached in main memory.
        """
        if self.device.type == "cpu":
            return 0
        needed = repair_bytes(self.subnet, self.tied, self.device, self.args.refine_passes > 0)
        return max(free_memory(self.device, 1) - needed, 0) // 2

    def _ridges(self, widest: int) -> tuple[float, ...]:
        """Return the candidate ridges, only strong ones if the widest map has more inputs than there are tokens."""
        n_tokens = self.calibration.n_fitted
        if n_tokens >= widest:
            return RIDGES
        warnings.warn(
            f"{n_tokens:,} calibration tokens are fewer than the {widest:,} inputs of the widest map; the repair "
            "hardly changes the sliced weights, raise repair.tokens",
            stacklevel=3,
        )
        return tuple(ridge for ridge in RIDGES if ridge >= 1e-2)

    @exact_products()
    @torch.no_grad()
    def run(self, progress: bool = True) -> Repaired:
        """Run the repair; after an interruption, resume after the last finished layer."""
        self.theirs = self._outside(self.teacher, read_outside(self.weights, self.device))
        self.basis = self._find_basis()
        cut = cut_outside(self.teacher, read_outside(self.weights, self.device), self.basis, self.tied)
        self.ours = self._outside(self.subnet.config, cut)
        layers = list(self._finished())
        self._begin_streams([weights for _, weights, _ in layers])
        bar = tqdm(total=len(self.subnet), desc="repair", unit="layer", disable=not progress, initial=len(layers))
        for i in range(len(layers), len(self.subnet)):
            layers.append(self._repair_layer(i))
            self._finish(i, *layers[-1])
            bar.set_postfix_str(f"error {layers[-1][2].before:.3f} -> {layers[-1][2].after:.3f}", refresh=False)
            bar.update()
        bar.close()
        student = {
            f"transformer.h.{i}.{name}": tensor
            for i, (_, weights, _) in enumerate(layers)
            for name, tensor in weights.items()
        }
        keeps, reports = [keep for keep, _, _ in layers], [report for _, _, report in layers]
        chosen, refined = self._chosen(keeps), None
        head, fitted = self._repair_head(progress)
        if self.args.refine_passes:
            blocks, refined, fitted = self._refine(chosen, [weights for _, weights, _ in layers], progress)
            student |= blocks
        outside = {name: tensor.detach() for name, tensor in self.ours.model.state_dict().items()}
        student = {name: tensor.cpu() for name, tensor in (student | outside).items()}
        if self.tied:
            student["lm_head.weight"] = student["transformer.wte.weight"]
        if self.tied and self.subnet.begins_late:  # not replaced by token means, since it is the head, too
            reports[0].left_as_cut.append("the embedding, which should stand in for dropped first layers")
        return Repaired(chosen, student, reports, head, refined, fitted, self.basis_name, self.basis.matrix.cpu())

    def _finish(self, i: int, keep: LayerUnits, weights: Weights, report: LayerReport) -> None:
        """Save a finished layer, after which an interrupted repair resumes."""
        self.teacher_stream.flush()
        self.student_stream.flush()
        barrier()  # all processes' parts of the streams are on disk
        units = {name: None if value is None else value.to_yaml() for name, value in vars(keep).items()}
        self.scratch.save(f"layer-{i}", {"keep": units, "weights": weights, "report": dataclasses.asdict(report)})
        self.scratch.remove_streams_before(i, keep=self._start if self.args.refine_passes else None)

    def _finished(self) -> Iterator[tuple[LayerUnits, Weights, LayerReport]]:
        """Yield the layers that an interrupted repair has finished."""
        for i in range(len(self.subnet)):
            if (saved := self.scratch.load(f"layer-{i}")) is None:
                return
            kept = saved["keep"].items()
            units: dict[str, Any] = {name: None if value is None else UnitIndex.parse(value) for name, value in kept}
            yield LayerUnits(**units), saved["weights"], LayerReport(**saved["report"])

    # the models -------------------------------------------------------------------------------------------------------

    def _outside(self, config: Config, weights: Weights) -> NonBlockModules:
        return NonBlockModules(config, weights, self.calibration.shape[1], self.device)

    def _teacher_block(self, layer: int) -> Block:
        return load_block(self.teacher, layer, read_block(self.weights, layer, self.device))

    def _find_basis(self) -> Basis:
        if self.basis_name == "coordinates":
            kept = torch.tensor(self.subnet.n_embd.indices, device=self.device)
            return Basis.coordinates(kept, self.teacher.n_embd)
        saved = self.scratch.load("basis")
        barrier()  # no process saves before all have looked
        if saved is not None:
            return Basis(saved["matrix"].to(self.device))
        centred = is_centring(self.teacher)
        stream = self._stream("directions", self.teacher.n_embd)
        units = {layer: self.subnet.layer(i) for i, layer in enumerate(self.subnet.layers)}
        worth = direction_importance(self.theirs, self._teacher_block, units, self.calibration, stream)
        self.scratch.remove_stream("directions")
        basis = Basis.principal(principal_directions(worth.form, centred), self.n_embd, centred)
        self.scratch.save("basis", {"matrix": basis.matrix})
        return basis

    # streams ----------------------------------------------------------------------------------------------------------

    def _stream(self, name: str, n_embd: int) -> Activations:
        return self.scratch.stream(name, *self.calibration.shape, n_embd, is_shared=name in self._shared)

    @property
    def _shared(self) -> set[str]:
        """Names of the streams of which every process reads all windows, to train the head or all blocks."""
        last = [f"{model}-{len(self.subnet)}" for model in ("teacher", "student")]
        return {*last, self._start} if self.args.refine_passes else set(last)

    def _last_streams(self) -> tuple[SharedActivations, SharedActivations]:
        """Return the student's and the teacher's stream after the last layer."""
        student, teacher = self.student_stream, self.teacher_stream
        assert not isinstance(student, OwnActivations) and not isinstance(teacher, OwnActivations)
        return student, teacher

    def _begin_streams(self, finished: list[Weights]) -> None:
        """Set up both models' streams before the first unfinished block.

        Args:
            finished: Weights of the student's finished blocks, to recompute streams that are not in files.
        """
        n = len(finished)
        names, first = [f"teacher-{n}", f"student-{n}"], min(n, self.subnet.n_intact)
        if self.args.refine_passes:
            names.append(f"student-{first}")
        has_streams = n > 0 and self.scratch.has_streams(*names)
        if (embedding := self.scratch.load("embedding") if n else None) is not None:
            self.ours.embedding.copy_(embedding)
        with nullcontext() if has_streams else self.scratch.filling():
            self.teacher_stream = self._stream(f"teacher-{n}", self.teacher.n_embd)
            self.student_stream = self._stream(f"student-{n}", self.n_embd)
            if not has_streams:
                self._begin_teacher(n)
                self._begin_student(finished)

    def _begin_teacher(self, n_finished: int) -> None:
        """Run the teacher up to the student's first unfinished block; repair the student's embedding on the way."""
        for batch in self.calibration.teacher_batches:
            self.teacher_stream[batch] = self.theirs.embed(self.calibration.ids(batch))
        layers = self.subnet.layers
        for layer in range(layers[n_finished] if n_finished < len(layers) else self.teacher.n_layer):
            self._advance(self.teacher_stream, layer)
        self._enter(self.teacher_stream, n_finished)
        if self.subnet.begins_late and n_finished == 0 and not self.tied:
            self._repair_embedding()

    def _begin_student(self, finished: list[Weights]) -> None:
        """Run the student's finished blocks."""
        n_intact = self.subnet.n_intact
        for batch in self.calibration.teacher_batches:
            self.student_stream[batch] = self.ours.embed(self.calibration.ids(batch))
        for i, weights in enumerate(finished):
            if i == n_intact and self.args.refine_passes:
                start = self._stream(self._start, self.n_embd)
                for batch in self.calibration.teacher_batches:
                    start[batch] = self.student_stream[batch]
            weights = {name: weight.to(self.device) for name, weight in weights.items()}
            block = load_student_block(self.subnet, i, weights)
            is_copy = i < n_intact
            args = (self.theirs if is_copy else self.ours).block_args[i]
            for batch in self.calibration.teacher_batches if is_copy else self.calibration.batches:
                self.student_stream[batch] = block(self.student_stream[batch], *args)

    def _advance(self, stream: Activations, layer: int, part: Literal["attn", "mlp"] | None = None) -> None:
        """Run one of the teacher's blocks, or one of its sub-layers, on its stream, in place."""
        block, finite = self._teacher_block(layer), FiniteCheck(layer)
        block = block if part is None else part_of(block, part)
        for batch in self.calibration.teacher_batches:
            stream[batch] = finite(block(stream[batch], *self.theirs.block_args[layer]))
        finite.finish()

    def _enter(self, stream: Activations, i: int) -> None:
        """Run the teacher's attention that the student's layer `i` dropped, if the layer begins with its MLP."""
        if i < len(self.subnet) and self.subnet.begins_inside(i):
            self._advance(stream, self.subnet.layers[i], "attn")

    def _repair_embedding(self) -> None:
        """Replace dropped first sub-layers by per-token means in the embedding."""
        weight = self.ours.embedding
        means = TokenMeans(self.calibration.windows.unique().to(weight.device), self.teacher.n_embd)
        for batch in self.calibration.training_batches:
            means.add(self.calibration.ids(batch), self.teacher_stream[batch])
        all_reduce_sum(means.total), all_reduce_sum(means.count)
        means.into(weight, self.basis, self.teacher)
        self.scratch.save("embedding", weight)

    # one layer --------------------------------------------------------------------------------------------------------

    def _repair_layer(self, i: int) -> tuple[LayerUnits, Weights, LayerReport]:
        layer = self.subnet.layers[i]
        teacher = self._teacher_block(layer)
        if i < self.subnet.n_intact:
            return self._copy_layer(i, teacher)
        middle = None if self.teacher.parallel_residual else self.teacher_stream
        if middle is not None and not self.subnet.begins_inside(i):
            middle = self._stream("middle", self.teacher.n_embd)
        ahead = self._stream(f"teacher-{i + 1}", self.teacher.n_embd)
        streams = Streams(self.teacher_stream, self.student_stream, middle, ahead, {})
        keep = self._walk_teacher(i, teacher, streams)
        block, slices = cut_block(self.subnet, i, keep, self.basis, teacher)
        args = self.ours.block_args[i]
        repair = BlockRepair(block, slices, teacher, args, streams, self.basis, self.calibration, self.ridges)
        # decisions use the tuning tokens; held-out tokens are only for the report
        tuning, held_out = self.calibration.tuning_batches, self.calibration.held_out_batches
        start = {name: tensor.clone() for name, tensor in block.state_dict().items()}
        before, before_tuning = repair.error(held_out), repair.error(tuning)
        repair.fit()
        if repair.error(tuning) > before_tuning:  # possible if the cut loses little, since norms are not linear
            repair.restore(start)
            repair.left_as_cut = [name for kind in KINDS for name in linear_names(slices, kind)]
        after = repair.error(held_out)
        if not math.isfinite(after):
            raise UserError(f"activations of layer {layer} are not finite; the checkpoint or its dtype is at fault")
        self.teacher_stream, self.student_stream = ahead, self._stream(f"student-{i + 1}", self.n_embd)
        for batch in self.calibration.batches:
            self.student_stream[batch] = repair.output(batch)
        # the device holds one block at a time
        weights = {name: tensor.detach().cpu() for name, tensor in block.state_dict().items()}
        # if slicing loses nothing, there is nothing to fit
        left_as_cut = repair.left_as_cut if before > 1e-6 else []
        return keep, weights, LayerReport(layer, before, after, left_as_cut)

    def _copy_layer(self, i: int, teacher: Block) -> tuple[LayerUnits, Weights, LayerReport]:
        """Copy a layer of the teacher, which needs no fit."""
        ahead, ours = self._stream(f"teacher-{i + 1}", self.n_embd), self._stream(f"student-{i + 1}", self.n_embd)
        finite = FiniteCheck(i)
        for batch in self.calibration.teacher_batches:
            ahead[batch] = ours[batch] = finite(teacher(self.teacher_stream[batch], *self.theirs.block_args[i]))
        finite.finish()
        self.teacher_stream, self.student_stream = ahead, ours
        weights = {name: tensor.detach().cpu() for name, tensor in teacher.state_dict().items()}
        return self.subnet.layer(i), weights, LayerReport(i, 0.0, 0.0)

    def _walk_teacher(self, i: int, teacher: Block, streams: Streams) -> LayerUnits:
        """Run the teacher's block and the dropped sub-layers after it on its stream; select the student's units."""
        layers = self.subnet.layers
        layer, behind = layers[i], layers[i + 1] if i + 1 < len(layers) else self.teacher.n_layer
        chosen = maps_to_choose_for(self.subnet, i) if self.args.choose_units else []
        block = part_of(teacher, "mlp") if self.subnet.begins_inside(i) else teacher
        kept = self.subnet.layer(i).parts
        post_norms = [POST_NORMS[part] for part in kept if post_norm(teacher, part) is not None]
        moments = {
            name: Moments(teacher.get_submodule(name).in_features, 0, self.device, fp32_products=True)
            for name in chosen
        }
        finite = FiniteCheck(layer)
        for batch in self.calibration.batches:
            stream = streams.teacher[batch]
            # 16 tokens per input suffice for the selection, from the beginning of the data
            n_before = batch.start * self.calibration.shape[1]
            wanted = [name for name in chosen if n_before < 16 * len(moments[name].z)]
            inside = [] if streams.middle is None else ["norm_2"]
            seen = run_block(block, stream, self.theirs.block_args[layer], inside + wanted + post_norms)
            if streams.middle is not None and streams.middle is not streams.teacher:
                streams.middle[batch] = seen["norm_2"]
            for name in post_norms:
                streams.sizes[name, batch.start] = seen[name].square().mean(-1, keepdim=True).sqrt()
            for name in wanted:
                # errors count relative to the hidden states after the projection
                is_inside = name.startswith("attn") and streams.middle is not None
                weights = token_weights(seen["norm_2" if is_inside else "out"], self.teacher)
                moments[name].add(seen[name], no_outputs(seen[name]), weights)
            streams.ahead[batch] = finite(seen["out"])
        for batch in self.calibration.further_batches:
            streams.ahead[batch] = finite(block(streams.teacher[batch], *self.theirs.block_args[layer]))
        finite.finish()
        for dropped in range(layer + 1, behind):
            self._advance(streams.ahead, dropped)
        self._enter(streams.ahead, i + 1)
        covariances = {
            name: sums.over_processes().covariances(teacher.get_submodule(name).bias is not None)[0]
            for name, sums in moments.items()
        }
        return choose_units(self.subnet, i, teacher, covariances, self.basis.matrix)

    # after the last layer ---------------------------------------------------------------------------------------------

    def _repair_head(self, progress: bool) -> tuple[Errors | None, float | None]:
        """Fit the LM head to the teacher's logits, from the moments of both final norms, then to its predictions.

        Returns:
            KL(teacher ‖ student) in nats per token: before and after on held-out tokens, and the final value on as many
            fitted tokens. None without passes.
        """
        theirs, ours = self.theirs, self.ours
        if not self.basis.is_coordinates:
            self.basis.turn_norm(theirs.norm, ours.norm)

        def pair(batch: slice) -> tuple[torch.Tensor, torch.Tensor]:
            return tuple(
                outside.norm(stream[batch])
                for outside, stream in ((ours, self.student_stream), (theirs, self.teacher_stream))
            )

        moments = self.calibration.moments(self.n_embd, self.teacher.n_embd, pair)
        if self.tied:
            fit_tied_norm(ours.norm, ours.embedding, theirs.embedding, *moments)
        else:
            anchor = self.basis.reconstruction(theirs.norm, moments[0])
            fit_head(ours.head, theirs.head, lambda b, metric: fit(*moments, anchor, b, metric, self.ridges))
        if not self.args.head_passes:
            return None, None
        head = HeadRepair(ours, theirs, *self._last_streams(), self.calibration, self.tied)
        errors = head.fit(self.args.head_passes, self.scratch, progress)
        return errors, head.error(self.calibration.compared_windows)

    def _refine(self, subnet: SubNet, layers: list[Weights], progress: bool) -> tuple[Weights, Errors, float]:
        """Train all blocks except leading copies jointly; return their weights and the divergences."""
        first = self.subnet.n_intact
        blocks = [
            load_student_block(subnet, i, {name: w.to(self.device) for name, w in layers[i].items()})
            for i in range(first, len(subnet))
        ]
        start = self._stream(self._start, self.n_embd)
        assert not isinstance(start, OwnActivations)  # is shared
        end_to_end = EndToEnd(
            self.ours,
            self.theirs,
            blocks,
            self.ours.block_args[first:],
            start,
            self._last_streams()[1],
            self.calibration,
            self.tied,
        )
        errors = end_to_end.fit(self.args.refine_passes, self.args.refine_lr, self.scratch, progress)
        weights = {
            f"transformer.h.{i}.{name}": tensor.detach()
            for i, block in enumerate(blocks, first)
            for name, tensor in block.state_dict().items()
        }
        return weights, errors, end_to_end.error(self.calibration.compared_windows)

    @property
    def _start(self) -> str:
        """Name of the student's stream before its first layer that is not a copy of the teacher's."""
        return f"student-{self.subnet.n_intact}"

    def _chosen(self, keeps: list[LayerUnits]) -> SubNet:
        """Return the sub-network with the selected units."""
        width = "moe_intermediate_size" if self.teacher.moe_intermediate_size is not None else "intermediate_size"
        fields: dict[str, list[UnitIndex | None]] = {}
        for i, keep in enumerate(keeps):
            values = {"n_query_groups": keep.n_query_groups, "heads_per_group": keep.heads_per_group}
            values["intermediate_size" if keep.n_expert is None else width] = keep.intermediate_size
            if keep.n_expert is not None:
                values["n_expert"] = keep.n_expert
            for name, value in values.items():
                fields.setdefault(name, [None] * len(keeps))[i] = value
        return self.subnet.replace(**fields)
