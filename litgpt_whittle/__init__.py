"""Turns a large pretrained language model into a good small one, from litgpt's command line.

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
    "Ranking": "ranking",
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
    "reorder": "order",
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
