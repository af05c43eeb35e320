"""Test the memory plan against closed forms, the same step on real tensors, and the memory of processes."""

import os
import re
from dataclasses import replace
from itertools import accumulate

import forked
import pytest
import torch
from litgpt import GPT, Config
from test_train import checkpoint, run, train_args
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from litgpt_whittle.distillation.args import DistillArgs
from litgpt_whittle.distillation.chunk_scores import N_COMPILED, dense_scores
from litgpt_whittle.distillation.head import CHUNK_ELEMENTS, HeadInput, head_loss
from litgpt_whittle.distillation.losses import reverse_kl
from litgpt_whittle.distillation.objective import Objective, Term
from litgpt_whittle.errors import UserError
from litgpt_whittle.training.live_bytes import LiveBytes
from litgpt_whittle.training.memory_plan import MemoryPlan, choose_placement, plan_memory, show_plan
from litgpt_whittle.training.planned_step import Step

CONFIG = Config(n_layer=2, n_embd=64, n_head=4, block_size=64, padded_vocab_size=512, vocab_size=512)
TEACHER = replace(CONFIG, n_embd=128)


def a_step(**settings) -> Step:
    usual = {
        "build_student": lambda: GPT(CONFIG),
        "build_optimizer": torch.optim.AdamW,
        "precision": "32-true",
        "device": torch.device("cpu"),
        "n_devices": 1,
        "is_sharded": True,
        "micro_batch_size": 4,
        "seq_length": 64,
        "is_accumulating": False,
        "max_norm": 1.0,
        "objective": Objective(0.2, 0.8, 0.9),
        "build_teacher": lambda: GPT(TEACHER),
    }
    return Step(**usual | settings)


def n_bytes(config: Config) -> int:
    with torch.device("meta"):
        return 4 * sum(weight.numel() for weight in GPT(config).parameters())


def test_live_bytes_counts_memory_once_and_forgets_it():
    with LiveBytes() as live:
        x = torch.zeros(100)
        y = x[10:].view(9, 10)
        assert live.now == 400
        z = y + 1
        assert live.now == live.peak == 400 + 360
        del z
        z = x.double()
        assert live.now == live.peak == 400 + 800
        z.untyped_storage().resize_(0)
        assert live.now == 400
        del x
        assert live.now == 400  # y is a view of it
        del y
        assert live.now == 0


@pytest.mark.parametrize("n", [1, 4])
def test_what_is_held_is_the_closed_form(n):
    plan = plan_memory(a_step(n_devices=n, teacher_is_sharded=n > 1))
    rotary = {id(config): 4 * sum(buffer.numel() for buffer in GPT(config).buffers()) for config in (CONFIG, TEACHER)}
    assert plan.weights == pytest.approx(n_bytes(CONFIG) / n + rotary[id(CONFIG)], rel=0.02)
    assert plan.gradients == pytest.approx(n_bytes(CONFIG) / n, rel=0.02)
    assert plan.optimizer == pytest.approx(2 * n_bytes(CONFIG) / n, rel=0.02)
    assert plan.teacher == pytest.approx(n_bytes(TEACHER) / n + rotary[id(TEACHER)], rel=0.02)
    # the first process gathers the full weights and AdamW's full state
    assert plan.checkpoint == (0 if n == 1 else pytest.approx(3 * n_bytes(CONFIG), rel=0.03))
    in_step = plan.weights + plan.gradients + plan.optimizer + plan.teacher + plan.step
    assert plan.total == max(in_step, plan.weights + plan.optimizer + plan.teacher + plan.checkpoint)


def test_other_precisions_devices_and_optimizers():
    plan = plan_memory(a_step())
    sgd = plan_memory(a_step(build_optimizer=torch.optim.SGD))
    assert sgd.optimizer == 0 and sgd.weights == plan.weights
    true = plan_memory(a_step(precision="bf16-true"))
    assert true.weights == pytest.approx(plan.weights / 2, rel=0.02)
    mixed = plan_memory(a_step(precision="bf16-mixed"))
    assert mixed.weights == plan.weights and mixed.teacher == pytest.approx(plan.teacher / 2, rel=0.02)
    ddp = plan_memory(a_step(n_devices=2, is_sharded=False))
    assert ddp.weights == plan.weights and ddp.gradients == 2 * plan.gradients
    tied = plan_memory(a_step(tie_embeddings=True))
    assert plan.weights - tied.weights == 512 * 64 * 4
    assert plan_memory(a_step(build_teacher=None)).teacher == 0
    longer = dict(micro_batch_size=16)
    saved = plan_memory(a_step(**longer)).step - plan_memory(a_step(**longer, activation_checkpointing=True)).step
    # a block keeps at least the outputs of its two norms, queries, keys and values, and the MLP's input twice
    assert saved > 16 * 64 * 4 * (2 * 64 + 3 * 64 + 2 * 256)


