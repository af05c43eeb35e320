"""The parts that each token of a BPE tokenizer is merged from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from litgpt_whittle.errors import UserError

BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
"""Names of the tokens that spell an unknown character in tokenizers with byte fallback"""

METASPACE = "\u2581"
"""SentencePiece's space, which decoders turn into a space only if it is a token and not spelt in bytes"""


@dataclass(frozen=True)
class Bpe:
    """Tokens of a byte-pair encoding that have an embedding, by their ids."""

    required: frozenset[int]
    """Tokens that are always kept: bytes, characters (except those that several byte tokens can spell), special and
    added tokens"""
    parts: Mapping[int, tuple[int, ...]]
    """The parts from which every other token is merged, or into which its text falls if the token is removed. A
    required token can have parts, too"""

    @property
    def n_tokens(self) -> int:
        """Number of tokens."""
        return len(self.required | set(self.parts))

    @cached_property
    def smallest(self) -> int:
        """Number of tokens that cannot be removed: the required ones, and the parts that they are merged from."""
        found, left = set(self.required), list(self.required)
        while left:
            new = set(self.parts.get(left.pop(), ())) - found
            found |= new
            left += new
        return len(found)


def read_bpe(tokenizer: Mapping[str, Any], path: Path, n_rows: int, named: Iterable[int] = ()) -> Bpe:
    """Return the tokens of a BPE tokenizer, byte-level or with SentencePiece's byte fallback.

    Args:
        tokenizer: Content of `tokenizer.json`.
        path: The file, for error messages.
        n_rows: Number of embeddings. Added tokens without an embedding are left out.
        named: Ids of further tokens to keep, such as those of the generation config.

    Raises:
        UserError: If the tokenizer is not such a BPE, or if a token of its model has no embedding.
    """
    model = _checked_model(tokenizer, path)
    vocab: dict[str, int] = model["vocab"]
    ranks = {pair: rank for rank, pair in enumerate(merges_of(model))}
    added = {token["id"] for token in tokenizer.get("added_tokens") or ()}
    # added tokens are found in a text before it is split, so nothing need lead to them
    merged = {symbol for pair in ranks for symbol in pair} | {token for token, i in vocab.items() if i not in added}
    known = {*added, *vocab.values()}
    required = {i for i in {*added, *named} if i < n_rows and i in known}
    falls_back = bool(model.get("byte_fallback")) and all(byte in vocab for byte in BYTES)
    always = {*BYTES, METASPACE, model.get("unk_token")}
    parts = {}
    for token, i in vocab.items():
        if token not in merged:
            continue
        if i >= n_rows:
            raise UserError(
                f"every token needs an embedding, and {token!r} of {str(path)!r} has id {i} where the checkpoint has "
                f"{n_rows} rows; use the tokenizer that belongs to the checkpoint"
            )
        # a byte token saves nothing in place of an ASCII character, and is hardly trained
        if token in always or (len(token) == 1 and (token.isascii() or not falls_back)):
            required.add(i)
        else:
            symbols = spelt(token) if len(token) == 1 else split(token, vocab, ranks)
            parts[i] = tuple(vocab[symbol] for symbol in symbols)
    return Bpe(frozenset(required), parts)


def _checked_model(tokenizer: Mapping[str, Any], path: Path) -> dict[str, Any]:
    model = tokenizer.get("model") or {}
    # old files do not name the type
    kind = model.get("type") or ("BPE" if "merges" in model else "unknown")
    if kind != "BPE":
        raise UserError(
            f"only vocabularies of BPE tokenizers can be pruned, {str(path)!r} is a {kind} model; choose another "
            "checkpoint"
        )
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise UserError(
                f"the tokens of a BPE must be the text of their parts, {str(path)!r} has {name} = {model[name]!r}; "
                "choose another checkpoint"
            )
    return model


def merges_of(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the merges of a BPE model in order of their rank; files list them as pairs, or as texts with a space."""
    return [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]


def split(token: str, vocab: Mapping[str, int], ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Return the symbols of a token before its last merge.

    A token that ends up in a text was merged there as it is merged on its own, because no merge crossed its ends. Other
    merges that give the same text are therefore never used for it.

    Args:
        token: The token's text.
        vocab: Ids of all tokens.
        ranks: Rank of each merge.

    Returns:
        The two parts of the last merge; all remaining symbols if no merges lead to the token.
    """
    symbols = [symbol for char in token for symbol in ([char] if char in vocab else spelt(char)) if symbol in vocab]
    while len(symbols) > 2:
        rank, i = min((ranks.get(pair, math.inf), i) for i, pair in enumerate(zip(symbols, symbols[1:])))
        if rank == math.inf:
            break
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    return symbols


def spelt(char: str) -> list[str]:
    """Return the byte tokens of a character's UTF-8 encoding."""
    return [BYTES[byte] for byte in char.encode("utf-8", "surrogatepass")]
