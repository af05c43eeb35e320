"""What a search minimises beside the score: costs of sub-networks, by their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from litgpt.config import Config

from litgpt_whittle.errors import UserError
from litgpt_whittle.metrics import MEASURES, MeasureArgs
from litgpt_whittle.subnet import SubNet

Measures = Mapping[str, Callable[[SubNet], float]]
"""Functions of a sub-network, by the names of what they measure; lower is better"""


def objective_names(objectives: Sequence[str], score: str) -> list[str]:
    """A strategy's objectives as a journal names them: the score by what it is."""
    return [score if name == "score" else name for name in objectives]


def objective_measures(
    objectives: Sequence[str], score: str, teacher: Config, seq_length: int, tied: bool = False
) -> Measures:
    """What must be measured for a strategy's objectives, beyond what every evaluation has.

    Args:
        objectives: The names of a strategy's objectives.
        score: The name of the score that counts, which `score` stands for too.
        teacher: The teacher's config.
        seq_length: Tokens per sequence.
        tied: Whether the LM head is the embedding.

    Raises:
        UserError: If nothing is measured under an objective's name, or not for such sequences.
    """
    given = ("score", score, "n_params")
    known = dict.fromkeys((*given, *MEASURES))
    for name in objectives:
        if name not in known:
            raise UserError(f"strategy.objectives may name {', '.join(known)}, got {name!r}; choose among these")
    wanted = [name for name in objectives if name not in given]
    return {name: partial(MEASURES[name], teacher, args=MeasureArgs(seq_length, tied=tied)) for name in wanted}
