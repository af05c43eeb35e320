"""Settings for all tests."""

import gc
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from docstring_parser.attrdoc import AttributeDocstrings
from hypothesis import HealthCheck, Phase, settings

sys.path.insert(0, str(Path(__file__).parent))  # helpers such as architectures.py, however pytest is started

import pretended_device

pretended_device.register()  # before the first backward pass; no device is visible outside its own tests

# no test asserts a time; examples are the same in every run, so that failures are reproducible
settings.register_profile(
    "whittle",
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # the models are already tiny, and shrinking a failure takes minutes
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("whittle")
torch.set_num_threads(1)  # threads that share a busy core wait for each other

# jsonargparse spends a third of its time on reading attribute docstrings from the same classes' source
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
    """Skip drawing pictures except in marked tests, because drawing takes longer than tiny trainings."""
    if request.node.get_closest_marker("pictures") is None:
        for module, function in PICTURES.items():
            if module in sys.modules:
                monkeypatch.setattr(sys.modules[module], function, lambda *_: None)


def pytest_collection_finish():
    """Exclude imported objects from garbage collection, which every command triggers and which takes half a second."""
    gc.collect()
    gc.freeze()


def pytest_make_parametrize_id(val):
    """Name long parameters by their type: compressed bytes differ between processes and are unreadable in a log."""
    return type(val).__name__ if isinstance(val, bytes | str) and len(val) > 60 else None
