"""The tree-structured Parzen estimator (Bergstra et al. 2011), implemented by optuna."""

from __future__ import annotations

import math
import warnings

import numpy as np

from litgpt_whittle.extras import require
from litgpt_whittle.setting_checks import (
    check_positive,
    check_shares,
)
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.strategies.base import Scored
from litgpt_whittle.strategies.choices import Choices
from litgpt_whittle.strategies.generations import Generations
from litgpt_whittle.subnet import SubNet


class TPE(Generations):
    """TPE: model the densities of sizes among good and other sub-networks, and propose sizes that maximise their ratio.

    Each proposal is the best sub-network so far, with new values of a few random sizes or layers sampled from the
    model. Proposals that change all sizes are rarely good if every layer has its own. The result is adjusted to the
    bin, and the model learns from the adjusted sizes. The model does not cover the kept units: proposals keep the units
    of the best sub-network, with a few exchanged.

    Args:
        n_initial: Number of random sub-networks to start with.
        batch_size: Sub-networks per update of the model; more allow more parallel scoring, fewer learn faster.
        n_modelled: Number of parameters (sizes, kept layers) to sample from the model per proposal.
        n_ei_candidates: Samples from the model per proposal; the most promising one is used.
        exchange_probability: Probability, for each set of units, that some of its units are exchanged for others.
    """

    def __init__(
        self,
        n_initial: int = 20,
        batch_size: int = 1,
        n_modelled: int = 4,
        n_ei_candidates: int = 24,
        exchange_probability: float = 0.1,
    ) -> None:
        require("optuna", extra="tpe", what="strategy TPE")
        check_positive("strategy", n_initial=n_initial, batch_size=batch_size)
        check_positive("strategy", n_modelled=n_modelled, n_ei_candidates=n_ei_candidates)
        check_shares("strategy", exchange_probability=exchange_probability)
        self.n_initial = n_initial
        self.batch_size = batch_size
        self.n_modelled = n_modelled
        self.n_ei_candidates = n_ei_candidates
        self.exchange_probability = exchange_probability

    def start(self, space: Space, seed: int) -> None:
        """Start a new search and discard any earlier state."""
        import optuna

        self.choices = Choices(space)
        self._distributions: dict[str, optuna.distributions.BaseDistribution] = {
            name: optuna.distributions.IntDistribution(lo, hi) for name, (lo, hi) in self.choices.bounds.items()
        }
        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # silences the message about the new study
        self._study = optuna.create_study()
        optuna.logging.set_verbosity(verbosity)
        self._best: SubNet | None = None
        super().start(space, seed)

    @property
    def generation_size(self) -> int:
        """Number of random sub-networks in the first generation, the batch size in later ones."""
        return self.batch_size if self.history else self.n_initial

    def select(self, generation: list[Scored]) -> None:
        """Add the sub-networks' sizes and scores to the model."""
        import optuna

        for subnet, score, _ in generation:
            if math.isfinite(score):
                numbers = self.choices.of(subnet)
                trial = optuna.trial.create_trial(params=numbers, distributions=self._distributions, value=score)
                self._study.add_trial(trial)
        if self.best is not None:
            # set after complete generations only, so that the batch sizes of `ask` have no effect
            self._best = self.best.subnet

    def propose(self, rng: np.random.Generator) -> SubNet:
        """Propose the best sub-network with some parameters from the model; in the first generation, a random one."""
        if self._best is None:
            return self.space.sample(rng)
        numbers = self.choices.of(self._best) | self._promising(rng)
        return self.choices.build(rng, numbers, self._best, self.exchange_probability)

    def _promising(self, rng: np.random.Generator) -> dict[str, int]:
        """Sample some randomly chosen parameters from the model."""
        import optuna

        names = rng.permutation(sorted(self._distributions))[: self.n_modelled].tolist()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # a new sampler each time, so that the result depends only on the seed and the scores
            sampler = optuna.samplers.TPESampler(
                n_startup_trials=0,
                n_ei_candidates=self.n_ei_candidates,
                seed=int(rng.integers(2**31)),
                multivariate=True,
                constant_liar=False,
            )
        trial = optuna.trial.create_trial(value=0.0)  # a required argument that the sampler does not use
        return sampler.sample_relative(self._study, trial, {name: self._distributions[name] for name in names})
