"""What candidates are scored by, found through the entry-point group `litgpt_whittle.fitness`, ours like anyone's."""

from litgpt_whittle.fitness.perplexity import Fitness, Perplexity, RepairedPerplexity, WindowLosses

__all__ = ["Fitness", "Perplexity", "RepairedPerplexity", "WindowLosses"]
