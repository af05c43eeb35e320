"""Objectives of a search in addition to the score: costs of sub-networks, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from litgpt.config import Config

from litgpt_whittle.errors import UserError
from litgpt_whittle.metrics import MEASURES, MeasureArgs
from litgpt_whittle.subnet import SubNet

Measures = Mapping[str, Callable[[SubNet], float]]
"""Functions of a sub-network, by the names of their measures; lower is better"""


def objective_names(objectives: Sequence[str], score: str) -> list[str]:
    """Return a strategy's objectives by their names in the journal, `score` replaced by the name of the score."""
    return [score if name == "score" else name for name in objectives]


def objective_measures(
    objectives: Sequence[str], score: str, teacher: Config, seq_length: int, tied: bool = False
) -> Measures:
    """Return the measures that a strategy's objectives need in addition to the measures of every evaluation.

    Args:
        objectives: Names of the strategy's objectives.
        score: Name of the score to minimise; an alias of the objective `score`.
        teacher: The teacher's config.
        seq_length: Tokens per sequence.
        tied: If true, the LM head shares the embedding's weights.

    Raises:
        UserError: If an objective is unknown, or cannot be measured for this sequence length.
    """
    given = ("score", score, "n_params")
    known = dict.fromkeys((*given, *MEASURES))
    for name in objectives:
        if name not in known:
            raise UserError(f"strategy.objectives may name {', '.join(known)}, got {name!r}; choose among these")
    wanted = [name for name in objectives if name not in given]
    return {name: partial(MEASURES[name], teacher, args=MeasureArgs(seq_length, tied=tied)) for name in wanted}
