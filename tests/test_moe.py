"""Test mixtures of experts in every training command: FLOPs, memory, and training itself."""

from dataclasses import replace

import pytest
import torch
from architectures import ARCHITECTURES, KINDS
from lightning.fabric.utilities.throughput import measure_flops
from litgpt import GPT
from litgpt.utils import save_config
from test_memory_plan import a_step
from test_supernet import train as train_supernet
from test_train import VOCAB, rows, run, same, train_args
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from litgpt_whittle.distillation.args import DistillArgs
from litgpt_whittle.distillation.head import LossModel
from litgpt_whittle.errors import UserError
from litgpt_whittle.spaces.args import (
    SizeArgs,
    SpaceArgs,
)
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import LayerwiseGPT
from litgpt_whittle.supernet import SupernetArgs
from litgpt_whittle.training.live_bytes import LiveBytes
from litgpt_whittle.training.memory_plan import plan_memory
from litgpt_whittle.training.planned_step import PlannedTeacher, planned_student, run_step
from litgpt_whittle.training.pretraining import count_flops

DENSE = [config for config in KINDS.values() if not config.n_expert]
MIXTRAL = ARCHITECTURES["Mixtral-8x7B-v0.1"]
QWEN3 = ARCHITECTURES["Qwen3-30B-A3B"]
MIXTURES = [MIXTRAL, QWEN3, ARCHITECTURES["latent"]]
EACH_MIXTURE = pytest.mark.parametrize("config", MIXTURES, ids=lambda config: config.name)


def tiny(config, **changes):
    return replace(config, name="tiny", vocab_size=VOCAB, padded_vocab_size=VOCAB, **changes)


def filled(model):
    """Return the model with random weights, including those that litgpt leaves uninitialised."""
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.data.normal_(std=0.2, generator=generator)
    return model


def checkpoint(folder, config):
    folder.mkdir(parents=True)
    torch.save(filled(GPT(config)).state_dict(), folder / "lit_model.pth")
    save_config(config, folder)
    return folder


# -- FLOPs


@pytest.mark.parametrize("config", DENSE, ids=lambda config: config.name)
def test_flops_of_a_micro_batch_are_those_that_lightning_measures(config):
    with torch.device("meta"):
        model, ids = GPT(config), torch.zeros(3, 16, dtype=torch.long)
        model.max_seq_length = 16
        trained = measure_flops(model, lambda: model(ids), lambda logits: logits.sum())
        frozen = measure_flops(model, lambda: model(ids))
    assert count_flops(model, 3, 16) == trained
    assert count_flops(model, 3, 16, [config]) == trained + frozen


@EACH_MIXTURE
def test_flops_of_a_mixture_are_those_that_pytorch_counts_with_routed_tokens(config):
    model, ids = filled(GPT(config)), torch.randint(60, (2, 16))
    # PyTorch counts no FLOPs in its fused attention for CPUs
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids).sum().backward()
    assert count_flops(model, 2, 16) == counter.get_total_flops()


def test_flops_of_a_layerwise_student_are_those_of_its_true_shape():
    teacher = ARCHITECTURES["Llama-3.1-8B"]
    subnet = SubNet(teacher, n_layer=2, intermediate_size=[8, 24])
    with torch.device("meta"):
        model, ids = LayerwiseGPT(subnet), torch.zeros(2, 16, dtype=torch.long)
        measured = measure_flops(model, lambda: model(ids), lambda logits: logits.sum())
    assert count_flops(model, 2, 16) == measured


def test_flops_that_cannot_be_counted_end_no_run(monkeypatch):
    def unknown(*_):
        raise TypeError("No slicing rule for 'mamba'")

    monkeypatch.setattr("litgpt_whittle.training.pretraining.flops", unknown)
    with pytest.warns(UserWarning, match="FLOPs cannot be counted: No slicing rule"):
        assert count_flops(GPT(MIXTRAL), 2, 16) == 0


# -- memory


@pytest.mark.parametrize(
    "config, checkpointed",
    [*((config, False) for config in MIXTURES), (MIXTRAL, True)],
    ids=lambda x: getattr(x, "name", x),
)
def test_the_plan_of_a_mixture_is_an_upper_bound_near_what_real_tokens_take(config, checkpointed):
    config = replace(config, block_size=64, n_layer=1, first_k_dense_replace=0)
    config = replace(config, intermediate_size=128, moe_intermediate_size=128)
    step = a_step(
        build_student=lambda: GPT(config),
        build_teacher=lambda: GPT(replace(config, n_layer=2)),
        activation_checkpointing=checkpointed,
    )
    plan, live = plan_memory(step), LiveBytes()
    with live:
        root = filled(planned_student(step, None))
        weights = live.now
        teacher = PlannedTeacher(step, root, None)
        filled(teacher.model)
        held = live.now
        optimizer = step.build_optimizer(root.parameters())
        for weight in root.parameters():
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
        optimizer.zero_grad()
        live.peak = live.now
        gradients = run_step(step, root, teacher, optimizer)
    state = sum(value.nbytes for slots in optimizer.state.values() for value in slots.values())
    assert (plan.weights, plan.teacher, plan.gradients, plan.optimizer) == (weights, held - weights, gradients, state)
    taken = live.peak - held - state - gradients
    assert taken <= plan.step <= 1.25 * taken


