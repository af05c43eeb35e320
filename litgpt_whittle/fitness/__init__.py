"""Fitness functions; built-in and third-party ones register in the entry-point group `litgpt_whittle.fitness`."""

from litgpt_whittle.fitness.base import Fitness, WindowFitness, WindowLosses
from litgpt_whittle.fitness.perplexity import Perplexity, RepairedPerplexity

__all__ = ["Fitness", "Perplexity", "RepairedPerplexity", "WindowFitness", "WindowLosses"]
