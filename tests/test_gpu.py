"""Test on a real GPU: results against the CPU's, NCCL, bf16, the compiler, and the planned memory against the peak."""

import dataclasses
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from litgpt.config import Config

sys.path.append(str(Path(__file__).parents[1] / "benchmarks/gpu"))
import sharded
import training
import values
from bench import STUDENT, TEACHER, Bench
from goals import TOLERANCES

from litgpt_whittle import SubNet, latency
from litgpt_whittle.distillation.head import HeadInput, TeacherLogits, head_loss
from litgpt_whittle.distillation.head_gradients import accumulates_products
from litgpt_whittle.distillation.objective import Objective
from litgpt_whittle.least_squares import exact_products
from litgpt_whittle.scratch import ActivationFile

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FAMILIES = ("pythia-14m", "Llama-3.2-1B", "Gemma-3-1b-it")


@pytest.fixture(scope="module", params=FAMILIES)
def cases(request, tmp_path_factory):
    """Return a family's models on the GPU and on the CPU."""
    return values.cases(request.param, tmp_path_factory.mktemp("cases"), DEVICE)


def bench(tmp_path, kind=Bench, **settings):
    (tmp_path / "work").mkdir()
    return kind(tmp_path, tmp_path / "work", **settings)


@pytest.mark.parametrize("name", TOLERANCES)
def test_results_are_those_of_the_cpu(cases, name):
    on_gpu, on_cpu = cases
    with exact_products():
        assert values.difference(values.RESULTS[name](on_gpu), values.RESULTS[name](on_cpu)) <= TOLERANCES[name]


def test_a_stream_in_a_file_returns_what_the_gpu_wrote(tmp_path):
    """The copies are asynchronous; each is read before and after another one is written."""
    stream, states = ActivationFile(tmp_path / "s.f32", (8, 64, 512), DEVICE), torch.randn(8, 64, 512, device=DEVICE)
    for i in range(8):
        stream[i : i + 1] = states[i : i + 1]
        assert torch.equal(stream[slice(max(i - 1, 0), i + 1)], states[max(i - 1, 0) : i + 1])
    rows = torch.randperm(8 * 64)
    assert torch.equal(stream.tokens(rows), states.flatten(0, 1)[rows.to(DEVICE)])
    stream.flush()
    assert torch.equal(ActivationFile(tmp_path / "s.f32", (8, 64, 512), DEVICE)[0:8], states)


def test_a_captured_decoding_step_gives_the_tokens_of_an_uncaptured_one():
    subnet, generator = SubNet.full(Config.from_name("pythia-14m", block_size=64)), torch.Generator().manual_seed(1)
    model = latency._random_student(subnet, DEVICE, torch.float32, 40)
    model.set_kv_cache(2, device=DEVICE, dtype=torch.float32)
    prompt = torch.randint(1000, (2, 32), generator=generator).to(DEVICE)
    with torch.inference_mode():
        graph, answers = latency._DecodingGraph(model, 2, 39), []
        for decode in (partial(latency._next_token, model), graph):
            tokens = [latency._next_token(model, prompt, 0)]
            for position in range(32, 40):
                tokens.append(decode(tokens[-1], position).clone())
            answers.append(torch.cat(tokens, dim=1))
    assert torch.equal(*answers)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_compiled_scores_of_the_head_are_the_uncompiled_ones(softcap):
    torch.manual_seed(0)
    student, teacher = (
        HeadInput(torch.randn(1, 300, width, device=DEVICE), torch.randn(5000, width, device=DEVICE) / 8, None)
        for width in (64, 96)
    )
    for tensor in student[:2]:
        tensor.requires_grad_()
    targets = torch.randint(5000, (1, 300), device=DEVICE)
    targets[0, ::7] = -100
    found = []
    for compiles in (False, True):
        losses = head_loss(
            student, targets, Objective(0.2, 0.8, 0.9), TeacherLogits(teacher, softcap), softcap, 128, compiles
        )
        found.append((*losses[:3], *torch.autograd.grad(losses.loss, student[:2])))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_the_gradient_of_the_head_is_summed_in_float32_over_chunks():
    """A product that were rounded to bf16 before its sum would differ by 2^-9 of its size."""
    if not accumulates_products("cuda", torch.bfloat16):
        pytest.skip("this torch or card has no such kernel")
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(1, 4096, 256, device="cuda", generator=generator)
    targets = torch.randint(512, (1, 4096), device="cuda", generator=generator)
    grads = []
    for chunk_size in (32, 4096):
        weight = torch.ones(512, 256, device="cuda").normal_(generator=generator.manual_seed(1)).requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            head_loss(HeadInput(hidden, weight, None), targets, Objective(), chunk_size=chunk_size).loss.backward()
        grads.append(weight.grad)
    assert (grads[0] - grads[1]).norm() < 1e-5 * grads[1].norm()


def test_losses_in_bf16_are_near_those_in_fp32_on_the_cpu(cases):
    on_gpu, on_cpu = cases
    in_bf16 = values.distillation_losses(on_gpu, torch.bfloat16)
    assert values.difference(in_bf16, values.distillation_losses(on_cpu)) <= 0.02


def test_the_compiled_step_has_the_losses_of_the_cpu(cases):
    on_gpu, on_cpu = cases
    with exact_products():
        compiled = values.distillation_losses(on_gpu, is_compiled=True)
    assert values.difference(compiled, values.distillation_losses(on_cpu)) <= TOLERANCES["distillation_losses"]


def test_fsdp_over_nccl_has_the_losses_of_one_device(tmp_path):
    found = {}
    for figures in sharded.fsdp(bench(tmp_path, tiny=True)):
        found |= figures
    assert max(found["sharded_difference"], found["compiled_difference"]) <= 0.02


@dataclasses.dataclass(frozen=True)
class Middle(Bench):
    """A student large enough for the libraries' own buffers to be negligible, for a GPU of 8 GB."""

    length, rows = 512, 8

    def config(self, name):
        return Config.from_name({TEACHER: "pythia-160m", STUDENT: "pythia-70m"}[name])


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true"])
def test_planned_memory_is_within_a_tenth_of_the_peak(tmp_path, precision):
    found = training.distilled(bench(tmp_path, Middle), precision=precision)
    assert found["planned_over_peak"] == pytest.approx(1, abs=0.1)
