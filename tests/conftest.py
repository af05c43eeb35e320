"""Settings for all tests."""

import gc
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from docstring_parser.attrdoc import AttributeDocstrings
from hypothesis import HealthCheck, Phase, settings

sys.path.insert(0, str(Path(__file__).parent))  # for helpers such as architectures.py, in every way of starting pytest

import pretended_device

pretended_device.register()  # before any test runs a backward pass; there seems to be no device outside its own tests

# no test asserts a time; examples are the same in every run, so that a failure can be looked at again
settings.register_profile(
    "whittle",
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # the models are tiny already: shrinking a failure takes minutes
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("whittle")
torch.set_num_threads(1)  # threads that share a busy core wait for each other

# jsonargparse spends a third of its time on reading the source of the same classes for their attributes' docstrings
_docstrings = cache(AttributeDocstrings().get_attr_docs)
AttributeDocstrings.get_attr_docs = lambda _, component: dict(_docstrings(component))

PICTURES = {
    "litgpt_whittle.commands.extract": "plot_repair",
    "litgpt_whittle.commands.prune": "plot_pruning",
    "litgpt_whittle.commands.rank": "plot_importance",
    "litgpt_whittle.training.log": "plot_training",
}


@pytest.fixture(autouse=True)
def _few_pictures(request, monkeypatch):
    """Only tests that are marked draw what commands leave beside their results: it takes longer than tiny trainings."""
    if request.node.get_closest_marker("pictures") is None:
        for module, function in PICTURES.items():
            if module in sys.modules:
                monkeypatch.setattr(sys.modules[module], function, lambda *_: None)


def pytest_collection_finish():
    """Exempt what is imported by now from garbage collection, which every command asks for: it takes half a second."""
    gc.collect()
    gc.freeze()


def pytest_make_parametrize_id(val):
    """Name long parameters by their type: compressed bytes differ between processes, and nobody reads them in a log."""
    return type(val).__name__ if isinstance(val, bytes | str) and len(val) > 60 else None
