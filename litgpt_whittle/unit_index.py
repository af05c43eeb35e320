"""Kept units of one dimension: the first n, or a sorted set of indices."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from litgpt_whittle.errors import UserError

_SINGLE = re.compile(r"(?<![-\d])(\d+)(?![-\d])")
"""Matches an index in the output of `UnitIndex.to_yaml` that is not part of a range"""


class UnitIndex:
    """Kept units of one dimension: the first n, or a sorted set of indices.

    Immutable and hashable; a set of the first n indices compares equal to `UnitIndex(n)`.

    Args:
        units: A number (the first n) or sorted distinct indices.

    Raises:
        UserError: If nothing is kept, or the indices are negative, unsorted or repeated.
    """

    __slots__ = ("_hash", "_indices", "_n")

    def __init__(self, units: int | Iterable[int] | np.ndarray) -> None:
        if isinstance(units, int | np.integer):
            self._n, self._indices = int(units), None
        else:
            indices = np.array(list(units) if not isinstance(units, np.ndarray) else units, dtype=np.int64)
            _check_sorted(indices)
            self._n = len(indices)
            is_prefix = self._n > 0 and indices[-1] == self._n - 1
            indices.setflags(write=False)
            self._indices = None if is_prefix else indices
        if self._n < 1:
            raise UserError(f"at least one unit must be kept, got {self._n}; choose 1 or more")
        self._hash = hash((self._n, None if self._indices is None else self._indices.tobytes()))

    @classmethod
    def parse(cls, value: int | str | UnitIndex) -> UnitIndex:
        """Parse `512` (the first 512) or `0-511,640-767` (inclusive ranges).

        Raises:
            UserError: If the text is neither.
        """
        if isinstance(value, UnitIndex):
            return value
        if isinstance(value, int | float) and not isinstance(value, bool) and float(value).is_integer():
            return cls(int(value))
        if not isinstance(value, str):
            raise UserError(f"units must be a number or ranges such as '0-511,640-767', got {value!r}")
        text = value.strip()
        if text.isdigit():
            return cls(int(text))
        parts = []
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            if not first.isdigit() or (dash and not last.isdigit()):
                raise UserError(f"ranges look like '0-511,640-767', got {value!r}; correct {part!r}")
            if dash and int(last) < int(first):
                raise UserError(f"a range must ascend, got {part!r} in {value!r}; swap its ends")
            parts.append(np.arange(int(first), int(last if dash else first) + 1))
        return cls(np.concatenate(parts))

    @property
    def is_prefix(self) -> bool:
        """True if these are the first n units, so that a slice of the teacher's weight is a view."""
        return self._indices is None

    @property
    def indices(self) -> np.ndarray:
        """The kept indices, sorted, int64, shape (n,)."""
        return np.arange(self._n) if self._indices is None else self._indices

    @property
    def largest(self) -> int:
        """The largest kept index."""
        return self._n - 1 if self._indices is None else int(self._indices[-1])

    @property
    def ranges(self) -> np.ndarray:
        """Runs of kept indices, ascending: start and exclusive end of each, int64, shape (n_runs, 2)."""
        if self._indices is None:
            return np.array([[0, self._n]])
        breaks = np.flatnonzero(np.diff(self._indices) != 1)
        firsts = self._indices[np.concatenate(([0], breaks + 1))]
        lasts = self._indices[np.concatenate((breaks, [self._n - 1]))]
        return np.stack((firsts, lasts + 1), axis=1)

    def to_yaml(self) -> int | str:
        """Return the compact form that `parse` reads: a number for a prefix, ranges for a set."""
        return self._n if self._indices is None else str(self)

    def __len__(self) -> int:
        return self._n

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, UnitIndex):
            return NotImplemented
        return self._hash == other._hash and self._n == other._n and np.array_equal(self.indices, other.indices)

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        return str(self._n) if self._indices is None else self.to_ranges()

    def to_ranges(self) -> str:
        """Return inclusive ranges such as `0-511,640-767`, also for a prefix."""
        ranges = self.ranges
        # a single index is written as a range, since "7" means the first seven
        if len(ranges) == 1:
            return f"{ranges[0, 0]}-{ranges[0, 1] - 1}"
        return ",".join(str(a) if b == a + 1 else f"{a}-{b - 1}" for a, b in ranges)

    def __repr__(self) -> str:
        return f"UnitIndex({str(self)!r})" if self._indices is not None else f"UnitIndex({self._n})"

    def __reduce__(self) -> tuple:
        return type(self), (self._n if self._indices is None else self._indices,)


class Ordered(UnitIndex):
    """Permutation of all units of one dimension.

    A `SubNet` with such a field has the plan of a reordered teacher (`litgpt_whittle.ranking.order`). It has no YAML
    form.

    Args:
        order: The units in their new order, a permutation of 0, 1, ….
    """

    __slots__ = ()

    def __init__(self, order: np.ndarray) -> None:
        super().__init__(len(order))
        if not np.array_equal(order, self.indices):
            assert np.array_equal(np.sort(order), self.indices), "an order has every unit once"
            self._indices = np.array(order, dtype=np.int64)
            self._indices.setflags(write=False)
            self._hash = hash(self._indices.tobytes())

    @property
    def largest(self) -> int:
        """The largest kept index."""
        return self._n - 1


def _check_sorted(indices: np.ndarray) -> None:
    if indices.ndim != 1:
        raise UserError(f"kept indices must be a flat list, got an array of shape {indices.shape}")
    if len(indices) and indices[0] < 0:
        raise UserError(f"kept indices must be 0 or more, got {indices[0]}; remove the negative ones")
    steps = np.diff(indices)
    if (steps == 0).any():
        raise UserError(f"kept indices must be distinct, got {indices[:-1][steps == 0][0]} twice; remove one")
    if (steps < 0).any():
        at = int(np.flatnonzero(steps < 0)[0])
        raise UserError(f"kept indices must be sorted, got {indices[at]} before {indices[at + 1]}; sort them")


def ranges(value: int | str | UnitIndex) -> np.ndarray:
    """Parse the output of `UnitIndex.to_yaml` into runs (see `UnitIndex.ranges`) without listing all units."""
    if isinstance(value, UnitIndex):
        return value.ranges
    if isinstance(value, int):
        return np.array([[0, value]])
    pairs = _SINGLE.sub(r"\1-\1", value).replace("-", ",")  # parsed by NumPy, since there may be thousands
    return np.fromstring(pairs, dtype=np.int64, sep=",").reshape(-1, 2) + [0, 1]


def n_units(value: int | str) -> int:
    """Return the number of units in the output of `UnitIndex.to_yaml`, without listing them."""
    if isinstance(value, int):
        return value
    ranges = (part.partition("-") for part in value.split(","))
    return sum(int(last or first) - int(first) + 1 for first, _, last in ranges)
