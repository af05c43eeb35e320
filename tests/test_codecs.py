"""Test codecs: round trips are exact up to the stated error, and samples are unbiased."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from litgpt_whittle import registry
from litgpt_whittle.distillation import losses
from litgpt_whittle.distillation.cache import KEY_BYTES, Layout
from litgpt_whittle.distillation.codecs import Full, Sampled, TopK, make_codec, pack_ids, unpack_ids, with_settings
from litgpt_whittle.distillation.head import HeadInput, head_loss
from litgpt_whittle.distillation.objective import Objective, SparseTargets, Term
from litgpt_whittle.errors import UserError
from litgpt_whittle.testing import inputs
from litgpt_whittle.testing.codecs import CHECKS, encoded, probabilities

V, N = 37, 23
NONE = torch.empty(N, 0, dtype=torch.float64)


def random_logits(n=N, v=V, seed=0, scale=3.0):
    return inputs.random_logits(n, v, seed, scale)


@pytest.mark.parametrize("name", registry.names("litgpt_whittle.codecs"))
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_codec_keeps_the_rules(name, check):
    check(registry.lookup("litgpt_whittle.codecs", name))


@pytest.mark.parametrize(
    "codec", [partial(TopK, k=1), partial(TopK, k=8), partial(TopK, k=V), partial(Sampled, draws=1)]
)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_settings_keep_the_rules(codec, check):
    check(codec)


def test_the_codecs_are_registered():
    names = registry.names("litgpt_whittle.codecs")
    assert [registry.lookup("litgpt_whittle.codecs", name) for name in names] == [Full, Sampled, TopK]
    assert with_settings("sampled") == {"sampled": {"draws": 12}} and with_settings("full") == {"full": {}}
    assert with_settings({"top_k": {"k": 3}}) == {"top_k": {"k": 3}}
    assert make_codec({"top_k": {"k": 3}}, V, 0.9).k == 3


@pytest.mark.parametrize(
    "choice, message",
    [
        ("nothing", "there is no 'nothing' in litgpt_whittle.codecs; choose from full, sampled, top_k"),
        ({"top_k": {"n": 3}}, "the codec top_k has no setting 'n'; it takes k$"),
        ({"sampled": {"draws": "x"}}, "draws must be at least 1, got '?x"),
        ({"full": {"k": 3}}, "the codec full has no setting 'k'; it takes none$"),
        ({"top_k": {}, "full": {}}, "codec must be one name"),
        ({"top_k": 3}, "codec must be one name"),
        ({"top_k": {"k": 0}}, "k must be between 1 and the vocabulary's 37 tokens, got 0"),
        ({"top_k": {"k": 38}}, "k must be between 1 and the vocabulary's 37 tokens, got 38"),
        ({"top_k": {"k": "3"}}, "k must be between 1"),
        ({"sampled": {"draws": 0}}, "draws must be at least 1, got 0"),
    ],
)
def test_what_is_no_codec_is_refused_in_one_line(choice, message):
    with pytest.raises(UserError, match=message) as refused:
        make_codec(choice, V, 0.9)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "choice, vocab_size, limit",
    [
        ({"top_k": {"k": 64}}, 50_304, 260),
        ({"top_k": {"k": 64}}, 65_536, 260),
        ({"top_k": {"k": 64}}, 152_064, 260),
        ({"sampled": {"draws": 12}}, 50_304, 50),
        ({"sampled": {"draws": 12}}, 152_064, 50),
    ],
)
def test_bytes_per_token_are_within_their_limits_tokens_and_keys_counted(choice, vocab_size, limit):
    layout = Layout(make_codec(choice, vocab_size, 0.9), 2048)
    assert layout.window_bytes / 2048 <= limit
    assert layout.codec.n_bytes * 2048 < layout.window_bytes - KEY_BYTES


@given(st.integers(1, 2**20), st.integers(0, 1000))
def test_packed_ids_come_back(vocab_size, seed):
    ids = torch.from_numpy(np.random.default_rng(seed).integers(vocab_size, size=(3, 5)))
    ids[0, 0], ids[0, 1] = 0, vocab_size - 1
    packed = pack_ids(ids, vocab_size)
    assert packed.dtype == torch.uint8 and torch.equal(unpack_ids(packed), ids)
    assert 256 ** packed.size(-1) >= vocab_size
    assert packed.size(-1) == 1 or 256 ** (packed.size(-1) - 1) < vocab_size


def test_full_gives_the_same_logits():
    logits = random_logits().float()
    assert torch.equal(Full(V, 0.9).decode(encoded(Full(V, 0.9), logits)), logits)


def reference_top_k(logits, k, temperature):
    """Return the k most likely tokens of each row, and the rest, in float64."""
    p = torch.softmax(logits / temperature, -1)
    probs, ids = p.topk(k)
    return ids, probs, 1 - probs.sum(-1, keepdim=True)


@pytest.mark.parametrize("vocab_size", [V, 50_304, 152_064])
@pytest.mark.parametrize("scale", [0.01, 3.0, 10.0])
@pytest.mark.parametrize("k", [1, 8, 37])
def test_top_k_is_the_distribution_up_to_its_storage(vocab_size, scale, k):
    """Also with nearly all of the mass in the tail, and with almost none."""
    logits = random_logits(7, vocab_size, scale=scale)
    codec = TopK(vocab_size, 0.9, k)
    stored = codec.encode(logits.clone(), NONE[:7])
    assert stored.dtype == torch.int32 and stored.shape == (7, k)
    got = codec.decode(stored)
    ids, p, tail = reference_top_k(logits, k, 0.9)
    assert torch.equal(got.ids, ids)
    # half a rounding step each way, for the token and for the normaliser
    step = 64 / (2 ** min(16, 32 - (vocab_size - 1).bit_length()) - 1)
    is_near = p >= p[:, :1] * math.exp(-64)  # less likely tokens are rounded up to this
    assert ((got.log_p - p.log()).abs()[is_near] <= step + 1e-5).all()
    assert (got.log_p[~is_near] < -63.9).all()
    is_seen = tail > 1e-12
    assert ((got.log_tail - tail.log()).abs()[is_seen] <= step + 1e-3).all()
    total = got.log_p.exp().sum(-1, keepdim=True) + got.log_tail.exp()
    assert torch.allclose(total, torch.ones_like(total), atol=1e-5)


def head_gradient(teacher, loss, student=None, temperature=0.9):
    """Return the loss's gradient with respect to a student's logits, by the chunked head, in float64."""
    student = random_logits(seed=1) if student is None else student
    weight = torch.eye(V, dtype=torch.float64)
    hidden = student.unsqueeze(0).clone().requires_grad_()

    class Said:
        def chunk(self, start, stop):
            if isinstance(teacher, torch.Tensor):
                return teacher[start:stop].clone()
            return SparseTargets(*(None if part is None else part[start:stop] for part in teacher))

    objective = Objective(0.0, 1.0, temperature, (Term(loss),))
    targets = torch.zeros(1, len(student), dtype=torch.long)
    head_loss(HeadInput(hidden, weight, None), targets, objective, Said(), chunk_size=10).loss.backward()
    return len(student) * hidden.grad[0]


@pytest.mark.parametrize("name", [n for n in registry.names("litgpt_whittle.losses") if n not in ("l1", "mse")])
def test_top_k_of_the_whole_vocabulary_gives_the_gradients_of_full(name):
    loss, logits = getattr(losses, name), random_logits()
    codec = TopK(V, 0.9, V)
    got = head_gradient(codec.decode(codec.encode(logits.clone(), NONE)), loss)
    assert torch.allclose(got, head_gradient(logits, loss), atol=2e-4)


def draw(logits, draws, seed, temperature=0.9):
    codec = Sampled(V, temperature, draws)
    return codec.decode(encoded(codec, logits, seed))


def test_samples_are_draws_of_equal_weight():
    p = probabilities(draw(random_logits(), 12, seed=0), V)
    assert torch.allclose(p.sum(-1), torch.ones(N, dtype=torch.float64), atol=1e-6)
    assert torch.allclose((12 * p).round(), 12 * p, atol=1e-5)
    sure = torch.full((1, V), -50.0)
    sure[0, 5] = 0.0
    assert probabilities(draw(sure, 12, seed=0), V)[0, 5] == pytest.approx(1)


@pytest.mark.parametrize("name", ["forward_kl", "soft_cross_entropy"])
@pytest.mark.parametrize("draws", [pytest.param(1, marks=pytest.mark.slow), 12])
def test_the_mean_gradient_of_samples_converges_to_the_full_one(name, draws):
    """It is linear in the samples' probabilities, whose mean is the teacher's (`check_unbiased`)."""
    loss, logits, student = getattr(losses, name), random_logits(scale=1.5), random_logits(seed=1)
    q = torch.softmax(student / 0.9, -1)
    assert torch.allclose(head_gradient(logits, loss), 0.9 * (q - torch.softmax(logits / 0.9, -1)), atol=1e-9)
    for seed in range(20):
        targets = draw(logits, draws, seed)
        assert torch.allclose(head_gradient(targets, loss), 0.9 * (q - probabilities(targets, V)), atol=1e-6)


def test_the_mean_gradient_of_top_k_does_not():
    """The tail's share of the gradient is lost, however many batches are averaged; samples do not have this bias."""
    logits = random_logits(scale=1.5)
    codec = TopK(V, 0.9, 12)
    biased = head_gradient(codec.decode(codec.encode(logits.clone(), NONE)), losses.forward_kl)
    assert (biased - head_gradient(logits, losses.forward_kl)).abs().max() > 0.01


def test_no_function_of_the_samples_varies_more_than_with_independent_draws():
    """Stratified sampling: the variance of any mean is at most that of as many independent samples."""
    logits, draws, n = random_logits(5, scale=1.5), 12, 3000
    p = torch.softmax(logits / 0.9, -1)
    seen = torch.stack([probabilities(draw(logits, draws, seed), V) for seed in range(n)])  # (n, 5, V)
    functions = torch.cat((torch.eye(V, dtype=torch.float64), random_logits(20, seed=3)))  # (57, V)
    variances = torch.einsum("nrv,fv->nrf", seen, functions).var(0)
    means = p @ functions.T
    independent = ((p @ (functions**2).T) - means**2) / draws
    # a variance from n samples has a relative error of sqrt(2 / n) for normal variables, and more for rare events
    assert (variances <= independent * (1 + 6 * math.sqrt(2 / n)) + 5 / draws**2 / n).all()
    assert variances.sum() < 0.7 * independent.sum()
