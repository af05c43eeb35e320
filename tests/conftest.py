"""Settings for all tests."""

import sys
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, settings

sys.path.insert(0, str(Path(__file__).parent))  # for helpers such as architectures.py, in every way of starting pytest

import pretended_device  # noqa: E402

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
