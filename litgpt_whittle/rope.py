"""Smaller attention heads that preserve the teacher's rotary frequencies.

Rotary embeddings rotate pairs of dimensions: pair j of n/2 by the angle position · base^(-2j/n). Keeping the first h
dimensions would break pairs apart, and change the frequencies of the remaining pairs. Stock litgpt can express two ways
to shrink a head that avoid both:

- drop non-rotary dimensions, and raise `rotary_percentage` to keep the number of rotary dimensions;
- keep the pairs 0, s, 2s, …, in total m of n rotary dimensions, and set `rope_base` to base^(s·m/n).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from litgpt.config import Config
from litgpt.model import GPT

from litgpt_whittle.errors import UserError


@dataclass(frozen=True)
class HeadCut:
    """A smaller head: its kept dimensions and config changes."""

    dims: np.ndarray
    """Kept dimensions of each head, in the student's order, shape (head_size,)"""
    config_changes: dict[str, Any] = field(default_factory=dict)
    """Changed fields of the student's litgpt config"""


def cut_head(teacher: Config, keep: int | np.ndarray) -> HeadCut:
    """Reduce a head's size without changing the rotary frequencies of the kept dimensions.

    Args:
        teacher: The teacher's config.
        keep: A head size, or the kept dimensions in ascending order. A head size drops non-rotary dimensions first,
            then rotary pairs, evenly over the frequencies. Kept rotary dimensions must form whole pairs 0, s, 2s, ….

    Raises:
        UserError: If litgpt cannot express such a head with the teacher's frequencies.
    """
    size, n_rotary = teacher.head_size, teacher.rope_n_elem
    n_kept = keep if isinstance(keep, int) else len(keep)
    if n_kept == size:
        return HeadCut(np.arange(size), {"head_size": size})
    if teacher.latent_attention:
        raise UserError(f"head_size cannot shrink in a model with latent attention, got {n_kept}; keep {size}")
    if not isinstance(keep, int):
        return _cut(teacher, keep, _stride(teacher, _pairs(teacher, keep[keep < n_rotary])))
    if keep >= n_rotary:
        return _cut(teacher, np.arange(keep), stride=1)
    if keep % 2 or n_rotary % 2:
        raise UserError(f"head_size below {n_rotary} must be even, since rotary dimensions come in pairs, got {keep}")
    for stride in range(n_rotary // keep, 0, -1):
        pairs = np.arange(keep // 2) * stride
        cut = _cut(teacher, _dims(teacher, pairs), stride, check=False)
        if _keeps_frequencies(teacher, cut, pairs):
            return cut
    raise _not_preserved(teacher, keep)


def legal_head_sizes(teacher: Config) -> list[int]:
    """Return all head sizes that preserve the teacher's rotary frequencies, ascending."""
    sizes = []
    for size in range(1, teacher.head_size + 1):
        try:
            cut_head(teacher, size)
        except UserError:
            continue
        sizes.append(size)
    return sizes


def _cut(teacher: Config, dims: np.ndarray, stride: int, check: bool = True) -> HeadCut:
    """Return the head that keeps `dims`; its rotary dimensions are the pairs 0, stride, 2 · stride, …."""
    n_rotary, kept = teacher.rope_n_elem, int((dims < teacher.rope_n_elem).sum())
    changes: dict[str, Any] = {"head_size": len(dims), "rotary_percentage": _percentage(kept, len(dims))}
    if kept not in (n_rotary, 2):  # a single pair rotates by the position itself, independently of the base
        power = stride * kept / n_rotary
        changes["rope_base"] = float(teacher.rope_base) ** power
        if teacher.rope_local_base_freq is not None:
            changes["rope_local_base_freq"] = float(teacher.rope_local_base_freq) ** power
    cut = HeadCut(dims, changes)
    if check and n_rotary and not _keeps_frequencies(teacher, cut, np.arange(kept // 2) * stride):
        raise _not_preserved(teacher, len(dims))
    return cut


def _percentage(n_rotary: int, size: int) -> float:
    """Return the `rotary_percentage` for exactly `n_rotary` dimensions; litgpt truncates percentage · size."""
    share = n_rotary / size
    while int(share * size) < n_rotary:
        share = math.nextafter(share, 2.0)
    return share


def _dims(teacher: Config, pairs: np.ndarray) -> np.ndarray:
    """Return the dimensions of these rotary pairs, in litgpt's layout."""
    if teacher.rope_interleave:
        return (pairs[:, None] * 2 + np.arange(2)).ravel()
    return np.concatenate((pairs, pairs + teacher.rope_n_elem // 2))


def _pairs(teacher: Config, rotary: np.ndarray) -> np.ndarray:
    """Return the pairs that these rotary dimensions form; raise UserError if a pair is incomplete or none is kept."""
    half = teacher.rope_n_elem // 2
    pairs = np.unique(rotary // 2 if teacher.rope_interleave else rotary % max(half, 1))
    whole = set(_dims(teacher, pairs).tolist())
    if len(rotary) == teacher.rope_n_elem:  # all rotary dimensions, even if their number is odd
        return np.arange(half)
    if missing := sorted(whole - set(rotary.tolist())):
        raise UserError(f"head_size must keep rotary dimensions in whole pairs; add dimension {missing[0]} or its pair")
    if len(pairs) == 0:
        raise UserError("head_size must keep a rotary pair, else the student has no positions; add dimension 0's pair")
    return pairs


def _stride(teacher: Config, pairs: np.ndarray) -> int:
    """Return s such that the kept pairs are 0, s, 2s, …; raise UserError if there is none."""
    stride = int(pairs[1] - pairs[0]) if len(pairs) > 1 else 1
    if len(pairs) and not np.array_equal(pairs, np.arange(len(pairs)) * stride):
        raise UserError(
            f"head_size must keep evenly spaced rotary pairs (0, s, 2s, …), got {pairs.tolist()}; keep others"
        )
    return stride


def _frequencies(config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Return litgpt's cosine and sine at position 1, where angles are at most 1 and so determine the frequencies."""
    return tuple(cache[1] for cache in GPT.rope_cache(SimpleNamespace(config=config, max_seq_length=2)))


def _keeps_frequencies(teacher: Config, cut: HeadCut, pairs: np.ndarray) -> bool:
    student = dataclasses.replace(teacher, **cut.config_changes)
    kept = torch.from_numpy(np.concatenate((pairs, pairs + teacher.rope_n_elem // 2)))
    if len(kept) != student.rope_n_elem:  # an odd number of rotary dimensions, all kept
        return student.rope_n_elem == teacher.rope_n_elem
    return all(
        torch.allclose(ours, theirs[kept], rtol=1e-5, atol=1e-7)
        for ours, theirs in zip(_frequencies(student), _frequencies(teacher))
    )


def _not_preserved(teacher: Config, size: int) -> UserError:
    return UserError(
        f"head_size {size} would change the teacher's rotary frequencies (the scaling of RoPE depends on the head "
        f"size); keep at least the {teacher.rope_n_elem} rotary dimensions"
    )
