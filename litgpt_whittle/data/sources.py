"""Find local text files and their splits, by the rules of Hugging Face `datasets` for folders."""

from __future__ import annotations

import glob
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from litgpt_whittle.errors import UserError

KINDS = {
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".tsv": "tsv",
}
"""Kinds of data files by suffix; any other file must be plain text and is one document"""

COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
"""fsspec's names of compressions by suffix"""

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in file and folder names that denote a split, as in `datasets.data_files`"""

METADATA = {"README.md", "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""Names of files that describe a dataset, which `datasets` never reads"""

_COMPANIONS = re.compile(r"(README|LICEN[CS]E|COPYING|NOTICE|CITATION|CHANGELOG)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Layout:
    """Files of a path and their splits."""

    path: str
    """The path as given by the user"""
    kind: Literal["hub", "files", "saved", "configured"]
    """A dataset on the hub, plain files, a folder of `save_to_disk`, or a folder with configurations in README.md"""
    root: Path | None = None
    """The file or folder; for a pattern, its leading folder"""
    files: tuple[Path, ...] = ()
    splits: dict[str, tuple[Path, ...]] = field(default_factory=dict)
    """Files by split; each split has all files if the file names do not show the split. Empty without splits"""
    names: tuple[str, ...] = ()
    """Names of the configurations"""

    def has(self, split: str) -> bool:
        """Return whether there is such a split; always false on the hub, where splits are not known."""
        return split in self.splits

    @property
    def is_certain(self) -> bool:
        """True if the files clearly form splits: every file belongs to a split, and there is a training split."""
        named = {file for files in self.splits.values() for file in files}
        rest = (file for file in self.files if file not in named and not is_companion(file))
        return "train" in self.splits and (self.kind != "files" or not any(rest))


@dataclass(frozen=True)
class Source:
    """All files of a path, or those of one split.

    Raises:
        UserError: If the path has no such split, or a split must be chosen.
    """

    layout: Layout
    split: str | None
    """None for all files"""
    split_option: str = "data.train_split"
    option: str = "data.path"
    is_shared: bool = False
    """True if a hash of each document assigns it to training or validation"""

    def __post_init__(self) -> None:
        layout = self.layout
        if self.split is None and layout.kind in ("saved", "configured") and layout.splits:
            raise UserError(
                f"{self.split_option} must be chosen for {layout.path!r}; its splits are {', '.join(layout.splits)}"
            )
        if self.split is None or layout.kind == "hub" or self.split in layout.splits:
            return
        if not layout.splits:
            raise UserError(
                f"{self.split_option} {self.split!r} is not in {layout.path!r}, which has no splits; leave it out, or "
                "name the folder's files train.jsonl, validation.jsonl, …"
            )
        raise UserError(
            f"{self.split_option} {self.split!r} is not in {layout.path!r}; its splits are {', '.join(layout.splits)}"
        )

    @property
    def files(self) -> tuple[Path, ...]:
        """Files to read, none on the hub."""
        return self.layout.files if self.split is None else self.layout.splits.get(self.split, ())


def find_layout(path: str, name: str | None = None, option: str = "data.path") -> Layout:
    """Return the files and splits of a file, a folder, a pattern such as `texts/*.jsonl`, or a dataset on the hub.

    Args:
        path: The path; `~` is the home directory.
        name: The configuration, for a folder whose README.md has several.
        option: Name of the option that gave the path, for error messages.

    Raises:
        UserError: If nothing is found, or there is no such configuration.
    """
    local = Path(os.path.expanduser(path))
    if local.is_file():
        return Layout(path, "files", local, (local,))
    if local.is_dir():
        files = tuple(_walk(local))
        if not files:
            raise UserError(f"{option} {path!r} holds no files; name a file or folder that contains text")
        return _folder_layout(path, local, files, name, option)
    if glob.has_magic(path):
        found = sorted(Path(match) for match in glob.glob(str(local), recursive=True))
        matched = [file for match in found for file in ([match] if match.is_file() else _walk(match))]
        files = tuple({os.path.realpath(file): file for file in reversed(matched)}.values())[::-1]
        if not files:
            raise UserError(f"{option} {path!r} matches no file; check the pattern")
        return Layout(path, "files", _folder_of_pattern(local), files)
    if is_file_name(path):
        raise not_found(path, option)
    return Layout(path, "hub")


def _folder_layout(path: str, folder: Path, files: tuple[Path, ...], name: str | None, option: str) -> Layout:
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        return Layout(path, "saved", folder, files, dict.fromkeys(splits, files))
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return Layout(path, "saved", folder, files)
    if names := _configurations(folder):
        splits = open_configuration(path, name, names, option).config.data_files
        return Layout(path, "configured", folder, files, dict.fromkeys(map(str, splits), files), names)
    return Layout(path, "files", folder, files, split_by_name(folder, files))


def split_by_name(folder: Path, files: Iterable[Path]) -> dict[str, tuple[Path, ...]]:
    """Return the files of each split by the first rule of `datasets` that matches any: shards, folders, file names."""
    relative = {file: file.relative_to(folder) for file in files if file.name not in METADATA}
    shards = {
        file: match[1]
        for file, path in relative.items()
        if (match := re.fullmatch(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*\.[^/]*", path.as_posix()))
    }
    if shards:
        order = sorted(set(shards.values()), key=lambda split: ([*SPLITS, split].index(split), split))
        return {split: tuple(file for file in shards if shards[file] == split) for split in order}
    for is_folder in (True, False):
        splits = {split: tuple(f for f in relative if _is_named(relative[f], split, is_folder)) for split in SPLITS}
        if any(splits.values()):
            return {split: found for split, found in splits.items() if found}
    return {}


def _is_named(path: Path, split: str, by_folder: bool) -> bool:
    """Return whether one of a path's folders, or its file name, contains a word for this split."""
    rule = rf"(.*[-._ 0-9])?({'|'.join(SPLITS[split])})" + (r"([-._ 0-9].*)?" if by_folder else r"[-._ 0-9].*")
    return any(re.fullmatch(rule, part, re.DOTALL) for part in (path.parts[:-1] if by_folder else path.parts[-1:]))


def _configurations(folder: Path) -> tuple[str, ...]:
    """Return the configurations in a folder's README.md."""
    if not (folder / "README.md").is_file():
        return ()
    from huggingface_hub import DatasetCard

    try:
        configs = DatasetCard.load(folder / "README.md", ignore_metadata_errors=True).data.get("configs")
        return tuple(str(config["config_name"]) for config in configs or () if "data_files" in config)
    except Exception:  # a README that is not a dataset card
        return ()


def open_configuration(path: str, name: str | None, names: tuple[str, ...], option: str) -> Any:
    """Return the `datasets` builder of a folder with configurations.

    Raises:
        UserError: If there is no such configuration, one must be chosen, or it cannot be read.
    """
    import datasets

    if name is not None and name not in names:
        raise UserError(f"data.name {name!r} is not in {path!r}; its configurations are {', '.join(names)}")
    try:
        with tempfile.TemporaryDirectory() as cache:  # local files are not cached
            return datasets.load_dataset_builder(os.path.expanduser(path), name, cache_dir=cache)
    except Exception as error:
        if name is None and len(names) > 1:
            raise UserError(
                f"data.name must be chosen for {path!r}; its configurations are {', '.join(names)}"
            ) from None
        raise UserError(f"{option} {path!r} cannot be read ({reason(error)}); correct its README.md") from None


def kind_of(file: Path) -> tuple[str, str | None]:
    """Return a file's kind ("text" for plain text) and compression by its suffixes, ignoring case."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    compression = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    inner = suffixes[:-1] if compression else suffixes
    return KINDS.get(inner[-1], "text") if inner else "text", compression


def is_companion(file: Path) -> bool:
    """Return whether a file describes data, such as a README or a licence, instead of holding it."""
    return file.name in METADATA or _COMPANIONS.match(file.name) is not None


def _walk(folder: Path) -> Iterator[Path]:
    """Yield a folder's files in order, following links, without hidden files and folders such as `__pycache__`."""
    found, seen = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        # links may form a cycle
        is_new = os.path.realpath(parent) not in seen
        seen.add(os.path.realpath(parent))
        folders[:] = [name for name in folders if is_new and not name.startswith((".", "__"))]
        found += [Path(parent, name) for name in names if is_new and not name.startswith(".")]
    yield from sorted(file for file in found if file.is_file())


def _folder_of_pattern(pattern: Path) -> Path:
    """Return the leading folder of a pattern, which has no wildcards."""
    return next(folder for folder in pattern.parents if not glob.has_magic(str(folder)))


def is_file_name(path: str) -> bool:
    """Return whether a path cannot be a dataset's name on the hub (`name` or `owner/name`)."""
    is_path = path.startswith(("/", ".", "~")) or path.count("/") > 1
    return is_path or kind_of(Path(path)) != ("text", None) or Path(path).suffix.lower() == ".txt"


def not_found(path: str, option: str, cause: str = "") -> UserError:
    where = "neither as a file or folder nor on the Hugging Face hub"
    return UserError(f"{option} {path!r} cannot be found, {where}{cause}; check the name")


def reason(error: BaseException) -> str:
    """Return the first line of an error or its cause; `datasets` wraps causes in errors that do not name them."""
    cause = error.__cause__ or error
    return (str(cause).strip() or repr(cause)).splitlines()[0]
