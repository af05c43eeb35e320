"""Test repairs of models that normalise a block's output, which makes it a nonlinear function of the block's input."""

import pytest
import torch
from architectures import ARCHITECTURES
from test_repair import distance, distance_of_cut, doubled, half, model, repair, student_of, windows

from litgpt_whittle.subnet import SubNet

POST_NORMS = pytest.mark.parametrize("name", ["OLMo-2-1124-7B", "Gemma-2-2b", "Gemma-3-1b-it"])


@POST_NORMS
@pytest.mark.parametrize("basis", ["pca", pytest.param("coordinates", marks=pytest.mark.slow)])
@pytest.mark.parametrize("cut", ["neurons", "a few neurons", "channels", "half"])
def test_what_a_norm_divides_is_fitted_with_the_teachers_divisor(name, basis, cut, tmp_path):
    config = ARCHITECTURES[name]
    teacher = model(config, std=0.1)
    subnet = {
        "neurons": SubNet(config, intermediate_size=config.intermediate_size // 2),
        "a few neurons": SubNet(config, intermediate_size=config.intermediate_size - 2),
        "channels": SubNet(config, n_embd=config.n_embd * 3 // 4),
        "half": half(config),
    }[cut]
    repaired = student_of(repair(teacher, subnet, tmp_path, n=128, basis=basis))
    assert distance(repaired, teacher) < 0.7 * distance_of_cut(subnet, teacher)


def test_copies_of_what_is_kept_lose_nothing_behind_a_norm(tmp_path):
    config = ARCHITECTURES["OLMo-2-1124-7B"]
    small, teacher, cut = doubled(config)
    idx = windows(config, 8, seed=1)
    torch.testing.assert_close(teacher(idx), small(idx), rtol=1e-4, atol=1e-4)
    student = student_of(repair(teacher, cut, tmp_path, n=128, basis="coordinates"))
    got, expected = (logits - logits.mean(-1, keepdim=True) for logits in (student(idx), teacher(idx)))
    assert (got - expected).norm() < 1e-4 * expected.norm()
