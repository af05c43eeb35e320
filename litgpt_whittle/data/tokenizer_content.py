"""Fingerprint of all files of a tokenizer that determine the tokens of texts and conversations."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from litgpt.tokenizer import Tokenizer

from litgpt_whittle.data.chat import template_facts
from litgpt_whittle.data.encoding import begins_with_bos, tokenizer_digest


def encoding_fingerprint(folder: Path) -> str:
    """Return sixteen hex digits that identify a folder's tokenizer, its special tokens and its chat templates.

    Equal tokenizers in different folders have the same fingerprint, however their files are formatted.
    """
    tokenizer = Tokenizer(folder)
    begins = begins_with_bos(tokenizer)  # litgpt's `use_bos` depends on the folder's name
    facts = [tokenizer_digest(tokenizer), tokenizer.bos_id, begins, template_facts(folder, tokenizer)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
