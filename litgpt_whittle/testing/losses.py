"""Checks of distillation losses.

Each check takes a loss with its settings bound, such as a `functools.partial`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any

import torch

from litgpt_whittle.distillation.losses import Loss
from litgpt_whittle.distillation.objective import SparseTargets, log_probabilities
from litgpt_whittle.testing.inputs import random_logits

N, V, T = 7, 11, 0.9
"""Number of tokens, size of the vocabulary, temperature"""


def check_loss(loss: Loss, **settings: Any) -> None:
    """Run all checks of `CHECKS` on a distillation loss.

    Args:
        loss: The loss.
        **settings: Settings of the loss; the others keep the loss's defaults.

    Raises:
        AssertionError: If the loss breaks a rule, which the message names.
    """
    bound = update_wrapper(partial(loss, **settings), loss) if settings else loss
    for check in CHECKS:
        check(bound)


def of_logits(loss: Loss, student: torch.Tensor, teacher: torch.Tensor | SparseTargets) -> torch.Tensor:
    """Return the loss for the logits of the student and the teacher, at a temperature of 0.9, shape (N,)."""
    if getattr(loss, "on_logits", False):
        assert isinstance(teacher, torch.Tensor), "a loss of logits needs the logits of all tokens"
        return loss(student / T, teacher / T)
    return loss(*log_probabilities(student, teacher, T))


def top_k(logits: torch.Tensor, k: int) -> SparseTargets:
    """Return each row's k most likely tokens, and the total probability of the rest, at a temperature of 0.9."""
    probs, ids = torch.softmax(logits / T, -1).topk(k)
    return SparseTargets(ids, probs.log(), (1 - probs.sum(-1, keepdim=True)).clamp(min=0).log())


def _gradient(loss: Loss, student: torch.Tensor, teacher: torch.Tensor | SparseTargets) -> torch.Tensor:
    """Return the gradient of the sum with respect to the student's logits."""
    student = student.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(of_logits(loss, student, teacher).sum(), student)
    return gradient


def _near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-9, atol=1e-9)


# -- rules


def check_shape(loss: Loss) -> None:
    """Check that a loss returns one finite number per token, in the precision of its inputs."""
    for dtype in (torch.float32, torch.float64):
        student, teacher = random_logits(2 * N, V).to(dtype).split(N)
        found = of_logits(loss, student, teacher)
        assert found.shape == (N,), f"a loss must have one number per token, shape ({N},), got {tuple(found.shape)}"
        assert found.dtype == dtype, f"a loss must keep the precision of its inputs, {dtype}, got {found.dtype}"
        assert found.isfinite().all(), "a loss must be finite for finite logits"


def check_rows(loss: Loss) -> None:
    """Check that the loss of a token does not depend on other tokens, which may be in other chunks."""
    student, teacher = random_logits(2 * N, V).split(N)
    whole = of_logits(loss, student, teacher)
    parts = [of_logits(loss, *pair) for pair in zip(student.split(3), teacher.split(3))]
    assert _near(torch.cat(parts), whole), "the loss of a token must not depend on the other tokens of its chunk"


def check_lowest(loss: Loss) -> None:
    """Check that the loss is lowest, with a gradient of 0, where the student equals the teacher."""
    teacher = random_logits(N, V)
    least = of_logits(loss, teacher, teacher)
    for scale in (0.01, 1.0, 100.0):
        for seed in range(10):
            others = of_logits(loss, teacher + random_logits(N, V, seed + 1, scale), teacher)
            assert (others >= least - 1e-9).all(), "a loss must be lowest where the student equals the teacher"
    slope = float(_gradient(loss, teacher, teacher).abs().max())
    assert slope < 1e-6, f"the gradient must be 0 where the student equals the teacher, it is up to {slope:.2g}"


def check_gradient(loss: Loss) -> None:
    """Check the gradient against finite differences, in float64."""
    student, teacher = random_logits(6, 5).split(3)
    try:
        is_right = torch.autograd.gradcheck(
            lambda logits: of_logits(loss, logits, teacher), student.clone().requires_grad_(), raise_exception=False
        )
    except RuntimeError:  # the loss does not depend on the student
        is_right = False
    assert is_right, "the gradient must be that of the loss, it differs from finite differences"


def check_impossible_tokens(loss: Loss) -> None:
    """Check that tokens whose logits are -inf for both student and teacher contribute nothing."""
    student, teacher = random_logits(2 * N, V).split(N)
    impossible, possible = [0, 4, V - 1], [i for i in range(V) if i not in (0, 4, V - 1)]
    teacher[:, impossible] = -math.inf
    if not getattr(loss, "on_logits", False):  # losses of logits ignore the student's logits there
        student[:, impossible] = -math.inf
    expected = of_logits(loss, student[:, possible], teacher[:, possible])
    same = _near(of_logits(loss, student, teacher), expected)
    assert same, "tokens whose logits are -inf must not change the loss"
    gradient = _gradient(loss, student, teacher)
    same = _near(gradient[:, possible], _gradient(loss, student[:, possible], teacher[:, possible]))
    assert same, "tokens whose logits are -inf must not change the gradients of the others"
    assert not gradient[:, impossible].any(), "tokens whose logits are -inf must have a gradient of 0"


def check_known_tokens(loss: Loss) -> None:
    """Check that a loss accepts the tokens that a cached teacher stores, in any order, with the rest as one event.

    Not required of losses with `on_logits`.
    """
    if getattr(loss, "on_logits", False):
        return
    student, teacher = random_logits(2 * N, V).split(N)
    full = of_logits(loss, student, teacher)
    assert _near(of_logits(loss, student, top_k(teacher, V)), full), "a loss must not depend on the order of the tokens"
    few = top_k(teacher, 4)
    found = of_logits(loss, student, few)
    is_fine = found.shape == (N,) and found.isfinite().all() and _gradient(loss, student, few).isfinite().all()
    assert is_fine, "a loss must be finite on the tokens that a cached teacher stores, whatever their number"


def check_linear(loss: Loss) -> None:
    """Check that the gradient of a loss with `is_linear` is linear in the teacher's probabilities.

    Not required of other losses.
    """
    if not getattr(loss, "is_linear", False):
        return
    student, one, two = random_logits(3 * N, V).split(N)
    share = 0.3
    mixture = share * torch.softmax(one / T, -1) + (1 - share) * torch.softmax(two / T, -1)
    expected = share * _gradient(loss, student, one) + (1 - share) * _gradient(loss, student, two)
    same = _near(_gradient(loss, student, T * mixture.log()), expected)
    assert same, "is_linear promises a gradient that is linear in the teacher's probabilities, and it is not"
    # samples: known tokens without a tail, and repeated ones with a probability of 0
    ids = torch.arange(4).expand(N, 4)
    samples = SparseTargets(ids, torch.tensor([0.5, 0.25, 0.25, 0.0], dtype=torch.float64).log().expand(N, 4), None)
    unused = SparseTargets(samples.ids[:, :3], samples.log_p[:, :3], None)
    same = _near(_gradient(loss, student, samples), _gradient(loss, student, unused))
    assert same, "samples with a probability of 0 must not change the gradient of a loss with is_linear"


CHECKS: tuple[Callable[[Loss], None], ...] = (
    check_shape,
    check_rows,
    check_lowest,
    check_gradient,
    check_impossible_tokens,
    check_known_tokens,
    check_linear,
)
"""All rules of a loss, which can be run one by one"""
