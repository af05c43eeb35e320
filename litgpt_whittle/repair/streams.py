"""Hidden states of teacher and student on the calibration tokens, computed side by side, block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from litgpt.model import Block

from litgpt_whittle.blocks import NonBlockModules, load_block, load_student_block, read_block, run_block
from litgpt_whittle.calibration import Calibration
from litgpt_whittle.least_squares import Moments, no_outputs
from litgpt_whittle.repair.basis import token_weights
from litgpt_whittle.repair.block import POST_NORMS, BlockStreams, post_norm
from litgpt_whittle.repair.cut import FiniteCheck
from litgpt_whittle.scratch import Activations, OwnActivations, Scratch, SharedActivations
from litgpt_whittle.student_block import part_of
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import Weights

SELECTION_TOKENS = 16
"""Calibration tokens, per input of an output projection, that suffice to select its inputs"""


class StreamPair:
    """Streams (hidden states on all calibration tokens) of both models before the student's next block.

    Args:
        weights: The teacher's weights.
        theirs: The teacher's modules outside the blocks.
        subnet: The student's sub-network.
        calibration: The calibration tokens and the device.
        scratch: Storage of the streams.
        refines: True if all blocks are trained jointly afterwards. Training needs the student's stream before its first
            block that is not a copy of the teacher's, which is then kept.
    """

    teacher: Activations
    student: Activations

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        theirs: NonBlockModules,
        subnet: SubNet,
        calibration: Calibration,
        scratch: Scratch,
        refines: bool,
    ) -> None:
        self.weights, self.theirs, self.subnet = weights, theirs, subnet
        self.calibration, self.scratch = calibration, scratch
        self.config, self.device = subnet.teacher, torch.device(calibration.device)
        last = [f"{model}-{len(subnet)}" for model in ("teacher", "student")]
        self.start = f"student-{subnet.n_intact}" if refines else None
        """Name of the stream that joint training begins with; None without joint training"""
        self._shared = {*last, self.start}
        """Names of the streams of which every process reads all windows, to train the head or all blocks"""

    def open(self, name: str, n_embd: int) -> Activations:
        """Open a stream of the repair, or create it if it does not exist."""
        return self.scratch.stream(name, *self.calibration.shape, n_embd, is_shared=name in self._shared)

    def open_teacher(self, i: int) -> Activations:
        """Open the teacher's stream before the student's block `i`."""
        return self.open(f"teacher-{i}", self.config.n_embd)

    def open_student(self, i: int) -> Activations:
        """Open the student's stream before its block `i`."""
        return self.open(f"student-{i}", len(self.subnet.n_embd))

    def are_complete(self, i: int) -> bool:
        """Return whether all streams that are needed to continue at the student's block `i` exist and are complete."""
        names = [f"teacher-{i}", f"student-{i}"]
        if self.start is not None:
            names.append(f"student-{min(i, self.subnet.n_intact)}")
        return self.scratch.has_streams(*names)

    def begin(self, i: int) -> None:
        """Open both models' streams before the student's block `i`, and make them the current ones."""
        self.teacher, self.student = self.open_teacher(i), self.open_student(i)

    def last(self) -> tuple[SharedActivations, SharedActivations]:
        """Return the student's and the teacher's stream after the last layer."""
        return _shared(self.student), _shared(self.teacher)

    def before_training(self) -> SharedActivations:
        """Return the student's stream before the first block that is trained jointly."""
        return _shared(self.open_student(self.subnet.n_intact))

    def flush(self) -> None:
        """Write both streams to disk, unless they are in the device's memory."""
        self.teacher.flush()
        self.student.flush()

    def teacher_block(self, layer: int) -> Block:
        """Load one of the teacher's blocks in float32."""
        return load_block(self.config, layer, read_block(self.weights, layer, self.device))

    def run_teacher(self, n_finished: int) -> None:
        """Run the teacher from its embedding to the student's first unfinished block."""
        for batch in self.calibration.teacher_batches:
            self.teacher[batch] = self.theirs.embed(self.calibration.ids(batch))
        layers = self.subnet.layers
        for layer in range(layers[n_finished] if n_finished < len(layers) else self.config.n_layer):
            self._advance(self.teacher, layer)
        self._enter(self.teacher, n_finished)

    def run_student(self, ours: NonBlockModules, finished: Sequence[Weights]) -> None:
        """Run the student from its embedding through its finished blocks.

        Args:
            ours: The student's modules outside the blocks.
            finished: Weights of the finished blocks.
        """
        n_intact = self.subnet.n_intact
        for batch in self.calibration.teacher_batches:
            self.student[batch] = ours.embed(self.calibration.ids(batch))
        for i, weights in enumerate(finished):
            if i == n_intact and self.start is not None:
                start = self.open_student(n_intact)
                for batch in self.calibration.teacher_batches:
                    start[batch] = self.student[batch]
            weights = {name: weight.to(self.device) for name, weight in weights.items()}
            block = load_student_block(self.subnet, i, weights)
            is_copy = i < n_intact
            args = (self.theirs if is_copy else ours).block_args[i]
            for batch in self.calibration.teacher_batches if is_copy else self.calibration.batches:
                self.student[batch] = block(self.student[batch], *args)

    def around(self, i: int) -> BlockStreams:
        """Return the streams around the student's block `i`; `run_teacher_block` fills `middle` and `ahead`."""
        middle = None if self.config.parallel_residual else self.teacher
        if middle is not None and not self.subnet.begins_inside(i):
            middle = self.open("middle", self.config.n_embd)
        return BlockStreams(self.teacher, self.student, middle, self.open_teacher(i + 1), {})

    def run_teacher_block(
        self, i: int, teacher: Block, streams: BlockStreams, chosen: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        """Run the teacher's block and the dropped sub-layers after it.

        Args:
            i: The student's layer.
            teacher: The teacher's block.
            streams: The streams around the block; `middle` and `ahead` are written.
            chosen: Names of the output projections whose inputs are selected.

        Returns:
            Covariances of the inputs of these projections, by name, shape (n_in, n_in).
        """
        layers = self.subnet.layers
        layer, following = layers[i], layers[i + 1] if i + 1 < len(layers) else self.config.n_layer
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
            n_before = batch.start * self.calibration.shape[1]
            wanted = [name for name in chosen if n_before < SELECTION_TOKENS * len(moments[name].z)]
            inside = [] if streams.middle is None else ["norm_2"]
            seen = run_block(block, stream, self.theirs.block_args[layer], inside + wanted + post_norms)
            if streams.middle is not None and streams.middle is not streams.teacher:
                streams.middle[batch] = seen["norm_2"]
            for name in post_norms:
                streams.sizes[name, batch.start] = seen[name].square().mean(-1, keepdim=True).sqrt()
            for name in wanted:
                # errors count relative to the hidden states after the projection
                is_inside = name.startswith("attn") and streams.middle is not None
                weights = token_weights(seen["norm_2" if is_inside else "out"], self.config)
                moments[name].add(seen[name], no_outputs(seen[name]), weights)
            streams.ahead[batch] = finite(seen["out"])
        for batch in self.calibration.further_batches:
            streams.ahead[batch] = finite(block(streams.teacher[batch], *self.theirs.block_args[layer]))
        finite.finish()
        for dropped in range(layer + 1, following):
            self._advance(streams.ahead, dropped)
        self._enter(streams.ahead, i + 1)
        return {
            name: sums.over_processes().covariances(teacher.get_submodule(name).bias is not None)[0]
            for name, sums in moments.items()
        }

    def _advance(self, stream: Activations, layer: int, part: Literal["attn", "mlp"] | None = None) -> None:
        """Run one of the teacher's blocks, or one sub-layer of the block, on a stream, in place."""
        block, finite = self.teacher_block(layer), FiniteCheck(layer)
        block = block if part is None else part_of(block, part)
        for batch in self.calibration.teacher_batches:
            stream[batch] = finite(block(stream[batch], *self.theirs.block_args[layer]))
        finite.finish()

    def _enter(self, stream: Activations, i: int) -> None:
        """Run the teacher's attention that the student's layer `i` dropped, if the layer begins with its MLP."""
        if i < len(self.subnet) and self.subnet.begins_inside(i):
            self._advance(stream, self.subnet.layers[i], "attn")


def _shared(stream: Activations) -> SharedActivations:
    assert not isinstance(stream, OwnActivations), "opened without is_shared"
    return stream
