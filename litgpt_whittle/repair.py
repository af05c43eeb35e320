"""Repairs a cut in closed form: fits what was cut off into what stays, before any training.

Most of what removed channels, neurons, heads and layers carried is a linear function of what stays. So teacher and
student walk through their blocks side by side on the same calibration tokens, and every linear map of the student is
fitted to what the teacher has in its place, given the inputs that the already repaired student really computes:

- Maps that read the residual stream (queries, keys, values, the MLP's inputs, routers, the LM head) want the teacher's
  pre-activations, which are linear in the teacher's normalised stream. So one regression of that on the student's
  normalised stream serves all maps behind a norm, the LM head included, whose logits never exist.
- Maps that write to the stream want to bring the student's stream to the teacher's, so each block also repairs what
  accumulated before it. Before a gap of dropped layers the target is the teacher's stream behind the gap.

Only moments are kept in memory (`litgpt_whittle.least_squares`), the streams lie in scratch files, and the teacher is
read block by block.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from litgpt.config import Config
from litgpt.model import Block
from torch import nn
from tqdm import tqdm

from litgpt_whittle.basis import Basis, norm_weight, set_norm_weight
from litgpt_whittle.errors import UserError
from litgpt_whittle.files import MappedWeights
from litgpt_whittle.importance import most_important
from litgpt_whittle.index_plan import Plan, axes_of, kept_indices, layer_plan
from litgpt_whittle.keep import Keep
from litgpt_whittle.least_squares import Fit, Moments, fit
from litgpt_whittle.scratch import Scratch, Stream
from litgpt_whittle.subnet import LayerKeep, SubNet
from litgpt_whittle.supergpt import BlocksGPT, Weights, is_tied


@dataclass
class RepairArgs:
    """How a cut is repaired before it is saved"""

    basis: Literal["pca", "coordinates"] = "pca"
    """What the student's channels carry: leading directions of the teacher's residual stream, or kept channels"""
    choose_units: bool = True
    """Keep as many heads and neurons as the sub-network says, but those that the others can least make up for"""
    tokens: int = 65_536
    """Calibration tokens"""
    refine_steps: int = 0
    """Steps that train each block, after its closed form, to map the student's stream to the teacher's"""
    refine_lr: float = 1e-3
    """Learning rate of these steps, annealed to zero"""

    def __post_init__(self) -> None:
        if self.basis not in ("pca", "coordinates"):
            raise UserError(f"repair.basis must be pca or coordinates, got {self.basis!r}")
        if self.tokens < 1:
            raise UserError(f"repair.tokens must be at least 1, got {self.tokens}; 65536 suits small models")
        if self.refine_steps < 0:
            raise UserError(f"repair.refine_steps must be 0 or more, got {self.refine_steps}")
        if not self.refine_lr > 0:
            raise UserError(f"repair.refine_lr must be above 0, got {self.refine_lr}")


@dataclass
class LayerReport:
    """What repairing a layer did, on held-out tokens."""

    layer: int
    before: float
    """Relative squared error of the student's stream behind this block, as it was sliced"""
    after: float
    """The same, repaired"""
    left_as_cut: list[str] = field(default_factory=list)
    """Maps that were not fitted"""


@dataclass
class Repaired:
    """A repaired student."""

    subnet: SubNet
    """Its sub-network, with the units that were chosen"""
    weights: Weights
    layers: list[LayerReport]
    basis: str


