"""Checks of the codecs of a cached teacher.

Each check takes a function of the vocabulary's size and the temperature that returns a codec, such as its class.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from litgpt_whittle.distillation.codecs import Codec
from litgpt_whittle.distillation.objective import SparseTargets
from litgpt_whittle.testing.inputs import random_logits

Make = Callable[[int, float], Codec]
"""Returns a codec for a vocabulary and a temperature: its class, or a `functools.partial` with settings"""

N, V, T = 23, 101, 0.9
"""Number of tokens, size of the vocabulary, temperature"""
TOLERANCE = 0.05
"""Maximum error of a log-probability in nats, for tokens with a probability of at least 0.001"""
N_DRAWS = 50_000
"""Number of independent samples that are averaged"""


def check_codec(make: Make) -> None:
    """Run all checks of `CHECKS` on a codec.

    Args:
        make: Returns a codec for a vocabulary and a temperature: its class, or a `functools.partial` with settings.

    Raises:
        AssertionError: If the codec breaks a rule, which the message names.
    """
    for check in CHECKS:
        check(make)


def encoded(codec: Codec, logits: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Encode a copy of logits with random numbers from a seed."""
    return codec.encode(logits.clone(), _uniform(codec, len(logits), seed))


def probabilities(targets: SparseTargets, vocab_size: int = V) -> torch.Tensor:
    """Return each token's probability, 0 if it is not stored, shape (n, vocab_size)."""
    seen = torch.zeros(len(targets.ids), vocab_size, dtype=torch.float64)
    return seen.scatter_add_(1, targets.ids, targets.log_p.exp().double())


def _uniform(codec: Codec, n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, codec.n_uniform, generator=generator, dtype=torch.float64)


