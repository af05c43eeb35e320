"""Test tokens with logits of -inf: they contribute nothing, against formulas in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES
from test_head import Known
from test_repair import half, model, repair, student_of, windows

from litgpt_whittle import registry
from litgpt_whittle.batches import Batch
from litgpt_whittle.calibration import Calibration
from litgpt_whittle.distillation import head, losses
from litgpt_whittle.distillation.codecs import make_codec
from litgpt_whittle.distillation.head import HeadInput, TeacherLogits, head_loss
from litgpt_whittle.distillation.objective import Objective, Term
from litgpt_whittle.errors import UserError
from litgpt_whittle.fitness.kl import KLDivergence
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import SuperGPT, extract_weights, student_model
from litgpt_whittle.training.caching import encode

N, V, E = 13, 24, 6
IMPOSSIBLE = [0, 3, *range(8, 16), 23]
POSSIBLE = [i for i in range(V) if i not in IMPOSSIBLE]
SHARE = torch.ones(N, dtype=torch.float64) / (N - 2)
SHARE[[2, 5]] = 0.0  # their targets are masked
T = 0.9


def tensors(student_too):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    student, teacher = (HeadInput(draw(1, N, E), draw(V, E), draw(V)) for _ in range(2))
    teacher.bias[IMPOSSIBLE] = -torch.inf
    if student_too:
        student.bias[IMPOSSIBLE] = -torch.inf
    targets = torch.tensor(POSSIBLE)[torch.randint(len(POSSIBLE), (1, N), generator=generator)]
    targets[0, [2, 5]] = -100
    return HeadInput(*(x.requires_grad_() for x in student)), teacher, targets


def kl(p, q):
    """Return KL over the columns with nonzero probability in p."""
    seen = p.detach().amax(0) > 0
    return (p[:, seen] * (p[:, seen] / q[:, seen]).log()).sum(-1)


def of_logits(size):
    return lambda z, t: size(z[:, POSSIBLE] / T - t[:, POSSIBLE] / T).mean(-1)


FORMULAS = {
    "forward_kl": kl,
    "reverse_kl": lambda p, q: kl(q, p),
    "symmetric_kl": lambda p, q: (kl(p, q) + kl(q, p)) / 2,
    "jensen_shannon": lambda p, q: (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2,
    "total_variation": lambda p, q: (p - q).abs().sum(-1) / 2,
    "soft_cross_entropy": lambda p, q: -(p[:, POSSIBLE] * q[:, POSSIBLE].log()).sum(-1),
    "cosine": lambda p, q: 1 - (p * q).sum(-1) / (p.norm(dim=-1) * q.norm(dim=-1)),
}
ON_LOGITS = {"mse": of_logits(torch.square), "l1": of_logits(torch.abs)}


def formula(name, student, teacher, targets, student_too):
    """Return the mean distance and cross-entropy over unmasked tokens; the student's vocabulary is the possible one."""
    columns = POSSIBLE if student_too else list(range(V))
    z = F.linear(student.hidden[0], student.weight[columns], student.bias[columns])
    t = F.linear(*teacher)[0]
    place = torch.tensor([columns.index(i) if i >= 0 else 0 for i in targets[0].tolist()])
    ce = (F.cross_entropy(z, place, reduction="none") * SHARE).sum()
    if name in ON_LOGITS:
        whole = torch.zeros(N, V, dtype=torch.float64).index_add(1, torch.tensor(columns), z)
        return (ON_LOGITS[name](whole, t) * SHARE).sum(), ce
    q = torch.zeros(N, V, dtype=torch.float64).index_add(1, torch.tensor(columns), torch.softmax(z / T, -1))
    return (FORMULAS[name](torch.softmax(t / T, -1), q) * SHARE).sum(), ce


def test_every_loss_is_tested():
    assert sorted(FORMULAS | ON_LOGITS) == registry.names("litgpt_whittle.losses")


CASES = [(name, student_too) for name in FORMULAS | ON_LOGITS for student_too in (True, False)]
# infinite by definition: the student gives probability to a token that the teacher excludes
CASES = [(name, too) for name, too in CASES if too or name not in ("reverse_kl", "symmetric_kl")]


@pytest.mark.parametrize("name, student_too", CASES)
def test_losses_and_gradients_of_a_live_teacher_are_the_formulas(name, student_too):
    student, teacher, targets = tensors(student_too)
    distance, ce = formula(name, student, teacher, targets, student_too)
    expected = 0.2 * ce + 0.8 * T**2 * distance
    expected_grads = torch.autograd.grad(expected, student)
    objective = Objective(0.2, 0.8, T, (Term(getattr(losses, name)),))
    got = head_loss(student, targets, objective, TeacherLogits(teacher), None, 5)
    assert torch.allclose(torch.stack(got[:3]), torch.stack([expected, ce, distance]), atol=1e-12)
    for a, b in zip(torch.autograd.grad(got.loss, student), expected_grads):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("codec", ["full", {"top_k": {"k": 18}}, {"top_k": {"k": 4}}, {"sampled": {"draws": 5}}])
