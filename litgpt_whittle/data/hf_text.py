"""Any text that Hugging Face `datasets` reads, as a litgpt DataModule: tokenised once, memory-mapped, packed."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from litgpt.data import DataModule
from litgpt.tokenizer import Tokenizer
from torch.utils.data import DataLoader

from litgpt_whittle.data.token_file import Shuffled, Windows, default_cache, is_written, write_tokens
from litgpt_whittle.errors import UserError

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}
"""Which of the `datasets` builders reads a file; all others are read as one document of plain text."""


PARTS = ("train", "validation")


@dataclass
class HFText(DataModule):
    """Text from local files or the Hugging Face hub, tokenised once and packed into blocks.

    Documents are separated by EOS. Batches are token ids, shape (B, max_seq_length + 1).
    """

    path: str
    """A file or folder of text, JSON lines, parquet or arrow files, or a dataset's name on the Hugging Face hub"""
    name: str | None = None
    """The configuration of a dataset on the hub, such as 'wikitext-103-raw-v1'"""
    text_column: str = "text"
    """The column that holds the text"""
    train_split: str = "train"
    """The split to train on"""
    val_split: str | None = None
    """The split to validate on"""
    val_path: str | None = None
    """A file, folder or dataset to validate on"""
    val_fraction: float = 0.02
    """The share of documents, by a hash of their text, to validate on where neither val_split nor val_path is given"""
    streaming: bool = False
    """Read a dataset from the hub as it is tokenised instead of downloading it first"""
    max_documents: int | None = None
    """Read no more documents than this, those for validation included"""
    max_tokens: int | None = None
    """Stop reading at this many tokens"""
    seed: int = 42
    """The seed of the order of training blocks"""
    num_workers: int = 0
    """The number of workers to use for data loading"""
    cache_dir: Path | None = None
    """Where the tokens are kept; by default beside local data, else in the user's cache"""

    tokenizer: Tokenizer | None = field(default=None, init=False, repr=False)
    batch_size: int = field(default=1, init=False, repr=False)
    max_seq_length: int = field(default=-1, init=False, repr=False)
    parts: tuple[str, ...] = field(default=PARTS, init=False, repr=False)
    """What is prepared; whoever reads validation text alone need not wait for the rest"""
    train_dataset: Windows | None = field(default=None, init=False, repr=False)
    val_dataset: Windows | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__init__()
        if not 0 < self.val_fraction < 1:
            raise UserError(f"data.val_fraction must lie between 0 and 1, got {self.val_fraction}; try 0.02")
        for option in ("max_documents", "max_tokens"):
            if (value := getattr(self, option)) is not None and value < 1:
                raise UserError(f"data.{option} must be at least 1, got {value}; leave it out for all")
        if self.val_path is not None and self.val_split is None and _same(self.val_path, self.path):
            raise UserError(f"data.val_path must not be the training data {self.path!r}; leave it out to split that")
        if self.val_split == self.train_split and self.val_path is None:
            raise UserError(f"data.val_split must not be data.train_split, got {self.val_split!r} for both; change one")

    def connect(
        self, tokenizer: Tokenizer | None = None, batch_size: int = 1, max_seq_length: int | None = None, **kwargs: Any
    ) -> None:
        """Takes what is only known at run time; blocks hold one token more, since each is predicted from the last."""
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.parts = PARTS
        self.max_seq_length = -1 if max_seq_length is None else max_seq_length + 1

    def check(self, reads: bool = False) -> None:
        """Refuses data that is not there, before anything expensive starts. A name on the hub is not looked up.

        Args:
            reads: Whether to read a first document of each part, too.

        Raises:
            UserError: If a file or folder is missing, or the first document cannot be read.
        """
        for path, split in {self._source(part): None for part in PARTS}:
            option = self._option(path)
            if not Path(path).exists():
                if _is_file_name(path):
                    raise _not_found(path, option)
            elif reads:
                texts, _ = read_texts(path, self.name, split, self.text_column, streaming=True, option=option)
                if next(texts, None) is None:
                    raise UserError(f"{option} {path!r} is empty; name data that has text")

    def prepare_data(self) -> None:
        """Tokenises what has not been tokenised yet.

        Raises:
            UserError: If there is no usable tokenizer, or the data cannot be read or is empty.
        """
        for part in self.parts:
            if not is_written(folder := self._folder(part)):
                self._tokenise(part, folder)

    def setup(self, stage: str = "") -> None:
        """Opens the tokens.

        Raises:
            UserError: If they do not fill one block.
        """
        datasets = {part: Windows(self._folder(part), self.max_seq_length) for part in self.parts}
        self.train_dataset, self.val_dataset = (datasets.get(part) for part in PARTS)
        for part, dataset in datasets.items():
            if len(dataset) == 0:
                raise UserError(
                    f"the {part} data must fill a block of {self.max_seq_length} tokens, got "
                    f"{dataset.about['n_tokens']}; add text, or lower train.max_seq_length"
                )

    def train_dataloader(self) -> DataLoader:
        """Blocks in an order that depends on nothing but seed and epoch."""
        sampler = Shuffled(len(self.train_dataset), self.seed)
        return self._loader(self.train_dataset, sampler=sampler, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """Blocks in their order in the text, always the same."""
        return self._loader(self.val_dataset, shuffle=False)

    def _loader(self, dataset: Windows, **options: Any) -> DataLoader:
        workers = {"num_workers": self.num_workers, "persistent_workers": self.num_workers > 0}
        return DataLoader(dataset, batch_size=self.batch_size, **workers, **options)

    def _source(self, part: str) -> tuple[str, str]:
        """Path and split of a part."""
        if part == "train" or (self.val_path is None and self.val_split is None):
            return str(self.path), self.train_split
        return str(self.val_path or self.path), self.val_split or self.train_split

    def _option(self, path: str) -> str:
        """Where a path was given."""
        return "data.path" if path == str(self.path) else "data.val_path"

    def _folder(self, part: str) -> Path:
        path, _ = self._source(part)
        return Path(self.cache_dir or default_cache(path)) / f"{part}-{self._fingerprint(part)}"

    def _fingerprint(self, part: str) -> str:
        """Tells apart everything that changes the tokens."""
        path, split = self._source(part)
        files = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in _files(path)]
        facts = {
            "source": [path, self.name, split, self.text_column, files],
            "held_out": None if self._splits_itself(part) is None else [part, self.val_fraction],
            "caps": [self.max_documents, self.max_tokens],
            "tokenizer": _tokenizer_digest(self._checked_tokenizer()),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def _splits_itself(self, part: str) -> bool | None:
        """Which side of the hash split a part takes, None where it takes all of its source."""
        return None if self.val_path is not None or self.val_split is not None else part == "validation"

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
        return self.tokenizer

    def _tokenise(self, part: str, folder: Path) -> None:
        from tqdm import tqdm

        tokenizer = self._checked_tokenizer()
        path, split = self._source(part)
        read = partial(read_texts, path, self.name, split, self.text_column, self.streaming, self._option(path))
        texts, total = read()
        texts = itertools.islice(texts, self.max_documents)
        if (held_out := self._splits_itself(part)) is not None:
            texts = (text for text in texts if (_position(text) < self.val_fraction) == held_out)
        about = {"part": part, "fingerprint": folder.name.rpartition("-")[2], "source": path, "split": split}
        bar = tqdm(texts, desc=f"Tokenising {part} data", unit=" documents", total=total)
        ids = _capped(encode(tokenizer, bar), self.max_tokens)
        first = next(ids, None)
        if first is None and held_out is not None and next(read()[0], None) is not None:
            raise UserError(
                f"none of the few documents of {path!r} fell into its {part} part, with val_fraction = "
                f"{self.val_fraction}; give text of its own as data.val_path, or change data.val_fraction"
            )
        if first is None:
            raise UserError(f"the {part} data of {path!r} is empty; name data that has text in {self.text_column!r}")
        vocab_size = max(tokenizer.vocab_size, tokenizer.eos_id + 1, _largest_id(tokenizer) + 1)
        write_tokens(folder, itertools.chain([first], ids), tokenizer.eos_id, vocab_size, about)


def read_texts(
    path: str, name: str | None, split: str, column: str, streaming: bool, option: str = "data.path"
) -> tuple[Iterator[str], int | None]:
    """The documents of a local file, a folder or a dataset on the hub that are not blank, and how many at most.

    Raises:
        UserError: If they cannot be read, or there is no such column.
    """
    import datasets

    files = _files(path)
    kinds = {BUILDERS.get(file.suffix, "text") for file in files}
    if len(kinds) > 1:
        raise UserError(f"the files in {path!r} must be of one kind, got {', '.join(sorted(kinds))}; separate them")
    if kinds == {"text"}:
        texts = (file.read_text(encoding="utf-8", errors="replace") for file in files)
        return (text for text in texts if text.strip()), len(files)
    try:
        if files:
            (kind,) = kinds
            data = datasets.load_dataset(kind, data_files=[str(f) for f in files], split="train", streaming=streaming)
        else:
            data = datasets.load_dataset(path, name, split=split, streaming=streaming)
    except StopIteration:
        raise UserError(f"{option} {path!r} is empty; name data that has text") from None
    except Exception as error:
        cause = error.__cause__ or error  # which datasets wraps in an error that says nothing
        reason = (str(cause).strip() or repr(cause)).splitlines()[0]
        # the hub's client says no more than this once it was closed by an earlier failure
        told = "" if "client has been closed" in reason else f" ({reason})"
        if not files:
            raise _not_found(path, option, told) from None
        raise UserError(f"{option} {path!r} cannot be read{told}; mend the file, or name another") from None
    if data.column_names is not None:
        _check_column(column, data.column_names, path)
    rows = (_check_column(column, row, path) or row[column] for row in data)
    return (text for text in rows if text and text.strip()), None if streaming else len(data)


def _check_column(column: str, columns: Iterable[str], path: str) -> None:
    if column not in columns:
        raise UserError(f"data.text_column {column!r} is not in {path!r}; its columns are {', '.join(columns)}")


def _not_found(path: str, option: str, reason: str = "") -> UserError:
    where = "neither as a file or folder nor on the Hugging Face hub"
    return UserError(f"{option} {path!r} cannot be found, {where}{reason}; check the name")


def _is_file_name(path: str) -> bool:
    """Whether a path cannot be a dataset's name on the hub, which is `name` or `owner/name`."""
    return path.startswith(("/", ".", "~")) or path.count("/") > 1 or Path(path).suffix in {*BUILDERS, ".txt"}


def encode(tokenizer: Tokenizer, texts: Iterable[str], batch: int = 64) -> Iterator[list[int]]:
    """Token ids of each document, without BOS and EOS."""
    texts = iter(texts)
    while chunk := list(itertools.islice(texts, batch)):
        if tokenizer.backend == "huggingface":  # in parallel, and a hundred times fewer calls
            yield from (done.ids for done in tokenizer.processor.encode_batch(chunk, add_special_tokens=False))
        else:
            yield from (tokenizer.encode(text, bos=False, eos=False).tolist() for text in chunk)


def _capped(documents: Iterator[list[int]], max_tokens: int | None) -> Iterator[list[int]]:
    """Documents until they hold `max_tokens`, their EOS counted; the last one is cut."""
    left = max_tokens
    for ids in documents:
        if left is not None:
            if left < 2:
                return
            ids = ids[: left - 1]
            left -= len(ids) + 1
        yield ids


def _files(path: str) -> list[Path]:
    """The files of a local path, hidden ones left out; none where it is a name on the hub."""
    local = Path(path)
    if local.is_file():
        return [local]
    found = (file for file in local.rglob("*") if file.is_file()) if local.is_dir() else ()
    return sorted(f for f in found if not any(part.startswith(".") for part in f.relative_to(local).parts))


def _same(a: str, b: str) -> bool:
    return str(a) == str(b) or (Path(a).exists() and Path(b).exists() and Path(a).samefile(b))


def _position(text: str) -> float:
    """A document's fixed place in [0, 1), the same in every run and on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:6], "big") / 2**48


def _largest_id(tokenizer: Tokenizer) -> int:
    if tokenizer.backend != "huggingface":
        return tokenizer.vocab_size - 1
    return max(tokenizer.processor.get_vocab(with_added_tokens=True).values(), default=0)


def _tokenizer_digest(tokenizer: Tokenizer) -> str:
    if tokenizer.backend == "huggingface":
        content = tokenizer.processor.to_str().encode()
    else:
        content = tokenizer.processor.serialized_model_proto()
    return hashlib.sha256(content + str(tokenizer.eos_id).encode()).hexdigest()[:16]
