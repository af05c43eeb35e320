"""Search strategies, found through the entry-point group `litgpt_whittle.strategies`, ours like anyone's."""

from litgpt_whittle.strategies.base import Scored, Strategy
from litgpt_whittle.strategies.evolution import Evolution
from litgpt_whittle.strategies.random_search import RandomSearch

__all__ = ["Evolution", "RandomSearch", "Scored", "Strategy"]
