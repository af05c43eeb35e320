"""Checks of fitness measures.

Each check takes the class of a fitness.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from litgpt.config import Config
from litgpt.model import GPT

from litgpt_whittle.batches import Batch
from litgpt_whittle.fitness import Fitness, WindowLosses
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import SuperGPT, extract_weights, student_model
from litgpt_whittle.tensors import IGNORE_INDEX
from litgpt_whittle.testing.inputs import (
    LEAN,
    random_batches,
    random_ranking,
    random_tasks,
    random_tokens,
    super_network,
)

Formula = Callable[[GPT, GPT, Sequence[Batch]], dict[str, float]]
"""Returns scores by name for a student, the teacher, both in float64, and the batches"""

LENGTH = 16
GROUPED = Config.from_name(
    "Llama-3.2-1B", n_layer=3, n_embd=32, n_head=4, n_query_groups=2, intermediate_size=44, block_size=32
)
"""A teacher with grouped queries, RMSNorm and a gated MLP"""
TEACHERS = (LEAN, GROUPED)


def check_fitness(fitness: type[Fitness], formula: Formula | None = None) -> None:
    """Run all checks of `CHECKS` on a fitness measure.

    Args:
        fitness: Its class.
        formula: A plain implementation to compare with: a function of the extracted student, the teacher, both in
            float64, and the batches, which returns scores by name. If given, `check_formula` runs on small teachers.

    Raises:
        AssertionError: If the fitness breaks a rule, which the message names.
    """
    for check in CHECKS:
        check(fitness)
    if formula is not None:
        for teacher in TEACHERS:
            check_formula(fitness, formula, teacher)


def make(
    fitness: type[Fitness],
    model: SuperGPT,
    batches: Sequence[Batch] | None = None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Fitness:
    """Construct a fitness as `litgpt search` does, with the inputs that its class attributes request."""
    inputs: dict[str, Any] = {}
    if fitness.n_calibration:
        inputs["calibration"] = torch.cat(random_tokens((16,), LENGTH, seed=2))
    if fitness.needs_importance:
        inputs["importance"] = random_ranking(model.config)
    if fitness.needs_tasks:
        inputs["tasks"] = random_tasks(LENGTH)
    if not fitness.reads_data:
        batches = []
    return fitness(model, random_batches(LENGTH) if batches is None else batches, autocast=autocast, **inputs)


def candidates(config: Config, n: int = 2) -> list[SubNet]:
    """Return n random sub-networks of any size, and the teacher without its last layer."""
    space, rng = Space(config, "fine_layerwise"), np.random.default_rng(3)
    return [*(space.sample(rng) for _ in range(n)), SubNet(config, n_layer=f"0-{config.n_layer - 2}")]


# -- rules


def check_scores(fitness: type[Fitness]) -> None:
    """Check that every sub-network gets finite scores by name, one of them with the fitness's own name."""
    for teacher in TEACHERS:
        model = super_network(teacher)
        score = make(fitness, model)
        for subnet in (*candidates(model.config), SubNet.full(model.config)):
            found = score(subnet)
            assert fitness.name in found, f"scores must have the fitness's name, {fitness.name!r}, got {sorted(found)}"
            odd = [name for name, value in found.items() if not (type(value) is float and math.isfinite(value))]
            assert not odd, f"scores must be finite and of type float, {odd} are not"


def check_repeatable(fitness: type[Fitness]) -> None:
    """Check that scores do not depend on earlier candidates, and that the teacher is not changed."""
    model = super_network(LEAN)
    ids = random_tokens((2,), LENGTH)[0]
    names, before = list(model.state_dict()), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    outputs = model(ids).detach()
    score = make(fitness, model)
    first, *others = candidates(model.config)
    expected = score(first)
    for subnet in others:
        score(subnet)
    assert score(first) == expected, (
        "a score must not depend on earlier candidates, the same candidate's second score differs"
    )
    assert make(fitness, model)(first) == expected, "a score must depend on the inputs only, a second fitness differs"
    same = list(model.state_dict()) == names and all(
        torch.equal(model.state_dict()[name], before[name]) for name in names
    )
    assert same, "scoring must leave the teacher's weights as they were"
    assert torch.equal(model(ids), outputs), "scoring must leave the teacher as it was, its outputs differ"
    has_no_gradient = all(parameter.grad is None for parameter in model.parameters())
    assert has_no_gradient, "scoring must not leave gradients in the teacher"


