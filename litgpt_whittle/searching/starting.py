"""Simple starts of a search, with units chosen by the teacher's ranking or a quick measurement; saved for resuming."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from litgpt.data import DataModule

from litgpt_whittle.batches import Batch, batches_after
from litgpt_whittle.files import write_text
from litgpt_whittle.fitness.base import Fitness
from litgpt_whittle.journal import read_header
from litgpt_whittle.processes import on_rank_zero
from litgpt_whittle.ranking.order import Order
from litgpt_whittle.ranking.quick import N_TOKENS, quick_order
from litgpt_whittle.ranking.ranking import Ranking
from litgpt_whittle.searching.loop import Search
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.spaces.starts import Start, simple_starts
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.tasks import TaskBatch

STARTS = "starts.json"
"""File name of the simple starts in a search's folder"""

_WIDE = 1.25
"""Minimum ratio of a bin's upper to its lower end for starts at several sizes, if the search also minimises size or
latency"""


def has_no_starts(journal: Path) -> bool:
    """Return whether a journal's search ran without simple starts: they were off, or an older version ran it."""
    return not read_header(journal).get("settings", {}).get("simple_starts", False)


def text_to_measure(
    data: DataModule | None,
    seq_length: int,
    batches: Sequence[Batch | TaskBatch],
    calibration: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Return batches of token ids to measure units on, each of shape (B, T).

    Units that are chosen on the batches that score candidates would get too good scores. So these batches are used only
    if there are no other tokens.

    Args:
        data: The connected data module; None if the fitness reads no data, but possibly tasks.
        seq_length: Tokens per sample.
        batches: Batches that score candidates.
        calibration: Calibration tokens, shape (N, T), if they were read.
    """
    if calibration is not None:
        return [calibration]
    others = [] if data is None else batches_after(data, seq_length, len(batches), N_TOKENS)
    found = ([batch.input_ids] if isinstance(batch, Batch) else batch.unpadded() for batch in others or batches)
    return [ids for each in found for ids in each]


def give_starts(
    searches: Sequence[Search],
    path: Path,
    resume: bool,
    fitness: Fitness,
    text: Callable[[], list[torch.Tensor]],
    ranking: Ranking | None = None,
    sharded: bool = False,
) -> None:
    """Set each search's simple starts, identical on all processes and after resuming.

    Args:
        searches: One per bin.
        path: File that stores the starts.
        resume: If true, read the starts from the file if it exists.
        fitness: Scores the candidates; its teacher is measured if a ranking is needed and none is given.
        text: Returns the tokens to measure the teacher on, as `text_to_measure` does.
        ranking: The teacher's ranking.
        sharded: If true, the teacher is sharded over the processes, which measure it together.
    """
    found = on_rank_zero(lambda: json.loads(path.read_text()) if resume and path.is_file() else None)
    if found is None:
        spaces = [search.space for search in searches]
        by_units = _names_units(spaces[0], fitness, ranking)
        is_needed = by_units or _may_drop_any_layer(spaces[0]) or spaces[0].sizes.may_drop
        known = _order(fitness, text, ranking, sharded) if is_needed or ranking is not None else None

        def build() -> dict[str, Any]:
            starts = {
                str(search.space.bin): simple_starts(search.space, known, by_units, _n_sizes(search))
                for search in searches
            }
            plain = {bin: [[start.origin, start.subnet.to_dict()] for start in own] for bin, own in starts.items()}
            write_text(path, json.dumps(plain))
            return plain

        found = on_rank_zero(build)
    for search in searches:
        own = found[str(search.space.bin)]
        search.starts = [Start(origin, SubNet.from_dict(search.space.teacher, choice)) for origin, choice in own]


def order_of_units(
    space: Space,
    fitness: Fitness,
    text: Callable[[], list[torch.Tensor]],
    ranking: Ranking | None = None,
    sharded: bool = False,
) -> Order | None:
    """Return the order in which a fine space keeps units; None if candidates do not list their units.

    Args:
        space: The space.
        fitness: Scores the candidates; its teacher is measured if no ranking is given.
        text: Returns the tokens to measure the teacher on, as `text_to_measure` does.
        ranking: The teacher's ranking.
        sharded: If true, the teacher is sharded over the processes, which measure it together.
    """
    return _order(fitness, text, ranking, sharded) if _names_units(space, fitness, ranking) else None


def _names_units(space: Space, fitness: Fitness, ranking: Ranking | None) -> bool:
    """Return whether candidates list their kept units: in a fine space, unless the fitness chooses them itself."""
    # if the fitness chooses units, listing them would only make the journal longer
    leaves_units = fitness.chooses_units and not space.teacher.n_expert
    return space.is_fine and (ranking is not None or not leaves_units)


def _order(
    fitness: Fitness, text: Callable[[], list[torch.Tensor]], ranking: Ranking | None, sharded: bool
) -> Order | None:
    """Return the order of the ranking if there is one, else a measured order; the same on all processes."""

    def order() -> Order | None:
        return _measured(fitness, text()) if ranking is None else ranking.order

    return order() if sharded else on_rank_zero(order)


def _may_drop_any_layer(space: Space) -> bool:
    return space.sizes.layer_order is None and len(space.sizes.grids["n_layer"]) > 1


def _n_sizes(search: Search) -> int:
    """Return the number of sizes to start at: one, unless the search also minimises sizes or latencies."""
    space = search.space
    lo, hi = max(space.bin.lo, space.sizes.smallest), min(space.bin.hi, space.sizes.largest)
    return 3 if (len(search.strategy.objectives) > 1 or space.limits.is_timed) and hi >= _WIDE * lo else 1


def _measured(fitness: Fitness, text: list[torch.Tensor]) -> Order | None:
    """Measure the order of the teacher's units and layers; None without tokens."""
    return quick_order(fitness.model, text, fitness.autocast) if text else None
