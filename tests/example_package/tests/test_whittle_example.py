"""Test the extensions: first the rules that litgpt_whittle has for all of them, then what each one promises."""

import pytest
import torch
from whittle_example.annealing import SimulatedAnnealing
from whittle_example.next_token import NextTokenError
from whittle_example.renyi import renyi

from litgpt_whittle import UserError
from litgpt_whittle.distillation.losses import forward_kl
from litgpt_whittle.testing import check_fitness, check_loss, strategies


@pytest.mark.parametrize("check", strategies.CHECKS)
def test_annealing_keeps_the_rules_of_strategies(check):
    check(SimulatedAnnealing)


def test_the_error_is_that_of_the_extracted_model():
    def formula(student, teacher, batches):
        wrong = [(student(ids).argmax(-1) != targets)[targets != -100] for ids, targets in batches]
        return {"next_token_error": float(torch.cat(wrong).double().mean())}

    check_fitness(NextTokenError, formula)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_renyi_keeps_the_rules_of_losses(alpha):
    check_loss(renyi, alpha=alpha)


@pytest.mark.slow
def test_annealing_beats_random_search():
    strategies.check_learns(SimulatedAnnealing)


def test_a_cold_walk_goes_downhill_only_and_a_hot_one_anywhere():
    for temperature, goes_up in ((1e-12, False), (1e12, True)):
        walk = SimulatedAnnealing(temperature=temperature, cooling=1.0)
        walk.start(strategies.SPACE, seed=1)
        ups = []
        for _ in range(30):
            before = walk.at
            (scored,) = strategies.run(walk, 1)
            if before is not None and scored.score > before.score:
                ups.append(walk.at.subnet == scored.subnet)
        assert ups and all(up == goes_up for up in ups)


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"cooling": 1.5}, {"cooling": 0}])
def test_wrong_settings_are_refused(settings):
    with pytest.raises(UserError, match=f"strategy.{next(iter(settings))} must be above 0"):
        SimulatedAnnealing(**settings)


@pytest.mark.parametrize("alpha", [0.05, 0.3, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("seed", range(5))
def test_the_loss_is_the_formula(seed, alpha):
    generator = torch.Generator().manual_seed(seed)
    q, p = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64).mul(2).softmax(-1)
    expected = (p**alpha * q ** (1 - alpha)).sum(-1).log() / (alpha - 1)
    torch.testing.assert_close(renyi(q.log(), p.log(), alpha=alpha), expected)
    assert (expected >= -1e-12).all() and renyi(p.log(), p.log(), alpha=alpha).abs().max() < 1e-12
    near_one = renyi(q.log(), p.log(), alpha=1 - 1e-7)
    torch.testing.assert_close(near_one, forward_kl(q.log(), p.log()), rtol=1e-4, atol=1e-6)


def test_the_loss_refuses_an_order_beyond_its_range():
    with pytest.raises(UserError, match="renyi's alpha must be between 0 and 1, got 1.0"):
        renyi(torch.zeros(1, 2), torch.zeros(1, 2), alpha=1.0)
