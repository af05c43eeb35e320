"""Files and messages that a search leaves: its best sub-networks, and how well its surrogates predicted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from litgpt.config import Config

from litgpt_whittle.evaluations import prediction_tau
from litgpt_whittle.journal import Evaluation
from litgpt_whittle.searching.loop import Search
from litgpt_whittle.strategies.surrogate_search import SurrogateSearch
from litgpt_whittle.subnet import SubNet


def best_name(search: Search, searches: list[Search]) -> str:
    """Return the file name of a bin's best sub-network."""
    return "best.yaml" if len(searches) == 1 else f"best-{search.space.bin}.yaml"


def save_subnet(
    teacher: Config, checkpoint_dir: Path, settings: dict[str, Any], evaluation: Evaluation, path: Path
) -> None:
    """Write a candidate's sub-network with its provenance."""
    provenance = {
        "checkpoint_dir": str(checkpoint_dir.absolute()),
        "bin": evaluation.bin,
        "n_params": evaluation.n_params,
        **evaluation.scores,
        "tokens": evaluation.tokens,
        "evaluation": evaluation.index,
        **{name: settings[name] for name in ("space", "order", "strategy", "seed", "precision", "max_seq_length")},
    }
    SubNet.from_dict(teacher, evaluation.subnet).save(path, **provenance)


def save_surrogates(searches: list[Search], evaluations: list[Evaluation], out_dir: Path) -> list[str]:
    """Save the surrogates that are slow to refit.

    Returns:
        For each bin with a surrogate, a line that compares its predictions with the scores measured later.
    """
    lines = []
    for search in searches:
        if isinstance(search.strategy, SurrogateSearch):
            bin = str(search.space.bin)
            tau, n = prediction_tau([e for e in evaluations if e.bin == bin], search.score)
            lines.append(
                f"The surrogate of {bin} predicted {n} candidates before they were measured: Kendall's τ {tau:.2f}"
            )
            search.strategy.save(out_dir / ("surrogate" if len(searches) == 1 else f"surrogate-{bin}"))
    return lines