def test_a_plan_for_gpus_elsewhere_has_their_chunks_of_logits_and_their_main_memory_beside(monkeypatch):
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 64 * 512)
    monkeypatch.setitem(CHUNK_ELEMENTS, "cuda", 256 * 512)
    step = a_step(n_devices=2)
    here, there = plan_memory(step), plan_memory(replace(step, is_elsewhere=True))
    assert (there.weights, there.optimizer, there.checkpoint) == (here.weights, here.optimizer, here.checkpoint)
    # the student's logits, the teacher's, and those of a scored chunk
    assert there.step - here.step > 3 * (256 - 64) * 512 * 4
    assert here.on_cpu and not there.on_cpu
    # one device's weights, and then AdamW's state, pass through main memory during a save
    alone = plan_memory(replace(step, n_devices=1, is_elsewhere=True))
    assert alone.checkpoint == alone.optimizer and plan_memory(replace(step, n_devices=1)).checkpoint == 0


def test_compiled_losses_take_as_many_tensors_as_counted_and_only_on_gpus(monkeypatch):
    monkeypatch.setitem(CHUNK_ELEMENTS, "cuda", 256 * 512)
    there = a_step(is_elsewhere=True)
    plans = [plan_memory(replace(there, is_compiled=compiled)).step for compiled in (False, True)]
    # uncompiled: the log-probabilities of both models, and the gradient of the cross-entropy
    assert plans[0] - plans[1] == pytest.approx((3 - N_COMPILED) * 256 * 512 * 4, rel=1e-3)
    here = a_step()
    assert plan_memory(replace(here, is_compiled=True)) == plan_memory(here)
    symmetric = replace(there, objective=Objective(0.2, 0.8, 0.9, (Term(reverse_kl),)))  # is not compiled
    assert plan_memory(replace(symmetric, is_compiled=True)) == plan_memory(symmetric)


def test_the_head_of_a_planned_gpu_stores_no_product_of_its_gradient():
    """There, one kernel adds products in bf16 to their float32 sum."""

    def peak(device_type: str) -> int:
        with FakeTensorMode(), LiveBytes() as live, torch.autocast("cpu", torch.bfloat16):
            hidden, weight = (torch.randn(*shape, requires_grad=True) for shape in ((1, 8, 64), (16384, 64)))
            targets = torch.zeros(1, 8, dtype=torch.long)
            head_loss(HeadInput(hidden, weight, None), targets, Objective(), chunk_size=2, device_type=device_type)
        return live.peak

    assert peak("cpu") - peak("cuda") == pytest.approx(16384 * 64 * 2, rel=0.1)


@pytest.mark.slow
def test_compiled_losses_allocate_on_a_cpu_what_a_plan_assumes():
    logits, teacher = torch.randn(64, 4096), torch.randn(64, 4096)
    targets, share = torch.randint(4096, (64,)), torch.full((64,), 1 / 64)
    for softcap in (None, 30.0):
        arguments = (logits, teacher, targets, share, Objective(0.2, 0.8, 0.9), softcap)
        dense_scores(*arguments)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            dense_scores(*arguments)
        events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
        sizes = accumulate(event.nbytes() for event in events if event.name() == "[memory]")
        assert max(sizes) == pytest.approx(N_COMPILED * logits.nbytes, rel=0.02)


def test_the_state_of_the_process_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    plan_memory(a_step(n_devices=2))
    assert torch.equal(torch.rand(3), expected)
    assert not torch.distributed.is_initialized() and torch.get_default_dtype() == torch.float32


def test_the_teacher_is_sharded_where_it_does_not_fit_otherwise(monkeypatch, capsys):
    student, teacher = (replace(config, n_layer=1) for config in (CONFIG, TEACHER))
    step = a_step(n_devices=4, build_student=lambda: GPT(student), build_teacher=lambda: GPT(teacher))
    whole, spread = plan_memory(step).total, plan_memory(replace(step, teacher_is_sharded=True)).total
    assert spread < whole
    for free, expected in ((whole, False), (whole - 1, True), (spread - 1, True)):
        monkeypatch.setattr("litgpt_whittle.training.memory_plan.free_memory", lambda *_, free=free: free)
        assert show_plan(step, "auto", 4) is expected
        assert ("more than the" in capsys.readouterr().out) == (free < spread)


