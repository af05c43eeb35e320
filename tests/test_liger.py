"""Test the choice of Liger's kernels and its errors, and their losses against our own head's."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from litgpt.config import Config
from litgpt.model import GPT
from test_train import checkpoint, run, train_args

from litgpt_whittle.commands import distill as command
from litgpt_whittle.distillation.args import DistillArgs
from litgpt_whittle.distillation.head import HeadInput, HeadLosses, LossModel, TeacherLogits, head_loss
from litgpt_whittle.distillation.liger import check_liger, check_liger_models, liger_loss
from litgpt_whittle.distillation.losses import forward_kl
from litgpt_whittle.distillation.objective import Objective, Term
from litgpt_whittle.errors import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda")
KL = Objective(0.2, 0.8, 0.9)
CONFIG = Config(n_layer=1, n_embd=16, n_head=2, block_size=8, vocab_size=40, padded_vocab_size=40)
HAS_LIGER = all(find_spec(package) for package in ("liger_kernel", "triton"))


@pytest.mark.parametrize(
    "loss, has_cache, device, message",
    [
        ("reverse_kl", False, GPU, "only the cross-entropy and forward_kl, got reverse_kl"),
        ({"forward_kl": 1.0, "mse": 0.1}, False, GPU, "only the cross-entropy and forward_kl, got forward_kl"),
        ("forward_kl", True, GPU, "needs a teacher that runs on every batch, got a teacher_cache"),
        ("forward_kl", False, CPU, "needs an NVIDIA GPU, got the device 'cpu'"),
    ],
)
def test_what_liger_does_not_compute_is_refused(loss, has_cache, device, message):
    with pytest.raises(UserError, match=f"distill.head liger .*{message}.*; use --distill.head chunked"):
        check_liger(DistillArgs(loss).first_objective, has_cache, device)


def test_a_missing_package_is_named(monkeypatch):
    for package in ("triton", "liger_kernel"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"distill.head liger needs triton .*pip install 'litgpt-whittle\[liger\]'"):
        check_liger(KL, False, GPU)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lm_head_bias": True}, "got a bias;"),
        ({"final_logit_softcapping": 30.0}, "got a softcap;"),
        ({"padded_vocab_size": 48}, "got vocabularies of 40 and 48 entries;"),
    ],
)
def test_heads_that_liger_does_not_compute_are_refused(changes, message):
    check_liger_models([CONFIG, CONFIG])
    for pair in ([CONFIG, replace(CONFIG, **changes)], [replace(CONFIG, **changes), CONFIG]):
        with pytest.raises(UserError, match=message):
            check_liger_models(pair)


def test_the_command_refuses_before_it_begins(tmp_path, monkeypatch):
    teacher = checkpoint(tmp_path / "teacher", n_embd=48, final_logit_softcapping=30.0)
    settings = dict(teacher_checkpoint_dir=teacher, distill=DistillArgs(head="liger"), train=train_args())
    with pytest.raises(UserError, match="needs an NVIDIA GPU"):
        run(tmp_path / "out", **settings)
    monkeypatch.setattr(command, "check_liger", lambda *_: None)  # as if there were a GPU
    with pytest.raises(UserError, match="got a softcap"):
        run(tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_the_fused_loss_is_used_in_training_and_our_own_in_validation():
    seen = []

    def fused(head_input, targets, objective, teacher):
        seen.append(targets)
        return HeadLosses(head_input.hidden.sum(), torch.tensor(1.0), torch.tensor(2.0))

    model, ids = LossModel(GPT(CONFIG)), torch.zeros(2, 8, dtype=torch.long)
    expected = model(ids, ids).ce
    model.fused_loss = fused
    assert model(ids, ids).distill == 2 and seen == [ids]
    with torch.no_grad():
        torch.testing.assert_close(model(ids, ids).ce, expected)
    assert len(seen) == 1


OBJECTIVES = [
    Objective(0.7),
    Objective(0.0, 0.8, 0.9),
    KL,
    Objective(0.3, 0.5, 2.0, (Term(forward_kl, 0.5),)),
]


def compare(device: torch.device) -> None:
    """Compare Liger's losses and gradients with our own head's, in fp32, with ignored tokens, and with only these."""
    torch.manual_seed(0)
    student, teacher = (
        HeadInput(torch.randn(2, 30, n, device=device), torch.randn(131, n, device=device) / 4, None) for n in (16, 24)
    )
    for tensor in student[:2]:
        tensor.requires_grad_()
    for n_ignored in (0, 17, 60):
        targets = torch.randint(131, (2, 30), device=device)
        targets.view(-1)[torch.randperm(60, device=device)[:n_ignored]] = -100
        for objective in OBJECTIVES:
            found = []
            for function in (head_loss, liger_loss):
                losses = function(student, targets, objective, TeacherLogits(teacher) if objective.beta else None)
                # not the last operation, as in training with accumulation
                found.append((*losses[:3], *torch.autograd.grad(losses.loss / 3, student[:2])))
            ours, theirs = found
            if not objective.alpha:
                assert theirs[1].isnan()  # not computed
                ours, theirs = ((x[0], *x[2:]) for x in (ours, theirs))
            for one, other in zip(ours, theirs):
                torch.testing.assert_close(other, one, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LIGER, reason="needs liger-kernel")
def test_liger_has_our_losses_and_gradients_in_tritons_interpreter():
    script = "import torch, test_liger; test_liger.compare(torch.device('cpu'))"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


@pytest.mark.gpu
@pytest.mark.skipif(not (HAS_LIGER and torch.cuda.is_available()), reason="needs liger-kernel and an NVIDIA GPU")
def test_liger_has_our_losses_and_gradients_on_a_gpu():
    compare(GPU)
