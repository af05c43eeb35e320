"""Copy the files of a checkpoint's tokenizer, chat template and generation config.

litgpt's `copy_config_files` leaves out chat templates, and also copies the permissions of read-only files.
"""

from __future__ import annotations

import shutil
from pathlib import Path

TEMPLATES = "additional_chat_templates"
"""Name of the folder in which `transformers` stores named chat templates"""

_HUGGING_FACE = (
    "tokenizer*", "tokenization_*.py", "special_tokens_map.json", "added_tokens.json", "generation_config.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "*.tiktoken", "tekken.json",
    "chat_template*", f"{TEMPLATES}/*.jinja",
)  # fmt: skip
"""Patterns of the files that `transformers` reads for tokenizers and generation"""

KEPT_TOKENS = "kept_tokens.json"
"""Name of the file in which `litgpt prune_vocab` records the kept tokens of the teacher's vocabulary"""

_LITGPT = ("prompt_style.yaml", KEPT_TOKENS)
"""Further files that litgpt's own `generate`, `chat` and `serve` read, and that our commands read"""


def copy_tokenizer(source: Path, out_dir: Path, for_litgpt: bool = True) -> None:
    """Copy the contents, not the permissions, of all files that belong to the tokenizer and to generation.

    Args:
        source: A checkpoint directory.
        out_dir: An existing folder. Files of the same names in it are replaced.
        for_litgpt: If true, include the files that only litgpt and our commands read.
    """
    for pattern in (*_HUGGING_FACE, *(_LITGPT if for_litgpt else ())):
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                copy_contents(path, out_dir / path.relative_to(source))


def copy_contents(path: Path, to: Path) -> None:
    """Copy a file's contents; the copy has the permissions of a new file."""
    to.parent.mkdir(exist_ok=True)
    to.unlink(missing_ok=True)  # an earlier copy may be read-only
    shutil.copyfile(path, to)
