"""The file that records which tokens a pruned vocabulary has kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litgpt_whittle.errors import UserError
from litgpt_whittle.tokenizer_files import KEPT_TOKENS
from litgpt_whittle.unit_index import UnitIndex
from litgpt_whittle.vocabulary.bpe import merges_of
from litgpt_whittle.vocabulary.rewrite import TOKENIZER, read_json


@dataclass(frozen=True)
class KeptTokens:
    """Tokens that a pruned vocabulary has kept of its teacher's."""

    ids: UnitIndex
    """The teacher's ids, in the order of the new ones"""
    tokenizer: str
    """Fingerprint of the teacher's tokenizer"""

    @classmethod
    def read(cls, folder: Path) -> KeptTokens | None:
        """Return the kept tokens of a checkpoint; None if its vocabulary was not pruned.

        Raises:
            UserError: If the file is damaged.
        """
        path = folder / KEPT_TOKENS
        if not path.is_file():
            return None
        content = read_json(path)
        try:
            return cls(UnitIndex.parse(content["ids"]), str(content["tokenizer"]))
        except (KeyError, TypeError):
            raise UserError(f"{str(path)!r} is damaged; run litgpt prune_vocab again") from None

    def write(self, folder: Path) -> None:
        """Write the file into a folder."""
        content = {"ids": self.ids.to_yaml(), "tokenizer": self.tokenizer}
        (folder / KEPT_TOKENS).write_text(json.dumps(content), encoding="utf-8")

    def belong_to(self, folder: Path) -> bool:
        """Return whether a folder has the tokenizer whose tokens these are."""
        path = folder / TOKENIZER
        return path.is_file() and tokenizer_fingerprint(read_json(path)) == self.tokenizer


def tokenizer_fingerprint(tokenizer: Mapping[str, Any]) -> str:
    """Return a hash of a BPE tokenizer's tokens, ids and merges, however its file is formatted: sixteen hex digits."""
    model = tokenizer.get("model") or {}
    added = sorted((token["id"], token["content"]) for token in tokenizer.get("added_tokens") or ())
    facts = [model.get("vocab"), merges_of(model) if "merges" in model else None, added]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
