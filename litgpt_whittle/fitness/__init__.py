"""Fitness functions; built-in and third-party ones register in the entry-point group `litgpt_whittle.fitness`."""

from litgpt_whittle.fitness.perplexity import Fitness, Perplexity, RepairedPerplexity, WindowLosses

__all__ = ["Fitness", "Perplexity", "RepairedPerplexity", "WindowLosses"]
