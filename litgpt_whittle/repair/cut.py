"""Slice a student out of its teacher, in the student's basis: the starting point of every repair."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from litgpt.config import Config
from litgpt.model import Block

from litgpt_whittle.blocks import load_student_block
from litgpt_whittle.errors import UserError
from litgpt_whittle.index_plan import SlicePlan, axes_of, layer_plan, on_device
from litgpt_whittle.repair.basis import Basis
from litgpt_whittle.subnet import LayerUnits, SubNet
from litgpt_whittle.supergpt import Weights

KINDS = ("reading", "writing", "inner")
"""Kinds of linear maps: input projections (from the residual stream), output projections (to it), and all others"""


def cut_outside(teacher: Config, weights: Mapping[str, torch.Tensor], basis: Basis, tied: bool) -> Weights:
    """Return the student's sliced weights outside the blocks: embedding, final norm and LM head.

    Args:
        teacher: The teacher's config.
        weights: The teacher's weights; weights of its blocks are ignored.
        basis: Basis of the student's residual stream.
        tied: True if the LM head is tied to the embedding.
    """
    n_student, n_teacher = basis.matrix.shape
    embedding = basis.project(weights["transformer.wte.weight"])
    if teacher.scale_embeddings:  # litgpt multiplies embeddings by the square root of the model's width
        embedding = embedding * math.sqrt(n_teacher / n_student)
    cut = {"transformer.wte.weight": embedding.contiguous()}
    for name, tensor in weights.items():
        if name.startswith("transformer.ln_f.") or name == "lm_head.weight":
            cut[name] = basis.project(tensor).contiguous()
        elif name == "lm_head.bias":
            cut[name] = tensor.clone()
    if tied:
        cut["lm_head.weight"] = cut["transformer.wte.weight"]
    return cut


def cut_block(subnet: SubNet, index: int, keep: LayerUnits, basis: Basis, teacher: Block) -> tuple[Block, SlicePlan]:
    """Return a student's block, sliced out of the teacher's, and its slices of the teacher's parameters."""
    slices = layer_plan(subnet.teacher, subnet.layers[index], subnet.n_embd, subnet.head_cut.dims, keep)
    (slices,) = on_device([slices], teacher.attn.proj.weight.device)
    tensors = dict(teacher.named_parameters()) | dict(teacher.named_buffers())
    weights = {name: take(tensors[take.name]).clone().contiguous() for name, take in slices.items()}
    block = load_student_block(subnet, index, weights)
    if not basis.is_coordinates:
        for name in ("norm_1", "norm_2", "post_attention_norm", "post_mlp_norm"):
            if getattr(teacher, name, None) is not None:
                basis.turn_norm(getattr(teacher, name), getattr(block, name))
        for name in linear_names(slices, "writing"):
            take, module = slices[f"{name}.weight"], block.get_submodule(name)
            wide = teacher.get_submodule(take.name.removesuffix(".weight"))
            module.weight.copy_(basis.matrix @ wide.weight[:, on(take.index[1], wide.weight)].float())
            if module.bias is not None:
                module.bias.copy_(basis.matrix @ wide.bias.float())
    return block, slices


def linear_names(slices: SlicePlan, kind: str) -> list[str]:
    """Return the names of a block's linear maps of one kind.

    Args:
        slices: The block's slice plan.
        kind: One of `KINDS`.
    """
    names = []
    for name, take in slices.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and len(take.index) == 2:
            out, inn = axes_of(module)
            if kind == ("reading" if inn == "n_embd" else "writing" if out == "n_embd" else "inner"):
                names.append(module)
    return names


def teacher_rows(slices: SlicePlan, name: str, teacher: Block) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return weight and bias of the teacher's counterpart of a student's linear map, at the kept outputs."""
    take = slices[f"{name}.weight"]
    wide = teacher.get_submodule(take.name.removesuffix(".weight"))
    rows, bias = on(take.index[0], wide.weight), getattr(wide, "bias", None)
    return wide.weight[rows], None if bias is None else bias[rows]


def on(index: slice | torch.Tensor, like: torch.Tensor) -> slice | torch.Tensor:
    """Move an index to a tensor's device."""
    return index if isinstance(index, slice) else index.to(like.device)


def not_finite(layer: int) -> UserError:
    """Return the error for a teacher layer whose outputs contain infinities or NaNs."""
    return UserError(
        f"the teacher's layer {layer} gives activations that are not finite on calibration data, so its weights are "
        "damaged; download or convert the teacher again"
    )


class FiniteCheck:
    """Checks that a teacher layer's outputs are finite.

    The result is read once, after all batches, because reading it waits for the device.
    """

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self._are_finite: list[torch.Tensor] = []

    def __call__(self, stream: torch.Tensor) -> torch.Tensor:
        """Add a batch's outputs; return them."""
        self._are_finite.append(torch.isfinite(stream).all())
        return stream

    def finish(self) -> None:
        """Raise UserError if an output was not finite."""
        if self._are_finite and not torch.stack(self._are_finite).all():
            raise not_finite(self.layer)


class TokenMeans:
    """Mean of the teacher's hidden states for each token id, as an embedding that replaces dropped first layers.

    A student without the teacher's first layers then starts from the best prediction, given the token alone, of the
    hidden states after these layers.

    Args:
        tokens: Token ids that can occur, in ascending order, shape (n,).
        n_embd: Number of the teacher's channels.
    """

    RIDGE = 4
    """Weight of the student's own embedding in the mean, as a number of occurrences; regularises rare tokens"""

    def __init__(self, tokens: torch.Tensor, n_embd: int) -> None:
        self.tokens = tokens
        self.total = torch.zeros(len(tokens), n_embd, device=tokens.device)
        self.count = torch.zeros(len(tokens), 1, device=tokens.device)

    def add(self, ids: torch.Tensor, stream: torch.Tensor) -> None:
        """Add token ids, shape (…), with the hidden states at their positions, shape (…, n_embd)."""
        rows = torch.searchsorted(self.tokens, ids.flatten())
        self.total.index_add_(0, rows, stream.flatten(0, -2).float())
        self.count.index_add_(0, rows, self.count.new_ones(len(rows), 1))

    def into(self, embedding: torch.Tensor, basis: Basis, config: Config) -> None:
        """Write the means into a student's embedding, in place."""
        factor = math.sqrt(embedding.shape[1]) if config.scale_embeddings else 1.0
        own = embedding[self.tokens].float() * factor
        means = (basis.project(self.total) + own * self.RIDGE) / (self.count + self.RIDGE)
        embedding[self.tokens] = (means / factor).to(embedding.dtype)
