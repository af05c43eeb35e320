"""Checks of a surrogate's regressors.

Each check takes a function without arguments that returns a new regressor.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import torch

from litgpt_whittle.spaces.bins import Bin
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.surrogates.base import Regressor
from litgpt_whittle.testing.inputs import LEAN

Make = Callable[[], Regressor]
"""Returns a new regressor, such as `lambda: MyRegressor(SurrogateArgs(mode="filter"))`"""

N_KNOWN, N_UNKNOWN = 20, 10


def check_surrogate(make: Make) -> None:
    """Run all checks of `CHECKS` on a surrogate's regressor.

    Args:
        make: Returns a new regressor, such as `lambda: MyRegressor(SurrogateArgs(mode="filter"))`.

    Raises:
        AssertionError: If the regressor breaks a rule, which the message names.
    """
    for check in CHECKS:
        check(make)


def sub_networks(n: int, seed: int = 0) -> list[SubNet]:
    """Return random sub-networks of about half of a small teacher's size."""
    space = Space(LEAN, "coarse_layerwise", Bin.parse("30K±10%"))
    return [space.sample(np.random.default_rng((seed, i))) for i in range(n)]


def _fitted(regressor: Regressor, n: int = N_KNOWN) -> Regressor:
    """Return a regressor fitted to random targets of n sub-networks."""
    targets = np.random.default_rng(0).normal(size=n)
    regressor.fit(regressor.read(LEAN, sub_networks(n)), targets, seed=1)
    return regressor


# -- rules


def check_encodings(make: Make) -> None:
    """Check that sub-networks, as objects or dictionaries, are encoded independently as plain numbers or text."""
    chosen = sub_networks(N_KNOWN)
    read = make().read(LEAN, chosen)
    assert len(read) == N_KNOWN, f"read must return one encoding per sub-network, {len(read)} of {N_KNOWN}"
    is_plain = json.loads(json.dumps(read, default=repr)) == [list(x) if isinstance(x, tuple) else x for x in read]
    assert is_plain, "encodings must consist of plain numbers or text"
    same = make().read(LEAN, [subnet.to_dict() for subnet in chosen]) == read
    assert same, "read must accept the output of SubNet.to_dict like the sub-network itself"
    same = [make().read(LEAN, [subnet])[0] for subnet in chosen[:3]] == read[:3]
    assert same, "the encoding of a sub-network must not depend on other sub-networks"


def check_predictions(make: Make) -> None:
    """Check that each sub-network gets one finite prediction and one deviation, independent of other sub-networks."""
    regressor = _fitted(make())
    unknown = regressor.read(LEAN, sub_networks(N_UNKNOWN, seed=1))
    found, deviation = regressor.predict(unknown), regressor.deviation(unknown)
    is_right = found.shape == (N_UNKNOWN,) and np.isfinite(found).all()
    assert is_right, f"predict must return one finite number per encoding, shape ({N_UNKNOWN},), got {found.shape}"
    is_right = deviation.shape == (N_UNKNOWN,) and bool((deviation >= 0).all())
    assert is_right, f"deviation must return one number of 0 or more per encoding, got {deviation.shape}"
    one = regressor.predict(unknown[3:4])
    assert np.allclose(one, found[3:4], atol=1e-5), "a prediction must not depend on the call's other sub-networks"


def check_determinism(make: Make) -> None:
    """Check that predictions depend only on the seed and the examples, and that a fit discards the earlier one."""
    torch.manual_seed(4), np.random.seed(4)
    one = _fitted(make())
    unknown = one.read(LEAN, sub_networks(N_UNKNOWN, seed=1))
    expected = one.predict(unknown)
    torch.manual_seed(5), np.random.seed(5)  # a regressor must not use global generators, which differ now
    state = torch.get_rng_state()
    same = np.array_equal(_fitted(make()).predict(unknown), expected)
    assert same, "predictions must depend only on the seed and the examples, a second regressor differs"
    assert torch.equal(torch.get_rng_state(), state), "fit must leave PyTorch's random state as it was"
    _fitted(one, N_KNOWN // 2)
    same = np.array_equal(_fitted(one).predict(unknown), expected)
    assert same, "fit must discard the earlier fit, predictions after another fit differ"


CHECKS: tuple[Callable[[Make], None], ...] = (check_encodings, check_predictions, check_determinism)
"""All rules of a regressor, which can be run one by one"""
