"""Choose the tokens of a smaller vocabulary by their frequency in a text."""

from __future__ import annotations

import heapq
from collections import Counter

import numpy as np

from litgpt_whittle.errors import UserError
from litgpt_whittle.vocabulary.bpe import Bpe

MULTIPLE = 64
"""Vocabularies are multiples of this, so that no rows of padding are needed"""


def check_size(bpe: Bpe, size: int) -> int:
    """Return the number of tokens to keep: `size`, rounded down to a multiple of `MULTIPLE`.

    Raises:
        UserError: If the tokenizer has no more tokens than that, or needs more.
    """
    n = size // MULTIPLE * MULTIPLE
    least, most = -(-bpe.smallest // MULTIPLE) * MULTIPLE, (bpe.n_tokens - 1) // MULTIPLE * MULTIPLE
    if not least <= n <= most:
        raise UserError(
            f"size must be from {least} (all bytes and special tokens) to {most} (fewer than the tokenizer's "
            f"{bpe.n_tokens:,}), got {size}; choose another"
        )
    return n


def choose_tokens(bpe: Bpe, counts: np.ndarray, size: int) -> np.ndarray:
    """Return the ids of the tokens to keep, sorted.

    Tokens are removed one at a time until `size` remain. Only tokens that are no part of a remaining one can be
    removed, so that merges lead to all remaining tokens. The text of a removed token falls into its parts: a token that
    occurs n times and has two parts costs n tokens more. The cheapest is removed first; of equals, the one with the
    highest id, which a BPE has merged last.

    Args:
        bpe: The tokenizer's tokens.
        counts: Occurrences of every id in the text, shape (n_ids,).
        size: Number of tokens to keep, at least `bpe.smallest`.
    """
    occurs = counts.tolist() + [0] * (max(bpe.required | set(bpe.parts)) + 1 - len(counts))
    n_uses = Counter(part for parts in bpe.parts.values() for part in parts)
    kept = set(bpe.required) | set(bpe.parts)

    def cost(token: int) -> tuple[int, int]:
        return occurs[token] * (len(bpe.parts[token]) - 1), -token

    leaves = [cost(token) for token in kept - bpe.required if not n_uses[token]]
    heapq.heapify(leaves)
    while len(kept) > size:
        assert leaves, "`check_size` comes first"
        token = -heapq.heappop(leaves)[1]
        kept.remove(token)
        for part in bpe.parts[token]:
            occurs[part] += occurs[token]
            n_uses[part] -= 1
            if not n_uses[part] and part not in bpe.required:
                # its occurrences are final, since all tokens that it is a part of are removed
                heapq.heappush(leaves, cost(part))
    return np.array(sorted(kept), dtype=np.int64)
