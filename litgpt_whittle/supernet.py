"""Super-network training: each step trains several sub-networks of one model in turn."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from litgpt.config import Config

from litgpt_whittle.distillation.args import DistillArgs
from litgpt_whittle.distillation.head import HeadInput, HeadLosses, LossModel, TeacherLogits, head_loss, hidden_states
from litgpt_whittle.distillation.objective import Objective
from litgpt_whittle.errors import UserError
from litgpt_whittle.processes import rank
from litgpt_whittle.registry import lookup, with_settings
from litgpt_whittle.samplers import Sampler
from litgpt_whittle.spaces.args import SpaceArgs
from litgpt_whittle.spaces.space import Space, SpaceName
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import SuperGPT
from litgpt_whittle.training.run import Backward, Score

GROUP = "litgpt_whittle.samplers"


@dataclass
class SupernetArgs:
    """Sub-networks to train, and their training objective"""

    space: SpaceName = "coarse_layerwise"
    """Search space of the sub-networks, as in `litgpt search`"""
    search_space: SpaceArgs = field(default_factory=SpaceArgs)
    """Dimensions that may shrink, their limits and steps"""
    sampler: str | dict[str, dict[str, int | float]] = "sandwich"
    """Sampler of the networks of each step, by name in `litgpt_whittle.samplers`: standard, random, sandwich,
    random_linear, alternate, in_place_distillation, size_weighted; or a name with settings: ``{sandwich: {n: 3}}``"""
    per_rank: Literal["same", "different"] = "same"
    """Within a step, train the same sub-networks on all devices, or different ones on each"""
    distill: DistillArgs = field(default_factory=lambda: DistillArgs(alpha=0.0, beta=1.0, temperature=1.0))
    """Objective for distilling the full network into the sub-networks, with in_place_distillation"""
    n_validated: int = 3
    """Number of fixed random sub-networks to validate in addition to the full and the smallest network"""

    def __post_init__(self) -> None:
        if self.per_rank not in ("same", "different"):
            raise UserError(f"supernet.per_rank must be same or different, got {self.per_rank!r}")
        if self.n_validated < 0:
            raise UserError(f"supernet.n_validated must be 0 or more, got {self.n_validated}; raise it")
        if self.distill.head != "chunked":
            raise UserError(f"supernet.distill.head must be chunked, got {self.distill.head!r}; leave it out")

    def make_sampler(self, config: Config, tied: bool) -> Sampler:
        """Return the sampler for the search space of a model.

        Raises:
            UserError: If the sampler or space is unknown, or the sampler distils predictions but `distill` does not.
        """
        space = Space(config, self.space, tied=tied, args=self.search_space)
        ((name, settings),) = with_settings(GROUP, self.sampler, "sampler", n_given=1).items()
        sampler = lookup(GROUP, name)(space, **settings)
        if sampler.teaches and (not self.distill.uses_teacher or self.distill.hidden.is_used):
            raise UserError(
                f"the sampler {name} distills predictions; set supernet.distill.beta above 0 and leave "
                "supernet.distill.hidden out, or choose another sampler"
            )
        return sampler

    def validated(self, space: Space) -> dict[str, SubNet]:
        """Return the sub-networks to validate, by names that include their number of parameters."""
        rng = np.random.default_rng(0)
        chosen = [space.smallest(), *(space.sample(rng) for _ in range(self.n_validated))]
        names = ["smallest", *(f"random {i + 1}" for i in range(self.n_validated))]
        return {f"{name} ({space.n_params(subnet):,})": subnet for name, subnet in zip(names, chosen)}


class SuperLossModel(LossModel):
    """A super-network that returns the losses of its active sub-network, and whose full network can teach the others.

    Args:
        model: The super-network.
    """

    model: SuperGPT

    def __init__(self, model: SuperGPT) -> None:
        super().__init__(model)
        self.keeps = False
        """If true, keep the head's input, so that the active network teaches the networks that follow in this step"""
        self.kept: torch.Tensor | None = None
        """The head's input, detached, (B, T, n_embd)"""

    def forward(self, input_ids: torch.Tensor, targets: torch.Tensor) -> HeadLosses:  # type: ignore[override]
        """Return the losses of a batch of ids and targets, each (B, T); `kept`, if any, gives the teacher's logits."""
        softcap, teacher = self.model.config.final_logit_softcapping, None
        head_input = hidden_states(self.model, input_ids)
        if self.keeps:
            self.kept = head_input.hidden.detach()
        elif self.kept is not None:
            # the head's weights change only between steps, so its logits can be recomputed chunk by chunk
            weight, bias = self.model.lm_head.weight.detach(), self.model.lm_head.bias
            whole = HeadInput(self.kept, weight, None if bias is None else bias.detach())
            teacher = TeacherLogits(whole, softcap)
        return head_loss(head_input, targets, self.objective, teacher, softcap)


