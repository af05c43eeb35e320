"""A litgpt DataModule for any text that Hugging Face `datasets` reads: tokenised once, memory-mapped, packed."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, cast

from litgpt.data import DataModule
from litgpt.tokenizer import Tokenizer
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from litgpt_whittle.data.blend import Blended, Paths, blended_once, weighted
from litgpt_whittle.data.documents import documents
from litgpt_whittle.data.sources import Source, find_layout, kind_of
from litgpt_whittle.data.token_file import Shuffled, Windows, default_cache, is_written, write_tokens
from litgpt_whittle.errors import UserError

PARTS = ("train", "validation")


@dataclass
class HFText(DataModule):
    """Text from local files or the Hugging Face hub, tokenised once and packed into blocks.

    Documents are separated by EOS. Blocks begin with BOS where the tokenizer begins texts with it. Batches are token
    ids, shape (B, max_seq_length + 1).
    """

    path: Paths
    """A file, a folder or a pattern such as 'texts/**/*.jsonl': plain text, JSON (lines), CSV, TSV, parquet or arrow,
    also compressed; a folder that `save_to_disk` wrote; or a dataset's name on the Hugging Face hub. Or a weighted
    mix of several, such as '{wiki.jsonl: 0.7, code/: 0.3}', with their shares of tokens"""
    name: str | None = None
    """The configuration of a dataset, such as 'wikitext-103-raw-v1'"""
    text_column: str = "text"
    """The column that holds the text"""
    train_split: str = "train"
    """The split to train on; a folder without splits is read whole. Splits of a folder are those of `datasets`: by
    files such as train.jsonl and validation.jsonl, by subfolders, or by the README.md"""
    val_split: str | None = None
    """The split to validate on. By default the split 'validation' of a local folder if all of its files belong to
    splits, else a fraction of the training split"""
    val_path: Paths | None = None
    """A file, folder, pattern, dataset or weighted mix to validate on; by default the data of ``path``"""
    val_fraction: float = 0.02
    """The fraction of documents to hold out for validation, by a hash of their text, if there is no split or path"""
    streaming: bool = False
    """Read a dataset from the hub as it is tokenised instead of downloading it first"""
    max_documents: int | None = None
    """Maximum number of documents to read of each path, including those for validation"""
    max_tokens: int | None = None
    """Maximum number of tokens to read of each path"""
    bos: bool | None = None
    """If true, begin every block with the BOS token, without which some models predict badly. By default true if the
    tokenizer begins every text with it, as the tokenizers of Gemma and Llama do"""
    seed: int = 42
    """The seed for shuffling the training blocks"""
    num_workers: int = 0
    """The number of workers to use for data loading"""
    cache_dir: Path | None = None
    """Folder for the tokens; by default next to local data if that is writable, else in the user's cache"""

    tokenizer: Tokenizer | None = field(default=None, init=False, repr=False)
    batch_size: int = field(default=1, init=False, repr=False)
    max_seq_length: int = field(default=-1, init=False, repr=False)
    vocab_size: int | None = field(default=None, init=False, repr=False)
    """Number of embeddings of the model, if known"""
    parts: tuple[str, ...] = field(default=PARTS, init=False, repr=False)
    """Parts to prepare; a search that reads only validation data need not tokenise the training data"""
    train_dataset: Windows | ConcatDataset | None = field(default=None, init=False, repr=False)
    val_dataset: Windows | Subset | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__init__()
        if not 0 < self.val_fraction < 1:
            raise UserError(f"data.val_fraction must lie between 0 and 1, got {self.val_fraction}; try 0.02")
        for option in ("max_documents", "max_tokens"):
            if (value := getattr(self, option)) is not None and value < 1:
                raise UserError(f"data.{option} must be at least 1, got {value}; leave it out for all")
        trains, validates = weighted(self.path, "data.path"), self._validation_paths()
        if validates and self.val_split is None:
            for path in validates:
                if any(_same(path, other) for other in trains):
                    raise UserError(f"data.val_path must not be the training data {path!r}; leave it out to split that")
        if self.val_split == self.train_split and self.val_path is None:
            raise UserError(f"data.val_split must not be data.train_split, got {self.val_split!r} for both; change one")

    def connect(
        self, tokenizer: Tokenizer | None = None, batch_size: int = 1, max_seq_length: int | None = None, **kwargs: Any
    ) -> None:
        """Set the tokenizer, batch size and sequence length; a block has one more token, the target of the last."""
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.parts = PARTS
        self.max_seq_length = -1 if max_seq_length is None else max_seq_length + 1

    def check(self, reads: bool = False) -> None:
        """Check that the data exists and can be read, before anything expensive starts.

        Args:
            reads: If true, look up and read datasets on the hub, too.

        Raises:
            UserError: If a file, folder, split or column is missing, or the first document cannot be read.
        """
        sources = [source for part in PARTS for source in self._sources(part)]
        for source in {(source.layout.path, source.split): source for source in sources}.values():
            if source.layout.kind == "hub" and not reads:
                continue
            texts, _ = self._read(source, streaming=True)
            if next(texts, None) is None:
                raise UserError(f"{source.option} {source.layout.path!r} is empty; choose data that contains text")

    def prepare_data(self) -> None:
        """Tokenise the parts that have not been tokenised yet.

        Raises:
            UserError: If there is no usable tokenizer, or the data cannot be read or is empty.
        """
        for part in self.parts:
            for source in self._sources(part):
                if not is_written(folder := self._folder(part, source)):
                    self._tokenise(part, source, folder)

    def setup(self, stage: str = "") -> None:
        """Open the tokenised parts.

        Raises:
            UserError: If a part does not fill one block, or has a token without an embedding.
        """
        if "train" in self.parts:
            windows = self._windows("train")
            self.train_dataset = windows[0] if len(windows) == 1 else ConcatDataset(windows)
        if "validation" in self.parts:
            windows = self._windows("validation")
            if len(windows) == 1:
                self.val_dataset = windows[0]
            else:
                order = blended_once([len(each) for each in windows], self._shares("validation"))
                self.val_dataset = Subset(ConcatDataset(windows), order)

    def _windows(self, part: str) -> list[Windows]:
        """Open the windows of each source of a part."""
        bos_id, opened = self._bos_id(), []
        for source in self._sources(part):
            windows = Windows(self._folder(part, source), self.max_seq_length, bos_id)
            self._check_id(max(windows.about.get("largest_id", 0), bos_id or 0), part)
            if len(windows) == 0:
                raise UserError(
                    f"the {part} data must fill a block of {self.max_seq_length} tokens, got "
                    f"{windows.about['n_tokens']} in {source.layout.path!r}; add text, or lower train.max_seq_length"
                )
            opened.append(windows)
        return opened

    def _bos_id(self) -> int | None:
        """Return the token that blocks begin with, if any."""
        tokenizer = self._checked_tokenizer()
        return tokenizer.bos_id if self.bos or (self.bos is None and begins_with_bos(tokenizer)) else None

    def _check_id(self, token: int, part: str) -> None:
        """Raise UserError for a token that the model has no embedding for."""
        if self.vocab_size is not None and token >= self.vocab_size:
            processor = self._checked_tokenizer().processor
            text = processor.id_to_token(token) if hasattr(processor, "id_to_token") else processor.id_to_piece(token)
            raise UserError(
                f"the model must have an embedding for every token, and the {part} data has the token {text!r} with id "
                f"{token} where padded_vocab_size is {self.vocab_size}; remove it from the text or from "
                "tokenizer.json, or resize the model's embedding and convert it again"
            )

    def _checked(self, documents: Iterable[list[int]], part: str) -> Iterator[list[int]]:
        for ids in documents:
            self._check_id(max(ids, default=0), part)
            yield ids

    def train_dataloader(self) -> DataLoader:
        """Return a dataloader of shuffled blocks; the order depends only on seed and epoch."""
        dataset = self.train_dataset
        assert dataset is not None, "`setup` comes first"
        sampler: Shuffled | Blended
        if isinstance(dataset, Windows):
            sampler = Shuffled(len(dataset), self.seed)
        else:
            sizes = [len(windows) for windows in cast("list[Windows]", dataset.datasets)]
            sampler = Blended(sizes, self._shares("train"), self.seed)
        return self._loader(dataset, sampler=sampler, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """Return a dataloader of blocks in text order."""
        assert self.val_dataset is not None, "`setup` comes first"
        return self._loader(self.val_dataset, shuffle=False)

    def _loader(self, dataset: Dataset, **options: Any) -> DataLoader:
        workers: dict[str, Any] = {"num_workers": self.num_workers, "persistent_workers": self.num_workers > 0}
        return DataLoader(dataset, batch_size=self.batch_size, **workers, **options)

    def _validation_paths(self) -> dict[str, Fraction]:
        """Return the paths of `val_path` and their shares; empty without it."""
        return {} if self.val_path is None else weighted(self.val_path, "data.val_path")

    def _shares(self, part: str) -> list[Fraction]:
        """Return the share of each source of a part."""
        validates = self._validation_paths() if part == "validation" else {}
        return list((validates or weighted(self.path, "data.path")).values())

    def _sources(self, part: str) -> list[Source]:
        """Return the sources of a part.

        Raises:
            UserError: If a path is not found, or has no such split.
        """
        if part == "validation" and (validates := self._validation_paths()):
            return [self._validation_source(path) for path in validates]
        return [self._source(part, path) for path in weighted(self.path, "data.path")]

    def _validation_source(self, path: str) -> Source:
        """Return the source of a path of `val_path`."""
        layout = find_layout(path, self.name, "data.val_path")
        default = self.train_split if layout.kind == "hub" else "validation" if layout.has("validation") else None
        return Source(layout, self.val_split or default, "data.val_split", "data.val_path")

    def _source(self, part: str, path: str) -> Source:
        """Return the source of a part of one of the paths."""
        layout = find_layout(path, self.name)
        if self.name is not None and layout.kind in ("files", "saved"):
            raise UserError(f"data.name {self.name!r} is not in {path!r}, which has no configurations; leave it out")
        validates = self._validation_paths()
        own_val_split = self.val_split if not validates or any(_same(each, path) for each in validates) else None
        val_split = own_val_split
        if not validates and layout.is_certain and layout.has("validation"):
            val_split = val_split or (None if self.train_split == "validation" else "validation")
        validation = Source(layout, val_split, "data.val_split") if val_split is not None else None
        if part == "validation" and validation is not None:
            return validation
        # otherwise a name such as test_io.py would be read as a split
        has_splits = layout.kind == "hub" or layout.is_certain or self.train_split != "train" or own_val_split
        is_shared = not validates and validation is None
        return Source(layout, self.train_split if has_splits else None, is_shared=is_shared)

    def _read(self, source: Source, streaming: bool) -> tuple[Iterator[str], int | None]:
        where = source.layout, source.files, self.name, source.split
        return documents(*where, self.text_column, streaming, source.option)

    def _folder(self, part: str, source: Source) -> Path:
        cache = Path(self.cache_dir or default_cache(source.layout.root)).expanduser()
        return cache / f"{part}-{self._fingerprint(part, source)}"

    def _fingerprint(self, part: str, source: Source) -> str:
        """Return a fingerprint of all settings and files that determine the tokens."""
        files = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in source.files]
        facts = {
            "source": [source.layout.path, self.name, source.split, self.text_column, files],
            "read as": [source.layout.kind, sorted({kind_of(file)[0] for file in source.files})],
            "held_out": [part, self.val_fraction] if source.is_shared else None,
            "caps": [self.max_documents, self.max_tokens],
            "tokenizer": _tokenizer_digest(self._checked_tokenizer()),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def _checked_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError(
                "HFText needs a tokenizer; set --tokenizer_dir to a directory that has one, or, where the command has "
                "no such flag, copy tokenizer.json or tokenizer.model into the checkpoint directory"
            )
        if self.tokenizer.eos_id is None:
            raise UserError(
                f"the tokenizer of {self.tokenizer.model_name!r} names no eos_token, which separates documents; "
                "add it to tokenizer_config.json"
            )
        if self.bos and self.tokenizer.bos_id is None:
            raise UserError(
                f"data.bos needs a BOS token, and the tokenizer of {self.tokenizer.model_name!r} names no bos_token; "
                "leave data.bos out, or add the token to tokenizer_config.json"
            )
        return self.tokenizer

    def _tokenise(self, part: str, source: Source, folder: Path) -> None:
        from tqdm import tqdm

        tokenizer = self._checked_tokenizer()
        path = source.layout.path
        read = partial(self._read, source, self.streaming)
        texts, total = read()
        texts = itertools.islice(texts, self.max_documents)
        if source.is_shared:
            is_held_out = part == "validation"
            texts = (text for text in texts if (_position(text) < self.val_fraction) == is_held_out)
        about = {"part": part, "fingerprint": folder.name.rpartition("-")[2], "source": path, "split": source.split}
        with tqdm(texts, desc=f"Tokenising {part} data", unit=" documents", total=total) as bar:
            ids = self._checked(_capped(encode(tokenizer, bar), self.max_tokens), part)
            first = next(ids, None)
            if first is None and source.is_shared and next(read()[0], None) is not None:
                raise UserError(
                    f"{path!r} has too few documents for a {part} split with val_fraction = {self.val_fraction}; "
                    "set data.val_path to another text, or change data.val_fraction"
                )
            if first is None:
                raise UserError(
                    f"the {part} data of {path!r} is empty; choose data that contains text in {self.text_column!r}"
                )
            vocab_size = max(tokenizer.vocab_size, tokenizer.eos_id + 1, largest_id(tokenizer) + 1)
            write_tokens(folder, itertools.chain([first], ids), tokenizer.eos_id, vocab_size, about)


def encode(tokenizer: Tokenizer, texts: Iterable[str], batch: int = 64) -> Iterator[list[int]]:
    """Yield each document's token ids, without BOS and EOS."""
    texts = iter(texts)
    while chunk := list(itertools.islice(texts, batch)):
        if tokenizer.backend == "huggingface":  # in parallel, with fewer calls
            yield from (done.ids for done in tokenizer.processor.encode_batch(chunk, add_special_tokens=False))
        else:
            yield from (tokenizer.encode(text, bos=False, eos=False).tolist() for text in chunk)


def begins_with_bos(tokenizer: Tokenizer) -> bool:
    """Return whether a tokenizer begins every text with BOS.

    litgpt's `use_bos` is also true for some instruction-tuned models whose prompts begin with BOS, but not their text.
    """
    if tokenizer.bos_id is None:
        return False
    if tokenizer.backend == "huggingface":
        return tokenizer.processor.encode("").ids[:1] == [tokenizer.bos_id]
    return tokenizer.use_bos


def _capped(documents: Iterator[list[int]], max_tokens: int | None) -> Iterator[list[int]]:
    """Yield documents up to `max_tokens` tokens, including EOS; the last document is cut."""
    left = max_tokens
    for ids in documents:
        if left is not None:
            if left < 2:
                return
            ids = ids[: left - 1]
            left -= len(ids) + 1
        yield ids


def _same(a: str, b: str) -> bool:
    first, second = (Path(os.path.expanduser(path)) for path in (a, b))
    return first == second or (first.exists() and second.exists() and first.samefile(second))


def _position(text: str) -> float:
    """Map a document to [0, 1) by a hash, the same in every run and on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:6], "big") / 2**48


def largest_id(tokenizer: Tokenizer) -> int:
    """Return a tokenizer's largest token id, including added tokens."""
    if tokenizer.backend != "huggingface":
        return tokenizer.vocab_size - 1
    return max(tokenizer.processor.get_vocab(with_added_tokens=True).values(), default=0)


def _tokenizer_digest(tokenizer: Tokenizer) -> str:
    if tokenizer.backend == "huggingface":
        content = tokenizer.processor.to_str().encode()
    else:
        content = tokenizer.processor.serialized_model_proto()
    return hashlib.sha256(content + str(tokenizer.eos_id).encode()).hexdigest()[:16]
