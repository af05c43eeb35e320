"""Test teachers and students with differently padded vocabularies against float64 formulas over the shared entries."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_head import another_forward_kl
from test_train import SEQ, VOCAB, TokenData, checkpoint, config, rows, run, train_args
from texts import write_word_tokenizer

from litgpt_whittle import load_model
from litgpt_whittle.commands import cache_teacher
from litgpt_whittle.commands.cache_teacher import WindowArgs
from litgpt_whittle.distillation import losses
from litgpt_whittle.distillation.args import DistillArgs
from litgpt_whittle.distillation.codecs import make_codec
from litgpt_whittle.distillation.head import HeadInput, TeacherLogits, head_loss
from litgpt_whittle.distillation.objective import Objective, Term
from litgpt_whittle.errors import UserError
from litgpt_whittle.tensors import IGNORE_INDEX
from litgpt_whittle.training.teacher import CachedTargets

N, E = 11, 6
SIZES = [(21, 29), (29, 21)]
"""Entries of the student and of the teacher; padding begins at 20"""
LOGITS = [losses.mse, losses.l1]
LINEAR = [losses.forward_kl, losses.soft_cross_entropy]
PROBABILITIES = LINEAR + [
    another_forward_kl, losses.reverse_kl, losses.symmetric_kl, losses.jensen_shannon, losses.total_variation,
    losses.cosine,
]  # fmt: skip


def tensors(n_student, n_teacher):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    student = HeadInput(draw(1, N, E), draw(n_student, E), draw(n_student))
    teacher = HeadInput(draw(1, N, E), draw(n_teacher, E), draw(n_teacher))
    targets = torch.randint(20, (1, N), generator=generator)
    targets[0, 3] = IGNORE_INDEX
    return HeadInput(*(x.requires_grad_() for x in student)), teacher, targets


def check(objective, student, targets, said, distance, atol=1e-10):
    """Compare losses and gradients with those of `distance`, from the student's logits (N, V) to N values."""
    z, counts = F.linear(*student).flatten(0, 1), targets.flatten() != IGNORE_INDEX
    expected_ce = F.cross_entropy(z, targets.flatten())
    expected_distance = distance(z)[counts].mean()
    expected = objective.alpha * expected_ce + objective.beta * objective.temperature**2 * expected_distance
    grads = torch.autograd.grad(expected, student)
    got = head_loss(student, targets, objective, said, chunk_size=4)
    values = expected, expected_ce, expected_distance
    for a, b in zip((*got[:3], *torch.autograd.grad(got.loss, student)), (*values, *grads)):
        assert torch.allclose(a, b, atol=atol, rtol=atol)