class SupernetStep:
    """One micro-batch of super-network training: forward and backward pass of every network of the step, in turn.

    A step therefore needs no more memory than its largest network. The loss is the mean over the networks.

    Args:
        root: The module set up by Fabric, or the model itself.
        losses_of: The model inside `root`.
        sampler: Chooses the networks of each step.
        objectives: Function from the fraction of training done to the objective of networks that the full network
            teaches.
        seed: Seed of the sampled networks.
        n_iters: Number of micro-batches of the whole training.
        accumulation: Number of micro-batches per step; all of them train the same networks.
        differs: If true, every process trains different networks.
    """

    def __init__(
        self,
        root: Any,
        losses_of: SuperLossModel,
        sampler: Sampler,
        objectives: Callable[[float], Objective],
        seed: int,
        n_iters: int,
        accumulation: int,
        differs: bool = False,
    ) -> None:
        self.root, self.losses_of, self.sampler, self.objectives = root, losses_of, sampler, objectives
        self.seed, self.n_iters, self.accumulation, self.differs = seed, n_iters, accumulation, differs

    def __call__(
        self, input_ids: torch.Tensor, targets: torch.Tensor, backward: Backward, done: float
    ) -> dict[str, torch.Tensor]:
        """Accumulate a batch's gradients; return the mean loss and the full network's loss (NaN if not trained)."""
        networks = self.networks(done)
        total, full = torch.zeros((), device=input_ids.device), torch.full((), torch.nan, device=input_ids.device)
        for network in networks:
            losses = self._train(network, input_ids, targets, backward, done, len(networks))
            total = total + losses.loss.detach() / len(networks)
            if network is None:
                full = losses.ce.detach()
        self.losses_of.kept = None
        return {"loss": total, "full": full}

    def networks(self, done: float) -> list[SubNet | None]:
        """Return the networks that this process trains when a fraction `done` of training is done."""
        step = round(done * self.n_iters) // self.accumulation
        # seeded by step and process alone, so that a resumed run trains the same networks
        key = [self.seed, step, rank() if self.differs else 0]
        return self.sampler.networks(np.random.default_rng(key), step, done)

    def _train(
        self, network: SubNet | None, input_ids, targets, backward: Backward, done: float, n_networks: int
    ) -> HeadLosses:
        losses_of, teaches = self.losses_of, self.sampler.teaches
        losses_of.keeps = teaches and network is None
        losses_of.objective = self.objectives(done) if teaches and network is not None else Objective()
        # backward inside as well, because checkpointed activations are recomputed there with this network
        with running(losses_of.model, network, trains=True):
            losses = self.root(input_ids, targets)
            backward(losses.loss / n_networks)
        losses_of.keeps = False
        return losses


def score_of(root: Any, losses_of: SuperLossModel, network: SubNet | None) -> Score:
    """Return a function that scores a sub-network by its cross-entropy."""

    def score(input_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        losses_of.objective = Objective()
        with running(losses_of.model, network):
            return root(input_ids, targets).ce

    return score


def running(model: SuperGPT, network: SubNet | None, trains: bool = False) -> AbstractContextManager[SuperGPT]:
    """Return a context in which the super-network runs as `network`; `None` is the full network."""
    return nullcontext(model) if network is None else model.running(network, trains=trains)
