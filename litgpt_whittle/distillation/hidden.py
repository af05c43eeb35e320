"""Matching a student's residual stream to its teacher's, layer by layer, besides what the two predict.

A student that was cut out of its teacher knows which of the teacher's layers and channels its own came from, so that
they are compared directly, with nothing to be learned in between.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from litgpt.config import Config
from litgpt.model import GPT
from torch import nn

from litgpt_whittle.distillation.losses import wide
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.training.args import HiddenArgs


class Place(NamedTuple):
    """Where a model's stream is looked at."""

    layer: int
    kind: str
    """"block": the stream behind the layer; "attn": what its attention adds to it"""

    def module(self, model: GPT) -> nn.Module:
        """The module whose output it is."""
        block = model.transformer.h[self.layer]
        return block if self.kind == "block" else block.attn


class Watch:
    """Keeps what a model has at some places while it runs, for whoever takes it.

    Args:
        model: The model.
        places: Where.
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
        """What was seen since the last time, each (B, T, n_embd)."""
        seen, self._seen = self._seen, {}
        return seen


class HiddenLoss(nn.Module):
    """How far a student's stream is from its teacher's at all matched places, the mean over places and tokens.

    Args:
        student: The student.
        teacher: The teacher's config.
        args: What is matched, and how.
        subnet: Which part of its teacher the student is; not needed with a learned projection.
        basis: Its channels as combinations of the teacher's, shape (n_embd_student, n_embd_teacher), where they are
            no choice of them.
    """

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
            above = [round((layer + 1) * teacher.n_layer / n_layer) - 1 for layer in range(n_layer)]
        else:
            assert subnet is not None, "nothing says what belongs together"
            above = subnet.layers
            rows = torch.eye(teacher.n_embd)[subnet.n_embd.indices] if basis is None else basis.float()
            self.register_buffer("channels", rows, persistent=False)
        chosen = range(n_layer) if args.layers is None else args.layers
        kinds = [kind for kind, weight in self.weights.items() if weight]
        self.pairs = {Place(i, kind): Place(above[i], kind) for kind in kinds for i in chosen}
        self.watch = Watch(student, self.pairs)
        if args.projection:
            self.projections = nn.ModuleDict(
                {_name(place): nn.Linear(student.config.n_embd, teacher.n_embd, bias=False) for place in self.pairs}
            )

    @property
    def weights(self) -> dict[str, float]:
        """What each kind of place counts."""
        return {"block": self.args.weight, "attn": self.args.attention}

    def forward(self, teacher: Mapping[Place, torch.Tensor], counts: torch.Tensor | None = None) -> torch.Tensor:
        """Return the weighted loss, of what the student had since the last time.

        Args:
            teacher: What the teacher had at its places, each (B, T, n_embd_teacher).
            counts: A mask of the tokens that count, shape (B, T); by default all do.
        """
        seen = self.watch.take()
        terms = []
        for ours, theirs in self.pairs.items():
            student, target = wide(seen[ours]), wide(teacher[theirs])
            if self.args.projection:
                student = wide(self.projections[_name(ours)](seen[ours]))
            else:
                target = target @ self.channels.to(target.dtype).T
            n_places = sum(place.kind == ours.kind for place in self.pairs)
            terms.append(self.weights[ours.kind] / n_places * self._distance(student, target, counts))
        return torch.stack(terms).sum()

    def _distance(self, student: torch.Tensor, target: torch.Tensor, counts: torch.Tensor | None) -> torch.Tensor:
        mask = student.new_ones(student.shape[:-1]) if counts is None else counts.to(student.dtype)
        if self.args.loss == "cosine":
            distances = 1 - nn.functional.cosine_similarity(student, target, dim=-1)
            return (distances * mask).sum() / mask.sum().clamp(min=1)
        # the stream grows with depth: relative to what the teacher has, all layers have the same say
        off, size = ((x.square().sum(-1) * mask).sum() for x in (student - target, target))
        return off / size.clamp(min=torch.finfo(size.dtype).tiny)


def _name(place: Place) -> str:
    return f"{place.kind}_{place.layer}"
