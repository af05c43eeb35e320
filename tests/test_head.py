"""Test the chunked head against the plain formula in float64, and against litgpt's own logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from litgpt import GPT, Config

from litgpt_whittle.distillation import chunk_scores, head, losses
from litgpt_whittle.distillation.head import HeadInput, TeacherLogits, head_loss, hidden_states
from litgpt_whittle.distillation.losses import forward_kl, l1, mse
from litgpt_whittle.distillation.objective import Objective, SparseTargets, Term
from litgpt_whittle.errors import UserError

N, V, E, E_TEACHER = 23, 37, 8, 12


def tensors(dtype=torch.float64, with_bias=True):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    student = HeadInput(draw(1, N, E), draw(V, E), draw(V) if with_bias else None)
    teacher = HeadInput(draw(1, N, E_TEACHER), draw(V, E_TEACHER), draw(V) if with_bias else None)
    targets = torch.randint(V, (1, N), generator=generator)
    return HeadInput(*(x if x is None else x.requires_grad_() for x in student)), teacher, targets


def capped(logits, cap):
    return logits if cap is None else cap * torch.tanh(logits / cap)


def plain(student, teacher, targets, objective, cap):
    """Compute the paper's formula with all logits at once."""
    z, t = (capped(F.linear(*x), cap).flatten(0, 1) for x in (student, teacher))
    counts = targets.flatten() != -100
    z, t, y = z[counts], t[counts], targets.flatten()[counts]
    p, q = (torch.softmax(x / objective.temperature, -1) for x in (t, z))
    kl = (p * (p.log() - q.log())).sum(-1).mean()
    ce = F.cross_entropy(z, y)
    return objective.alpha * ce + objective.beta * objective.temperature**2 * kl, ce, kl


def another_forward_kl(student, teacher):
    """Compute forward KL in a different function object, so that the head uses autograd instead of its closed form."""
    return forward_kl(student, teacher)


