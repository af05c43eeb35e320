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
from typing import Any

import torch
from litgpt.config import Config
from litgpt.model import Block
from tqdm import tqdm

from litgpt_whittle.blocks import NonBlockModules, load_student_block, read_outside
from litgpt_whittle.calibration import Calibration
from litgpt_whittle.errors import UserError
from litgpt_whittle.least_squares import RIDGES, exact_products, fit
from litgpt_whittle.processes import all_reduce_sum, barrier, free_memory, gather
from litgpt_whittle.repair.args import RepairArgs
from litgpt_whittle.repair.basis import Basis, is_centring, principal_directions
from litgpt_whittle.repair.block import BlockRepair
from litgpt_whittle.repair.costs import check_repair_memory, repair_bytes, widest_map
from litgpt_whittle.repair.cut import KINDS, FiniteCheck, TokenMeans, cut_block, cut_outside, linear_names
from litgpt_whittle.repair.directions import direction_importance
from litgpt_whittle.repair.end_to_end import EndToEnd
from litgpt_whittle.repair.head import HeadRepair
from litgpt_whittle.repair.readers import fit_head, fit_tied_norm
from litgpt_whittle.repair.refine import Errors
from litgpt_whittle.repair.repaired import LayerReport, Repaired
from litgpt_whittle.repair.streams import StreamPair
from litgpt_whittle.repair.units import choose_units, maps_to_choose_for, with_units
from litgpt_whittle.scratch import Scratch
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
        self.refines = args.refine_passes > 0
        check_repair_memory(
            subnet, self.tied, self.device, args.choose_units, trains_head=args.head_passes > 0, refines=self.refines
        )
        scratch.device, scratch.budget = self.device, min(gather(self._streams_budget()))
        self.ridges = self._ridges(widest_map(subnet.config))

    def _streams_budget(self) -> int:
        """Return the maximum bytes of streams in the device's memory: half of the memory that the repair leaves free.

        On a CPU, return 0: streams are files, which the operating system caches in main memory.
        """
        if self.device.type == "cpu":
            return 0
        needed = repair_bytes(self.subnet, self.tied, self.device, self.refines)
        return max(free_memory(self.device, 1) - needed, 0) // 2

    def _ridges(self, widest: int) -> tuple[float, ...]:
        """Return the ridge strengths to choose from: only large ones if there are fewer tokens than inputs of a map."""
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
        self.streams = StreamPair(self.weights, self.theirs, self.subnet, self.calibration, self.scratch, self.refines)
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
        chosen, refined = with_units(self.subnet, keeps), None
        head, fitted = self._repair_head(progress)
        if self.refines:
            blocks, refined, fitted = self._refine(chosen, [weights for _, weights, _ in layers], progress)
            student |= blocks
        outside = {name: tensor.detach() for name, tensor in self.ours.model.state_dict().items()}
        student = {name: tensor.cpu() for name, tensor in (student | outside).items()}
        if self.tied:
            student["lm_head.weight"] = student["transformer.wte.weight"]
        if self.tied and self.subnet.begins_late:
            # as the embedding is also the LM head, it cannot replace dropped first layers
            reports[0].left_as_cut.append("the embedding (tied to the LM head)")
        return Repaired(chosen, student, reports, head, refined, fitted, self.basis_name, self.basis.matrix.cpu())

    def _finish(self, i: int, keep: LayerUnits, weights: Weights, report: LayerReport) -> None:
        """Save a finished layer, after which an interrupted repair resumes."""
        self.streams.flush()
        barrier()  # all processes' parts of the streams are on disk
        units = {name: None if value is None else value.to_yaml() for name, value in vars(keep).items()}
        self.scratch.save(f"layer-{i}", {"keep": units, "weights": weights, "report": dataclasses.asdict(report)})
        self.scratch.remove_streams_before(i, keep=self.streams.start)

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
        """Return a model's modules outside the blocks, for windows of the calibration tokens' length."""
        return NonBlockModules(config, weights, self.calibration.shape[1], self.device)

    def _find_basis(self) -> Basis:
        """Return the student's basis; principal directions are loaded if an interrupted repair has computed them."""
        if self.basis_name == "coordinates":
            kept = torch.tensor(self.subnet.n_embd.indices, device=self.device)
            return Basis.coordinates(kept, self.teacher.n_embd)
        saved = self.scratch.load("basis")
        barrier()  # no process saves before all have looked
        if saved is not None:
            return Basis(saved["matrix"].to(self.device))
        centred = is_centring(self.teacher)
        stream = self.streams.open("directions", self.teacher.n_embd)
        units = {layer: self.subnet.layer(i) for i, layer in enumerate(self.subnet.layers)}
        importance = direction_importance(self.theirs, self.streams.teacher_block, units, self.calibration, stream)
        self.scratch.remove_stream("directions")
        basis = Basis.principal(principal_directions(importance.form, centred), self.n_embd, centred)
        self.scratch.save("basis", {"matrix": basis.matrix})
        return basis

    def _begin_streams(self, finished: list[Weights]) -> None:
        """Set up both models' streams before the first unfinished block.

        Args:
            finished: Weights of the student's finished blocks, to recompute streams that are not in files.
        """
        n = len(finished)
        has_streams = n > 0 and self.streams.are_complete(n)
        if (embedding := self.scratch.load("embedding") if n else None) is not None:
            self.ours.embedding.copy_(embedding)
        with nullcontext() if has_streams else self.scratch.filling():
            self.streams.begin(n)
            if has_streams:
                return
            self.streams.run_teacher(n)
            if self.subnet.begins_late and n == 0 and not self.tied:
                self._repair_embedding()
            self.streams.run_student(self.ours, finished)

    def _repair_embedding(self) -> None:
        """Write the teacher's mean hidden state after the dropped first sub-layers, by token id, into the embedding."""
        weight = self.ours.embedding
        means = TokenMeans(self.calibration.windows.unique().to(weight.device), self.teacher.n_embd)
        for batch in self.calibration.training_batches:
            means.add(self.calibration.ids(batch), self.streams.teacher[batch])
        all_reduce_sum(means.total), all_reduce_sum(means.count)
        means.into(weight, self.basis, self.teacher)
        self.scratch.save("embedding", weight)

    # one layer --------------------------------------------------------------------------------------------------------

    def _repair_layer(self, i: int) -> tuple[LayerUnits, Weights, LayerReport]:
        """Fit the student's block `i`; return its kept units, its weights on the CPU, and its errors."""
        layer = self.subnet.layers[i]
        teacher = self.streams.teacher_block(layer)
        if i < self.subnet.n_intact:
            return self._copy_layer(i, teacher)
        around = self.streams.around(i)
        chosen = maps_to_choose_for(self.subnet, i) if self.args.choose_units else []
        covariances = self.streams.run_teacher_block(i, teacher, around, chosen)
        keep = choose_units(self.subnet, i, teacher, covariances, self.basis.matrix)
        block, slices = cut_block(self.subnet, i, keep, self.basis, teacher)
        args = self.ours.block_args[i]
        repair = BlockRepair(block, slices, teacher, args, around, self.basis, self.calibration, self.ridges)
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
            raise UserError(
                f"the student's hidden states must be finite, and those after the teacher's layer {layer} are not; "
                "download or convert the teacher again, or give --repair false"
            )
        self.streams.begin(i + 1)
        for batch in self.calibration.batches:
            self.streams.student[batch] = repair.output(batch)
        # the device holds one block at a time
        weights = {name: tensor.detach().cpu() for name, tensor in block.state_dict().items()}
        # if slicing loses nothing, there is nothing to fit
        left_as_cut = repair.left_as_cut if before > 1e-6 else []
        return keep, weights, LayerReport(layer, before, after, left_as_cut)

    def _copy_layer(self, i: int, teacher: Block) -> tuple[LayerUnits, Weights, LayerReport]:
        """Copy the teacher's block `i`; all blocks before it are copies, too, so that nothing has to be fitted."""
        before, finite = self.streams.teacher, FiniteCheck(i)
        self.streams.begin(i + 1)
        for batch in self.calibration.teacher_batches:
            after = finite(teacher(before[batch], *self.theirs.block_args[i]))
            self.streams.teacher[batch] = self.streams.student[batch] = after
        finite.finish()
        weights = {name: tensor.detach().cpu() for name, tensor in teacher.state_dict().items()}
        return self.subnet.layer(i), weights, LayerReport(i, 0.0, 0.0)

    # after the last layer ---------------------------------------------------------------------------------------------

    def _repair_head(self, progress: bool) -> tuple[Errors | None, float | None]:
        """Fit the LM head to the teacher's logits, from the moments of both final norms, then to its predictions.

        Returns:
            KL(teacher ‖ student) in nats per token: on held-out tokens before and after the fit to predictions, and its
            final value on an equal number of fitted tokens. Both are None if `head_passes` is 0.
        """
        theirs, ours = self.theirs, self.ours
        if not self.basis.is_coordinates:
            self.basis.turn_norm(theirs.norm, ours.norm)

        def pair(batch: slice) -> tuple[torch.Tensor, torch.Tensor]:
            return tuple(
                outside.norm(stream[batch])
                for outside, stream in ((ours, self.streams.student), (theirs, self.streams.teacher))
            )

        moments = self.calibration.moments(self.n_embd, self.teacher.n_embd, pair)
        if self.tied:
            fit_tied_norm(ours.norm, ours.embedding, theirs.embedding, *moments)
        else:
            anchor = self.basis.reconstruction(theirs.norm, moments[0])
            fit_head(ours.head, theirs.head, lambda b, metric: fit(*moments, anchor, b, metric, self.ridges))
        if not self.args.head_passes:
            return None, None
        head = HeadRepair(ours, theirs, *self.streams.last(), self.calibration, self.tied)
        errors = head.fit(self.args.head_passes, self.scratch, progress)
        return errors, head.error(self.calibration.compared_windows)

    def _refine(self, subnet: SubNet, layers: list[Weights], progress: bool) -> tuple[Weights, Errors, float]:
        """Train all blocks except leading copies of the teacher's jointly.

        Returns:
            The weights of these blocks, and KL(teacher ‖ student) in nats per token: on held-out tokens before and
            after training, and its final value on an equal number of fitted tokens.
        """
        first = self.subnet.n_intact
        blocks = [
            load_student_block(subnet, i, {name: w.to(self.device) for name, w in layers[i].items()})
            for i in range(first, len(subnet))
        ]
        end_to_end = EndToEnd(
            self.ours,
            self.theirs,
            blocks,
            self.ours.block_args[first:],
            self.streams.before_training(),
            self.streams.last()[1],
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
