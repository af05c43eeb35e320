"""Measure every layer's alternatives once and let an integer program combine them, the idea of Puzzle (2411.19146)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from litgpt_whittle.errors import UserError
from litgpt_whittle.ranking.order import Order
from litgpt_whittle.searching.args import check_positive, is_number
from litgpt_whittle.spaces.alternatives import Alternative, Alternatives, LayerChoice
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.strategies.base import Scored
from litgpt_whittle.strategies.generations import Generations
from litgpt_whittle.strategies.program import Program
from litgpt_whittle.subnet import SubNet

WHOLE = "teacher"
"""The name of the measurement that all others are compared with"""

_NOISE = 0.05
"""Standard deviation of a candidate's cost around the fitted one, relative to it"""

_COMMON = 2.0
"""Prior standard deviation of the factor that all costs have in common"""

_LEAST = 0.02
"""Costs below this share of the mean may be corrected by as much as one of this share"""

_TRIES = 20
"""Combinations in a row that may turn out not to be admitted"""


class IntegerProgram(Generations):
    """Combine the layers' alternatives that cost least, measured one by one, by an integer program; correct and repeat.

    Before the search, the teacher is scored with one alternative of one layer at a time: the layer dropped, or a share
    of its units kept. The rise of the loss is the alternative's cost. The first candidate is the combination in the bin
    with the lowest sum. True scores then correct the costs by ridge regression. Each further batch begins with the best
    combination by the corrected costs; the others are the best ones by costs drawn from their posterior. Channels and
    the size of heads stay whole.

    Args:
        shares: Shares of a layer's neurons, heads or experts to offer, beside all of them.
        batch_size: Candidates between two corrections, which can be scored side by side.
        uncertainty: Standard deviation of the corrections, relative to the costs.
    """

    needs_measurements = True

    def __init__(
        self,
        shares: tuple[float, ...] = (0.875, 0.75, 0.5, 0.25),
        batch_size: int = 4,
        uncertainty: float = 0.3,
    ) -> None:
        check_positive("strategy", batch_size=batch_size)
        self.shares = tuple(shares)
        if not self.shares or not all(is_number(share) and 0 < share < 1 for share in self.shares):
            raise UserError(f"strategy.shares must be one or more numbers between 0 and 1, got {list(self.shares)}")
        if not (is_number(uncertainty) and uncertainty > 0):
            raise UserError(f"strategy.uncertainty must be more than 0, got {uncertainty!r}; 0.3 is usual")
        self.batch_size, self.uncertainty = batch_size, uncertainty

    def start(self, space: Space, seed: int) -> None:
        """Begin a search, forgetting any earlier one."""
        self.alternatives = Alternatives(space, self.shares)
        self._program: Program | None = None
        self.base, self.costs = 0.0, np.zeros(len(self.alternatives.all))
        self._tried: list[list[LayerChoice]] = []
        self._is_new = True
        self._posterior: _Posterior | None = None
        self._weights: dict[SubNet, np.ndarray | None] = {}
        super().start(space, seed)

    @property
    def program(self) -> Program:
        """The integer program of the space."""
        if self._program is None:
            self._program = Program(self.alternatives)
        return self._program

    @property
    def generation_size(self) -> int:
        """Candidates between two corrections."""
        return self.batch_size

    def measurements(self, order: Order | None = None) -> dict[str, SubNet]:
        """Return the whole teacher, and the teacher with each alternative alone.

        Raises:
            UserError: If no combination of alternatives lies in the bin and within the limits.
        """
        if self.program.solve(self.costs) is None:
            raise UserError(
                f"strategy IntegerProgram found no combination of layers' alternatives in the bin {self.space.bin} "
                "within the limits, channels being whole; change the bin, --strategy.shares or the strategy"
            )
        alone = {str(each): self.alternatives.alone(each, order or self.space.order) for each in self.alternatives.all}
        return {WHOLE: SubNet.full(self.space.teacher), **alone}

    def take_measurements(self, measured: Mapping[str, Scored]) -> None:
        """Set the costs: rises of the loss above the whole teacher's. One that failed costs more than all others."""
        if not math.isfinite(measured[WHOLE].score):
            raise UserError("the whole teacher could not be scored, without which nothing has a cost; see the journal")
        self.base = _loss(measured[WHOLE])
        for alternative in self.alternatives.all:
            self.alternatives.note_units(alternative, measured[str(alternative)].subnet)
        self.costs = costs_of(measured, self.alternatives.all)
        failed = ~np.isfinite(self.costs)
        self.costs[failed] = 2 * np.abs(self.costs[~failed]).sum() + 1.0
        self._posterior = None

    def select(self, generation: list[Scored]) -> None:
        """Correct the costs by all scores so far; done when they are needed next."""
        self._is_new, self._posterior = True, None

    def propose(self, rng: np.random.Generator) -> SubNet:
        """Return the best new combination; a random sub-network where there is none."""
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
        """Fit the costs to the scores of all generations that are complete."""
        told = [each for each in self.told[: self._begins] if math.isfinite(each.score)]
        for each in told:
            if each.subnet not in self._weights:
                self._weights[each.subnet] = self.alternatives.weights(each.subnet)
        weights = [self._weights[each.subnet] for each in told]
        pairs = [(own, _loss(each) - self.base) for own, each in zip(weights, told) if own is not None]
        rises = np.array([rise for _, rise in pairs])
        return _Posterior(self.costs, np.array([own for own, _ in pairs]), rises, self.uncertainty)


class _Posterior:
    """Costs of alternatives, corrected: a Gaussian process of linear functions, which is ridge regression.

    A cost is corrected by a factor that all have in common, since cuts rarely add up, and by a share of its own.
    Candidates' costs are fitted relative to themselves, so that bad ones do not outweigh good ones.

    Args:
        costs: Measured costs, shape (n_alternatives,).
        weights: How much of each alternative candidates have, shape (n_candidates, n_alternatives).
        rises: Their losses above the teacher's, shape (n_candidates,).
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
        """The corrected costs."""
        return self._corrected(self.features.T @ (self.inverse @ (self.residuals / self.units)))

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Draw costs that are as likely as the scores leave them; their common factor is the expected one."""
        prior = rng.normal(size=self.features.shape[1])
        prior[-1] = 0.0
        noise = _NOISE * rng.normal(size=len(self.residuals))
        missing = self.residuals / self.units - self.features @ prior - noise
        return self._corrected(prior + self.features.T @ (self.inverse @ missing))

    def _corrected(self, shares: np.ndarray) -> np.ndarray:
        # the factor stays positive, or the worst combination would look best
        return self.costs * max(1.0 + _COMMON * shares[-1], 0.1) + self.scales * self.uncertainty * shares[:-1]


def costs_of(measured: Mapping[str, Scored], alternatives: list[Alternative]) -> np.ndarray:
    """Return the rise of the loss above the whole teacher's by each alternative, shape (n_alternatives,).

    Infinite where an alternative could not be scored, or was not yet.
    """
    base = _loss(measured[WHOLE])
    return np.array([_loss(measured[str(each)]) - base if str(each) in measured else math.inf for each in alternatives])


def _loss(scored: Scored) -> float:
    """Return the loss in nats per token where the fitness gives it, else the score."""
    return scored.measures.get("nll", scored.score) if math.isfinite(scored.score) else math.inf
