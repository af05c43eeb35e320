"""Repairs a cut in closed form: fits what was cut off into what stays, before any training.

Most of what removed channels, neurons, heads and layers carried is a linear function of what stays. So teacher and
student walk through their blocks side by side on the same calibration tokens, and every linear map of the student is
fitted to what the teacher has in its place, given the inputs that the already repaired student really computes:

- Maps that read the residual stream (queries, keys, values, the MLP's inputs, routers, the LM head) want the teacher's
  pre-activations, which are linear in the teacher's normalised stream. So one regression of that on the student's
  normalised stream serves all maps behind a norm, the LM head included, whose logits never exist.
- Maps that write to the stream want to bring the student's stream to the teacher's, so each block also repairs what
  accumulated before it. Before a gap of dropped layers the target is the teacher's stream behind the gap.
- The LM head is then trained a little further (`litgpt_whittle.repair.head`), since logits are not what counts.

Only moments are kept in memory (`litgpt_whittle.least_squares`), the streams lie in scratch files, and the teacher is
read block by block.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator, Mapping

import torch
from litgpt.config import Config
from litgpt.model import Block
from tqdm import tqdm

from litgpt_whittle.blocks import Outside, load_block, read_block, read_outside, run_block
from litgpt_whittle.calibration import Calibration
from litgpt_whittle.errors import UserError
from litgpt_whittle.files import readable_size
from litgpt_whittle.keep import Keep
from litgpt_whittle.least_squares import RIDGES, Moments, exact_products, fit, no_outputs
from litgpt_whittle.processes import add_up, barrier, free_memory, n_sharing
from litgpt_whittle.repair.args import RepairArgs
from litgpt_whittle.repair.basis import (
    Basis,
    Worth,
    is_centring,
    principal_directions,
    readers,
    standardised,
    token_weights,
)
from litgpt_whittle.repair.block import POST_NORMS, BlockRepair, Streams, post_norm
from litgpt_whittle.repair.costs import head_bytes, refine_bytes, sums_bytes, widest_map
from litgpt_whittle.repair.cut import KINDS, TokenMeans, cut_block, cut_outside, linear_names, not_finite
from litgpt_whittle.repair.end_to_end import EndToEnd
from litgpt_whittle.repair.head import HeadRepair
from litgpt_whittle.repair.readers import fit_head, fit_tied_norm
from litgpt_whittle.repair.refine import Errors
from litgpt_whittle.repair.repaired import LayerReport, Repaired
from litgpt_whittle.repair.units import choose_units, maps_to_choose_for
from litgpt_whittle.scratch import Scratch, Stream
from litgpt_whittle.subnet import LayerKeep, SubNet
from litgpt_whittle.supergpt import Weights, is_tied


class Repair:
    """Walks through teacher and student and fits the student, a block at a time.

    Where several processes run it together, each takes its share of the tokens, and all get the same student.

    Args:
        weights: The teacher's weights; memory-mapped ones are read a block at a time.
        subnet: What the student keeps.
        calibration: The tokens, and where to compute, in float32.
        args: How to repair.
        scratch: Where streams and finished blocks go; a repair that was stopped goes on with what it finds there.

    Raises:
        UserError: If activations of the teacher are not finite, or memory does not suffice.
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
        self.ridges = self._ridges(widest_map(subnet.config))

    def _check_memory(self) -> None:
        """Refuses what would not fit: the moments that are kept at once, and an LM head that is trained."""
        free = free_memory(self.device, n_sharing(self.device))
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

    def _ridges(self, widest: int) -> tuple[float, ...]:
        """The ridges to choose from: only strong ones where a regression has more inputs than tokens."""
        n_tokens = self.calibration.n_fitted
        if n_tokens >= widest:
            return RIDGES
        warnings.warn(
            f"{n_tokens:,} calibration tokens are fewer than the {widest:,} inputs of the widest map; the repair stays "
            "near the plain cut, raise repair.tokens",
            stacklevel=3,
        )
        return tuple(ridge for ridge in RIDGES if ridge >= 1e-2)

    @exact_products()
    @torch.no_grad()
    def run(self, progress: bool = True) -> Repaired:
        """Repairs all of it."""
        self.theirs = self._outside(self.teacher, read_outside(self.weights, self.device))
        self.basis = self._find_basis()
        cut = cut_outside(self.teacher, read_outside(self.weights, self.device), self.basis, self.tied)
        self.ours = self._outside(self.subnet.config, cut)
        layers = list(self._finished())
        self._begin_streams(len(layers))
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
        chosen, head, refined = self._chosen(keeps), self._repair_head(progress), None
        if self.args.refine_passes:
            blocks, refined = self._refine(chosen, [weights for _, weights, _ in layers], progress)
            student |= blocks
        outside = {name: tensor.detach() for name, tensor in self.ours.model.state_dict().items()}
        student = {name: tensor.cpu() for name, tensor in (student | outside).items()}
        if self.tied:
            student["lm_head.weight"] = student["transformer.wte.weight"]
        if self.tied and self.subnet.layers[0]:  # it is the head, too
            reports[0].left_as_cut.append("the embedding, which should stand in for dropped first layers")
        return Repaired(chosen, student, reports, head, refined, self.basis_name, self.basis.matrix.cpu())

    def _finish(self, i: int, keep: LayerKeep, weights: Weights, report: LayerReport) -> None:
        """Saves a layer, so that an interrupted repair goes on behind it."""
        self.teacher_stream.flush()
        self.student_stream.flush()
        barrier()  # all processes' parts of the streams are on disk
        units = {name: None if value is None else value.to_yaml() for name, value in vars(keep).items()}
        self.scratch.save(f"layer-{i}", {"keep": units, "weights": weights, "report": dataclasses.asdict(report)})
        self.scratch.remove_streams_before(i, keep=self._start if self.args.refine_passes else None)

    def _finished(self) -> Iterator[tuple[LayerKeep, Weights, LayerReport]]:
        """The layers that an interrupted repair had finished."""
        for i in range(len(self.subnet)):
            if (saved := self.scratch.load(f"layer-{i}")) is None:
                return
            units = {name: None if value is None else Keep.parse(value) for name, value in saved["keep"].items()}
            yield LayerKeep(**units), saved["weights"], LayerReport(**saved["report"])

    # the models -------------------------------------------------------------------------------------------------------

    def _outside(self, config: Config, weights: Weights) -> Outside:
        return Outside(config, weights, self.calibration.shape[1], self.device)

    def _teacher_block(self, layer: int) -> Block:
        return load_block(self.teacher, layer, read_block(self.weights, layer, self.device))

    def _find_basis(self) -> Basis:
        if self.basis_name == "coordinates":
            kept = torch.tensor(self.subnet.n_embd.indices, device=self.device)
            return Basis.coordinates(kept, self.teacher.n_embd)
        saved = self.scratch.load("basis")
        barrier()  # nobody saves before all have looked
        if saved is not None:
            return Basis(saved["matrix"].to(self.device))
        centred = is_centring(self.teacher)
        basis = Basis.principal(principal_directions(self._worth().form, centred), self.n_embd, centred)
        self.scratch.save("basis", {"matrix": basis.matrix})
        return basis

    def _worth(self) -> Worth:
        """What directions of the teacher's stream are worth to what reads it in the kept layers, and to its head."""
        # thirty-two tokens for each channel suffice for directions, from all over the calibration data
        batches, n_needed = self.calibration.all_batches, 32 * self.teacher.n_embd
        batches = self.calibration.share(batches[:: max(self.calibration.windows.numel() // n_needed, 1)])
        stream, worth = self._stream("directions", self.teacher.n_embd), Worth()
        for batch in batches:
            stream[batch] = self.theirs.embed(self.calibration.ids(batch))
        for layer in range(self.teacher.n_layer):
            block = self._teacher_block(layer)
            before, middle = (Moments(self.teacher.n_embd, 0, self.device) for _ in range(2))
            inside = [] if self.teacher.parallel_residual else ["norm_2"]
            for batch in batches:
                x = stream[batch].to(self.device)
                before.add(standardised(x, self.teacher), no_outputs(x))
                seen = run_block(block, x, self.theirs.block_args[layer], inside)
                if inside:
                    middle.add(standardised(seen["norm_2"], self.teacher), no_outputs(x))
                stream[batch] = _finite(seen["out"], layer)
            if layer in self.subnet.layers:
                before.over_processes()
                mlp_norm = block.norm_1 if self.teacher.shared_attention_norm else block.norm_2
                worth.add(before, block.norm_1, readers(block, "attn"))
                worth.add(middle.over_processes() if inside else before, mlp_norm, readers(block, "mlp"))
        final = Moments(self.teacher.n_embd, 0, self.device)
        for batch in batches:
            x = stream[batch].to(self.device)
            final.add(standardised(x, self.teacher), no_outputs(x))
        final.over_processes()  # all have read the stream
        self.scratch.remove_stream("directions")
        head = self.theirs.head.weight
        # as much as half of the layers' readers: of 1, 1/2, 1/4 and 1/8 the best on a teacher of 8 layers
        worth.add(final, self.theirs.norm, [head - head.mean(0)], times=len(self.subnet))
        return worth

    # streams ----------------------------------------------------------------------------------------------------------

    def _stream(self, name: str, n_embd: int) -> Stream:
        return self.scratch.stream(name, *self.calibration.shape, n_embd)

    def _begin_streams(self, n_finished: int) -> None:
        """Both models' streams before the first block that is still to do."""
        self.teacher_stream = self._stream(f"teacher-{n_finished}", self.teacher.n_embd)
        self.student_stream = self._stream(f"student-{n_finished}", self.n_embd)
        if n_finished:
            if (embedding := self.scratch.load("embedding")) is not None:
                self.ours.embedding.copy_(embedding)
            return
        for batch in self.calibration.batches:
            self.teacher_stream[batch] = self.theirs.embed(self.calibration.ids(batch))
        for layer in range(self.subnet.layers[0]):
            self._advance(self.teacher_stream, layer)
        if self.subnet.layers[0] and not self.tied:
            self._repair_embedding()
        for batch in self.calibration.batches:
            self.student_stream[batch] = self.ours.embed(self.calibration.ids(batch))

    def _advance(self, stream: Stream, layer: int) -> None:
        """Takes the teacher's stream through one of its blocks, in place."""
        block = self._teacher_block(layer)
        for batch in self.calibration.batches:
            stream[batch] = _finite(block(stream[batch].to(self.device), *self.theirs.block_args[layer]), layer)

    def _repair_embedding(self) -> None:
        """Lets the embedding stand in for the dropped first layers."""
        weight = self.ours.embedding
        means = TokenMeans(self.calibration.windows.unique().to(weight.device), self.teacher.n_embd)
        for batch in self.calibration.batches:
            means.add(self.calibration.ids(batch), self.teacher_stream[batch].to(self.device))
        add_up(means.total), add_up(means.count)
        means.into(weight, self.basis, self.teacher)
        self.scratch.save("embedding", weight)

    # one layer --------------------------------------------------------------------------------------------------------

    def _repair_layer(self, i: int) -> tuple[LayerKeep, Weights, LayerReport]:
        layer = self.subnet.layers[i]
        teacher = self._teacher_block(layer)
        if self._is_copy(i):
            return self._copy_layer(i, teacher)
        middle = None if self.teacher.parallel_residual else self._stream("middle", self.teacher.n_embd)
        ahead = self._stream(f"teacher-{i + 1}", self.teacher.n_embd)
        streams = Streams(self.teacher_stream, self.student_stream, middle, ahead, {})
        keep = self._walk_teacher(i, teacher, streams)
        block, takes = cut_block(self.subnet, i, keep, self.basis, teacher)
        args = self.ours.block_args[i]
        repair = BlockRepair(block, takes, teacher, args, streams, self.basis, self.calibration, self.ridges)
        # the choice is made on tokens that tune, those held out only report
        tuning, held_out = self.calibration.tuning_batches, self.calibration.held_out_batches
        start = {name: tensor.clone() for name, tensor in block.state_dict().items()}
        before, before_tuning = repair.error(held_out), repair.error(tuning)
        repair.fit()
        if repair.error(tuning) > before_tuning:  # what is cut loses little, and norms are not linear
            repair.restore(start)
            repair.left_as_cut = [name for kind in KINDS for name in linear_names(takes, kind)]
        after = repair.error(held_out)
        if not math.isfinite(after):
            raise UserError(f"activations of layer {layer} are not finite; the checkpoint or its dtype is at fault")
        self.teacher_stream, self.student_stream = ahead, self._stream(f"student-{i + 1}", self.n_embd)
        for batch in self.calibration.batches:
            self.student_stream[batch] = repair.output(batch)
        # a device has room for one block
        weights = {name: tensor.detach().cpu() for name, tensor in block.state_dict().items()}
        # where the cut loses nothing, nothing is left to be fitted
        left_as_cut = repair.left_as_cut if before > 1e-6 else []
        return keep, weights, LayerReport(layer, before, after, left_as_cut)

    def _is_copy(self, i: int) -> bool:
        """Return whether a layer and all before it are the teacher's own, so that their streams are, too."""
        if self.n_embd < self.teacher.n_embd or i + 1 == len(self.subnet) < self.teacher.n_layer:
            return False
        full = SubNet.full(self.teacher)
        is_same_head = self.subnet.head_size == full.head_size
        is_whole = all(self.subnet.layer(j) == full.layer(j) for j in range(i + 1))
        n_same = i + 1 if i + 1 == len(self.subnet) else i + 2  # no dropped layers follow
        return is_whole and list(self.subnet.layers[:n_same]) == list(range(n_same)) and is_same_head

    def _copy_layer(self, i: int, teacher: Block) -> tuple[LayerKeep, Weights, LayerReport]:
        """Take a layer over as it is; nothing needs to be fitted."""
        ahead, ours = self._stream(f"teacher-{i + 1}", self.n_embd), self._stream(f"student-{i + 1}", self.n_embd)
        for batch in self.calibration.batches:
            stream = teacher(self.teacher_stream[batch].to(self.device), *self.theirs.block_args[i])
            ahead[batch] = ours[batch] = _finite(stream, i)
        self.teacher_stream, self.student_stream = ahead, ours
        weights = {name: tensor.detach().cpu() for name, tensor in teacher.state_dict().items()}
        return self.subnet.layer(i), weights, LayerReport(i, 0.0, 0.0)

    def _walk_teacher(self, i: int, teacher: Block, streams: Streams) -> LayerKeep:
        """Takes the teacher's stream through its block and the dropped ones behind; chooses the student's units."""
        layers = self.subnet.layers
        layer, behind = layers[i], layers[i + 1] if i + 1 < len(layers) else self.teacher.n_layer
        chosen = maps_to_choose_for(self.subnet, i) if self.args.choose_units else []
        post_norms = [POST_NORMS[part] for part in POST_NORMS if post_norm(teacher, part) is not None]
        moments = {
            name: Moments(teacher.get_submodule(name).in_features, 0, self.device, rough=True) for name in chosen
        }
        for batch in self.calibration.batches:
            stream = streams.teacher[batch].to(self.device)
            # sixteen tokens for each input suffice to choose, from the beginning of the data
            n_before = batch.start * self.calibration.shape[1]
            wanted = [name for name in chosen if n_before < 16 * len(moments[name].z)]
            inside = [] if streams.middle is None else ["norm_2"]
            seen = run_block(teacher, stream, self.theirs.block_args[layer], inside + wanted + post_norms)
            if streams.middle is not None:
                streams.middle[batch] = seen["norm_2"]
            for name in post_norms:
                streams.sizes[name, batch.start] = seen[name].square().mean(-1, keepdim=True).sqrt()
            for name in wanted:
                # errors count relative to the stream that the map writes to
                is_inside = name.startswith("attn") and streams.middle is not None
                weights = token_weights(seen["norm_2" if is_inside else "out"], self.teacher)
                moments[name].add(seen[name], no_outputs(seen[name]), weights)
            streams.ahead[batch] = _finite(seen["out"], layer)
        for dropped in range(layer + 1, behind):
            self._advance(streams.ahead, dropped)
        covariances = {
            name: sums.over_processes().covariances(teacher.get_submodule(name).bias is not None)[0]
            for name, sums in moments.items()
        }
        return choose_units(self.subnet, i, teacher, covariances, self.basis.matrix)

    # behind the last layer --------------------------------------------------------------------------------------------

    def _repair_head(self, progress: bool) -> Errors | None:
        """Fits the LM head to the teacher's logits, through the moments of both final norms, and to its predictions."""
        theirs, ours = self.theirs, self.ours
        if not self.basis.is_coordinates:
            self.basis.turn_norm(theirs.norm, ours.norm)

        def pair(batch: slice) -> tuple[torch.Tensor, torch.Tensor]:
            return tuple(
                outside.norm(stream[batch].to(self.device))
                for outside, stream in ((ours, self.student_stream), (theirs, self.teacher_stream))
            )

        moments = self.calibration.moments(self.n_embd, self.teacher.n_embd, pair)
        if self.tied:
            fit_tied_norm(ours.norm, ours.embedding, theirs.embedding, *moments)
        else:
            anchor = self.basis.reconstruction(theirs.norm, moments[0])
            fit_head(ours.head, theirs.head, lambda b, metric: fit(*moments, anchor, b, metric, self.ridges))
        if not self.args.head_passes:
            return None
        head = HeadRepair(ours, theirs, self.student_stream, self.teacher_stream, self.calibration, self.tied)
        return head.fit(self.args.head_passes, self.scratch, progress)

    def _refine(self, subnet: SubNet, layers: list[Weights], progress: bool) -> tuple[Weights, Errors]:
        """Train all blocks but leading copies together; return their weights."""
        first = self._n_copies
        blocks = [
            load_block(subnet.layer_config(i), i, {name: w.to(self.device) for name, w in layers[i].items()})
            for i in range(first, len(subnet))
        ]
        start = self._stream(self._start, self.n_embd)
        end_to_end = EndToEnd(
            self.ours,
            self.theirs,
            blocks,
            self.ours.block_args[first:],
            start,
            self.teacher_stream,
            self.calibration,
            self.tied,
        )
        errors = end_to_end.fit(self.args.refine_passes, self.args.refine_lr, self.scratch, progress)
        return {
            f"transformer.h.{i}.{name}": tensor.detach()
            for i, block in enumerate(blocks, first)
            for name, tensor in block.state_dict().items()
        }, errors

    @property
    def _n_copies(self) -> int:
        """Number of leading layers that are copies of the teacher's."""
        return sum(self._is_copy(i) for i in range(len(self.subnet)))

    @property
    def _start(self) -> str:
        """Name of the student's stream before its first layer that is no copy."""
        return f"student-{self._n_copies}"

    def _chosen(self, keeps: list[LayerKeep]) -> SubNet:
        """The sub-network with the units that were chosen."""
        subnet = self.subnet
        width = "moe_intermediate_size" if self.teacher.moe_intermediate_size is not None else "intermediate_size"
        fields: dict[str, list[Keep | None]] = {}
        for i, keep in enumerate(keeps):
            values = {"n_query_groups": keep.n_query_groups, "heads_per_group": keep.heads_per_group}
            values["intermediate_size" if keep.n_expert is None else width] = keep.intermediate_size
            if keep.n_expert is not None:
                values["n_expert"] = keep.n_expert
            for name, value in values.items():
                fields.setdefault(name, [None] * len(keeps))[i] = value
        return SubNet(self.teacher, n_embd=subnet.n_embd, n_layer=subnet.n_layer, head_size=subnet.head_size, **fields)


def _finite(stream: torch.Tensor, layer: int) -> torch.Tensor:
    """The teacher's stream behind a layer, refused where it is not finite."""
    if not torch.isfinite(stream).all():
        raise not_finite(layer)
    return stream
