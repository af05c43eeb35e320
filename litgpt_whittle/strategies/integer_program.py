"""Combine measured alternatives to every layer by an integer program, as in Puzzle (arXiv 2411.19146)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from litgpt_whittle.errors import UserError
from litgpt_whittle.ranking.order import Order
from litgpt_whittle.setting_checks import (
    check_positive,
    is_number,
)
from litgpt_whittle.spaces.alternatives import Alternative, Alternatives, LayerChoice
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.strategies.base import Scored
from litgpt_whittle.strategies.generations import Generations
from litgpt_whittle.strategies.program import Program
from litgpt_whittle.subnet import SubNet

WHOLE = "teacher"
"""Name of the measurement of the whole teacher, with which all other measurements are compared"""

_NOISE = 0.05
"""Standard deviation of a candidate's cost around the fitted one, relative to the cost"""

_COMMON = 2.0
"""Prior standard deviation of the common factor of all costs"""

_LEAST = 0.02
"""Minimum scale of a cost's correction, as a share of the mean cost"""

_TRIES = 20
"""Maximum number of inadmissible combinations in a row before a random candidate is drawn instead"""


class IntegerProgram(Generations):
    """Search by an integer program for the combination of per-layer alternatives with the lowest total cost.

    Before the search, the teacher is scored with a single layer replaced by an alternative: the layer or a sub-layer
    dropped, or a share of its units kept. The increase of the loss is the alternative's cost. The first candidate is
    the combination in the bin with the lowest total cost. Scores of candidates then correct the costs by ridge
    regression. Each further batch starts with the best combination by the corrected costs; its other candidates are the
    best combinations by costs drawn from the posterior. Channels and head size stay at the teacher's sizes.

    Args:
        shares: Shares of a layer's neurons, heads or experts to measure, in addition to the full layer.
        n_between: Number of unmeasured MLP widths to offer between two adjacent measured widths, at interpolated costs.
        batch_size: Candidates between two corrections of the costs; these can be scored in parallel.
        uncertainty: Prior standard deviation of the corrections, relative to the costs.
    """

    needs_measurements = True

    def __init__(
        self,
        shares: tuple[float, ...] = (0.875, 0.75, 0.5, 0.25),
        batch_size: int = 4,
        uncertainty: float = 0.3,
        n_between: int = 3,
    ) -> None:
        check_positive("strategy", batch_size=batch_size)
        if n_between < 0:
            raise UserError(f"strategy.n_between must be 0 or more, got {n_between}; 0 offers only measured widths")
        self.shares = tuple(shares)
        if not self.shares or not all(is_number(share) and 0 < share < 1 for share in self.shares):
            raise UserError(
                f"strategy.shares must be one or more numbers between 0 and 1, got {list(self.shares)}; "
                "for example [0.5, 0.75]"
            )
        if not (is_number(uncertainty) and uncertainty > 0):
            raise UserError(f"strategy.uncertainty must be more than 0, got {uncertainty!r}; 0.3 is usual")
        self.batch_size, self.uncertainty, self.n_between = batch_size, uncertainty, n_between

    def start(self, space: Space, seed: int) -> None:
        """Start a new search and discard any earlier state."""
        self.alternatives = Alternatives(space, self.shares, self.n_between)
        self._program: Program | None = None
        self.base, self.costs = 0.0, np.zeros(len(self.alternatives.all))
        self._tried: list[list[LayerChoice]] = []
        self._is_new = True
        self._posterior: _Posterior | None = None
        self._weights: dict[SubNet, np.ndarray | None] = {}
        super().start(space, seed)

    @property
    def program(self) -> Program:
        """Integer program of the space, built on first use."""
        if self._program is None:
            self._program = Program(self.alternatives)
        return self._program

    @property
    def generation_size(self) -> int:
        """Number of candidates between two corrections of the costs."""
        return self.batch_size

    def measurements(self, order: Order | None = None) -> dict[str, SubNet]:
        """Return the whole teacher, and the teacher with each single alternative.

        Raises:
            UserError: If no combination of alternatives lies in the bin and within the limits.
        """
        if self.program.solve(self.costs) is None:
            raise UserError(
                f"strategy IntegerProgram found no combination of layers' alternatives in the bin {self.space.bin} "
                "within the limits (channels are never reduced); change the bin, --strategy.shares or the strategy"
            )
        alone = {str(each): self.alternatives.alone(each, order or self.space.order) for each in self.alternatives.all}
        return {WHOLE: SubNet.full(self.space.teacher), **alone}

    def take_measurements(self, measured: Mapping[str, Scored]) -> None:
        """Set each alternative's cost to the increase of the loss over that of the whole teacher.

        An alternative that could not be scored costs more than all others together.

        Raises:
            UserError: If the whole teacher could not be scored.
        """
        if not math.isfinite(measured[WHOLE].score):
            raise UserError(
                "the whole teacher could not be scored, and all costs are relative to its loss; see the journal"
            )
        self.base = _loss(measured[WHOLE])
        for alternative in self.alternatives.all:
            self.alternatives.note_units(alternative, measured[str(alternative)].subnet)
        self.costs = costs_of(measured, self.alternatives.all)
        failed = ~np.isfinite(self.costs)
        self.costs[failed] = 2 * np.abs(self.costs[~failed]).sum() + 1.0
        self._posterior = None

    def select(self, generation: list[Scored]) -> None:
        """Mark the costs as outdated; the next proposal corrects them by all scores so far."""
        self._is_new, self._posterior = True, None

    def propose(self, rng: np.random.Generator) -> SubNet:
        """Propose the best new combination, or a random sub-network if there is none."""
        if self._posterior is None:
            self._posterior = self._fit()
        costs = self._posterior.mean if self._is_new else self._posterior.draw(rng)
        for _ in range(_TRIES):
            choices = self.program.solve(costs, self._tried)
            if choices is None:
                break
            self._tried.append(choices)
            subnet = self.alternatives.combined(choices)
            if subnet not in self._asked and self._is_member(subnet):
                self._is_new = False
                return subnet
        return self.space.sample(rng)

    def _is_member(self, subnet: SubNet) -> bool:
        return self.space.n_params(subnet) in self.space.bin and self.space.admits(subnet)

    def _fit(self) -> _Posterior:
        """Fit the costs to the scores of all complete generations."""
        finite = [each for each in self.history[: self._begins] if math.isfinite(each.score)]
        for each in finite:
            if each.subnet not in self._weights:
                self._weights[each.subnet] = self.alternatives.weights(each.subnet)
        weights = [self._weights[each.subnet] for each in finite]
        pairs = [(own, _loss(each) - self.base) for own, each in zip(weights, finite) if own is not None]
        rises = np.array([rise for _, rise in pairs])
        return _Posterior(self.costs, np.array([own for own, _ in pairs]), rises, self.uncertainty)