@pytest.mark.parametrize("loss", PROBABILITIES + LOGITS, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("sizes", SIZES)
def test_distances_are_those_of_the_distributions_over_the_shared_entries(sizes, loss):
    student, teacher, targets = tensors(*sizes)
    t, n, logits = 0.9, min(sizes), F.linear(*teacher).flatten(0, 1)

    def distance(z):
        if loss in LOGITS:
            return loss(z[:, :n] / t, logits[:, :n] / t)
        return loss(torch.log_softmax(z[:, :n] / t, -1), torch.log_softmax(logits[:, :n] / t, -1))

    check(Objective(0.3, 0.7, t, (Term(loss),)), student, targets, TeacherLogits(teacher), distance)


def cached(codec_name, settings, teacher, t):
    """Return the cached targets of a teacher, and each token's known probabilities with the tail's."""
    logits = F.linear(*teacher).flatten(0, 1)
    codec = make_codec({codec_name: settings}, logits.size(1), t)
    uniform = torch.rand(N, codec.n_uniform, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    stored = codec.encode(logits.float(), uniform)
    said, known = codec.decode(stored), []
    for i in range(N):
        pairs = [(j, math.exp(p)) for j, p in zip(said.ids[i].tolist(), said.log_p[i].tolist()) if p > -math.inf]
        known.append((dict(pairs), 0.0 if said.log_tail is None else said.log_tail[i].exp().item()))
    return CachedTargets(codec, stored), known


def events(z, known, tail, n, t):
    """Return log-probabilities of the known shared tokens, and of all others together if there is a tail."""
    known = {token: p for token, p in known.items() if token < n}
    total = sum(known.values()) + tail
    log_q = torch.log_softmax(z[:n] / t, -1)
    ids = list(known)
    teacher = torch.tensor([p / total for p in known.values()], dtype=torch.float64).log()
    if not tail:
        return log_q[ids], teacher
    others = [j for j in range(n) if j not in known]
    rest = torch.tensor([math.log(tail / total)], dtype=torch.float64)
    return torch.cat((log_q[ids], log_q[others].logsumexp(0, keepdim=True))), torch.cat((teacher, rest))


@pytest.mark.parametrize("loss", PROBABILITIES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("sizes", SIZES)
def test_a_cache_of_the_likeliest_tokens_gives_the_same_events_without_those_that_the_student_lacks(sizes, loss):
    student, teacher, targets = tensors(*sizes)
    t, n = 0.9, min(sizes)
    said, known = cached("top_k", {"k": 9}, teacher, t)
    assert sizes[0] > sizes[1] or len({len([j for j in ids if j >= n]) for ids, _ in known}) > 2

    def distance(z):
        pairs = [events(z[i], *known[i], n, t) for i in range(N)]
        return torch.cat([loss(q[None], p[None]) for q, p in pairs])

    check(Objective(0.3, 0.7, t, (Term(loss),)), student, targets, said, distance, atol=1e-6)


@pytest.mark.parametrize("loss", LINEAR, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("draws", [1, 5])
def test_samples_of_what_the_student_lacks_do_not_count(sizes, loss, draws):
    student, teacher, targets = tensors(*sizes)
    t, n = 0.9, min(sizes)
    said, known = cached("sampled", {"draws": draws}, teacher, t)

    def distance(z):
        pairs = [events(z[i], *known[i], n, t) for i in range(N) if any(j < n for j in known[i][0])]
        values = iter([loss(q[None], p[None]) for q, p in pairs])
        zero = z.new_zeros(1)
        return torch.cat([next(values) if any(j < n for j in known[i][0]) else zero for i in range(N)])

    check(Objective(0.3, 0.7, t, (Term(loss),)), student, targets, said, distance, atol=1e-6)


def test_a_cache_must_know_fewer_tokens_than_the_student_has():
    student, teacher, targets = tensors(21, 29)
    said, _ = cached("top_k", {"k": 21}, teacher, 0.9)
    with pytest.raises(
        UserError, match="fewer tokens per distribution than the student's 21 vocabulary entries, got 21"
    ):
        head_loss(student, targets, Objective(0.3, 0.7, 0.9), said)


def models(tmp_path, n_student, n_teacher, own=VOCAB, theirs=VOCAB):
    """Make a student and a teacher, with tokenizers of the given numbers of words."""
    student = checkpoint(tmp_path / "student", padded_vocab_size=n_student)
    teacher = checkpoint(tmp_path / "teacher", seed=1, n_embd=48, padded_vocab_size=n_teacher)
    for folder, n in ((student, own), (teacher, theirs)):
        write_word_tokenizer(folder, n)
    return student, teacher


STEP = {"train": train_args(max_steps=1), "distill": DistillArgs(alpha=0.0, beta=1.0)}


@pytest.mark.parametrize("sizes", [(100, 128), (128, 100)])
def test_models_padded_differently_distill_live_and_from_a_cache(sizes, tmp_path):
    student, teacher = models(tmp_path, *sizes)
    common = {"initial_checkpoint_dir": student, "data": TokenData(n_train=8, n_val=4)} | STEP
    run(tmp_path / "live", teacher_checkpoint_dir=teacher, **common)
    data = TokenData(n_train=8, n_val=4)
    cache_teacher.setup(teacher, data, tmp_path / "cache", "full", train=WindowArgs(4, SEQ), precision="32-true")
    weights = run(tmp_path / "cached", teacher_cache=tmp_path / "cache", **common)
    assert weights["lm_head.weight"].size(0) == sizes[0]
    found = [rows(tmp_path / name)[0]["distill"] for name in ("live", "cached")]

    ids = torch.cat(list(data.train_dataloader()))[:, :-1]
    with torch.no_grad():
        log_q, log_p = (
            torch.log_softmax(load_model(folder, dtype=torch.float64)(ids)[..., :100] / 0.9, -1)
            for folder in (student, teacher)
        )
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert found == pytest.approx([expected, expected], abs=1e-5)


def test_a_new_student_takes_the_teachers_tokenizer(tmp_path):
    _, teacher = models(tmp_path, 100, 128)
    run(tmp_path / "out", teacher_checkpoint_dir=teacher, model_config=config(padded_vocab_size=112), **STEP)
    assert (tmp_path / "out/final/tokenizer.json").is_file()


@pytest.mark.parametrize(
    "change, message",
    [
        ("drop", "got 128 and 100 entries, and '.*student' has no tokenizer to compare; copy one there"),
        ("drop the teacher's", "got 128 and 100 entries, and '.*teacher' has no tokenizer to compare"),
        ("sentencepiece", "a tokenizer.json cannot be compared with a tokenizer.model"),
        ("more words", "first in the token 'w98', which has no id and the id 98; choose a teacher"),
        ("too many words", "the token 'w119' with id 119 is missing from one of them"),
    ],
)
def test_vocabularies_that_may_be_others_are_refused(change, message, tmp_path):
    n = {"more words": (98, 100), "too many words": (120, 120)}.get(change, (100, 100))
    student, teacher = models(tmp_path, 100, 128, *n)
    folder = teacher if change == "drop the teacher's" else student
    if change.startswith(("drop", "sentencepiece")):
        (folder / "tokenizer.json").unlink()
    if change == "sentencepiece":
        (folder / "tokenizer.model").write_bytes(b"\x0a")
    with pytest.raises(UserError, match=message) as error:
        run(tmp_path / "out", initial_checkpoint_dir=student, teacher_checkpoint_dir=teacher, **STEP)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
