"""Test hidden-state matching against hooks on stock models and the plain formula."""

import pytest
import torch
import torch.nn.functional as F
from litgpt import GPT
from test_train import SEQ, VOCAB, checkpoint, config, interrupted, rows, run, same, train_args

from litgpt_whittle.commands.extract import setup as extract_student
from litgpt_whittle.distillation.args import (
    DistillArgs,
    HiddenArgs,
)
from litgpt_whittle.distillation.head import LossModel, TeacherLogits, hidden_states
from litgpt_whittle.distillation.hidden import HiddenLoss, Place, Watch
from litgpt_whittle.distillation.objective import Objective
from litgpt_whittle.errors import UserError
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import extract_weights, student_model

TEACHER = config(n_layer=4, n_embd=48)
SUBNET = SubNet(TEACHER, n_layer="0,2,3", n_embd="1-20,30-41", intermediate_size=96, n_query_groups="0,2")


def models(subnet=SUBNET):
    torch.manual_seed(0)
    teacher = GPT(TEACHER)
    student = student_model(subnet)
    student.load_state_dict(extract_weights(teacher, subnet))
    return student.double(), teacher.double().requires_grad_(False)


def streams(model, kind):
    """Return a stock model's residual stream after each layer, or after its attention."""
    seen = []
    modules = model.transformer.h if kind == "block" else [block.attn for block in model.transformer.h]
    handles = [module.register_forward_hook(lambda *args: seen.append(args[2])) for module in modules]
    model(IDS)
    for handle in handles:
        handle.remove()
    return seen


IDS = torch.arange(2 * SEQ).reshape(2, SEQ) % VOCAB


def matched(student, teacher, args, **origin):
    """Return the loss's hidden-state term from the model with losses."""
    hidden = HiddenLoss(student, teacher.config, args, **origin).double()
    root = LossModel(student, hidden)
    root.objective = Objective(0.2, 0.8, 0.9)
    watch = Watch(teacher, hidden.pairs.values())
    watch.is_on = True
    head = hidden_states(teacher, IDS)
    losses = root(IDS, IDS, TeacherLogits(head, None, watch.take()))
    expected = 0.2 * losses.ce + 0.8 * 0.81 * losses.distill + losses.hidden
    assert torch.allclose(losses.loss, expected)
    return losses


def relative(a, b):
    return (((a - b) ** 2).sum(-1) / (b**2).sum(-1)).mean()


def by_cosine(a, b):
    return 1 - F.cosine_similarity(a, b, dim=-1).mean()


@pytest.mark.parametrize("loss, distance", [("mse", relative), ("cosine", by_cosine)])
@pytest.mark.parametrize("layers", [None, [0, 2]])
def test_channels_are_compared_with_those_that_they_came_from(loss, distance, layers):
    student, teacher = models()
    kept, above = [*range(1, 21), *range(30, 42)], [0, 2, 3]
    chosen = layers or range(3)
    expected = 0.0
    for kind, weight in (("block", 0.7), ("attn", 0.3)):
        ours, theirs = streams(student, kind), streams(teacher, kind)
        expected += weight * sum(distance(ours[i], theirs[above[i]][..., kept]) for i in chosen) / len(chosen)
    args = HiddenArgs(weight=0.7, attention=0.3, loss=loss, layers=layers)
    assert torch.allclose(matched(student, teacher, args, subnet=SUBNET).hidden, expected)


def test_a_student_in_another_basis_is_compared_in_it():
    student, teacher = models()
    basis = torch.linalg.qr(torch.randn(48, 32)).Q.T.contiguous()
    ours, theirs = streams(student, "block"), streams(teacher, "block")
    expected = sum(relative(ours[i], theirs[j] @ basis.double().T) for i, j in enumerate((0, 2, 3))) / 3
    losses = matched(student, teacher, HiddenArgs(weight=1.0), subnet=SUBNET, basis=basis)
    assert torch.allclose(losses.hidden, expected)


def test_a_student_equal_to_its_teacher_has_nothing_to_match():
    full = SubNet.full(TEACHER)
    student, teacher = models(full)
    losses = matched(student, teacher, HiddenArgs(weight=1.0, attention=1.0), subnet=full)
    assert losses.hidden.abs() < 1e-20


def test_gradients_reach_every_layer_below_and_the_projections():
    torch.manual_seed(1)
    student, teacher = GPT(config(n_layer=2)).double(), models()[1]
    losses = matched(student, teacher, HiddenArgs(weight=1.0, layers=[0], projection=True))
    hidden = losses.loss - (losses.loss - losses.hidden).detach()
    hidden.backward()
    grads = {name: parameter.grad for name, parameter in student.named_parameters()}
    assert all(grads[name].abs().sum() > 0 for name in grads if "h.0." in name and "norm_2.bias" not in name)