class _Posterior:
    """Posterior of the alternatives' costs under a Gaussian process of linear functions (ridge regression).

    All costs share a common factor, because the costs of alternatives rarely add up. Each cost also has a separate
    correction. Residuals are relative to the candidates' costs, so that bad candidates do not outweigh good ones.

    Args:
        costs: Measured costs, shape (n_alternatives,).
        weights: Weight of each alternative in the candidates, shape (n_candidates, n_alternatives).
        rises: The candidates' losses minus the teacher's, shape (n_candidates,).
        uncertainty: Prior standard deviation of the corrections, relative to the costs.
    """

    def __init__(self, costs: np.ndarray, weights: np.ndarray, rises: np.ndarray, uncertainty: float) -> None:
        self.costs, self.uncertainty = costs, uncertainty
        sizes = np.abs(costs)
        self.scales = np.maximum(sizes, _LEAST * sizes.mean() if sizes.any() else 1.0)  # (n_alternatives,)
        self.weights = weights.reshape(-1, len(costs))
        least = 0.1 * np.median(rises) if len(rises) and np.median(rises) > 0 else 1e-3
        self.units = np.maximum(rises, least)
        self.residuals = rises - self.weights @ costs
        own = self.weights * self.scales * uncertainty
        common = _COMMON * self.weights @ costs[:, None]
        self.features = np.hstack((own, common)) / self.units[:, None]  # (n_candidates, n_alternatives + 1)
        kernel = self.features @ self.features.T + _NOISE**2 * np.eye(len(rises))
        self.inverse = np.linalg.inv(kernel)

    @property
    def mean(self) -> np.ndarray:
        """Posterior mean of the costs, shape (n_alternatives,)."""
        return self._corrected(self.features.T @ (self.inverse @ (self.residuals / self.units)))

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Draw costs from the posterior, with the prior draw of the common factor fixed at its mean."""
        prior = rng.normal(size=self.features.shape[1])
        prior[-1] = 0.0
        noise = _NOISE * rng.normal(size=len(self.residuals))
        missing = self.residuals / self.units - self.features @ prior - noise
        return self._corrected(prior + self.features.T @ (self.inverse @ missing))

    def _corrected(self, shares: np.ndarray) -> np.ndarray:
        # the factor must stay positive, or the worst combination would look best
        return self.costs * max(1.0 + _COMMON * shares[-1], 0.1) + self.scales * self.uncertainty * shares[:-1]


def costs_of(measured: Mapping[str, Scored], alternatives: list[Alternative]) -> np.ndarray:
    """Return the increase over the whole teacher's loss due to each alternative, shape (n_alternatives,).

    The increase is infinite if an alternative failed or has not been scored yet.
    """
    base = _loss(measured[WHOLE])
    return np.array([_loss(measured[str(each)]) - base if str(each) in measured else math.inf for each in alternatives])


def _loss(scored: Scored) -> float:
    """Return the loss in nats per token if the fitness reports it, else the score; infinite after a failure."""
    return scored.measures.get("nll", scored.score) if math.isfinite(scored.score) else math.inf
