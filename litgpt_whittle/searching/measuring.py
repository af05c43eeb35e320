"""Measurements that a strategy needs before the search: scores of sub-networks that are not candidates.

They are taken once for all bins and recorded in a journal of their own, from which an interrupted search resumes. The
journal names no bin, so a copy of it can be reused by searches of other bins.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from litgpt_whittle.fitness.base import Fitness
from litgpt_whittle.journal import (
    Evaluation,
    open_record,
)
from litgpt_whittle.processes import on_rank_zero, parallel_map, rank
from litgpt_whittle.ranking.order import Order
from litgpt_whittle.searching.loop import Search, score
from litgpt_whittle.strategies.base import Scored
from litgpt_whittle.subnet import SubNet

logger = logging.getLogger(__name__)

MEASUREMENTS = "measurements.jsonl"
"""File name of the measurements' journal in a search's folder"""

_SETTINGS = ("space", "search_space", "order", "importance", "fitness", "tasks", "score", "precision", "max_seq_length")
"""Settings of a search that its measurements depend on, in addition to the strategy's own"""


def measurement_names(searches: Sequence[Search]) -> list[str]:
    """Return the names of the measurements that the strategies need.

    Raises:
        UserError: If a strategy cannot search its bin.
    """
    if not searches[0].strategy.needs_measurements:
        return []
    # each call prepares its strategy; all strategies on a space need the same measurements
    measurements = [list(search.strategy.measurements()) for search in searches]
    return measurements[0]


def take_measurements(
    searches: Sequence[Search],
    path: Path,
    header: Mapping[str, Mapping[str, Any]],
    fitness: Fitness,
    order: Callable[[], Order | None],
    seed: int,
    parallel_map: Callable = parallel_map,
) -> None:
    """Take the measurements that are not in their journal yet, and report all of them to every strategy.

    Args:
        searches: One per bin.
        path: Journal of the measurements.
        header: Header of the search's journal.
        fitness: Scores a sub-network.
        order: Returns the order of units by importance, called on all processes; None if the first units are kept.
        seed: Seed of the search, for the record.
        parallel_map: Distributes work over processes.

    Raises:
        UserError: If the journal was written with different settings.
    """
    names = measurement_names(searches)
    if not names:
        return
    teacher = searches[0].space.teacher
    is_there = on_rank_zero(path.is_file)
    with open_record(path, measurements_header(header), is_there, is_locked=True) as record:
        known = {evaluation.origin for evaluation in record.evaluations}
        missing = [name for name in names if name not in known]
        if missing and rank() == 0:
            logger.info(
                f"{len(missing)} measurements come first, each of the teacher with one part made smaller. All bins "
                "share them, and they do not count as iterations"
            )
        subnets = searches[0].strategy.measurements(order()) if missing else {}
        outcomes = parallel_map(lambda name: score(fitness, subnets[name]), missing)
        for name, outcome in tqdm(
            zip(missing, outcomes), total=len(missing), desc="measuring", unit="cut", disable=rank() > 0
        ):
            record.append(
                Evaluation(
                    index=len(record.evaluations),
                    bin="",
                    subnet=subnets[name].to_dict(),
                    n_params=searches[0].space.n_params(subnets[name]),
                    seed=seed,
                    origin=name,
                    **vars(outcome),
                )
            )
        measured = as_scored(record.evaluations, searches[0].score, teacher)
    for search in searches:
        search.strategy.take_measurements({name: measured[name] for name in names})


def as_scored(evaluations: Sequence[Evaluation], name: str, teacher: Any) -> dict[str, Scored]:
    """Convert measurements to the strategies' format, by name."""
    return {
        str(each.origin): Scored(SubNet.from_dict(teacher, each.subnet), each.score(name), each.measures)
        for each in evaluations
    }


def measurements_header(header: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the header of the measurements' journal: the settings that affect scores in every bin."""
    settings = {name: value for name, value in header["settings"].items() if name in _SETTINGS}
    return {**header, "settings": settings}
