"""A litgpt DataModule for texts and conversations that `datasets` reads: tokenised once, memory-mapped, packed."""

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
from typing import Any, Literal, cast

from litgpt.data import DataModule
from litgpt.tokenizer import Tokenizer
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from litgpt_whittle.data.blend import Blended, Paths, blended_once, token_shares, weighted
from litgpt_whittle.data.chat import ChatTemplate, Messages, encode_chats, find_template
from litgpt_whittle.data.documents import Columns, documents, position
from litgpt_whittle.data.encoding import begins_with_bos, capped, encode, largest_id, tokenizer_digest
from litgpt_whittle.data.sources import Source, find_layout, kind_of
from litgpt_whittle.data.token_file import Document, Shuffled, Windows, default_cache, is_written, write_tokens
from litgpt_whittle.errors import UserError

PARTS = ("train", "validation")


@dataclass
class HFText(DataModule):
    """Texts and conversations from local files or the Hugging Face hub, tokenised once and packed into blocks.

    Texts are separated by EOS; conversations are what the chat template writes. Blocks begin with BOS where the
    tokenizer begins texts with it. Batches are token ids, shape (B, max_seq_length + 1), or, with conversations of
    which only the answers count, dicts of `input_ids` and `labels` of that shape.
    """

    path: Paths
    """A file, a folder or a pattern such as 'texts/**/*.jsonl': plain text, JSON (lines), CSV, TSV, parquet or arrow,
    also compressed; a folder that `save_to_disk` wrote; or a dataset's name on the Hugging Face hub. Or a weighted
    mix of several, such as '{wiki.jsonl: 0.7, code/: 0.3}', with their shares"""
    name: str | None = None
    """The configuration of a dataset, such as 'wikitext-103-raw-v1'"""
    text_column: str = "text"
    """The column that holds the text"""
    messages_column: str = "messages"
    """The column of conversations, each a list of messages with ``role`` and ``content`` (or ``from`` and ``value``, as
    in ShareGPT's ``conversations``). Paths that have this column are read as conversations, all others as text"""
    chat_template: str | None = None
    """The template that renders conversations: a file, or the name of one of the checkpoint's templates; by default
    the checkpoint's"""
    answers_only: bool = True
    """If true, only the assistant's answers count in the loss and in scores of conversations; in text, all tokens do"""
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
    weights_of: Literal["tokens", "documents"] = "tokens"
    """Unit of the shares in a mix. With shares of documents, a path's share of tokens is also in proportion to the mean
    length of its documents"""
    bos: bool | None = None
    """If true, begin every block with the BOS token, without which some models predict badly. By default true if the
    tokenizer begins every text with it, as the tokenizers of Gemma and Llama do"""
    reset_attention: bool = False
    """If true, tokens of a block attend only to tokens of the same document, and to BOS if the block begins with it.
    Not for repairs, only for texts, whose documents end with EOS, and only in this project's commands"""
    seed: int = 42
    """The seed for shuffling the training blocks"""
    num_workers: int = 0
    """The number of workers to use for data loading"""
    cache_dir: Path | None = None
    """Folder for the tokens; by default next to local data if that is writable, else in the user's cache"""

    tokenizer: Tokenizer | None = field(default=None, init=False, repr=False)
    batch_size: int = field(default=1, init=False, repr=False)
    max_seq_length: int = field(default=-1, init=False, repr=False)
    tokenizer_dir: Path | None = field(default=None, init=False, repr=False)
    """The checkpoint directory with the chat template, if known"""
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
        if self.weights_of not in ("tokens", "documents"):
            raise UserError(f"data.weights_of must be tokens or documents, got {self.weights_of!r}; choose one")
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
            first = self._first(source, streaming=True)
            if first is None:
                raise UserError(f"{source.option} {source.layout.path!r} is empty; choose data that contains text")
            if isinstance(first, list):
                self._check_resets(source)
                template = self._rendering(source)
                render = template.render_with_answers if self.answers_only else template.render
                render(first, source.layout.path)

    def prepare_data(self) -> None:
        """Tokenise the parts that have not been tokenised yet.

        Raises:
            UserError: If there is no usable tokenizer, or the data cannot be read or is empty.
        """
        for part in self.parts:
            for source in self._sources(part):
                folder, template = self._place(part, source)
                if not is_written(folder):
                    self._tokenise(part, source, folder, template)

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
                order = blended_once([len(each) for each in windows], self._shares("validation", windows))
                self.val_dataset = Subset(ConcatDataset(windows), order)

    def _windows(self, part: str) -> list[Windows]:
        """Open the windows of each source of a part."""
        bos_id, opened = self._bos_id(), []
        for source in self._sources(part):
            folder, template = self._place(part, source)
            if template is not None:
                self._check_resets(source)
            windows = Windows(folder, self.max_seq_length, bos_id)
            self._check_id(max(windows.about.get("largest_id", 0), bos_id or 0), part)
            if len(windows) == 0:
                raise UserError(
                    f"the {part} data must fill a block of {self.max_seq_length} tokens, got "
                    f"{windows.about['n_tokens']} in {source.layout.path!r}; add text, or lower train.max_seq_length"
                )
            opened.append(windows)
        if any(windows.is_masked for windows in opened):
            for windows in opened:
                windows.with_labels = True
        return opened

    def has_bos(self, tokenizer: Tokenizer) -> bool:
        """Return whether blocks begin with BOS."""
        return begins_with_bos(tokenizer) if self.bos is None else self.bos

    def _bos_id(self) -> int | None:
        """Return the token that blocks begin with, if any."""
        tokenizer = self._checked_tokenizer()
        return tokenizer.bos_id if self.has_bos(tokenizer) else None

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

    def _checked(self, documents: Iterable[Document], part: str) -> Iterator[Document]:
        for document in documents:
            self._check_id(max(document.ids, default=0), part)
            yield document

    def train_dataloader(self) -> DataLoader:
        """Return a dataloader of shuffled blocks; the order depends only on seed and epoch."""
        dataset = self.train_dataset
        assert dataset is not None, "`setup` comes first"
        sampler: Shuffled | Blended
        if isinstance(dataset, Windows):
            sampler = Shuffled(len(dataset), self.seed)
        else:
            windows = cast("list[Windows]", dataset.datasets)
            sampler = Blended([len(each) for each in windows], self._shares("train", windows), self.seed)
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

    def _shares(self, part: str, windows: list[Windows]) -> list[Fraction]:
        """Return the share of tokens of each source of a part, whose windows are given."""
        validates = self._validation_paths() if part == "validation" else {}
        shares = list((validates or weighted(self.path, "data.path")).values())
        if self.weights_of == "tokens":
            return shares
        return token_shares(shares, [Fraction(each.about["n_tokens"], each.about["n_documents"]) for each in windows])

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
        """Return the location of the training or validation text of one path."""
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

    def _read(self, source: Source, streaming: bool) -> tuple[Iterator[str] | Iterator[Messages], int | None]:
        where = source.layout, source.files, self.name, source.split
        return documents(*where, Columns(self.text_column, self.messages_column), streaming, source.option)

    def _first(self, source: Source, streaming: bool) -> str | Messages | None:
        """Return the first document of a source, None if there is none."""
        return next(self._read(source, streaming)[0], None)

    def _find_template(self) -> ChatTemplate | None:
        return find_template(self.chat_template, self.tokenizer_dir, self.tokenizer)

    def _rendering(self, source: Source) -> ChatTemplate:
        """Return the template that renders the conversations of a source.

        Raises:
            UserError: If there is none.
        """
        if (template := self._find_template()) is None:
            raise UserError(
                f"the conversations in {source.layout.path!r} need a chat template, and the checkpoint has none; set "
                f"data.chat_template to a Jinja file, or data.messages_column to another column than "
                f"{self.messages_column!r} to read text"
            )
        return template

    def _place(self, part: str, source: Source) -> tuple[Path, ChatTemplate | None]:
        """Return the folder of a source's tokens, and the template that renders them, None for text.

        Raises:
            UserError: If the source has conversations and there is no template.
        """
        cache = Path(self.cache_dir or default_cache(source.layout.root)).expanduser()
        text = cache / f"{part}-{self._fingerprint(part, source)}"
        if is_written(text):  # tokens of a dataset on the hub are used without a connection
            return text, None
        template = self._find_template()
        chat = cache / f"{part}-{self._fingerprint(part, source, template)}"
        if chat != text and is_written(chat):
            return chat, template
        if not isinstance(self._first(source, self.streaming), list):
            return text, None
        return chat, self._rendering(source)

    def _check_resets(self, source: Source) -> None:
        """Raise UserError if attention cannot be reset between the conversations of a source."""
        if self.reset_attention:
            raise UserError(
                "data.reset_attention needs texts, whose documents end with EOS, and "
                f"{source.layout.path!r} has conversations, which may contain it; leave it out"
            )

    def _fingerprint(self, part: str, source: Source, template: ChatTemplate | None = None) -> str:
        """Return a fingerprint of all settings and files that determine the tokens."""
        files = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in source.files]
        facts = {
            "source": [source.layout.path, self.name, source.split, self.text_column, files],
            "read as": [source.layout.kind, sorted({kind_of(file)[0] for file in source.files})],
            "held_out": [part, self.val_fraction] if source.is_shared else None,
            "caps": [self.max_documents, self.max_tokens],
            "tokenizer": tokenizer_digest(self._checked_tokenizer()),
        }
        if template is not None or self.messages_column != "messages":  # text may be in another column of the same file
            facts["chat"] = [self.messages_column, self.answers_only, template and template.digest]
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

    def _tokenise(self, part: str, source: Source, folder: Path, template: ChatTemplate | None) -> None:
        from tqdm import tqdm

        tokenizer = self._checked_tokenizer()
        path, is_chat = source.layout.path, template is not None
        read = partial(self._read, source, self.streaming)
        found, total = read()
        texts: Iterator[Any] = itertools.islice(found, self.max_documents)
        if source.is_shared:
            is_held_out = part == "validation"
            texts = (text for text in texts if (position(text) < self.val_fraction) == is_held_out)
        about = {"part": part, "fingerprint": folder.name.rpartition("-")[2], "source": path, "split": source.split}
        with tqdm(texts, desc=f"Tokenising {part} data", unit=" documents", total=total) as bar:
            if template is None:
                encoded = encode(tokenizer, bar)
            else:
                encoded = encode_chats(tokenizer, template, bar, path, self.answers_only)
            kept = self._checked(capped(encoded, self.max_tokens, has_eos=not is_chat), part)
            first = next(kept, None)
            if first is None and source.is_shared and next(read()[0], None) is not None:
                raise UserError(
                    f"{path!r} has too few documents for a {part} split with val_fraction = {self.val_fraction}; "
                    "set data.val_path to another text, or change data.val_fraction"
                )
            if first is None:
                raise UserError(
                    f"the {part} data of {path!r} is empty; choose data that contains text in {self.text_column!r}"
                )
            vocab_size = max(tokenizer.vocab_size, cast(int, tokenizer.eos_id) + 1, largest_id(tokenizer) + 1)
            eos_id = None if is_chat else tokenizer.eos_id
            masked = is_chat and self.answers_only
            write_tokens(folder, itertools.chain([first], kept), eos_id, vocab_size, about, masked)


def _same(a: str, b: str) -> bool:
    first, second = (Path(os.path.expanduser(path)) for path in (a, b))
    return first == second or (first.exists() and second.exists() and first.samefile(second))