def test_no_plan_is_made_where_memory_is_plenty(monkeypatch, capsys):
    monkeypatch.setattr("litgpt_whittle.training.memory_plan.free_memory", lambda *_: 10**12)
    step = a_step(n_devices=4)
    assert show_plan(step, "auto", 4) is show_plan(step, "replicated", 4) is False
    assert show_plan(step, "sharded", 4) is True
    assert show_plan(replace(step, n_devices=1), "sharded", 1) is False
    assert not capsys.readouterr().out
    assert "at the peak" in choose_placement(step, "auto", 4, is_final=True)[1]


def test_what_cannot_run_without_content_is_told(monkeypatch):
    monkeypatch.setattr("litgpt_whittle.training.memory_plan.free_memory", lambda *_: 10**6)

    class Reading(torch.optim.SGD):
        def step(self):
            if float(self.param_groups[0]["params"][0].detach().sum()) > 0:
                super().step()

    step = a_step(build_optimizer=lambda weights: Reading(weights, 0.1))
    with pytest.warns(UserWarning, match="memory with a replicated teacher cannot be planned"):
        assert show_plan(step, "auto", 1) is False
    with pytest.raises(UserError, match="memory with a replicated teacher cannot be planned.*leave --dry_run out"):
        choose_placement(step, "auto", 1, is_final=True)
    # on several devices the plan places the teacher, so a failure ends the run unless the placement is set
    step = replace(step, n_devices=4)
    with pytest.raises(UserError, match="replicated teacher cannot be planned, .*; choose --teacher_placement repl"):
        show_plan(step, "auto", 4)
    for placement, is_sharded in (("replicated", False), ("sharded", True)):
        with pytest.warns(UserWarning, match=f"memory with a {placement} teacher cannot be planned"):
            assert show_plan(step, placement, 4) is is_sharded
    with pytest.warns(UserWarning, match="memory cannot be planned"):
        assert show_plan(replace(step, build_teacher=None), "auto", 4) is False


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    teacher = checkpoint(tmp_path / "teacher", n_embd=48)
    with pytest.raises(UserError, match="no checkpoint directory"):  # a dry run writes no student for `run` to open
        run(tmp_path / "out", teacher_checkpoint_dir=teacher, distill=DistillArgs(), train=train_args(), dry_run=True)
    assert not (tmp_path / "out").exists()
    printed = capsys.readouterr().out
    assert "student's weights" in printed and "teacher" in printed and "at the peak" in printed


SCRIPT = """
import ctypes, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
from litgpt import Config
from litgpt.args import EvalArgs
from test_train import TokenData, run, train_args
from litgpt_whittle.distillation.args import DistillArgs
torch.set_num_threads(1)
if sys.platform == "linux":  # each freed buffer goes back to the system, so that what is resident is in use
    ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD
student = Config(n_layer=4, n_embd=512, n_head=8, block_size=64, padded_vocab_size=16384, vocab_size=16384)
run(
    Path({folder!r}) / "out", teacher_checkpoint_dir=Path({folder!r}) / "teacher", distill=DistillArgs(),
    model_config=student, eval=EvalArgs(initial_validation=False, final_validation=False, max_iters=1),
    data=TokenData(), devices={devices}, teacher_placement="auto" if {devices} == 1 else "sharded",
    train=train_args(max_seq_length=64, max_steps=3, max_tokens=None, global_batch_size=8, micro_batch_size=2),
)
"""


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_processes_take_what_was_planned(tmp_path, devices):
    checkpoint(tmp_path / "teacher", n_embd=256, block_size=64, padded_vocab_size=16384)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=os.path.dirname(__file__), folder=str(tmp_path), devices=devices))
    done = forked.run(script, n=devices)
    assert done.returncode == 0, done.stdout + done.stderr
    planned, taken = (
        float(number) * {"GB": 1e9, "MB": 1e6}[unit]
        for number, unit in (
            re.search(pattern + r"\s+([\d.]+) (\wB)", done.stdout).groups()
            for pattern in ("at the peak", "Peak memory")
        )
    )
    assert taken == pytest.approx(planned, rel=0.15)


def test_the_table_leaves_out_what_there_is_none_of():
    shown = str(MemoryPlan(weights=10**6, gradients=10**6, optimizer=0, teacher=0, step=10**9))
    assert "optimizer" not in shown and "teacher" not in shown and "1.00 GB" in shown
