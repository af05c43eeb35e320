"""Checks for extensions: the rules that strategies, losses and other extensions must follow.

As with scikit-learn's `check_estimator`, one call runs all rules of a kind, and raises an `AssertionError` that names
the broken one. Each module has a tuple `CHECKS` of its rules, to run them as separate tests:

    @pytest.mark.parametrize("check", litgpt_whittle.testing.strategies.CHECKS)
    def test_strategy(check):
        check(MyStrategy)
"""

from litgpt_whittle.testing import codecs, fitness, losses, pruners, samplers, strategies, surrogates
from litgpt_whittle.testing.codecs import check_codec
from litgpt_whittle.testing.fitness import check_fitness
from litgpt_whittle.testing.losses import check_loss
from litgpt_whittle.testing.pruners import check_pruner
from litgpt_whittle.testing.samplers import check_sampler
from litgpt_whittle.testing.strategies import check_strategy
from litgpt_whittle.testing.surrogates import check_surrogate

__all__ = [
    "check_codec",
    "check_fitness",
    "check_loss",
    "check_pruner",
    "check_sampler",
    "check_strategy",
    "check_surrogate",
    "codecs",
    "fitness",
    "losses",
    "pruners",
    "samplers",
    "strategies",
    "surrogates",
]
