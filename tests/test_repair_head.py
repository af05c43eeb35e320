"""Test the LM head fitted to the teacher's predictions against PyTorch's divergence and a convex solver in float64."""

import math

import pytest
import torch
from architectures import ARCHITECTURES, KINDS
from litgpt.model import GPT
from test_repair import half, model, repair, student_of, windows
from torch.nn import functional as F

from litgpt_whittle.calibration import Calibration
from litgpt_whittle.errors import UserError
from litgpt_whittle.repair.head import HeadRepair

EACH = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)


def divergence(student: GPT, teacher: GPT, idx: torch.Tensor) -> float:
    """Return KL(teacher ‖ student) by PyTorch, from both models' full logits in float64."""
    ours, theirs = (F.log_softmax(net(idx).double(), -1).flatten(0, 1) for net in (student, teacher))
    return float(F.kl_div(ours, theirs, log_target=True, reduction="batchmean"))


@EACH
def test_the_head_brings_predictions_nearer_to_the_teachers(config, tmp_path):
    teacher, subnet = model(config), half(config)
    plain, fitted = (repair(teacher, subnet, tmp_path, n=256, head_passes=passes) for passes in (0, 10))
    calibration = Calibration(windows(config, 256))
    held_out = calibration.windows[calibration.n_fitted // calibration.shape[1] :]
    assert plain.head is None
    before, after = fitted.head
    assert after < before
    assert math.isclose(before, divergence(student_of(plain), teacher, held_out), rel_tol=1e-3)
    assert math.isclose(after, divergence(student_of(fitted), teacher, held_out), rel_tol=1e-3)
    for name, tensor in plain.weights.items():  # the remainder is due to the closed form
        assert name.startswith("lm_head.") or torch.equal(tensor, fitted.weights[name])


def best_head(z: torch.Tensor, log_p: torch.Tensor, start: torch.Tensor) -> float:
    """Return the lowest divergence of any head without bias, by L-BFGS in float64."""
    weight = start.double().clone().requires_grad_(True)
    solver = torch.optim.LBFGS([weight], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        solver.zero_grad()
        value = F.kl_div(F.log_softmax(z @ weight.T, -1), log_p, log_target=True, reduction="batchmean")
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
        return loss().item()


def test_many_passes_come_near_the_best_head_there_is(tmp_path):
    config = ARCHITECTURES["Llama-3.1-8B"]
    teacher, subnet = model(config), half(config)
    plain, fitted = (repair(teacher, subnet, tmp_path, n=256, head_passes=passes) for passes in (0, 40))
    idx = windows(config, 256)[: 256 - 256 // 8]
    student, seen = student_of(plain), []
    student.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].double().flatten(0, 1)))
    before = divergence(student, teacher, idx)
    log_p = F.log_softmax(teacher(idx).double(), -1).flatten(0, 1)
    least = best_head(seen[0], log_p, plain.weights["lm_head.weight"])
    after = divergence(student_of(fitted), teacher, idx)
    assert least < before
    assert after - least < 0.1 * (before - least)


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "stablelm-3b-4e1t"])
def test_where_the_head_is_the_embedding_the_final_norm_is_fitted(name, tmp_path):
    config = ARCHITECTURES[name]
    teacher, subnet = model(config, tied=True), half(config)
    plain, fitted = (repair(teacher, subnet, tmp_path, n=256, head_passes=passes) for passes in (0, 10))
    assert fitted.head.after < fitted.head.before
    assert fitted.weights["lm_head.weight"] is fitted.weights["transformer.wte.weight"]
    for key, tensor in plain.weights.items():
        assert "ln_f" in key or torch.equal(tensor, fitted.weights[key])


def test_a_head_that_is_not_better_for_it_keeps_the_closed_form(tmp_path, monkeypatch):
    config = ARCHITECTURES["Llama-3.1-8B"]
    teacher, subnet = model(config), half(config)
    plain = repair(teacher, subnet, tmp_path, head_passes=0)
    monkeypatch.setattr("litgpt_whittle.repair.head.RATE", 100.0)
    fitted = repair(teacher, subnet, tmp_path, head_passes=2)
    assert fitted.head.before == fitted.head.after
    assert all(torch.equal(tensor, fitted.weights[name]) for name, tensor in plain.weights.items())


def test_a_head_without_parameters_of_its_own_is_left(tmp_path):
    """OLMo's final norm has no weight, so if its head is the embedding, no parameter is free."""
    config = ARCHITECTURES["OLMo-1B-hf"]
    assert repair(model(config, tied=True), half(config), tmp_path).head is None


def test_a_head_too_large_to_train_is_refused_before_anything_runs(tmp_path, monkeypatch):
    config = ARCHITECTURES["Llama-3.1-8B"]
    monkeypatch.setattr("litgpt_whittle.repair.costs.OPTIMIZER_COPIES", 10**12)
    monkeypatch.setattr(HeadRepair, "fit", lambda *_: pytest.fail("it was trained"))
    with pytest.raises(UserError, match="fitting the LM head .* takes .* are free; give --repair.head_passes 0"):
        repair(model(config), half(config), tmp_path)