@pytest.mark.parametrize("chunk_size", [4, 23, 64])
@pytest.mark.parametrize("loss", [forward_kl, another_forward_kl])
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("ignored", [[], [0, 1, 2, 3, 9]])
def test_value_and_gradients_match_the_plain_formula(chunk_size, loss, cap, with_bias, ignored):
    student, teacher, targets = tensors(with_bias=with_bias)
    targets[0, ignored] = -100
    objective = Objective(0.2, 0.8, 0.9, (Term(loss),))
    inputs = [x for x in student if x is not None]
    expected = plain(student, teacher, targets, objective, cap)
    expected_grads = torch.autograd.grad(3 * expected[0], inputs)

    got = head_loss(student, targets, objective, TeacherLogits(teacher, cap), cap, chunk_size)
    grads = torch.autograd.grad(3 * got.loss, inputs)

    for a, b in zip((*got[:3], *grads), (*expected, *expected_grads)):
        assert torch.allclose(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("n_rows", [1, 3, 5])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_a_chunk_may_be_scored_in_parts(monkeypatch, n_rows, cap):
    monkeypatch.setitem(head.PART_ELEMENTS, "cpu", n_rows * V + 1)
    student, teacher, targets = tensors()
    targets[0, 4:7] = -100
    objective = Objective(0.2, 0.8, 0.9)
    expected = plain(student, teacher, targets, objective, cap)
    expected_grads = torch.autograd.grad(expected[0], student)
    got = head_loss(student, targets, objective, TeacherLogits(teacher, cap), cap, 8)
    for a, b in zip((*got[:3], *torch.autograd.grad(got.loss, student)), (*expected, *expected_grads)):
        assert torch.allclose(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("ignored", [[], [0, 1, 2, 3, 9], range(N)])
def test_compiled_scores_are_those_of_the_plain_formula(monkeypatch, cap, ignored):
    """One graph for all chunks and all values of a schedule; a backend that only traces keeps the test short."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    traced = torch.compile(chunk_scores._dense_scores, backend=backend, fullgraph=True)
    monkeypatch.setattr(chunk_scores, "_compiled", lambda: traced)
    for beta, temperature in ((0.8, 0.9), (0.7, 1.0), (0.1, 2.0)):
        student, teacher, targets = tensors()
        targets[0, list(ignored)] = -100
        objective = Objective(0.2, beta, temperature)
        got = head_loss(student, targets, objective, TeacherLogits(teacher, cap), cap, 8, compiles_scores=True)
        grads = torch.autograd.grad(got.loss, student)
        assert graphs
        if len(ignored) == N:
            assert not any(value.any() for value in (*got[:3], *grads))
            continue
        expected = plain(student, teacher, targets, objective, cap)
        for a, b in zip((*got[:3], *grads), (*expected, *torch.autograd.grad(expected[0], student))):
            assert torch.allclose(a, b, atol=1e-10, rtol=1e-10)
    assert len(graphs) <= 2


@pytest.mark.parametrize("losses", [[forward_kl, losses.reverse_kl], [losses.reverse_kl]])
def test_what_cannot_be_compiled_is_scored_without(monkeypatch, losses):
    monkeypatch.setattr(chunk_scores, "_compiled", None)
    student, teacher, targets = tensors()
    objective = Objective(0.2, 0.8, 0.9, tuple(Term(loss, 0.5) for loss in losses))
    one, other = (
        head_loss(student, targets, objective, TeacherLogits(teacher), compiles_scores=compiles)
        for compiles in (True, False)
    )
    assert torch.equal(one.loss, other.loss)


@pytest.mark.parametrize("tile", [(1, 1), (4, 5), (5, 36), (64, 64)])
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("ignored", [[], [0, 1, 2, 3, 9], range(N)])
def test_cross_entropy_alone_needs_no_more_logits_than_a_tile(monkeypatch, tile, cap, with_bias, ignored):
    monkeypatch.setattr(head, "TILE", tile)
    student, _, targets = tensors(with_bias=with_bias)
    targets[0, list(ignored)] = -100
    logits = capped(F.linear(*student), cap)[0]
    expected = F.cross_entropy(logits, targets[0], reduction="sum") / max(1, N - len(ignored))
    with torch.no_grad():
        got = head_loss(student, targets, Objective(0.3, 0.0), softcap=cap)
    assert torch.allclose(got.ce, expected, atol=1e-12, rtol=1e-12)
    assert torch.allclose(got.loss, 0.3 * expected, atol=1e-12, rtol=1e-12) and got.distill == 0


def test_cross_entropy_alone_stands_logits_that_would_overflow():
    student, _, targets = tensors()
    student = HeadInput(1e3 * student.hidden.detach(), student.weight.detach(), student.bias.detach())
    expected = F.cross_entropy(F.linear(*student)[0], targets[0])
    assert torch.allclose(head_loss(student, targets).ce, expected, rtol=1e-12)


@pytest.mark.parametrize("alpha, beta", [(1.0, 0.0), (0.3, 0.0), (0.0, 1.0)])
def test_either_term_may_be_left_out(alpha, beta):
    student, teacher, targets = tensors()
    objective = Objective(alpha, beta, 2.0)
    expected = torch.autograd.grad(plain(student, teacher, targets, objective, None)[0], student)
    got = torch.autograd.grad(head_loss(student, targets, objective, TeacherLogits(teacher), None, 5).loss, student)
    for a, b in zip(got, expected):
        assert torch.allclose(a, b, atol=1e-10)


def test_without_targets_all_tokens_count_and_there_is_no_cross_entropy():
    student, teacher, targets = tensors()
    objective, inputs = Objective(0.0, 1.0, 2.0), [x for x in student if x is not None]
    expected = head_loss(student, targets, objective, TeacherLogits(teacher))
    got = head_loss(student, None, objective, TeacherLogits(teacher))
    assert torch.equal(got.loss, expected.loss) and float(got.ce) == 0.0
    for a, b in zip(*(torch.autograd.grad(found.loss, inputs) for found in (got, expected))):
        assert torch.equal(a, b)


def test_without_gradients_only_the_values_are_computed():
    student, teacher, targets = tensors()
    objective = Objective(0.2, 0.8, 0.9)
    with_grad = head_loss(student, targets, objective, TeacherLogits(teacher))
    with torch.no_grad():
        without = head_loss(student, targets, objective, TeacherLogits(teacher))
    assert not without.loss.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(with_grad[:3], without))


def test_targets_that_are_all_ignored_give_zero_and_zero_gradients():
    student, teacher, targets = tensors()
    found = head_loss(student, targets.fill_(-100), Objective(0.2, 0.8, 0.9), TeacherLogits(teacher))
    found.loss.backward()
    assert found.loss == 0 and all(not x.grad.any() for x in student)


def test_frozen_inputs_get_no_gradient():
    student, _, targets = tensors()
    frozen = HeadInput(student.hidden, student.weight.detach(), student.bias.detach())
    head_loss(frozen, targets).loss.backward()
    assert student.hidden.grad is not None and student.weight.grad is None


def test_bf16_autocast_keeps_the_losses_in_fp32_and_near_the_exact_ones():
    student, teacher, targets = tensors(torch.float32)
    objective = Objective(0.2, 0.8, 0.9)
    exact = plain(student, teacher, targets, objective, None)[0]
    expected = torch.autograd.grad(exact, student)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head_loss(student, targets, objective, TeacherLogits(teacher), chunk_size=5)
    assert found.loss.dtype == torch.float32
    assert found.loss.item() == pytest.approx(exact.item(), rel=2e-2)
    for a, b in zip(torch.autograd.grad(found.loss, student), expected):
        assert a.dtype == torch.float32
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999


def test_gradients_cannot_be_taken_twice():
    student, _, targets = tensors()
    loss = head_loss(student, targets).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="freed after one backward pass"):
        loss.backward()


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("tied", [False, True])
def test_hidden_states_of_a_litgpt_model_give_its_loss_and_gradients(cap, tied):
    config = Config(
        block_size=16,
        padded_vocab_size=V,
        n_layer=2,
        n_head=2,
        n_embd=16,
        final_logit_softcapping=cap,
        lm_head_bias=True,
    )
    torch.manual_seed(0)
    model = GPT(config).double()
    if tied:
        model.lm_head.weight = model.transformer.wte.weight
    idx = torch.randint(V, (2, 9))
    names = list(model.state_dict())
    logits = model(idx)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), idx[:, 1:].flatten())
    expected.backward()
    expected_grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    got = head_loss(hidden_states(model, idx[:, :-1]), idx[:, 1:], softcap=cap, chunk_size=3).loss
    got.backward()

    assert torch.allclose(got, expected, atol=1e-10)
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, expected_grads[name], atol=1e-10), name
    assert list(model.state_dict()) == names, "tapping the head must not rename weights"
    assert (model.lm_head.weight is model.transformer.wte.weight) == tied
    assert torch.equal(model(idx), logits), "outside of hidden_states the model gives its logits"


def test_full_logits_never_exist():
    """Records the largest float tensor that any operation creates."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, torch.Tensor):
                    self.numel = max(self.numel, x.numel())
            return out

    hidden, weight = torch.randn(1, 512, 4, requires_grad=True), torch.randn(64, 4, requires_grad=True)
    teacher = TeacherLogits(HeadInput(torch.randn(1, 512, 4), torch.randn(64, 4), None))
    with Largest() as largest:
        head = HeadInput(hidden, weight, None)
        targets = torch.randint(64, (1, 512))
        head_loss(head, targets, Objective(0.2, 0.8, 0.9), teacher, chunk_size=32).loss.backward()
    assert largest.numel <= 512 * 4 < 512 * 64 // 6
    assert math.isfinite(hidden.grad.sum())


class Known:
    """Soft targets with some known tokens, as from a cached teacher."""

    def __init__(self, targets: SparseTargets) -> None:
        self.targets = targets

    def chunk(self, start, stop):
        return SparseTargets(*(x if x is None else x[start:stop] for x in self.targets))


def known_of(teacher, k, temperature, with_tail=True):
    """Return the teacher's k most likely tokens, with the rest, or normalised to sum to 1."""
    probs, ids = torch.softmax(F.linear(*teacher).flatten(0, 1) / temperature, -1).topk(k)
    if not with_tail:
        return SparseTargets(ids, (probs / probs.sum(-1, keepdim=True)).log(), None)
    return SparseTargets(ids, probs.log(), (1 - probs.sum(-1, keepdim=True)).clamp(min=0).log())


@pytest.mark.parametrize("loss", [mse, l1])
def test_a_loss_of_logits_refuses_sparse_targets(loss):
    student, teacher, targets = tensors()
    known = Known(known_of(teacher, 3, 1.0))
    with pytest.raises(UserError, match=f"{loss.__name__} needs all logits, got only distributions .*forward_kl"):
        head_loss(student, targets, Objective(0.2, 0.8, 1.0, (Term(forward_kl), Term(loss))), known)


def gradients(student, targets, objective, teacher, chunk_size=5):
    inputs = [x for x in student if x is not None]
    found = head_loss(student, targets, objective, teacher, None, chunk_size)
    return [*found[:3], *torch.autograd.grad(found.loss, inputs)]


@pytest.mark.parametrize("k, with_tail", [(1, True), (6, True), (V, True), (6, False)])
@pytest.mark.parametrize("temperature", [0.9, 2.0])
def test_the_closed_form_for_known_tokens_is_what_autograd_gives(k, with_tail, temperature):
    student, teacher, targets = tensors()
    targets[0, [0, 7]] = -100
    known = Known(known_of(teacher, k, temperature, with_tail))
    closed, plain_loss = (
        gradients(student, targets, Objective(0.2, 0.8, temperature, (Term(loss),)), known)
        for loss in (forward_kl, another_forward_kl)
    )
    for a, b in zip(closed, plain_loss):
        assert torch.allclose(a, b, atol=1e-10)


def test_knowing_the_whole_vocabulary_is_knowing_the_logits():
    student, teacher, targets = tensors()
    objective = Objective(0.2, 0.8, 0.9)
    full = gradients(student, targets, objective, TeacherLogits(teacher))
    known = gradients(student, targets, objective, Known(known_of(teacher, V, 0.9)))
    for a, b in zip(full, known):
        assert torch.allclose(a, b, atol=1e-9)


def test_a_student_that_is_sure_of_known_tokens_has_finite_gradients():
    student, teacher, targets = tensors(torch.float32)
    sure = HeadInput(student.hidden, (student.weight * 200).detach().requires_grad_(), student.bias)
    found = gradients(sure, targets, Objective(0.0, 1.0, 0.5), Known(known_of(teacher, 4, 0.5)))
    assert all(torch.isfinite(x).all() for x in found)


@pytest.mark.parametrize("known", [False, True])
def test_several_losses_add_up_with_their_weights(known):
    student, teacher, targets = tensors()
    soft = Known(known_of(teacher, 6, 0.9)) if known else TeacherLogits(teacher)
    terms = [Term(forward_kl, 0.7), Term(losses.jensen_shannon, 0.2), Term(losses.total_variation, 0.3)]
    together = gradients(student, targets, Objective(0.0, 1.0, 0.9, tuple(terms)), soft)
    alone = [gradients(student, targets, Objective(0.0, 1.0, 0.9, (term,)), soft) for term in terms]
    for total, *parts in [*zip(together, *alone)][:1] + [*zip(together, *alone)][2:]:
        assert torch.allclose(total, sum(parts), atol=1e-10)


def test_losses_of_logits_are_divided_by_the_temperature():
    student, teacher, targets = tensors()
    z, t = (F.linear(*x).flatten(0, 1) for x in (student, teacher))
    expected = 0.5 * 4 * (z / 2 - t / 2).square().mean()
    got = head_loss(student, targets, Objective(0.0, 0.5, 2.0, (Term(losses.mse),)), TeacherLogits(teacher)).loss
    assert torch.allclose(got, expected, atol=1e-10)
    wanted = torch.autograd.grad(expected, student.hidden)[0]
    assert torch.allclose(torch.autograd.grad(got, student.hidden)[0], wanted, atol=1e-10)
