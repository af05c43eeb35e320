"""Write the tokenizer and the configs of a checkpoint with the ids of a smaller vocabulary."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from litgpt.utils import fix_and_load_json

from litgpt_whittle.errors import UserError
from litgpt_whittle.tokenizer_files import copy_tokenizer
from litgpt_whittle.vocabulary.bpe import merges_of

TOKENIZER = "tokenizer.json"
CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json")

_OTHER_FORMATS = ("*.model", "*.tiktoken", "tekken.json")
"""Files with the same tokenizer in other formats, which would keep the old ids"""

_IDS = re.compile(r"(^|_)token_(id|ids|index)$|^(begin_)?suppress_tokens$")
"""Keys of token ids in configs"""

NewId = Callable[[int], int | None]
"""Returns a token's new id; None for tokens that are not kept"""


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, tolerating the faults that litgpt tolerates.

    Raises:
        UserError: If the file is missing or cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text)
    except ValueError:
        pass
    except OSError as error:
        raise UserError(
            f"{str(path)!r} cannot be read ({error.strerror}); check its permissions, or fetch it again"
        ) from None
    try:
        return fix_and_load_json(text)
    except ValueError:
        raise UserError(f"{str(path)!r} is not JSON; check its permissions, or fetch it again") from None


def named_ids(folder: Path) -> set[int]:
    """Return the token ids that the configs in a checkpoint directory name."""
    found: set[int] = set()

    def note(token: int) -> int:
        found.add(token)
        return token

    for path in _configs(folder):
        _renumbered(read_json(path), note)
    return found


def write_tokenizer(source: Path, out_dir: Path, kept: np.ndarray) -> None:
    """Write the tokenizer files and Hugging Face configs of a checkpoint with new token ids.

    Token `kept[i]` gets the id i. Files with the same tokenizer in other formats, such as `tokenizer.model`, are left
    out.

    Args:
        source: The checkpoint directory.
        out_dir: An existing folder.
        kept: Ids of the kept tokens, sorted; the merges that lead to each of them are among its kept parts.
    """
    new_ids = {token: i for i, token in enumerate(kept.tolist())}
    copy_tokenizer(source, out_dir)
    for pattern in _OTHER_FORMATS:
        for path in out_dir.glob(pattern):
            path.unlink()
    tokenizer = _pruned(read_json(source / TOKENIZER), new_ids.get)
    _write(out_dir / TOKENIZER, tokenizer)
    for path in _configs(source):
        content = _renumbered(read_json(path), new_ids.get)
        _write(out_dir / path.name, _with_size(content, len(kept)) if path.name == "config.json" else content)
    model = tokenizer["model"]
    if (source / "vocab.json").is_file():
        _write(out_dir / "vocab.json", model["vocab"])
    if (source / "merges.txt").is_file():
        lines = [" ".join(merge) for merge in merges_of(model)]
        (out_dir / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")
    if (source / "added_tokens.json").is_file():
        added = read_json(source / "added_tokens.json")
        _write(out_dir / "added_tokens.json", {t: new_ids[i] for t, i in added.items() if i in new_ids})


def _configs(folder: Path) -> list[Path]:
    return [path for name in CONFIGS if (path := folder / name).is_file()]


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")


def _pruned(tokenizer: dict[str, Any], new_id: NewId) -> dict[str, Any]:
    """Return the content of a `tokenizer.json` with the kept tokens only."""
    model = tokenizer["model"]
    vocab = {token: new for token, i in model["vocab"].items() if (new := new_id(i)) is not None}
    merges = [
        merge
        for merge, (a, b) in zip(model["merges"], merges_of(model))
        if a in vocab and b in vocab and a + b in vocab
    ]
    added = [
        token | {"id": new} for token in tokenizer.get("added_tokens") or () if (new := new_id(token["id"])) is not None
    ]
    changes = {"added_tokens": added, "model": model | {"vocab": vocab, "merges": merges}}
    if tokenizer.get("post_processor"):
        changes["post_processor"] = _processor(tokenizer["post_processor"], new_id)
    if tokenizer.get("padding"):
        changes["padding"] = tokenizer["padding"] | {"pad_id": new_id(tokenizer["padding"]["pad_id"])}
    return tokenizer | changes


def _processor(processor: dict[str, Any], new_id: NewId) -> dict[str, Any]:
    """Return a post-processor, which adds special tokens to a text, with new ids."""
    if processor["type"] == "Sequence":
        return processor | {"processors": [_processor(part, new_id) for part in processor["processors"]]}
    if processor["type"] == "TemplateProcessing":
        tokens = processor["special_tokens"].items()
        special = {name: token | {"ids": [new_id(i) for i in token["ids"]]} for name, token in tokens}
        return processor | {"special_tokens": special}
    pairs = {key: [processor[key][0], new_id(processor[key][1])] for key in ("sep", "cls") if key in processor}
    return processor | pairs


def _renumbered(content: Any, new_id: NewId) -> Any:
    """Return a config in which all token ids are replaced; ids without a new one become null, or leave a list."""
    if not isinstance(content, dict):
        return [_renumbered(value, new_id) for value in content] if isinstance(content, list) else content
    replaced: dict[str, Any] = {}
    for key, value in content.items():
        if key == "added_tokens_decoder":
            replaced[key] = {str(new): token for i, token in value.items() if (new := new_id(int(i))) is not None}
        elif not _IDS.search(key):
            replaced[key] = _renumbered(value, new_id)
        elif isinstance(value, list):
            replaced[key] = [new for i in value if (new := new_id(i)) is not None]
        else:
            replaced[key] = new_id(value) if isinstance(value, int) else value
    return replaced


def _with_size(content: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Return a Hugging Face config, and the text part of a multimodal one, with another vocabulary size."""
    inner = {key: _with_size(content[key], size) for key in ("text_config",) if key in content}
    return {**content, **inner, **({"vocab_size": size} if "vocab_size" in content else {})}
