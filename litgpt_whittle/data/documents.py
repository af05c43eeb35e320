"""Read documents from local files and from datasets on the Hugging Face hub."""

from __future__ import annotations

import codecs
import errno
import glob
import hashlib
import json
import lzma
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from huggingface_hub.utils import HFValidationError

from litgpt_whittle.data.chat import Messages, conversation
from litgpt_whittle.data.sources import (
    COMPRESSIONS,
    KINDS,
    Layout,
    is_companion,
    kind_of,
    not_found,
    open_configuration,
    reason,
)
from litgpt_whittle.errors import UserError

HEAD = 2**16
"""Bytes at the beginning of a file to check before anything starts"""

MAX_NULS = 0.01
"""Fraction of NUL bytes above which a file is not text"""

MAX_CHECKED = 1000
"""Maximum number of a folder's files to check before anything starts"""

_READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)


def position(document: str | Messages) -> float:
    """Map a document to [0, 1) by a hash of its text or messages, the same in every run and on every machine."""
    text = document if isinstance(document, str) else json.dumps(document, sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:6], "big") / 2**48


def readable(files: Iterable[Path], path: str, option: str) -> tuple[str, list[Path]]:
    """Return the kind of a set of files, and the files to read, without metadata, licences and empty files.

    Args:
        files: The files.
        path: The path they were found at, as given by the user.
        option: Name of the option that gave the path.

    Raises:
        UserError: If the files are of several kinds, all empty, or neither text nor of a readable kind.
    """
    kinds = {file: kind_of(file)[0] for file in files}
    if set(kinds.values()) != {"text"}:
        kinds = {file: kind for file, kind in kinds.items() if not is_companion(file)} or kinds
    found = sorted(set(kinds.values()))
    if len(found) > 1:
        raise UserError(
            f"the files in {path!r} must be of one kind, got {', '.join(found)}; separate them, or choose some by a "
            f"pattern such as '{path}/**/*.jsonl'"
        )
    kept = [file for file in kinds if file.stat().st_size]
    if not kept:
        raise UserError(f"{option} {path!r} is empty; choose data that contains text")
    _check_zstd(kept)
    if found[0] not in ("parquet", "arrow"):
        for file in kept[:: -(-len(kept) // MAX_CHECKED)]:
            with opened(file, option) as content:
                check_utf8(content.read(HEAD), file, option, is_all=False)
    return found[0], kept


class Columns(NamedTuple):
    """Names of columns that hold documents."""

    text: str
    messages: str
    """Column of conversations, which takes precedence where it exists and does not hold text"""


def documents(
    layout: Layout,
    files: Iterable[Path],
    name: str | None,
    split: str | None,
    columns: Columns,
    streaming: bool,
    option: str,
) -> tuple[Iterator[str] | Iterator[Messages], int | None]:
    """Return the documents that are not blank, and an upper bound on their number, None if unknown.

    Documents are texts, or conversations if the data has a column of them.

    Args:
        layout: The files and splits to read from.
        files: All files of the split; none on the hub.
        name: The configuration.
        split: The split.
        columns: The columns that hold texts or conversations.
        streaming: If true, read a dataset on the hub without downloading it first.
        option: Name of the option that gave the path.

    Raises:
        UserError: If the documents cannot be read, or there is no column of text or conversations.
    """
    if layout.kind == "files":
        kind, files = readable(files, layout.path, option)
        if kind == "text":
            texts = (read_text(file, option) for file in files)
            return (text for text in texts if text.strip()), len(files)
    try:
        with _errors_in_one_line(layout, option):
            if layout.kind == "files":
                data = _open_files(kind, files)
            elif layout.kind == "hub":
                data = _open_hub(layout.path, name, split, streaming)
            elif layout.kind == "saved":
                assert layout.root is not None, "only a dataset on the hub has no root"
                data = _open_saved(layout.root, split)
            else:
                data = open_configuration(layout.path, name, layout.names, option).as_streaming_dataset(split)
    except StopIteration:
        raise UserError(f"{option} {layout.path!r} is empty; choose data that contains text") from None
    total = len(data) if hasattr(data, "__len__") else None
    return _documents_of(data, layout, columns, option), total


def _open_files(kind: str, files: Iterable[Path]) -> Any:
    import datasets

    builder, options = ("csv", {"sep": "\t"}) if kind == "tsv" else (kind, {})
    paths = [glob.escape(str(file.absolute())) for file in files]  # `datasets` interprets names as patterns
    # streamed, since only the tokens are kept; a copy of the text in the user's cache would be useless
    with tempfile.TemporaryDirectory() as cache:
        return datasets.load_dataset(
            builder, data_files=paths, split="train", streaming=True, cache_dir=cache, **options
        )


def _open_saved(folder: Path, split: str | None) -> Any:
    import datasets

    data = datasets.load_from_disk(str(folder))
    return data if split is None else data[split]


def _open_hub(path: str, name: str | None, split: str | None, streaming: bool) -> Any:
    import datasets

    return datasets.load_dataset(path, name, split=split, streaming=streaming)


def _documents_of(
    data: Iterable[dict[str, Any]], layout: Layout, columns: Columns, option: str
) -> Iterator[str] | Iterator[Messages]:
    """Yield the text or the conversation of every row that has one."""
    names = getattr(data, "column_names", None)
    if names is not None and columns.messages not in names:
        _check_column(columns.text, names, layout.path)
    rows = iter(data)
    while True:
        with _errors_in_one_line(layout, option):
            row = next(rows, None)
        if row is None:
            return
        if not isinstance(row.get(columns.messages, ""), str):
            if messages := row[columns.messages]:
                yield conversation(messages, layout.path)
        elif (text := _text_of(row, columns.text, layout.path)) and text.strip():
            yield text


def _text_of(row: dict[str, Any], column: str, path: str) -> str | None:
    """Return the text of a row.

    Raises:
        UserError: If the column is missing or not text.
    """
    _check_column(column, row, path)
    text = row[column]
    if not isinstance(text, str | None):
        texts = [name for name, value in row.items() if isinstance(value, str)]
        remedy = f"choose one of its columns of text: {', '.join(texts)}" if texts else "choose data with text"
        raise UserError(
            f"data.text_column {column!r} of {path!r} must hold text, got a {type(text).__name__}; {remedy}"
        )
    return text


def _check_column(column: str, columns: Iterable[str], path: str) -> None:
    if column not in columns:
        raise UserError(f"data.text_column {column!r} is not in {path!r}; its columns are {', '.join(columns)}")


@contextmanager
def _errors_in_one_line(layout: Layout, option: str) -> Iterator[None]:
    """Convert exceptions of `datasets` to `UserError`."""
    try:
        yield
    except (UserError, StopIteration):
        raise
    except Exception as error:
        cause = reason(error)
        if layout.kind != "hub":
            remedy = "mend the file, or name another"
        elif (full := _cache_error(error)) is not None:
            raise full from None
        elif isinstance(error, ValueError) and not isinstance(error, HFValidationError):
            remedy = "check data.name and the splits"
        else:
            # after an earlier failure, the hub's client reports only that it is closed
            raise not_found(layout.path, option, "" if "client has been closed" in cause else f" ({cause})") from None
        raise UserError(f"{option} {layout.path!r} cannot be read ({cause}); {remedy}") from None


def _cache_error(error: BaseException | None) -> UserError | None:
    """Return a `UserError` if the cause is that the user's cache of datasets cannot be written, else None."""
    while error is not None:
        unwritable = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR)
        if isinstance(error, OSError) and error.errno in unwritable:
            import datasets

            return UserError(
                f"the cache of Hugging Face datasets, {str(datasets.config.HF_DATASETS_CACHE)!r}, cannot be written "
                f"({error.strerror}); make room or change permissions, or set HF_HOME to another folder"
            )
        error = error.__cause__ or error.__context__
    return None


def read_text(file: Path, option: str) -> str:
    """Return a file's text.

    Raises:
        UserError: If the file cannot be read or is not UTF-8.
    """
    with opened(file, option) as stream:
        content = stream.read()
    return check_utf8(content, file, option)


def check_utf8(content: bytes, file: Path, option: str, is_all: bool = True) -> str:
    """Decode UTF-8 bytes, without a byte order mark.

    Args:
        content: The bytes.
        file: The file that holds them.
        option: Name of the option that gave the file.
        is_all: If false, `content` may end within a character.

    Raises:
        UserError: If the bytes are not UTF-8, or more than `MAX_NULS` of them are NUL.
    """
    try:
        if content.count(0) <= MAX_NULS * len(content):
            return codecs.getincrementaldecoder("utf-8-sig")().decode(content, is_all)
    except UnicodeDecodeError:
        pass
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    what = "UTF-16" if is_utf16 else "not UTF-8 text"
    remedy = "convert it to UTF-8" if is_utf16 else "convert it, or choose files by a pattern such as 'texts/**/*.txt'"
    raise UserError(
        f"{option} must name UTF-8 text or {', '.join(KINDS)} files, plain or compressed as {', '.join(COMPRESSIONS)}, "
        f"and {str(file)!r} is {what}; {remedy}"
    )


@contextmanager
def opened(file: Path, option: str) -> Iterator[IO[bytes]]:
    """Open a file for reading, decompressed.

    Raises:
        UserError: If the file cannot be read, also inside the `with` block.
    """
    import fsspec

    try:
        with fsspec.filesystem("file").open(str(file.absolute()), "rb", compression=kind_of(file)[1]) as stream:
            yield stream
    except _READ_ERRORS as error:
        raise UserError(
            f"{option}: {str(file)!r} cannot be read ({reason(error)}); correct the file, or name another"
        ) from None


def _check_zstd(files: Iterable[Path]) -> None:
    import fsspec

    for file in files:
        if kind_of(file)[1] not in fsspec.available_compressions():
            raise UserError(f"{str(file)!r} needs the package zstandard; install it, or decompress the file")
