"""Test the rules that every registered search strategy keeps, and its defaults on the command line."""

import inspect
from functools import partial

import pytest
import yaml
from litgpt.utils import CLI

from litgpt_whittle import registry
from litgpt_whittle.commands.search import setup
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.strategies import Evolution, RandomSearch, Strategy
from litgpt_whittle.testing import strategies

GROUP = "litgpt_whittle.strategies"
SMALL = {
    "population_size": 8,
    "elites": 4,
    "n_offspring": 6,
    "n_children": 6,
    "n_initial": 8,
    "n_starts": 4,
    "patience": 5,
    "n_strata": 4,
}
EACH = pytest.mark.parametrize("name", registry.names(GROUP))


def small(name: str) -> partial:
    """Return a registered strategy's class, with small settings where possible."""
    cls = registry.lookup(GROUP, name)
    known = inspect.signature(cls).parameters
    return partial(cls, **{key: value for key, value in SMALL.items() if key in known})


def make(name: str, space: Space = strategies.SPACE, seed: int = 1) -> Strategy:
    """Return a registered strategy that has started, with small settings where possible."""
    return strategies.begin(small(name), space, seed)


@EACH
@pytest.mark.parametrize("check", strategies.CHECKS, ids=lambda check: check.__name__)
def test_every_strategy_keeps_the_rules(name, check):
    check(small(name))


@EACH
def test_a_strategys_own_defaults_hold_on_the_command_line(name, capsys):
    """jsonargparse passes the default strategy's settings on to another one if it has settings of the same names."""
    with pytest.raises(SystemExit):
        CLI(setup, args=["teacher", "--strategy", name, "--print_config"])
    shown = yaml.safe_load(capsys.readouterr().out)["strategy"].get("init_args", {})
    defaults = registry.lookup(GROUP, name)().settings
    assert shown == {key: list(value) if isinstance(value, tuple) else value for key, value in defaults.items()}


def test_ours_come_through_the_public_door():
    found = registry.load_all(GROUP)
    assert found["Evolution"] is Evolution and found["RandomSearch"] is RandomSearch