def test_mixtures_are_planned_where_they_are_spread_over_devices():
    student, teacher = (
        replace(config, n_layer=1, vocab_size=512, padded_vocab_size=512) for config in (MIXTRAL, QWEN3)
    )
    models = {"build_student": lambda: GPT(student), "build_teacher": lambda: GPT(teacher)}
    spread, alone = (
        plan_memory(a_step(seq_length=24, n_devices=n, teacher_is_sharded=n > 1, **models)) for n in (2, 1)
    )
    assert spread.weights < 0.7 * alone.weights and spread.teacher < 0.7 * alone.teacher


def test_a_dry_run_of_a_mixture_prints_its_plan(tmp_path, capsys):
    teacher = checkpoint(tmp_path / "teacher", tiny(QWEN3, n_layer=2))
    settings = {"model_config": tiny(MIXTRAL, n_layer=1), "train": train_args(max_seq_length=8), "dry_run": True}
    with pytest.raises(UserError, match="no checkpoint directory"):  # a dry run writes no student for `run` to open
        run(tmp_path / "out", teacher_checkpoint_dir=teacher, distill=DistillArgs(), **settings)
    assert "at the peak" in capsys.readouterr().out


# -- training


@pytest.mark.parametrize("config", [MIXTRAL, QWEN3], ids=lambda config: config.name)
def test_a_mixture_is_distilled(tmp_path, config):
    """Extracted from its teacher with fewer experts, and from random weights without a teacher."""
    teacher = checkpoint(tmp_path / "teacher", tiny(config, n_layer=2))
    SubNet(tiny(config, n_layer=2), n_layer=1, n_expert=3).save(tmp_path / "cut.yaml")
    settings = {"train": train_args(max_seq_length=8, max_tokens=6 * 8 * 8, save_interval=3)}
    taught = settings | {"teacher_checkpoint_dir": teacher, "distill": DistillArgs()}
    unbroken = run(tmp_path / "cut", sub_network=tmp_path / "cut.yaml", **taught)
    own = run(tmp_path / "alone", model_config=tiny(config, n_layer=2), **settings)
    for name in ("cut", "alone"):
        losses = [row["loss"] for row in rows(tmp_path / name)]
        assert losses[-1] < losses[0]
    assert "transformer.h.0.mlp.experts.2.fc_1.weight" in unbroken
    assert "transformer.h.0.mlp.experts.3.fc_1.weight" in own
    resumed = run(tmp_path / "more", sub_network=tmp_path / "cut.yaml", resume=tmp_path / "cut/step-00000003", **taught)
    assert same(unbroken, resumed)


@pytest.mark.slow
def test_a_compiled_mixture_trains_like_an_uncompiled_one():
    """Uses the compiler's front end, which cannot trace routing; the back end is PyTorch's."""
    config = replace(QWEN3, n_layer=1)
    ids = torch.randint(60, (2, 9))
    found = []
    for compiled in (False, True):
        root = LossModel(filled(GPT(config)))
        run_it = torch.compile(root, backend="aot_eager") if compiled else root
        for micro_batch in (ids, ids.flip(1)):  # so that the experts get different tokens
            loss = run_it(micro_batch[:, :-1], micro_batch[:, 1:]).loss
            loss.backward()
        found.append((loss.detach(), {name: weight.grad for name, weight in root.named_parameters()}))
    (expected, grads), (got, compiled_grads) = found
    assert torch.allclose(got, expected, rtol=1e-5)
    for name, grad in grads.items():
        assert torch.allclose(compiled_grads[name], grad, atol=1e-5), name


def test_a_super_network_of_experts_is_trained(tmp_path):
    smallest = SizeArgs(n_embd=16, n_query_groups=1, n_expert=2)
    supernet = SupernetArgs(search_space=SpaceArgs(smallest=smallest), n_validated=0)
    train = train_args(max_seq_length=8, max_tokens=5 * 8 * 8)
    train_supernet(tmp_path, model_config=tiny(MIXTRAL, n_layer=2), train=train, supernet=supernet)
    losses = [row["loss"] for row in rows(tmp_path)]
    assert len(losses) == 5 and losses[-1] < losses[0]