@pytest.mark.parametrize("name, student_too", CASES)
def test_a_cached_teacher_gives_finite_losses_near_those_of_the_live_one(codec, name, student_too):
    codec = make_codec(codec, V, T)
    if codec.gives != "logits" and name in ON_LOGITS:
        pytest.skip("logits are not stored")
    if codec.gives == "samples" and not hasattr(getattr(losses, name), "is_linear"):
        pytest.skip("samples serve linear losses")
    student, teacher, targets = tensors(student_too)
    uniform = torch.rand(N, codec.n_uniform, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    stored = encode(codec, TeacherLogits(teacher), uniform, torch.device("cpu"))
    decoded = codec.decode(stored)
    soft = TeacherLogits(teacher) if codec.gives == "logits" else Known(decoded)
    if codec.gives == "samples":
        assert not set(decoded.ids.flatten().tolist()) & set(IMPOSSIBLE)
    objective = Objective(0.2, 0.8, T, (Term(getattr(losses, name)),))
    got = head_loss(student, targets, objective, soft, None, 5)
    assert all(torch.isfinite(x).all() for x in (*got[:3], *torch.autograd.grad(got.loss, student)))
    if codec.gives == "samples" or getattr(codec, "k", V) < len(POSSIBLE):
        return  # with fewer known tokens
    expected = head_loss(student, targets, objective, TeacherLogits(teacher), None, 5)
    assert got.distill.item() == pytest.approx(expected.distill.item(), abs=2e-3)


def test_what_the_student_alone_finds_impossible_is_infinitely_far():
    student, teacher, targets = tensors(student_too=True)
    teacher.bias.zero_()
    got = head_loss(student, targets, Objective(0.2, 0.8, T), TeacherLogits(teacher))
    assert got.distill == math.inf and got.loss == math.inf and got.ce < math.inf
    targets[0, 0] = IMPOSSIBLE[1]
    assert head_loss(student, targets).ce == math.inf


@pytest.mark.parametrize("tile", [(4, 4), (512, 1024)])
def test_cross_entropy_in_tiles_passes_over_a_tile_without_probability(monkeypatch, tile):
    monkeypatch.setattr(head, "TILE", tile)
    student, teacher, targets = tensors(student_too=True)
    expected = formula("mse", student, teacher, targets, True)[1]
    with torch.no_grad():
        assert torch.allclose(head_loss(student, targets).ce, expected, atol=1e-12)


def test_logits_that_are_no_numbers_are_not_cached():
    _, teacher, _ = tensors(True)
    codec = make_codec("full", V, T)
    uniform = torch.empty(N, 0, dtype=torch.float64)
    for value, places in ((math.nan, 1), (math.inf, 1), (-math.inf, slice(None))):
        bias = teacher.bias.clone()
        bias[places] = value
        with pytest.raises(UserError, match="logits must be finite"):
            encode(codec, TeacherLogits(teacher._replace(bias=bias)), uniform, torch.device("cpu"))


# -- whole models

PHI = ARCHITECTURES["phi-2"]  # its head has a bias


def impossible(net):
    """Return a model with a head bias of -inf for some tokens."""
    with torch.no_grad():
        net.lm_head.bias[IMPOSSIBLE] = -torch.inf
    return net


def distance_of(student, teacher, ids):
    """Return KL(teacher ‖ student) over the possible tokens, by PyTorch in float64."""
    columns = [i for i in range(teacher.config.padded_vocab_size) if i not in IMPOSSIBLE]
    q, p = (net(ids).double().flatten(0, 1)[:, columns].log_softmax(-1) for net in (student, teacher))
    return F.kl_div(q, p, log_target=True, reduction="batchmean").item()


def test_a_repair_reports_the_divergence_over_possible_tokens(tmp_path):
    teacher = impossible(model(PHI))
    repaired = repair(teacher, half(PHI), tmp_path, n=256, head_passes=2)
    calibration = Calibration(windows(PHI, 256))
    held_out = calibration.windows[calibration.n_fitted // calibration.shape[1] :]
    before, after = repaired.head
    assert after < before < math.inf
    assert after == pytest.approx(distance_of(student_of(repaired), teacher, held_out), rel=1e-3)
    assert torch.equal(repaired.weights["lm_head.bias"].isinf(), teacher.lm_head.bias.isinf())


@torch.no_grad()
def test_candidates_are_scored_over_possible_tokens():
    teacher = SuperGPT(PHI)
    teacher.load_state_dict(impossible(model(PHI)).state_dict())
    subnet, ids = SubNet(PHI, n_layer=2), windows(PHI, 3)
    student = student_model(subnet)
    student.load_state_dict(extract_weights(teacher, subnet))
    found = KLDivergence(teacher.eval(), [Batch(ids, ids)])(subnet)["kl"]
    assert found == pytest.approx(distance_of(student, teacher, ids), rel=1e-4)