def test_unrelated_layers_are_matched_by_depth():
    hidden = HiddenLoss(GPT(config(n_layer=2)), TEACHER, HiddenArgs(weight=1.0, attention=1.0, projection=True))
    assert hidden.pairs == {
        Place(0, "block"): Place(1, "block"),
        Place(1, "block"): Place(3, "block"),
        Place(0, "attn"): Place(1, "attn"),
        Place(1, "attn"): Place(3, "attn"),
    }


@pytest.mark.slow
def test_a_compiled_student_matches_too():
    student, teacher = models()
    student.float(), teacher.float()
    hidden = HiddenLoss(student, TEACHER, HiddenArgs(weight=1.0), SUBNET)
    root = LossModel(student, hidden)
    compiled = torch.compile(root, backend="aot_eager")
    watch = Watch(teacher, hidden.pairs.values())
    watch.is_on = True
    found = []
    for model in (root, compiled, compiled):
        losses = model(IDS, IDS, TeacherLogits(hidden_states(teacher, IDS), None, watch.take()))
        losses.loss.backward()
        found.append((losses.hidden.item(), student.transformer.wte.weight.grad.clone()))
        student.zero_grad()
    for value, grad in found[1:]:
        assert value == pytest.approx(found[0][0], rel=1e-5) and torch.allclose(grad, found[0][1], atol=1e-6)


@pytest.mark.parametrize("projection", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_comes_nearer_to_the_teachers_stream_and_goes_on_exactly(tmp_path, monkeypatch, projection):
    teacher = checkpoint(tmp_path / "teacher", n_layer=3, n_embd=48)
    subnet = SubNet(config(n_layer=3, n_embd=48), n_layer="0,2", n_embd=32)
    subnet.save(tmp_path / "sub_network.yaml")
    kwargs = {
        "teacher_checkpoint_dir": teacher,
        "distill": DistillArgs(beta=0.0, hidden=HiddenArgs(weight=1.0, projection=projection)),
        "train": train_args(save_interval=2, max_tokens=20 * 8 * SEQ),
        "sub_network": tmp_path / "sub_network.yaml",
    }
    unbroken = run(tmp_path / "unbroken", **kwargs)
    parts = [row["hidden"] for row in rows(tmp_path / "unbroken", "hidden")]
    assert sum(parts[-3:]) < 0.8 * sum(parts[:3])
    assert same(unbroken, interrupted(tmp_path, monkeypatch, 4, **kwargs))
    assert [row["hidden"] for row in rows(tmp_path / "broken", "hidden")] == parts


def test_an_extracted_student_in_another_basis_keeps_it_over_a_resumption(tmp_path):
    teacher = checkpoint(tmp_path / "teacher", n_layer=3, n_embd=48)
    SubNet(config(n_layer=3, n_embd=48), n_layer="0,2", n_embd=32).save(tmp_path / "sub_network.yaml")
    extract_student(teacher, tmp_path / "sub_network.yaml", tmp_path / "student")
    basis = torch.linalg.qr(torch.randn(48, 32)).Q.T.contiguous()
    torch.save({"basis": basis}, tmp_path / "student/basis.pth")  # in the form after a repair
    kwargs = {
        "teacher_checkpoint_dir": teacher,
        "distill": DistillArgs(hidden=HiddenArgs(weight=1.0)),
        "train": train_args(save_interval=2),
    }
    unbroken = run(tmp_path / "unbroken", initial_checkpoint_dir=tmp_path / "student", **kwargs)
    assert torch.equal(torch.load(tmp_path / "unbroken/final/basis.pth", weights_only=True)["basis"], basis)
    step_two = tmp_path / "unbroken/step-00000002"
    assert same(unbroken, run(tmp_path / "resumed", resume=step_two, model_config=None, **kwargs))


@pytest.mark.parametrize(
    "hidden, message",
    [
        ({"weight": 1.0}, "the student's sub_network.yaml .* add --distill.hidden.projection true"),
        ({"weight": 1.0, "projection": True, "layers": [0, 2]}, "must be student layers from 0 to 1, got 2"),
    ],
)
def test_what_cannot_be_matched_is_refused(tmp_path, hidden, message):
    teacher = checkpoint(tmp_path / "teacher")
    with pytest.raises(UserError, match=message):
        run(tmp_path / "out", teacher_checkpoint_dir=teacher, distill=DistillArgs(hidden=HiddenArgs(**hidden)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["weight", "attention"])
def test_weights_are_not_negative(name):
    with pytest.raises(UserError, match=f"distill.hidden.{name} must be 0 or more, got -1"):
        HiddenArgs(**{name: -1})
