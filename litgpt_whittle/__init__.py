"""Turn a large pretrained language model into a good small one, from litgpt's command line.

To read the code, begin with `subnet` (the units that a student keeps), `index_plan` (the weights of these units) and
`supergpt` (a teacher that runs as any of its sub-networks), and continue with one of `commands`. Packages:

commands, pipeline, api    user interfaces: single commands, `litgpt whittle` as all of them in one, and the Python API
spaces, ranking, fitness   search spaces, importance of units and layers, scores of candidates
strategies, surrogates     proposals of candidates, and predictions of their scores; searching: the search loop
repair                     fitting the remaining weights to compensate for the removed units
distillation, training     losses and teachers, and the training loop; samplers: the steps of super-networks
hf, reports, contrib       Hugging Face directories; tables, plots and pages; pruning
testing                    checks for strategies, losses and other parts of any package

Names are imported on first use (PEP 562): every `import torch` runs the bootstrap in `plugin`, and therefore this file.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Checkpoint": "results",
    "LayerwiseGPT": "supergpt",
    "ParamSlice": "index_plan",
    "Ranking": "ranking.ranking",
    "SearchResult": "results",
    "SubNet": "subnet",
    "SuperGPT": "supergpt",
    "TrainingResult": "results",
    "UnitIndex": "unit_index",
    "UserError": "errors",
    "distill": "api",
    "extract": "api",
    "extract_weights": "supergpt",
    "load_model": "checkpoint",
    "n_params": "index_plan",
    "plan": "index_plan",
    "reorder": "ranking.order",
    "save_checkpoint": "checkpoint",
    "search": "api",
    "student_model": "supergpt",
}
__all__ = sorted(_PUBLIC)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
