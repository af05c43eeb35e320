"""Training a model so that its sub-networks are good: one step trains several of them, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from litgpt.config import Config

from litgpt_whittle.distillation.head import HeadInput, HeadLosses, LossModel, TeacherLogits, head_loss, hidden_states
from litgpt_whittle.distillation.objective import Objective
from litgpt_whittle.errors import UserError
from litgpt_whittle.processes import rank
from litgpt_whittle.registry import lookup, with_settings
from litgpt_whittle.samplers import Sampler
from litgpt_whittle.searching.args import SpaceArgs
from litgpt_whittle.spaces.space import Space, SpaceName
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import SuperGPT
from litgpt_whittle.training.args import DistillArgs
from litgpt_whittle.training.run import Backward, Score

GROUP = "litgpt_whittle.samplers"


@dataclass
class SupernetArgs:
    """Which sub-networks are trained, and what they learn"""

    space: SpaceName = "coarse_layerwise"
    """The sub-networks that there are, as `litgpt search` has it"""
    search_space: SpaceArgs = field(default_factory=SpaceArgs)
    """What may shrink, how far and in which steps"""
    sampler: str | dict[str, dict[str, int | float]] = "sandwich"
    """Which networks a step trains, by name in `litgpt_whittle.samplers`: standard, random, sandwich, random_linear,
    alternate, in_place_distillation, size_weighted; or one with its settings: ``{sandwich: {n: 3}}``"""
    per_rank: Literal["same", "different"] = "same"
    """Whether several devices train the same sub-networks in a step"""
    distill: DistillArgs = field(default_factory=lambda: DistillArgs(alpha=0.0, beta=1.0, temperature=1.0))
    """What sub-networks learn from the full network, with in_place_distillation"""
    n_validated: int = 3
    """Random sub-networks, always the same, that are validated beside the full network and the smallest"""

    def __post_init__(self) -> None:
        if self.per_rank not in ("same", "different"):
            raise UserError(f"supernet.per_rank must be same or different, got {self.per_rank!r}")
        if self.n_validated < 0:
            raise UserError(f"supernet.n_validated must be 0 or more, got {self.n_validated}")

    def make_sampler(self, config: Config, tied: bool) -> Sampler:
        """The sampler, on the space of a model's sub-networks.

        Raises:
            UserError: If there is no such sampler or space, or nobody would teach.
        """
        space = Space(config, self.space, tied=tied, args=self.search_space)
        ((name, settings),) = with_settings(GROUP, self.sampler, "sampler", n_given=1).items()
        sampler = lookup(GROUP, name)(space, **settings)
        if sampler.teaches and (not self.distill.uses_teacher or self.distill.hidden.is_used):
            raise UserError(
                f"the sampler {name} teaches predictions; set supernet.distill.beta above 0 and leave "
                "supernet.distill.hidden out, or choose another sampler"
            )
        return sampler

    def validated(self, space: Space) -> dict[str, SubNet]:
        """The sub-networks that are validated, by names that say how large they are."""
        rng = np.random.default_rng(0)
        chosen = [space.smallest(), *(space.sample(rng) for _ in range(self.n_validated))]
        names = ["smallest", *(f"random {i + 1}" for i in range(self.n_validated))]
        return {f"{name} ({space.n_params(subnet):,})": subnet for name, subnet in zip(names, chosen)}


class SuperLossModel(LossModel):
    """A super-network that gives the losses of whatever it runs as, and can teach its own sub-networks.

    Args:
        model: The super-network.
    """

    def __init__(self, model: SuperGPT) -> None:
        super().__init__(model)
        self.keeps = False
        """Whether what the head is called with is kept, so that it teaches the networks that come next"""
        self.kept: torch.Tensor | None = None
        """That, without gradients, (B, T, n_embd)"""

    def forward(self, input_ids: torch.Tensor, targets: torch.Tensor) -> HeadLosses:
        """Losses of one batch, both shape (B, T); what was kept has its say where the objective asks for a teacher."""
        softcap, teacher = self.model.config.final_logit_softcapping, None
        head_input = hidden_states(self.model, input_ids)
        if self.keeps:
            self.kept = head_input.hidden.detach()
        elif self.kept is not None:
            # the head's weights change between steps only: its logits are made anew, chunk by chunk
            weight, bias = self.model.lm_head.weight.detach(), self.model.lm_head.bias
            whole = HeadInput(self.kept, weight, None if bias is None else bias.detach())
            teacher = TeacherLogits(whole, softcap)
        return head_loss(head_input, targets, self.objective, teacher, softcap)


class SupernetStep:
    """One micro-batch of super-network training: every network of the step in turn, forward and backward.

    So a step takes the memory of its largest network. Its loss is the mean over the networks.

    Args:
        root: What Fabric set up, or the model itself.
        losses_of: The model within.
        sampler: Which networks a step trains.
        objectives: What those learn that the full network teaches, when a share of the training is done.
        seed: Of the networks.
        n_iters: The micro-batches of the whole training.
        accumulation: The micro-batches of a step; all of them train the same networks.
        differs: Whether every process trains networks of its own.
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
        """Adds the gradients of a batch; gives the mean loss and the full network's, NaN where it is not trained."""
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
        """The networks that this process trains when a share of the training is done."""
        step = round(done * self.n_iters) // self.accumulation
        # from step and process alone, so that a resumed run trains the same
        key = [self.seed, step, rank() if self.differs else 0]
        return self.sampler.networks(np.random.default_rng(key), step, done)

    def _train(
        self, network: SubNet | None, input_ids, targets, backward: Backward, done: float, n_networks: int
    ) -> HeadLosses:
        losses_of, teaches = self.losses_of, self.sampler.teaches
        losses_of.keeps = teaches and network is None
        losses_of.objective = self.objectives(done) if teaches and network is not None else Objective()
        # backward, too, while it runs as this network: checkpointed activations are computed again there
        with running(losses_of.model, network, trains=True):
            losses = self.root(input_ids, targets)
            backward(losses.loss / n_networks)
        losses_of.keeps = False
        return losses


def score_of(root: Any, losses_of: SuperLossModel, network: SubNet | None) -> Score:
    """The cross-entropy of one of a super-network's networks."""

    def score(input_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        losses_of.objective = Objective()
        with running(losses_of.model, network):
            return root(input_ids, targets).ce

    return score


def running(model: SuperGPT, network: SubNet | None, trains: bool = False) -> AbstractContextManager[SuperGPT]:
    """The super-network running as one of its networks, `None` for the full one."""
    return nullcontext(model) if network is None else model.running(network, trains=trains)