def check_ignored_tokens(fitness: type[Fitness]) -> None:
    """Check that `n_tokens` counts the targets that are not ignored, and that ignored targets do not change scores."""
    model = super_network(LEAN)
    batches = random_batches(LENGTH)
    score = make(fitness, model, batches)
    n = sum(batch.n_tokens for batch in score.batches)
    assert score.n_tokens == n, f"n_tokens must count the targets that are not ignored, {n}, it is {score.n_tokens}"
    # the model is causal, so a window's ignored end may as well be cut off
    n_kept = LENGTH - LENGTH // 4
    batches[1] = Batch(*(tensor[:, :n_kept] for tensor in batches[1]))
    shorter = make(fitness, model, batches)
    for subnet in candidates(model.config):
        one, two = score(subnet)[fitness.name], shorter(subnet)[fitness.name]
        same = math.isclose(one, two, rel_tol=1e-5, abs_tol=1e-7)
        assert same, f"tokens whose targets are ignored must not count, {one:.6g} becomes {two:.6g} without them"


def check_windows(fitness: type[Fitness]) -> None:
    """Check the losses per window, for racing: shape, type, token counts, and independence of other batches.

    Not required of a fitness without `losses` and `scores`.
    """
    if not (hasattr(fitness, "losses") and hasattr(fitness, "scores")):
        return
    model = super_network(LEAN)
    score: Any = make(fitness, model)
    counts = torch.cat([(targets != IGNORE_INDEX).sum(1) for _, targets in random_batches(LENGTH)])
    for subnet in candidates(model.config):
        found = score.losses(subnet)
        assert isinstance(found, WindowLosses), f"losses must return WindowLosses, got {type(found).__name__}"
        sums, n_tokens = found
        is_right = sums.shape == (len(counts),) and sums.dtype == torch.float64 and sums.device.type == "cpu"
        assert is_right, f"sums must be float64 on the CPU, one per window, got {sums.dtype}, {tuple(sums.shape)}"
        assert torch.equal(n_tokens.cpu(), counts), "n_tokens must count each window's targets that are not ignored"
        parts = [score.losses(subnet, slice(start, start + 1)).sums for start in range(3)]
        adds_up = torch.allclose(torch.cat(parts), sums, rtol=1e-5, atol=1e-7)
        assert adds_up, "the losses of a window must not depend on the batches that are scored with it"
        same = score.scores(found.mean) == score(subnet)
        assert same, "scores of the mean loss must be the scores of the sub-network"


def check_halved(fitness: type[Fitness]) -> None:
    """Check that scores do not change within `halved`, which reduces the memory for a candidate.

    Not required of a fitness without `halved`.
    """
    if not hasattr(fitness, "halved"):
        return
    model = super_network(LEAN)
    score: Any = make(fitness, model)
    for subnet in candidates(model.config):
        expected = score(subnet)[fitness.name]
        with score.halved():
            found = score(subnet)[fitness.name]
        same = math.isclose(found, expected, rel_tol=1e-5, abs_tol=1e-7)
        assert same, f"scores within halved must be the same, {expected:.6g} becomes {found:.6g}"


def check_autocast(fitness: type[Fitness]) -> None:
    """Check that sub-networks run within the autocast context, so that `--precision` has an effect.

    Not required of a fitness that reads no data.
    """
    if not fitness.reads_data:
        return
    entered = []

    def autocast() -> AbstractContextManager:
        entered.append(True)
        return torch.autocast("cpu", torch.bfloat16)

    model = super_network(LEAN)
    score = make(fitness, model, autocast=autocast)
    entered.clear()
    score(candidates(model.config)[0])
    assert entered, "a sub-network must run within the context that autocast returns, which was never entered"


CHECKS: tuple[Callable[[type[Fitness]], None], ...] = (
    check_scores,
    check_repeatable,
    check_ignored_tokens,
    check_windows,
    check_halved,
    check_autocast,
)
"""All rules of a fitness, which can be run one by one"""


def check_formula(fitness: type[Fitness], formula: Formula, teacher: Config = LEAN, rel: float = 1e-4) -> None:
    """Check the scores against a plain implementation on the extracted student.

    Args:
        fitness: Class of the fitness.
        formula: A function of the extracted student, the teacher, both in float64, and the batches, which returns
            scores by name.
        teacher: Config of the teacher, whose vocabulary is replaced by one of 61 tokens.
        rel: Maximum relative error.

    Raises:
        AssertionError: If a score differs.
    """
    model = super_network(teacher)
    plain = GPT(model.config)
    plain.load_state_dict(model.state_dict())
    score = make(fitness, model)
    for subnet in candidates(model.config):
        student = student_model(subnet)
        student.load_state_dict(extract_weights(model, subnet))
        with torch.no_grad():
            expected = formula(student.double().eval(), plain.double().eval(), score.batches)
        found = score(subnet)
        for name, value in expected.items():
            same = math.isclose(found[name], value, rel_tol=rel, abs_tol=1e-7)
            assert same, (
                f"{name} must equal the formula's on the extracted student, {value:.7g}, it is {found[name]:.7g}"
            )
