"""Search strategies; built-in and third-party ones register in the entry-point group `litgpt_whittle.strategies`."""

from litgpt_whittle.strategies.base import Scored, Strategy
from litgpt_whittle.strategies.evolution import Evolution
from litgpt_whittle.strategies.evopress import EvoPress
from litgpt_whittle.strategies.generations import Generations
from litgpt_whittle.strategies.integer_program import IntegerProgram
from litgpt_whittle.strategies.local_search import LocalSearch
from litgpt_whittle.strategies.nsga2 import NSGA2
from litgpt_whittle.strategies.random_search import RandomSearch
from litgpt_whittle.strategies.stratified_random import StratifiedRandom
from litgpt_whittle.strategies.tpe import TPE

__all__ = [
    "NSGA2",
    "TPE",
    "EvoPress",
    "Evolution",
    "Generations",
    "IntegerProgram",
    "LocalSearch",
    "RandomSearch",
    "Scored",
    "Strategy",
    "StratifiedRandom",
]
