"""A tiny tokenizer and a tiny corpus, in the file formats of users."""

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards quietly mix boxing jugs".split()
VOCABULARY = 300


def documents(n: int, seed: int = 0) -> list[str]:
    """Return made-up documents of different lengths."""
    rng = random.Random(seed)
    return [f"{i} " + " ".join(rng.choices(WORDS, k=rng.randint(3, 30))) for i in range(n)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def write_tokenizer(folder: Path, eos: bool = True) -> Path:
    """Write `tokenizer.json` and `tokenizer_config.json` of a byte-level BPE with at most 300 entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents(50), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | ({"eos_token": "<|endoftext|>"} if eos else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_word_tokenizer(folder: Path, n: int) -> Path:
    """Write `tokenizer.json` and `tokenizer_config.json` of n words: w0, w1, …"""
    vocabulary = {f"w{i}": i for i in range(n)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w1"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
