"""Layer-wise matching of a student's hidden states to its teacher's, in addition to their predictions.

If the student was extracted from the teacher, its layers and channels correspond to some of the teacher's. They are
then compared directly, without a learned projection.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from litgpt.config import Config
from litgpt.model import GPT
from torch import nn

from litgpt_whittle.distillation.args import HiddenArgs
from litgpt_whittle.errors import UserError
from litgpt_whittle.student_block import NoSublayer
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.tensors import upcast


class Place(NamedTuple):
    """A place in a model whose hidden states are matched."""

    layer: int
    kind: str
    """"block": the residual stream after the layer; "attn": the output of its attention"""

    def module(self, model: GPT) -> nn.Module:
        """Return the module that outputs these hidden states."""
        block = model.transformer.h[self.layer]
        return block if self.kind == "block" else block.attn


class Watch:
    """Records a model's hidden states at some places in each forward pass, while `is_on`.

    Args:
        model: The model.
        places: The places to record.
    """

    def __init__(self, model: GPT, places: Iterable[Place]) -> None:
        self.is_on = False
        self._seen: dict[Place, torch.Tensor] = {}
        for place in places:
            place.module(model).register_forward_hook(self._keeper(place))

    def _keeper(self, place: Place):
        def keep(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            if self.is_on:
                self._seen[place] = output

        return keep

    def take(self) -> dict[Place, torch.Tensor]:
        """Return and clear the recorded hidden states, each (B, T, n_embd)."""
        seen, self._seen = self._seen, {}
        return seen


class HiddenLoss(nn.Module):
    """Weighted distance between a student's and its teacher's hidden states, averaged over matched places and tokens.

    Args:
        student: The student.
        teacher: The teacher's config.
        args: The settings of the loss.
        subnet: The student as a sub-network of the teacher; not needed with a learned projection.
        basis: The student's channels as linear combinations of the teacher's, shape (n_embd_student, n_embd_teacher);
            None if they are a selection of the teacher's channels.

    Raises:
        UserError: If attention outputs are to be matched, and none of the layers to match has attention.
    """

    channels: torch.Tensor

    def __init__(
        self,
        student: GPT,
        teacher: Config,
        args: HiddenArgs,
        subnet: SubNet | None = None,
        basis: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.args = args
        n_layer = len(student.transformer.h)
        if args.projection:
            above: Sequence[int] = [round((layer + 1) * teacher.n_layer / n_layer) - 1 for layer in range(n_layer)]
        else:
            assert subnet is not None, "without a projection, a sub-network must map the layers and channels"
            above = subnet.layers
            rows = torch.eye(teacher.n_embd)[subnet.n_embd.indices] if basis is None else basis.float()
            self.register_buffer("channels", rows, persistent=False)
        chosen = range(n_layer) if args.layers is None else args.layers
        kinds = [kind for kind, weight in self.weights.items() if weight]
        lacking = {i for i, block in enumerate(student.transformer.h) if isinstance(block.attn, NoSublayer)}
        if "attn" in kinds and lacking.issuperset(chosen):
            raise UserError(
                "distill.hidden.attention needs a layer with attention, and the student's layers "
                f"{sorted(chosen)} have none; name others in distill.hidden.layers, or set distill.hidden.attention 0"
            )
        places = [Place(i, kind) for kind in kinds for i in chosen if kind != "attn" or i not in lacking]
        self.pairs = {place: Place(above[place.layer], place.kind) for place in places}
        self.watch = Watch(student, self.pairs)
        if args.projection:
            self.projections = nn.ModuleDict(
                {_name(place): nn.Linear(student.config.n_embd, teacher.n_embd, bias=False) for place in self.pairs}
            )

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each kind of place."""
        return {"block": self.args.weight, "attn": self.args.attention}

    def forward(self, teacher: Mapping[Place, torch.Tensor], counts: torch.Tensor | None = None) -> torch.Tensor:
        """Return the weighted loss on the student's recorded hidden states, and clear them.

        Args:
            teacher: The teacher's hidden states by place, each (B, T, n_embd_teacher).
            counts: A mask of the tokens that count, shape (B, T); by default all do.
        """
        seen = self.watch.take()
        terms = []
        for ours, theirs in self.pairs.items():
            student, target = upcast(seen[ours]), upcast(teacher[theirs])
            if self.args.projection:
                student = upcast(self.projections[_name(ours)](seen[ours]))
            else:
                target = target @ self.channels.to(target.dtype).T
            n_places = sum(place.kind == ours.kind for place in self.pairs)
            terms.append(self.weights[ours.kind] / n_places * self._distance(student, target, counts))
        return torch.stack(terms).sum()

    def _distance(self, student: torch.Tensor, target: torch.Tensor, counts: torch.Tensor | None) -> torch.Tensor:
        size = target.square().sum(-1)
        mask = (size > 0).to(student.dtype)  # a teacher that lacks an attention has zeros there
        if counts is not None:
            mask = mask * counts
        if self.args.loss == "cosine":
            distances = 1 - nn.functional.cosine_similarity(student, target, dim=-1)
        else:
            # relative to each token's norm: the residual stream grows with depth, and the first tokens of a window can
            # be a thousand times larger than all others
            distances = (student - target).square().sum(-1) / size.where(size > 0, 1.0)
        return (distances * mask).sum() / mask.sum().clamp(min=1)


def _name(place: Place) -> str:
    return f"{place.kind}_{place.layer}"
