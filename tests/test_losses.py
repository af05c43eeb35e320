"""Test distillation losses against their definitions, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence

from litgpt_whittle import registry
from litgpt_whittle.distillation import losses
from litgpt_whittle.distillation.losses import jensen_shannon
from litgpt_whittle.distillation.objective import log_probabilities
from litgpt_whittle.errors import UserError
from litgpt_whittle.testing.losses import CHECKS, top_k

NAMES = registry.names("litgpt_whittle.losses")
ON_LOGITS = ("l1", "mse")


def pair(n=7, v=11, seed=0):
    return torch.randn(2, n, v, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixture_of(p, q, beta=0.5):
    return Categorical(probs=beta * p.probs + (1 - beta) * q.probs)


DEFINITIONS = {
    "forward_kl": kl_divergence,
    "reverse_kl": lambda p, q: kl_divergence(q, p),
    "symmetric_kl": lambda p, q: (kl_divergence(p, q) + kl_divergence(q, p)) / 2,
    "jensen_shannon": lambda p, q: (kl_divergence(p, mixture_of(p, q)) + kl_divergence(q, mixture_of(p, q))) / 2,
    "total_variation": lambda p, q: (p.probs - q.probs).clamp(min=0).sum(-1),
    "soft_cross_entropy": lambda p, q: kl_divergence(p, q) + p.entropy(),
    "cosine": lambda p, q: 1 - (p.probs * q.probs).sum(-1) / (p.probs.norm(dim=-1) * q.probs.norm(dim=-1)),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_loss_keeps_the_rules(name, check):
    check(registry.lookup("litgpt_whittle.losses", name))


def test_every_loss_is_tested():
    assert sorted([*DEFINITIONS, *ON_LOGITS]) == NAMES


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("temperature", [0.5, 0.9, 2.0])
def test_a_loss_of_distributions_is_its_definition(name, temperature):
    student, teacher = pair()
    p, q = (Categorical(logits=x / temperature) for x in (teacher, student))
    got = getattr(losses, name)(*log_probabilities(student, teacher, temperature))
    assert torch.allclose(got, DEFINITIONS[name](p, q), atol=1e-12)


def test_losses_of_logits_are_means_over_the_vocabulary():
    student, teacher = pair()
    assert torch.allclose(losses.mse(student, teacher), F.mse_loss(student, teacher, reduction="none").mean(-1))
    assert torch.allclose(losses.l1(student, teacher), F.l1_loss(student, teacher, reduction="none").mean(-1))
    assert all(getattr(losses, name).on_logits for name in ON_LOGITS)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.7])
def test_the_generalised_jensen_shannon_divergence_is_its_definition(beta):
    student, teacher = pair()
    p, q = Categorical(logits=teacher), Categorical(logits=student)
    m = mixture_of(p, q, beta)
    expected = beta * kl_divergence(p, m) + (1 - beta) * kl_divergence(q, m)
    assert torch.allclose(jensen_shannon(*log_probabilities(student, teacher, 1.0), beta=beta), expected, atol=1e-12)


def test_jensen_shannon_refuses_a_mixture_of_one():
    with pytest.raises(UserError, match="beta must be between 0 and 1, got 1.0"):
        jensen_shannon(*pair(), beta=1.0)


def arguments(name, student, teacher):
    return (student, teacher) if name in ON_LOGITS else log_probabilities(student, teacher, 0.9)


@pytest.mark.parametrize("name", NAMES)
def test_a_student_equal_to_its_teacher_has_no_loss(name):
    logits = pair()[0]
    loss = getattr(losses, name)(*arguments(name, logits, logits.clone()))
    if name == "soft_cross_entropy":
        loss = loss - Categorical(logits=logits / 0.9).entropy()
    assert torch.allclose(loss, torch.zeros(len(logits), dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("name", ["symmetric_kl", "jensen_shannon", "total_variation", "cosine", "mse", "l1"])
def test_symmetric_losses_are(name):
    logs = arguments(name, *pair())
    loss = getattr(losses, name)
    assert torch.allclose(loss(*logs), loss(*logs[::-1]), atol=1e-12)


@given(st.integers(0, 10_000), st.floats(0.01, 100), st.floats(0.05, 0.95))
@settings(max_examples=50, deadline=None)
def test_losses_stay_within_their_bounds(seed, scale, beta):
    logs = log_probabilities(*(scale * pair(4, 6, seed)), 1.0)
    for name in DEFINITIONS:
        assert (getattr(losses, name)(*logs) >= -1e-9).all()
    assert (losses.jensen_shannon(*logs) <= math.log(2) + 1e-12).all()
    assert (losses.jensen_shannon(*logs, beta=beta) <= math.log(2) + 1e-12).all()
    assert (losses.total_variation(*logs) <= 1 + 1e-12).all()
    assert (losses.cosine(*logs) <= 1 + 1e-12).all()


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon", "total_variation", "symmetric_kl"])
def test_putting_tokens_together_never_raises_a_divergence(name):
    """The data-processing inequality, which all of these divergences satisfy."""
    student, teacher = pair(50, 20)
    loss = getattr(losses, name)
    by_k = [loss(*log_probabilities(student, top_k(teacher, k), 0.9)) for k in (1, 4, 12, 20)]
    for fewer, more in zip(by_k, by_k[1:]):
        assert (fewer <= more + 1e-12).all() and (fewer < more - 1e-6).any()
