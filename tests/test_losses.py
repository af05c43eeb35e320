"""Distillation losses against their definitions."""

import math

import pytest
import torch

from litgpt_whittle.losses import cross_entropy, forward_kl


@pytest.mark.parametrize("temperature", [0.5, 0.9, 2.0])
def test_forward_kl_matches_torch_distributions(temperature):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 7, 11, dtype=torch.float64)
    p, q = (torch.distributions.Categorical(logits=x / temperature) for x in (teacher, student))
    expected = torch.distributions.kl_divergence(p, q).mean()
    assert torch.allclose(forward_kl(student, teacher, temperature), expected, atol=1e-12)


def test_forward_kl_of_a_student_equal_to_its_teacher_is_zero():
    logits = torch.randn(5, 9, dtype=torch.float64)
    assert forward_kl(logits, logits + 3.0, 0.9).abs() < 1e-12


def test_forward_kl_gradients_match_finite_differences():
    torch.manual_seed(1)
    student = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: forward_kl(s, teacher, 0.7), student)


def test_cross_entropy_is_a_mean_over_the_tokens_that_count():
    logits = torch.zeros(4, 10)
    assert cross_entropy(logits, torch.tensor([1, -100, 2, -100])).item() == pytest.approx(math.log(10))
    assert cross_entropy(logits, torch.full((4,), -100)).item() == 0.0


def test_losses_of_half_precision_logits_are_computed_in_fp32():
    student, teacher = torch.randn(2, 6, 8).bfloat16()
    assert torch.equal(forward_kl(student, teacher, 1.0), forward_kl(student.float(), teacher.float(), 1.0))
    assert cross_entropy(student, torch.arange(6)).dtype == torch.float32
