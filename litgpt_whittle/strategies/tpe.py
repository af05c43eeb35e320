"""The tree-structured Parzen estimator (Bergstra et al. 2011), modelled by optuna."""

from __future__ import annotations

import math
import warnings

import numpy as np

from litgpt_whittle.extras import require
from litgpt_whittle.searching.args import check_positive, check_shares
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.strategies.base import Scored
from litgpt_whittle.strategies.choices import Choices
from litgpt_whittle.strategies.generations import Generations
from litgpt_whittle.subnet import SubNet


class TPE(Generations):
    """Models which sizes good sub-networks have and which others do, and tries what is likelier of the good ones.

    Each proposal is the best sub-network with a few choices, drawn by lot, made by the model: proposals in which all of
    them change are hardly ever good where every layer has its own. Its numbers are brought into the bin, and the model
    learns from what came out. It knows sizes and layers, not which units are kept: those are the best one's, a few of
    them exchanged.

    Args:
        n_initial: Random sub-networks to start with.
        batch_size: Sub-networks proposed from one state of the model; more can be scored side by side, fewer learn
            faster.
        n_modelled: How many choices (sizes, whether a layer is kept) the model makes in each proposal.
        n_ei_candidates: Draws from the model for each proposal, of which it takes the most promising.
        exchange_probability: How likely some units of each set are exchanged for others.
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
        """Begins a search, forgetting any earlier one."""
        import optuna

        self.choices = Choices(space)
        self._distributions = {
            name: optuna.distributions.IntDistribution(lo, hi) for name, (lo, hi) in self.choices.bounds.items()
        }
        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # it would announce the study
        self._study = optuna.create_study()
        optuna.logging.set_verbosity(verbosity)
        self._best: SubNet | None = None
        super().start(space, seed)

    @property
    def generation_size(self) -> int:
        """Random sub-networks first, then batches."""
        return self.batch_size if self.told else self.n_initial

    def select(self, generation: list[Scored]) -> None:
        """Shows the model the sizes that came out."""
        import optuna

        for subnet, score, _ in generation:
            if math.isfinite(score):
                numbers = self.choices.of(subnet)
                trial = optuna.trial.create_trial(params=numbers, distributions=self._distributions, value=score)
                self._study.add_trial(trial)
        if self.best is not None:
            self._best = self.best.subnet  # of whole generations, however many candidates are asked for at a time

    def propose(self, rng: np.random.Generator) -> SubNet:
        """The best sub-network with some of the model's choices; a random one at first."""
        if self._best is None:
            return self.space.sample(rng)
        numbers = self.choices.of(self._best) | self._promising(rng)
        return self.choices.build(rng, numbers, self._best, self.exchange_probability)

    def _promising(self, rng: np.random.Generator) -> dict[str, int]:
        """The model's choices under some of the names."""
        import optuna

        names = rng.permutation(sorted(self._distributions))[: self.n_modelled].tolist()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # a new one each time, so that nothing but the seed and the scores matters
            sampler = optuna.samplers.TPESampler(
                n_startup_trials=0,
                n_ei_candidates=self.n_ei_candidates,
                seed=int(rng.integers(2**31)),
                multivariate=True,
                constant_liar=False,
            )
        trial = optuna.trial.create_trial(value=0.0)  # asked for, but not looked at
        return sampler.sample_relative(self._study, trial, {name: self._distributions[name] for name in names})