class Repair:
    """Walks through teacher and student and fits the student, a block at a time.

    Args:
        weights: The teacher's weights; memory-mapped ones are read a block at a time.
        subnet: What the student keeps.
        windows: Calibration tokens, shape (N, T).
        args: How to repair.
        scratch: Where streams and finished blocks go; a repair that was stopped goes on with what it finds there.
        micro_batch_size: Windows per forward pass.
        device: Where to compute, in float32.

    Raises:
        UserError: If activations of the teacher are not finite.
    """

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        subnet: SubNet,
        windows: torch.Tensor,
        args: RepairArgs,
        scratch: Scratch,
        micro_batch_size: int = 16,
        device: torch.device | str = "cpu",
    ) -> None:
        self.weights, self.subnet, self.args, self.scratch, self.device = weights, subnet, args, scratch, device
        self.teacher, self.tied = subnet.teacher, is_tied(weights)
        self.windows = windows
        n, n_held = len(windows), max(len(windows) // 8, 1)
        if n < 2:
            raise UserError(f"a repair needs at least 2 windows of calibration data, got {n}; raise repair.tokens")
        self.batches = [
            slice(start, min(start + micro_batch_size, end))
            for begin, end in ((0, n - n_held), (n - n_held, n))
            for start in range(begin, end, micro_batch_size)
        ]
        self.first_held_out = n - n_held
        self.basis_name = "coordinates" if len(subnet.n_embd) == self.teacher.n_embd else args.basis

    @torch.no_grad()
    def run(self, progress: bool = True) -> Repaired:
        """Repairs all of it."""
        self.teacher_root, self.teacher_args = self._root(self.teacher, self._root_weights())
        self.basis = self._find_basis()
        student_root = self._student_root_weights()
        self.student_root, self.student_args = self._root(self.subnet.config, student_root)
        layers = list(self._finished())
        self._begin_streams(len(layers))
        student: Weights = {}
        keeps: list[LayerKeep] = []
        bar = tqdm(total=len(self.subnet), desc="repair", unit="layer", disable=not progress, initial=len(layers))
        for i in range(len(self.subnet)):
            if i < len(layers):
                keep, block_weights, report = layers[i]
            else:
                keep, block_weights, report = self._repair_layer(i)
                layers.append((keep, block_weights, report))
                self._finish(i, keep, block_weights, report)
            bar.update(i >= bar.n)
            bar.set_postfix_str(f"error {report.before:.3f} -> {report.after:.3f}")
            keeps.append(keep)
            student |= {f"transformer.h.{i}.{name}": tensor for name, tensor in block_weights.items()}
        bar.close()
        student |= self._repair_head()
        reports = [report for _, _, report in layers]
        return Repaired(self._chosen(keeps), student, reports, self.basis_name)

    def _finish(self, i: int, keep: LayerKeep, weights: Weights, report: LayerReport) -> None:
        """Saves a layer, so that an interrupted repair goes on behind it."""
        self.teacher_stream.flush()
        self.student_stream.flush()
        units = {name: None if value is None else value.to_yaml() for name, value in vars(keep).items()}
        self.scratch.save(f"layer-{i}", {"keep": units, "weights": weights, "report": dataclasses.asdict(report)})
        self.scratch.remove_streams_before(i)

    def _finished(self) -> Iterator[tuple[LayerKeep, Weights, LayerReport]]:
        """The layers that an interrupted repair had finished."""
        for i in range(len(self.subnet)):
            if (saved := self.scratch.load(f"layer-{i}")) is None:
                return
            units = {name: None if value is None else Keep.parse(value) for name, value in saved["keep"].items()}
            weights = {name: tensor.to(self.device) for name, tensor in saved["weights"].items()}
            yield LayerKeep(**units), weights, LayerReport(**saved["report"])

    # the models, a block at a time ------------------------------------------------------------------------------------

    def _root_weights(self) -> Weights:
        return {
            name: tensor.to(self.device, torch.float32)
            for name, tensor in self.weights.items()
            if not name.startswith("transformer.h.")
        }

    def _root(self, config: Config, weights: Weights) -> tuple[BlocksGPT, list[tuple]]:
        """What lies outside a model's blocks, and what each block is called with besides the stream."""
        with torch.device("meta"):
            root = BlocksGPT(config, [_Probe() for _ in range(config.n_layer)])
        root.load_state_dict(weights, assign=True)
        root.max_seq_length = self.windows.shape[1]
        root.cos, root.sin = root.rope_cache(device=self.device)
        root.eval().requires_grad_(False)
        root(self.windows[:1].to(self.device))
        return root, [probe.seen[1:] for probe in root.transformer.h]

    def _embed(self, root: BlocksGPT, batch: slice) -> torch.Tensor:
        """A model's stream before its first block."""
        with _stopping_at(root.transformer.h[0]):
            try:
                root(self.windows[batch].to(self.device))
            except _Stop:
                pass
        return root.transformer.h[0].seen[0]

    def _teacher_block(self, layer: int) -> Block:
        prefix = f"transformer.h.{layer}."
        names = [name for name in self.weights if name.startswith(prefix)]
        weights = {name.removeprefix(prefix): self.weights[name].to(self.device, torch.float32) for name in names}
        if isinstance(self.weights, MappedWeights):
            for name in names:
                self.weights.forget(name)
        return _block(self.teacher, layer, weights)

    def _student_block(self, i: int, keep: LayerKeep, teacher: Block) -> tuple[Block, Plan]:
        """The student's block as it is cut, in its own basis, and what it takes of the teacher's."""
        takes = layer_plan(self.teacher, self.subnet.layers[i], self.subnet.n_embd, self.subnet.head_cut.dims, keep)
        tensors = dict(teacher.named_parameters()) | dict(teacher.named_buffers())
        weights = {name: take(tensors[take.name]).clone().contiguous() for name, take in takes.items()}
        block = _block(self.subnet.layer_config(i), i, weights)
        if not self.basis.is_coordinates:
            for name in ("norm_1", "norm_2", "post_attention_norm", "post_mlp_norm"):
                if getattr(teacher, name, None) is not None:
                    self._turn_norm(getattr(teacher, name), getattr(block, name))
            for name in _linear_names(takes, "writing"):
                module, wide = block.get_submodule(name), _linear(teacher, takes[f"{name}.weight"].name)
                columns = _indices(takes[f"{name}.weight"].index[1], self.device)
                module.weight.copy_(self.basis.matrix @ wide.weight[:, columns])
                if module.bias is not None:
                    module.bias.copy_(self.basis.matrix @ wide.bias)
        return block, takes

    def _turn_norm(self, teacher: nn.Module, student: nn.Module) -> None:
        """Gives a norm its start in a basis of directions, in which the teacher's weight is no diagonal."""
        weight = norm_weight(teacher)
        set_norm_weight(student, 1.0 if weight is None else weight.square().mean().sqrt())
        if getattr(student, "bias", None) is not None:
            student.bias.copy_(self.basis.matrix @ teacher.bias)

    # basis and root ---------------------------------------------------------------------------------------------------

    def _find_basis(self) -> Basis:
        if self.basis_name == "coordinates":
            return Basis.coordinates(torch.from_numpy(self.subnet.n_embd.indices).to(self.device), self.teacher.n_embd)
        saved = self.scratch.load("basis")
        if saved is not None:
            return Basis(saved["matrix"].to(self.device))
        # directions need fewer tokens than regressions: a quarter, from all over the calibration data
        batches = self.batches[:: 4 if len(self.batches) >= 8 else 1]
        streams = [self._embed(self.teacher_root, batch) for batch in batches]
        worth = torch.zeros(self.teacher.n_embd, self.teacher.n_embd, dtype=torch.float64, device=self.device)
        for layer in range(self.teacher.n_layer):
            block = self._teacher_block(layer)
            before, middle = (Moments(self.teacher.n_embd, 0, self.device) for _ in range(2))
            inside = [] if self.teacher.parallel_residual else ["norm_2"]
            for i, stream in enumerate(streams):
                before.add(_standardised(stream, self.teacher), _nothing(stream))
                seen = _run(block, stream, self.teacher_args[layer], inside)
                if inside:
                    middle.add(_standardised(seen["norm_2"], self.teacher), _nothing(stream))
                streams[i] = seen["out"]
            if layer in self.subnet.layers:
                mlp_norm = block.norm_1 if self.teacher.shared_attention_norm else block.norm_2
                worth += _worth(before, block.norm_1, _readers(block, "attn"))
                worth += _worth(middle if inside else before, mlp_norm, _readers(block, "mlp"))
        final = Moments(self.teacher.n_embd, 0, self.device)
        for stream in streams:
            final.add(_standardised(stream, self.teacher), _nothing(stream))
        head = self.teacher_root.lm_head.weight
        # as much as half of all layers: measured best among 1/8, 3/8 and all of them
        worth += len(self.subnet) * _worth(final, self.teacher_root.transformer.ln_f, [head - head.mean(0)])
        basis = Basis.principal(worth, len(self.subnet.n_embd), _centres(self.teacher))
        self.scratch.save("basis", {"matrix": basis.matrix})
        return basis

    def _student_root_weights(self) -> Weights:
        """Embedding and head as they are cut; an embedding before dropped layers is fitted to what lies behind them."""
        wide = self._root_weights()
        embedding = self.basis.project(wide["transformer.wte.weight"])
        if self.teacher.scale_embeddings:  # litgpt multiplies by the square root of each model's own width
            embedding = embedding * math.sqrt(self.teacher.n_embd / len(self.subnet.n_embd))
        weights = {"transformer.wte.weight": embedding.contiguous()}
        for name, tensor in wide.items():
            if name.startswith("transformer.ln_f.") or name == "lm_head.weight":
                weights[name] = self.basis.project(tensor).contiguous()
            elif name == "lm_head.bias":
                weights[name] = tensor
        if self.tied:
            weights["lm_head.weight"] = weights["transformer.wte.weight"]
        return weights

    # streams ----------------------------------------------------------------------------------------------------------

    def _begin_streams(self, n_finished: int) -> None:
        """Both models' streams before the first block that is still to do."""
        n, length = self.windows.shape
        if n_finished:
            self.teacher_stream = self.scratch.stream(f"teacher-{n_finished}", n, length, self.teacher.n_embd)
            self.student_stream = self.scratch.stream(f"student-{n_finished}", n, length, len(self.subnet.n_embd))
            if (embedding := self.scratch.load("embedding")) is not None:
                self.student_root.transformer.wte.weight.copy_(embedding)
            return
        self.teacher_stream = self.scratch.stream("teacher-0", n, length, self.teacher.n_embd)
        self.student_stream = self.scratch.stream("student-0", n, length, len(self.subnet.n_embd))
        for batch in self.batches:
            self.teacher_stream[batch] = self._embed(self.teacher_root, batch)
        for layer in range(self.subnet.layers[0]):
            block = self._teacher_block(layer)
            for batch in self.batches:
                self.teacher_stream[batch] = block(self._teacher_at(batch), *self.teacher_args[layer])
        if self.subnet.layers[0] and not self.tied:
            self._repair_embedding()
        for batch in self.batches:
            self.student_stream[batch] = self._embed(self.student_root, batch)

    def _teacher_at(self, batch: slice) -> torch.Tensor:
        return self.teacher_stream[batch].to(self.device)

    def _student_at(self, batch: slice) -> torch.Tensor:
        return self.student_stream[batch].to(self.device)

    def _repair_embedding(self) -> None:
        """Each token's embedding becomes the mean of the stream behind the dropped first layers where it occurs.

        A ridge of four occurrences draws rare tokens towards their own embedding.
        """
        weight = self.student_root.transformer.wte.weight
        factor = math.sqrt(len(self.subnet.n_embd)) if self.teacher.scale_embeddings else 1.0
        total, count = weight * factor * 4, torch.full((len(weight), 1), 4.0, device=weight.device)
        for batch in self.batches:
            tokens = self.windows[batch].flatten().to(self.device)
            total.index_add_(0, tokens, self.basis.project(self._teacher_at(batch)).flatten(0, 1))
            count.index_add_(0, tokens, torch.ones(len(tokens), 1, device=count.device))
        weight.copy_(total / count / factor)
        self.scratch.save("embedding", weight)

    # one layer --------------------------------------------------------------------------------------------------------

    def _repair_layer(self, i: int) -> tuple[LayerKeep, Weights, LayerReport]:
        layer = self.subnet.layers[i]
        teacher = self._teacher_block(layer)
        n, length = self.windows.shape
        parallel = self.teacher.parallel_residual
        middle = None if parallel else self.scratch.stream("middle", n, length, self.teacher.n_embd)
        ahead = self.scratch.stream(f"teacher-{i + 1}", n, length, self.teacher.n_embd)
        keep = self._walk_teacher(i, teacher, middle, ahead)
        block, takes = self._student_block(i, keep, teacher)
        walk = _LayerWalk(self, i, teacher, block, takes, middle, ahead)
        before = walk.error()
        walk.read("attn", teacher.norm_1, block.norm_1)
        if parallel:
            shared = self.teacher.shared_attention_norm
            walk.read("mlp", *((teacher.norm_1, block.norm_1) if shared else (teacher.norm_2, block.norm_2)))
            walk.write("attn", "mlp")
        else:
            walk.write("attn")
            walk.read("mlp", teacher.norm_2, block.norm_2)
            walk.write("mlp")
        if self.args.refine_steps:
            walk.refine()
        after = walk.error()
        if not math.isfinite(after):
            raise UserError(f"activations of layer {layer} are not finite; the checkpoint or its dtype is at fault")
        following = self.scratch.stream(f"student-{i + 1}", n, length, len(self.subnet.n_embd))
        for batch in self.batches:
            following[batch] = block(self._student_at(batch), *self.student_args[i])
        self.teacher_stream, self.student_stream = ahead, following
        weights = {name: tensor.detach() for name, tensor in block.state_dict().items()}
        return keep, weights, LayerReport(layer, before, after, walk.left_as_cut)

    def _walk_teacher(self, i: int, teacher: Block, middle: Stream | None, ahead: Stream) -> LayerKeep:
        """Takes the teacher's stream through its block and the dropped ones behind; chooses the student's units."""
        layers = self.subnet.layers
        behind = layers[i + 1] if i + 1 < len(layers) else self.teacher.n_layer
        chooser = _Chooser(self, i, teacher)
        for batch in self.batches:
            wanted = ["norm_2"] if middle is not None else []
            seen = _run(teacher, self._teacher_at(batch), self.teacher_args[layers[i]], wanted + chooser.wanted(batch))
            if middle is not None:
                middle[batch] = seen["norm_2"]
            chooser.add(seen)
            ahead[batch] = seen["out"]
            if not torch.isfinite(seen["out"]).all():
                raise UserError(
                    f"the teacher's layer {layers[i]} gives activations that are not finite on calibration data; "
                    "the checkpoint is damaged"
                )
        for layer in range(layers[i] + 1, behind):
            block = self._teacher_block(layer)
            for batch in self.batches:
                ahead[batch] = block(ahead[batch].to(self.device), *self.teacher_args[layer])
        return chooser.choose()

    # behind the last layer --------------------------------------------------------------------------------------------

    def _repair_head(self) -> Weights:
        """Fits the LM head to the teacher's logits, through the moments of both final norms."""
        teacher, student = self.teacher_root, self.student_root
        if not self.basis.is_coordinates:
            self._turn_norm(teacher.transformer.ln_f, student.transformer.ln_f)
        ins, outs = len(self.subnet.n_embd), self.teacher.n_embd
        moments = {False: Moments(ins, outs, self.device), True: Moments(ins, outs, self.device)}
        for batch in self.batches:
            z, y = student.transformer.ln_f(self._student_at(batch)), teacher.transformer.ln_f(self._teacher_at(batch))
            moments[batch.start >= self.first_held_out].add(z, y)
        head = teacher.lm_head.weight
        if self.tied:
            self._repair_tied_head(moments[False] + moments[True])
        else:
            # a softmax does not see what all logits have in common
            centred = (head - head.mean(0)).to(moments[False].zz.dtype)
            turn = self._reconstruction(teacher.transformer.ln_f, moments[False])
            found = fit(*moments.values(), turn, student.lm_head.bias is not None, centred.T @ centred)
            student.lm_head.weight.copy_(head @ found.weight.to(head.dtype))
            if student.lm_head.bias is not None:
                student.lm_head.bias.copy_(teacher.lm_head.bias + head @ found.bias.to(head.dtype))
        weights = dict(student.state_dict())
        if self.tied:
            weights["lm_head.weight"] = weights["transformer.wte.weight"]
        return weights

    def _repair_tied_head(self, moments: Moments) -> None:
        """The head is the embedding, so only the weight w of the final norm is free: least squares over w alone.

        With E the student's embedding, V the teacher's, z and y their final normalised streams, ‖E diag(w) z − V y‖² is
        least where (EᵀE ∘ Σzzᵀ) w = diag(Eᵀ V Σyzᵀ).
        """
        norm = self.student_root.transformer.ln_f
        if norm_weight(norm) is None:
            return
        dtype = moments.zz.dtype
        ours, theirs = (root.lm_head.weight.to(dtype) for root in (self.student_root, self.teacher_root))
        zz, yz = moments.covariances(intercept=False)
        gram = (ours.T @ ours) * zz
        right = ((ours.T @ theirs) @ yz).diagonal()
        factor = torch.linalg.solve(gram + 1e-6 * torch.diag(gram.diagonal().clamp_min(1e-30)), right)
        if torch.isfinite(factor).all():
            set_norm_weight(norm, norm_weight(norm) * factor.to(norm.weight.dtype))
            if getattr(norm, "bias", None) is not None:
                norm.bias.mul_(factor.to(norm.bias.dtype))

    def _reconstruction(self, norm: nn.Module, moments: Moments) -> torch.Tensor:
        """The teacher's normalised stream from the student's, as a plain cut has it, to the best scale.

        The scale is needed because a norm over fewer channels divides by something else.

        Returns:
            R, shape (n_embd_teacher, n_embd_student), with teacher ≈ R · student.
        """
        turn = self.basis.matrix.T.to(moments.zz.dtype)
        weight = norm_weight(norm)
        if not self.basis.is_coordinates and weight is not None:
            turn = turn * weight.to(turn.dtype)[:, None] / weight.to(turn.dtype).square().mean().sqrt()
        zz, yz = moments.covariances(intercept=True)
        size = ((turn @ zz) * turn).sum()
        return turn * float((turn * yz).sum() / size) if size > 0 else turn

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


class _Chooser:
    """Chooses a layer's heads and neurons from the moments of what its writing maps read."""

    def __init__(self, repair: Repair, i: int, teacher: Block) -> None:
        self.repair, self.teacher, self.keep = repair, teacher, repair.subnet.layer(i)
        config, full = repair.teacher, SubNet.full(repair.teacher).layer(repair.subnet.layers[i])
        self.full = full
        cut = {
            "attn.proj": self.keep.n_query_groups != full.n_query_groups
            or self.keep.heads_per_group != full.heads_per_group
        }
        # experts share their choice with each other, which this criterion does not cover
        cut["mlp.proj"] = self.keep.n_expert is None and self.keep.intermediate_size != full.intermediate_size
        self.moments = {
            name: Moments(teacher.get_submodule(name).in_features, 0, repair.device)
            for name, is_cut in cut.items()
            if is_cut and repair.args.choose_units
        }
        self.dims = SubNet.full(config).head_cut.dims if len(repair.subnet.head_size) == config.head_size else None

    def wanted(self, batch: slice) -> list[str]:
        """Whose inputs are still wanted: sixteen tokens for each suffice, from the beginning of the data."""
        length = self.repair.windows.shape[1]
        return [name for name, moments in self.moments.items() if batch.start * length < 16 * len(moments.z)]

    def add(self, seen: Mapping[str, torch.Tensor]) -> None:
        for name, moments in self.moments.items():
            if name in seen:
                moments.add(seen[name], _nothing(seen[name]))

    def choose(self) -> LayerKeep:
        keep = self.keep
        if "attn.proj" in self.moments:
            groups = self._best("attn.proj", self._heads(self.full.n_query_groups, None), len(keep.n_query_groups))
            within = self._best("attn.proj", self._heads(None, groups), len(keep.heads_per_group))
            keep = dataclasses.replace(keep, n_query_groups=groups, heads_per_group=within)
        if "mlp.proj" in self.moments:
            neurons = torch.arange(len(self.full.intermediate_size), device=self.repair.device)[:, None]
            keep = dataclasses.replace(
                keep, intermediate_size=self._best("mlp.proj", neurons, len(keep.intermediate_size))
            )
        return keep

    def _best(self, name: str, units: torch.Tensor, n: int) -> Keep:
        if n == len(units):
            return Keep(n)
        module = self.teacher.get_submodule(name)
        columns = units.flatten()
        covariance = self.moments[name].covariances(module.bias is not None)[0][columns][:, columns]
        weight = self.repair.basis.matrix @ module.weight[:, columns]
        places = torch.arange(len(columns), device=columns.device).view(units.shape)
        return Keep(np.array(most_important(covariance, weight, places, n)))

    def _heads(self, groups: Keep | None, chosen: Keep | None) -> torch.Tensor:
        """Columns of the attention's output map, a row per query group, or per head within the chosen groups."""
        full, subnet = self.full, self.repair.subnet

        def columns(groups: Keep, heads: Keep) -> np.ndarray:
            keep = dataclasses.replace(full, n_query_groups=groups, heads_per_group=heads)
            return kept_indices(self.repair.teacher, 0, subnet.head_cut.dims, keep)["attention"]

        if chosen is None:
            rows = [columns(Keep([g]), full.heads_per_group) for g in range(len(full.n_query_groups))]
        else:
            rows = [columns(chosen, Keep([h])) for h in range(len(full.heads_per_group))]
        return torch.from_numpy(np.stack(rows)).to(self.repair.device)


class _LayerWalk:
    """Fits the maps of one block in the order in which they compute."""

    def __init__(
        self, repair: Repair, i: int, teacher: Block, block: Block, takes: Plan, middle: Stream | None, ahead: Stream
    ) -> None:
        self.repair, self.teacher, self.block, self.takes = repair, teacher, block, takes
        self.middle, self.ahead, self.args = middle, ahead, repair.student_args[i]
        self.left_as_cut = _linear_names(takes, "inner")

    def read(self, part: str, teacher_norm: nn.Module, student_norm: nn.Module) -> None:
        """Fits all maps of `attn` or `mlp` that read the normalised stream."""
        names = [name for name in _linear_names(self.takes, "reading") if name.startswith(part)]
        ins, outs = len(self.repair.subnet.n_embd), self.repair.teacher.n_embd
        moments = self._moments(ins, outs)
        inside = part == "mlp" and self.middle is not None
        for batch in self.repair.batches:
            theirs = self.middle[batch].to(self.repair.device) if inside else self.repair._teacher_at(batch)
            ours = self._run(batch, ["norm_2"])["norm_2"] if inside else self.repair._student_at(batch)
            moments[self._is_held_out(batch)].add(student_norm(ours), teacher_norm(theirs))
        rows = {name: self._rows(name) for name in names}
        wide = torch.cat([weight for weight, _ in rows.values()]).to(moments[False].zz.dtype)
        turn = self.repair._reconstruction(teacher_norm, moments[False])
        found: dict[bool, Fit] = {}
        for name, (weight, bias) in rows.items():
            module = self.block.get_submodule(name)
            intercept = bias is not None
            if intercept not in found:
                found[intercept] = fit(*moments.values(), turn, intercept, wide.T @ wide)
            module.weight.data.copy_(weight @ found[intercept].weight.to(weight.dtype))
            if intercept:
                module.bias.data.copy_(bias + weight @ found[intercept].bias.to(weight.dtype))

    def _rows(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The teacher's weight and bias in the place of a map of the student, at the kept rows."""
        take = self.takes[f"{name}.weight"]
        wide, rows = _linear(self.teacher, take.name), _indices(take.index[0], self.repair.device)
        bias = getattr(wide, "bias", None)
        return wide.weight.data[rows], None if bias is None else bias.data[rows]

    def write(self, *parts: str) -> None:
        """Fits the maps through which `attn`, `mlp` or both together write to the stream."""
        if "mlp" in parts and "mlp.proj.weight" not in self.takes:
            self.left_as_cut += [name for name in _linear_names(self.takes, "writing") if name.startswith("mlp")]
            parts = tuple(part for part in parts if part != "mlp")
            if not parts:
                return
        names = [f"{part}.proj" for part in parts]
        modules = [self.block.get_submodule(name) for name in names]
        moments = self._moments(sum(m.in_features for m in modules), len(self.repair.subnet.n_embd))
        for batch in self.repair.batches:
            z, y = self._writing_pair(batch, parts)
            moments[self._is_held_out(batch)].add(z, y)
        anchor = torch.cat([module.weight for module in modules], 1)
        intercept = modules[-1].bias is not None
        found = fit(*moments.values(), anchor, intercept)
        for module, weight in zip(modules, found.weight.split([m.in_features for m in modules], 1)):
            module.weight.data.copy_(weight)
            if module.bias is not None:
                module.bias.data.copy_(found.bias if module is modules[-1] else torch.zeros_like(found.bias))
        for part in parts:
            norm = getattr(self.block, f"post_{'attention' if part == 'attn' else part}_norm")
            if norm_weight(norm) is not None:
                self._refit_post_norm(norm, modules[names.index(f"{part}.proj")], parts)

    def _writing_pair(self, batch: slice, parts: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """What the writing maps read, and what they should add to the student's stream."""
        wanted = [f"{part}.proj" for part in parts]
        inside = parts == ("mlp",) and self.middle is not None
        seen = self._run(batch, wanted + ["norm_2"] * inside)
        start = seen["norm_2"] if inside else self.repair._student_at(batch)
        goal = self.middle if parts == ("attn",) and self.middle is not None else self.ahead
        target = self.repair.basis.project(goal[batch].to(self.repair.device)) - start
        return torch.cat([seen[name] for name in wanted], -1), target

    def _refit_post_norm(self, norm: nn.Module, module: nn.Module, parts: tuple[str, ...]) -> None:
        """The weight of a norm behind a writing map: the best one per channel."""
        size = len(self.repair.subnet.n_embd)
        products, squares = (torch.zeros(size, dtype=torch.float64, device=self.repair.device) for _ in range(2))
        for batch in self.repair.batches:
            z, y = self._writing_pair(batch, parts)
            normed = norm(module(z))
            products += (normed * y).flatten(0, -2).sum(0)
            squares += normed.square().flatten(0, -2).sum(0)
        factor = (products / squares.clamp_min(1e-30)).to(torch.float32)
        set_norm_weight(norm, norm_weight(norm) * factor)

    def refine(self) -> None:
        """Trains the block to map the student's stream to the teacher's; kept if that is better on held-out tokens."""
        start = {name: tensor.clone() for name, tensor in self.block.state_dict().items()}
        before = self.error()
        steps, batches = self.repair.args.refine_steps, [b for b in self.repair.batches if not self._is_held_out(b)]
        parameters = list(self.block.parameters())
        optimizer = torch.optim.Adam(parameters, lr=self.repair.args.refine_lr, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        order = torch.Generator().manual_seed(0)
        with torch.enable_grad():
            self.block.requires_grad_(True)
            for _ in range(steps):
                batch = batches[int(torch.randint(len(batches), (), generator=order))]
                target = self.repair.basis.project(self.ahead[batch].to(self.repair.device))
                out = self.block(self.repair._student_at(batch), *self.args)
                loss = (out - target).square().mean() / target.var()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            self.block.requires_grad_(False)
        if not self.error() < before:
            self.block.load_state_dict(start)

    def error(self) -> float:
        """The relative squared error of the student's stream behind this block, on held-out tokens."""
        off = total = 0.0
        for batch in self.repair.batches:
            if self._is_held_out(batch):
                target = self.repair.basis.project(self.ahead[batch].to(self.repair.device))
                out = self.block(self.repair._student_at(batch), *self.args)
                off += float((out - target).double().square().sum())
                total += float(target.double().square().sum())
        return off / max(total, 1e-30)

    def _moments(self, n_in: int, n_out: int) -> dict[bool, Moments]:
        """Of calibration tokens and of held-out ones."""
        return {held_out: Moments(n_in, n_out, self.repair.device) for held_out in (False, True)}

    def _is_held_out(self, batch: slice) -> bool:
        return batch.start >= self.repair.first_held_out

    def _run(self, batch: slice, wanted: list[str]) -> dict[str, torch.Tensor]:
        return _run(self.block, self.repair._student_at(batch), self.args, wanted, stop=True)


class _Stop(Exception):
    """Ends a forward pass that has shown all it should."""


class _Probe(nn.Module):
    """Stands in for a block: notes what it is called with, and passes the stream on."""

    seen: tuple = ()

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        self.seen = args
        return args[0]


@contextmanager
def _stopping_at(probe: _Probe) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _Stop

    handle = probe.register_forward_hook(stop)
    try:
        yield
    finally:
        handle.remove()


def _run(
    block: Block, stream: torch.Tensor, args: tuple, wanted: list[str], stop: bool = False
) -> dict[str, torch.Tensor]:
    """Runs a block; gives the inputs of the modules `wanted` by name, and its output as `out` unless it is to stop
    when it has seen them all."""
    seen: dict[str, torch.Tensor] = {}

    def note(name: str):
        def hook(_: nn.Module, inputs: tuple) -> None:
            seen[name] = inputs[0]
            if stop and len(seen) == len(wanted):
                raise _Stop

        return hook

    handles = [block.get_submodule(name).register_forward_pre_hook(note(name)) for name in wanted]
    try:
        seen["out"] = block(stream, *args)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _block(config: Config, layer: int, weights: Weights) -> Block:
    """litgpt's block around weights."""
    with torch.device("meta"):
        block = Block(config, layer)
    block.load_state_dict(weights, assign=True)
    return block.eval().requires_grad_(False)


def _linear_names(takes: Plan, kind: Literal["reading", "writing", "inner"]) -> list[str]:
    """The linear maps of a block that read the stream, write to it, or do neither."""
    names = []
    for name, take in takes.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and len(take.index) == 2:
            out, inn = axes_of(module)
            if kind == ("reading" if inn == "n_embd" else "writing" if out == "n_embd" else "inner"):
                names.append(module)
    return names


def _readers(block: Block, part: str) -> list[torch.Tensor]:
    """The weights of all maps of `attn` or `mlp` that read the stream, each of shape (n_out, n_embd)."""
    weights = []
    for name, weight in block.get_submodule(part).named_parameters():
        module, _, leaf = f"{part}.{name}".rpartition(".")
        if leaf == "weight" and axes_of(module)[1:] == ("n_embd",):
            weights.append(weight.data)
    return weights


def _worth(moments: Moments, norm: nn.Module, readers: list[torch.Tensor]) -> torch.Tensor:
    """How much of what readers get each direction of the normalised stream x gives them.

    With W the readers' weights, C = E[x xᵀ] and P the projection to kept directions, the part of what they read that
    survives is E⟨W x, W P x⟩ = tr(P (C WᵀW + WᵀW C) / 2), so the leading eigenvectors of that matrix are the best.

    Returns:
        The matrix, shape (n_embd, n_embd), with trace 1.
    """
    covariance = moments.zz / moments.n
    weight = norm_weight(norm)
    gram = torch.zeros_like(covariance)
    for reader in readers:
        reader = (reader if weight is None else reader * weight).to(gram.dtype)
        gram.addmm_(reader.T, reader)
    worth = covariance @ gram
    return ((worth + worth.T) / (2 * worth.trace().clamp_min(1e-30))).double()


def _linear(block: Block, weight: str) -> nn.Module:
    return block.get_submodule(weight.rpartition(".")[0])


def _indices(index: slice | torch.Tensor, device: torch.device | str) -> slice | torch.Tensor:
    return index if isinstance(index, slice) else index.to(device)


def _nothing(like: torch.Tensor) -> torch.Tensor:
    """Outputs of size zero, where only moments of inputs are wanted."""
    return like.new_zeros(*like.shape[:-1], 0)


def _centres(config: Config) -> bool:
    """Whether the model's norms subtract the mean over channels."""
    return config.norm_class_name == "LayerNorm"


def _standardised(stream: torch.Tensor, config: Config) -> torch.Tensor:
    """The stream as a norm without weights leaves it."""
    if _centres(config):
        stream = stream - stream.mean(-1, keepdim=True)
    return stream * torch.rsqrt(stream.square().mean(-1, keepdim=True) + config.norm_eps)
