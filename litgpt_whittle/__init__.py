"""Turns a large pretrained language model into a good small one, from litgpt's command line.

To read the code, begin with `subnet` (what a student keeps), `index_plan` (which weights that means) and `supergpt` (a
teacher that runs as any of its sub-networks), and go on with one of `commands`. Packages, from what to how:

commands, pipeline, api    what people type: each command by itself, all of them as one, the same from Python
spaces, ranking, fitness   what may shrink, what its parts are worth, what a candidate is scored by
strategies, surrogates     who proposes candidates; searching: the loop around them
repair                     what was cut off, fitted into what stays
distillation, training     what a student learns, and the loop in which it does; samplers: super-networks' steps
pruners, hf, reports       sparse weights; Hugging Face directories; tables, pictures and pages

Names are imported when they are first used (PEP 562): the bootstrap in `plugin` runs in every `import torch`, and so
must this file.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Checkpoint": "results",
    "Keep": "keep",
    "LayerwiseGPT": "supergpt",
    "Ranking": "ranking.ranking",
    "SearchResult": "results",
    "SubNet": "subnet",
    "SuperGPT": "supergpt",
    "Take": "index_plan",
    "TrainingResult": "results",
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