def _same(a: Any, b: Any) -> bool:
    """Return whether two results of `decode` are equal."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    return a is b if a is None else all(_same(*parts) for parts in zip(a, b))


# -- rules


def check_storage(make: Make) -> None:
    """Check that `encode` returns arrays of the declared shape and type, and encodes each token independently."""
    for logits in (random_logits(N, V), random_logits(N, V).float()):
        codec = make(V, T)
        stored = encoded(codec, logits)
        shape = (N, *codec.shape)
        assert tuple(stored.shape) == shape, f"encode must return the shape {shape}, got {tuple(stored.shape)}"
        dtype = stored.numpy().dtype
        assert dtype == np.dtype(codec.dtype), f"encode must return the declared type {codec.dtype}, got {dtype.str}"
        again = encoded(make(V, T), logits)
        assert torch.equal(again, stored), "encode must depend on its arguments only, a second call differs"
        uniform = _uniform(codec, N, 0)
        parts = [codec.encode(logits[i : i + 5].clone(), uniform[i : i + 5]) for i in range(0, N, 5)]
        assert torch.equal(torch.cat(parts), stored), "the array of a token must not depend on the other tokens"


def check_decoded(make: Make) -> None:
    """Check that `decode` returns new tensors, of the kind that `gives` names."""
    codec = make(V, T)
    stored = encoded(codec, random_logits(N, V))
    before = stored.clone()
    found, expected = codec.decode(stored), codec.decode(before.clone())
    for part in (found,) if isinstance(found, torch.Tensor) else found:
        if part is not None:
            part.zero_()
    assert torch.equal(stored, before), "decode must return new tensors, overwriting them changed the stored array"
    assert _same(codec.decode(stored), expected), "decode must depend on the stored array only, a second call differs"
    known = ("logits", "distributions", "samples")
    assert codec.gives in known, f"gives must be one of {', '.join(known)}, got {codec.gives!r}"
    if codec.gives == "logits":
        is_right = isinstance(expected, torch.Tensor) and expected.shape == (N, V)
        assert is_right, f"a codec that gives logits must decode to a tensor of shape ({N}, {V})"
        return
    assert isinstance(expected, SparseTargets), f"a codec that gives {codec.gives} must decode to SparseTargets"
    is_right = expected.ids.dtype == torch.int64 and expected.log_p.shape == expected.ids.shape
    assert is_right, "ids must be int64, with one log-probability each"
    has_tail = expected.log_tail is not None
    assert has_tail == (codec.gives == "distributions"), (
        "log_tail must be a tensor for distributions, and None for samples"
    )
    total = probabilities(expected).sum(1, keepdim=True)
    if expected.log_tail is not None:
        n_distinct = [len(row.unique()) for row in expected.ids]
        assert n_distinct == [expected.ids.shape[1]] * N, "the stored tokens of a distribution must differ"
        total = total + expected.log_tail.exp()
    error = float((total - 1).abs().max())
    assert error < 1e-4, f"decoded probabilities must add up to 1, they are off by {error:.2g}"


def check_predictions(make: Make) -> None:
    """Check that decoded logits or distributions equal the teacher's up to `TOLERANCE`.

    Not required of samples, which `check_unbiased` checks.
    """
    for vocab_size, scale in ((V, 0.01), (V, 3.0), (V, 10.0), (152_064, 3.0)):
        codec = make(vocab_size, T)
        if codec.gives == "samples":
            return
        logits = random_logits(N, vocab_size, scale=scale)
        logits[:, -1] = logits.amax(1) + 1  # the last token id must be representable, too
        expected = torch.log_softmax(logits / T, -1)
        found = codec.decode(encoded(codec, logits))
        if isinstance(found, torch.Tensor):
            pairs = [(torch.log_softmax(found.double() / T, -1), expected)]
        else:
            assert found.log_tail is not None
            rest = torch.log1p(-expected.exp().gather(1, found.ids).sum(1, keepdim=True).clamp(max=1 - 1e-12))
            pairs = [(found.log_p, expected.gather(1, found.ids)), (found.log_tail, rest)]
        for ours, theirs in pairs:
            errors = (ours - theirs).abs().masked_fill(theirs <= math.log(1e-3), 0.0)
            error = float(errors.max())
            assert error <= TOLERANCE, (
                f"decoded log-probabilities must equal the teacher's at the temperature, they are off by {error:.2g}"
            )


def check_unbiased(make: Make) -> None:
    """Check that the mean of many samples is the teacher's distribution, by Bernstein's inequality.

    The mean is compared for each token, and for the logits, where a wrong temperature shows most. An unbiased codec
    fails with a probability of at most 0.0001. Not required of codecs that do not give samples.
    """
    codec = make(V, T)
    if codec.gives != "samples":
        return
    for seed, scale in enumerate((0.5, 1.5)):
        logits = random_logits(1, V, seed, scale)
        p = torch.softmax(logits / T, -1)[0]
        targets = codec.decode(encoded(codec, logits.expand(N_DRAWS, V), seed))
        assert isinstance(targets, SparseTargets)
        functions = torch.cat((torch.eye(V, dtype=torch.float64), logits))  # functions of a token, shape (V + 1, V)
        expected, found = functions @ p, functions @ probabilities(targets).mean(0)
        # the variance of a function's mean over samples is at most that of one draw
        variance = (functions**2) @ p - expected**2
        width = functions.amax(1) - functions.amin(1)
        level = math.log(2 * 2 * (V + 1) / 1e-4) / N_DRAWS  # a union bound over both distributions and both signs
        bound = width * level / 3 + ((width * level / 3) ** 2 + 2 * level * variance).sqrt()
        worst = int(((found - expected).abs() / bound).argmax())
        name = f"the probability of token {worst}" if worst < V else "the mean logit"
        assert abs(found[worst] - expected[worst]) <= bound[worst], (
            f"samples must have the teacher's mean: {name} is {found[worst]:.4f} instead of {expected[worst]:.4f}"
        )


def check_impossible_tokens(make: Make) -> None:
    """Check that tokens whose logits are -inf have no probability after decoding, for any random numbers."""
    for vocab_size in (V, 50_304):
        codec = make(vocab_size, T)
        possible = torch.tensor([1, 3, vocab_size - 2])
        logits = torch.full((200, vocab_size), -math.inf)
        logits[:, possible] = torch.tensor([0.0, 1.0, 0.5])
        extremes = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64).repeat_interleave(100)
        stored = codec.encode(logits.clone(), extremes.unsqueeze(1).expand(200, codec.n_uniform))
        found = codec.decode(stored)
        if isinstance(found, torch.Tensor):
            p = torch.softmax(found.double() / T, -1)
        else:
            p = probabilities(found, vocab_size)
            if found.log_tail is not None and found.ids.shape[1] >= 3:
                rest = float(found.log_tail.exp().max())
                assert rest == 0, f"tokens whose logits are -inf must have no probability, the tail has {rest:.2g}"
        p[:, possible] = 0
        assert not p.any(), "tokens whose logits are -inf must have no probability after decoding"


CHECKS: tuple[Callable[[Make], None], ...] = (
    check_storage,
    check_decoded,
    check_predictions,
    check_unbiased,
    check_impossible_tokens,
)
"""All rules of a codec, which can be run one by one"""
