"""The simple starts of a search: units by the teacher's ranking or a quick measurement, kept in a file for resuming."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from litgpt.data import DataModule

from litgpt_whittle.batches import Batch, batches_after
from litgpt_whittle.files import write_text
from litgpt_whittle.fitness.perplexity import Fitness
from litgpt_whittle.processes import first_does
from litgpt_whittle.ranking.order import Order
from litgpt_whittle.ranking.quick import N_TOKENS, quick_order
from litgpt_whittle.ranking.ranking import Ranking
from litgpt_whittle.searching.journal import read_header
from litgpt_whittle.searching.loop import Search
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.spaces.starts import Start, simple_starts
from litgpt_whittle.subnet import SubNet

STARTS = "starts.json"
"""Their name in a search's folder"""

_WIDE = 1.25
"""Ratio of a bin's ends from which a search that trades sizes for scores starts at several sizes"""


def began_without(journal: Path) -> bool:
    """Return whether a search that is resumed has no simple starts, as those of earlier versions."""
    return not read_header(journal).get("settings", {}).get("simple_starts", False)


def text_to_measure(
    data: DataModule | None, seq_length: int, batches: Sequence[Batch], calibration: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Return text to measure units on, token ids of shape (B, T) each.

    That which scores candidates would flatter those whose units were chosen by it, so it is the last resort.

    Args:
        data: The connected data module; None where the fitness reads no text.
        seq_length: The length of samples.
        batches: What scores candidates.
        calibration: Training tokens, shape (N, T), where they were read.
    """
    if calibration is not None:
        return [calibration]
    if data is None:
        return []
    return [batch.input_ids for batch in batches_after(data, seq_length, len(batches), N_TOKENS) or batches]


def give_starts(
    searches: Sequence[Search],
    path: Path,
    resume: bool,
    fitness: Fitness,
    text: Callable[[], list[torch.Tensor]],
    ranking: Ranking | None = None,
    sharded: bool = False,
) -> None:
    """Give each search its simple starts, the same on all processes and after a resumption.

    Args:
        searches: One per bin.
        path: The file that keeps them.
        resume: Read them from there, if they were written before the interruption.
        fitness: Scores the candidates; its teacher is measured where a ranking is needed and none is given.
        text: Gives what to measure it on, as `text_to_measure` does.
        ranking: The teacher's ranking.
        sharded: The teacher is spread over the processes, which measure it together.
    """
    found = first_does(lambda: json.loads(path.read_text()) if resume and path.is_file() else None)
    if found is None:
        spaces = [search.space for search in searches]
        by_units = _names_units(spaces[0], fitness, ranking)
        is_needed = by_units or _may_drop_any_layer(spaces[0])
        known = _order(fitness, text, ranking, sharded) if is_needed or ranking is not None else None

        def build() -> dict[str, Any]:
            starts = {
                str(search.space.bin): simple_starts(search.space, known, by_units, _n_sizes(search))
                for search in searches
            }
            plain = {bin: [[start.origin, start.subnet.to_dict()] for start in own] for bin, own in starts.items()}
            write_text(path, json.dumps(plain))
            return plain

        found = first_does(build)
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
    """Return the order of the units that a fine space keeps; None where the first ones are named or the space has one.

    Args:
        space: The space.
        fitness, text, ranking, sharded: As for `give_starts`.
    """
    return _order(fitness, text, ranking, sharded) if _names_units(space, fitness, ranking) else None


def _names_units(space: Space, fitness: Fitness, ranking: Ranking | None) -> bool:
    """Return whether kept units matter and the space does not prescribe them."""
    # where the fitness chooses units, a list of them would only make the journal longer
    leaves_units = getattr(fitness, "chooses_units", False) and not space.teacher.n_expert
    return space.is_fine and (ranking is not None or not leaves_units)


def _order(
    fitness: Fitness, text: Callable[[], list[torch.Tensor]], ranking: Ranking | None, sharded: bool
) -> Order | None:
    """Return the ranking's order, or one that is measured, the same on all processes."""

    def order() -> Order | None:
        return _measured(fitness, text()) if ranking is None else ranking.order

    return order() if sharded else first_does(order)


def _may_drop_any_layer(space: Space) -> bool:
    return space.sizes.layer_order is None and len(space.sizes.grids["n_layer"]) > 1


def _n_sizes(search: Search) -> int:
    """Sizes to start at: one, unless a smaller sub-network may be preferred to one that scores better."""
    space = search.space
    lo, hi = max(space.bin.lo, space.sizes.smallest), min(space.bin.hi, space.sizes.largest)
    return 3 if (len(search.strategy.objectives) > 1 or space.limits.is_timed) and hi >= _WIDE * lo else 1


def _measured(fitness: Fitness, text: list[torch.Tensor]) -> Order | None:
    """Measure the order of the teacher's units and layers; None where there is no text."""
    return quick_order(fitness.model, text, getattr(fitness, "autocast", nullcontext)) if text else None
