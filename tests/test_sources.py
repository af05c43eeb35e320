"""Test reading local text against `datasets`: compression, upper and lower case, and splits of a folder."""

import bz2
import gzip
import json
import lzma
import random

import datasets
import pandas
import pytest
from datasets import Dataset, DatasetDict
from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns
from litgpt.tokenizer import Tokenizer
from texts import documents, write_jsonl, write_tokenizer

from litgpt_whittle.data import HFText
from litgpt_whittle.data.sources import find_layout
from litgpt_whittle.errors import UserError

DOCUMENTS = documents(24)
JSONL = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def texts_of(path, **options):
    """Return the documents of each split."""
    data = HFText(str(path), **options)
    data.check()
    return {part: list(data._read(data._sources(part)[0], streaming=True)[0]) for part in ("train", "validation")}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_jsonl(path, rows)


def refusal(path, **options):
    with pytest.raises(UserError) as error:
        HFText(str(path), **options).check()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", gzip.compress(JSONL.encode())),
        ("a.json.bz2", bz2.compress(JSONL.encode())),
        ("a.JSON.XZ", lzma.compress(JSONL.encode())),
        ("a.ndjson", JSONL),
        ("a.[1] *.jsonl", JSONL),
        ("a.JSONL", JSONL),
        ("a.tsv", "n\ttext\n" + "".join(f"{i}\t{text}\n" for i, text in enumerate(DOCUMENTS))),
        ("a.CSV", "n,text\n" + "".join(f"{i},{text}\n" for i, text in enumerate(DOCUMENTS))),
        ("a.csv.gz", gzip.compress(("text,n\n" + "".join(f"{text},0\n" for text in DOCUMENTS)).encode())),
    ],
)
def test_every_kind_of_file_gives_its_documents(tmp_path, name, content):
    write(tmp_path / "folder" / name, content)
    for path in (tmp_path / "folder", tmp_path / "folder" / name, tmp_path / "*" / "a.*"):
        assert texts_of(path)["train"] == DOCUMENTS


def test_upper_case_parquet_and_compressed_plain_text_are_read(tmp_path):
    pandas.DataFrame({"text": DOCUMENTS}).to_parquet(tmp_path / "a.PARQUET")
    assert texts_of(tmp_path / "a.PARQUET")["train"] == DOCUMENTS
    for i, (suffix, compress) in enumerate(((".gz", gzip.compress), (".bz2", bz2.compress), (".XZ", lzma.compress))):
        write(tmp_path / f"texts/{i}.txt{suffix}", compress(DOCUMENTS[i].encode()))
    assert texts_of(tmp_path / "texts")["train"] == DOCUMENTS[:3]


def test_zstandard_is_read_or_its_package_is_named(tmp_path):
    try:
        import zstandard
    except ImportError:
        write(tmp_path / "a.jsonl.zst", b"\x28\xb5\x2f\xfd")
        assert "needs the package zstandard; install it" in refusal(tmp_path / "a.jsonl.zst")
    else:
        write(tmp_path / "a.jsonl.zst", zstandard.compress(JSONL.encode()))
        assert texts_of(tmp_path / "a.jsonl.zst")["train"] == DOCUMENTS


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokens.bin", bytes([1, 0, 2, 0, 3, 0] * 50)),
        ("model.safetensors", random.Random(0).randbytes(500)),
        ("texts.zip", b"PK\x03\x04\x14\x00\x00\x00\x08\x00" + random.Random(0).randbytes(500)),
        ("latin.txt", "Fußgänger".encode("latin-1")),
        ("wide.txt", "\n".join(DOCUMENTS).encode("utf-16")),
        ("wide_without_mark.txt", "\n".join(DOCUMENTS).encode("utf-16-le")),
        ("wide.jsonl", JSONL.encode("utf-16")),
        ("wide.csv", JSONL.encode("utf-16")),
    ],
)
def test_what_is_not_text_is_refused_by_name(tmp_path, name, content):
    write(tmp_path / "folder" / name, content)
    write(tmp_path / "folder" / ("b.jsonl" if ".jsonl" in name else "b.csv" if ".csv" in name else "b.txt"), JSONL)
    assert (message := refusal(tmp_path / "folder")).startswith("data.path must name UTF-8 text or .jsonl, .json")
    assert f"/{name}'" in message and ("is UTF-16" in message or "is not UTF-8 text" in message)


def test_text_that_is_damaged_further_on_is_refused_when_it_is_tokenised(tmp_path, tokenizer):
    write(tmp_path / "long/a.txt", "a"), write(tmp_path / "cut/a.txt", "a")
    write(tmp_path / "long/b.txt", b"a word \xc3\xa9 " * 10_000 + b"\xff")
    write(tmp_path / "cut/b.txt.gz", gzip.compress(random.Random(0).randbytes(10**5).hex().encode())[:90_000])
    for name, problem in (("long", "b.txt' is not UTF-8 text"), ("cut", "b.txt.gz' cannot be read")):
        data = HFText(str(tmp_path / name), val_path=str(write(tmp_path / "other.txt", "a b c")))
        data.check()
        data.connect(tokenizer, max_seq_length=8)
        with pytest.raises(UserError, match=problem):
            data.prepare_data()
        assert not [path for path in (tmp_path / ".tokens").rglob("*") if "train" in path.name]


def test_text_may_have_a_mark_at_its_beginning_and_any_suffix(tmp_path):
    for name in ("a.md", "b.py", "c", "README.md", "LICENSE"):
        write(tmp_path / "folder" / name, ("\ufeff" + name).encode())
    write(tmp_path / "folder/__pycache__/b.pyc", b"\x00\xff")
    assert sorted(texts_of(tmp_path / "folder")["train"]) == sorted(["a.md", "b.py", "c", "README.md", "LICENSE"])


def test_what_describes_data_is_not_read_as_data(tmp_path):
    write_rows(tmp_path / "folder/a.jsonl", DOCUMENTS)
    for name, content in (("README.md", "# Data"), ("LICENSE", "Free"), ("dataset_info.json", "{}"), ("b.jsonl", "")):
        write(tmp_path / "folder" / name, content)
    assert texts_of(tmp_path / "folder")["train"] == DOCUMENTS
    write(tmp_path / "folder/b.txt", "b")
    assert "must be of one kind, got json, text" in refusal(tmp_path / "folder")


def test_home_links_and_patterns_are_followed(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "far/a.txt", "a"), write(tmp_path / "near/b.txt", "b"), write(tmp_path / "near/c.md", "c")
    (tmp_path / "near/link").symlink_to(tmp_path / "far"), (tmp_path / "far/loop").symlink_to(tmp_path / "near")
    assert texts_of("~/near")["train"] == ["b", "c", "a"]
    assert texts_of("~/near/*.txt")["train"] == ["b"]
    assert texts_of(tmp_path / "near/**/*.md", val_path="~/f?r/*.txt") == {"train": ["c"], "validation": ["a"]}
    assert "matches no file; check the pattern" in refusal("~/near/*.jsonl")
    (tmp_path / "nothing").mkdir()
    assert "holds no files" in refusal("~/nothing")


def test_the_users_cache_need_not_be_writable_for_local_text(tmp_path, monkeypatch):
    """Root may write anywhere, so the cache is below a file."""
    write_rows(tmp_path / "a.jsonl", DOCUMENTS), write(tmp_path / "file", "")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file/cache")
    assert texts_of(tmp_path / "a.jsonl")["train"] == DOCUMENTS

    def unwritable(*_, **__):
        (tmp_path / "file/cache").mkdir(parents=True)

    monkeypatch.setattr(datasets, "load_dataset", unwritable)
    with pytest.raises(UserError, match=r"^the cache of .*/file/cache', cannot be written .*set HF_HOME to another"):
        HFText("owner/name").check(reads=True)


def split_tree(folder, names):
    for name in names:
        write_rows(folder / name, [f"{name} {i}" for i in range(3)])
    return folder


TREES = [
    ("train.jsonl", "validation.jsonl"),
    ("train/a.jsonl", "val/a.jsonl", "val/deep/b.jsonl", "LICENSE.jsonl"),
    ("data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/odd.split-00000-of-00001.jsonl"),
    ("my_train_part.jsonl", "dev-1.jsonl", "eval 2.jsonl", "rest.jsonl"),
    ("a/training_set/x.jsonl", "a/evaluation/test.jsonl", "train.jsonl"),
    ("pretrain.jsonl", "testing.jsonl"),
    ("__special/train.jsonl", ".hidden/test.jsonl", "valid0.jsonl"),
    ("a.jsonl", "b/c.jsonl"),
    ("train_val.jsonl", "test.v2.jsonl", "contest.jsonl"),
]


@pytest.mark.parametrize("names", TREES)
def test_splits_are_those_that_datasets_finds(tmp_path, names):
    folder = split_tree(tmp_path / "folder", names)
    try:
        patterns = get_data_patterns(str(folder))
        expected = DataFilesDict.from_patterns(patterns, base_path=str(folder))
    except EmptyDatasetError:
        expected = {}
    if list(patterns.values()) == [["**"]]:  # all files are for training, without splits
        expected = {}
    found = {split: {str(file) for file in files} for split, files in find_layout(str(folder)).splits.items()}
    assert found == {str(split): set(files) for split, files in expected.items()}


def test_a_folder_of_splits_is_trained_and_validated_on_those(tmp_path):
    folder = split_tree(tmp_path / "folder", ("train.jsonl", "validation.jsonl", "test.jsonl"))
    write(folder / "README.md", "# Data")
    split = {name: [f"{name}.jsonl {i}" for i in range(3)] for name in ("train", "validation", "test")}
    as_named = {"train": split["train"], "validation": split["validation"]}
    assert texts_of(folder) == texts_of(folder, val_split="validation") == as_named
    assert texts_of(folder, val_split="test") == as_named | {"validation": split["test"]}
    assert texts_of(folder, train_split="test", val_split="train") == {
        "train": split["test"], "validation": split["train"]
    }  # fmt: skip
    other = {"val_path": str(folder / "test.jsonl")}
    assert texts_of(folder, **other) == {"train": split["train"], "validation": split["test"]}
    assert texts_of(folder / "test.jsonl", val_path=str(folder))["validation"] == split["validation"]


def test_names_like_splits_among_other_files_are_none_unless_asked_for(tmp_path):
    folder = split_tree(tmp_path / "folder", ("train.jsonl", "test_io.jsonl", "model.jsonl"))
    assert len(texts_of(folder)["train"]) == 9
    assert texts_of(folder, val_split="test") == {
        "train": [f"train.jsonl {i}" for i in range(3)], "validation": [f"test_io.jsonl {i}" for i in range(3)]
    }  # fmt: skip


def test_a_folder_without_a_validation_split_keeps_some_documents_of_its_training_split(tmp_path, tokenizer):
    texts = {"train": documents(60), "test": documents(20, seed=1)}
    for name, rows in texts.items():
        write_rows(tmp_path / f"folder/{name}.jsonl", rows)
    data = HFText(str(tmp_path / "folder"), val_fraction=0.3)
    data.connect(tokenizer, max_seq_length=8)
    data.prepare_data(), data.setup()
    counts = [dataset.about["n_documents"] for dataset in (data.train_dataset, data.val_dataset)]
    assert sum(counts) == 60 and all(counts)


def test_splits_and_configurations_that_are_not_there_are_refused(tmp_path):
    folder = split_tree(tmp_path / "folder", ("train.jsonl", "validation.jsonl"))
    plain = split_tree(tmp_path / "plain", ("a.jsonl",))
    assert "data.train_split 'nonsense' is not in" in (message := refusal(folder, train_split="nonsense"))
    assert message.endswith("its splits are train, validation")
    assert "data.val_split 'test' is not in" in refusal(folder, val_split="test")
    for path in (plain, plain / "a.jsonl"):
        assert "which has no splits; leave it out" in refusal(path, train_split="nonsense")
        assert "data.val_split 'validation' is not in" in refusal(path, val_split="validation")
        assert "data.name 'nonsense' is not in" in refusal(path, name="nonsense")
    assert "data.val_split 'test' is not in" in refusal(plain, val_path=str(folder), val_split="test")


def test_a_readme_names_configurations_and_splits(tmp_path):
    folder = split_tree(tmp_path / "folder", ("en/a.jsonl", "en/b.jsonl", "de/a.jsonl"))
    configs = [
        "---", "configs:", "- config_name: en", "  data_files:", "  - split: train", "    path: en/a.jsonl",
        "  - split: held_out", "    path: en/b.jsonl", "- config_name: de", "  data_files: de/*.jsonl", "---",
    ]  # fmt: skip
    write(folder / "README.md", "\n".join(configs))
    found = texts_of(folder, name="en", val_split="held_out")
    assert found == {
        part: [f"en/{letter}.jsonl {i}" for i in range(3)] for part, letter in (("train", "a"), ("validation", "b"))
    }
    assert texts_of(folder, name="de")["train"] == [f"de/a.jsonl {i}" for i in range(3)]
    assert "data.name must be chosen" in (message := refusal(folder)) and message.endswith("are en, de")
    assert refusal(folder, name="fr").endswith("its configurations are en, de")
    assert refusal(folder, name="en", val_split="validation").endswith("its splits are train, held_out")


def test_what_datasets_saved_is_read(tmp_path):
    rows = {"train": DOCUMENTS[:9], "validation": DOCUMENTS[9:]}
    DatasetDict({k: Dataset.from_dict({"text": v}) for k, v in rows.items()}).save_to_disk(str(tmp_path / "splits"))
    Dataset.from_dict({"text": DOCUMENTS}).save_to_disk(str(tmp_path / "one"))
    assert texts_of(tmp_path / "splits") == rows
    assert texts_of(tmp_path / "splits", train_split="validation", val_split="train")["train"] == rows["validation"]
    assert texts_of(tmp_path / "one")["train"] == DOCUMENTS
    assert refusal(tmp_path / "splits", val_split="test").endswith("its splits are train, validation")
    assert "which has no splits" in refusal(tmp_path / "one", val_split="test")


@pytest.mark.parametrize(("column", "kind"), [("words", "list"), ("n", "int"), ("score", "float")])
def test_a_column_that_is_no_text_is_refused(tmp_path, column, kind):
    rows = [{"text": text, "words": text.split(), "n": 1, "score": 0.5} for text in DOCUMENTS]
    write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    pandas.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        message = refusal(tmp_path / name, text_column=column)
        assert f"must hold text, got a {kind}; choose one of its columns of text: text" in message


def test_a_full_disk_is_told_in_one_line_and_leaves_nothing(tmp_path, tokenizer):
    """`/dev/full` exists only on Linux."""
    write_rows(tmp_path / "a.jsonl", DOCUMENTS)
    data = HFText(str(tmp_path / "a.jsonl"), val_fraction=0.5)
    data.connect(tokenizer, max_seq_length=8)
    with pytest.MonkeyPatch.context() as patch:

        def full(*_, **__):
            return open("/dev/full", "wb")

        patch.setattr("litgpt_whittle.data.token_file.open", full, raising=False)
        with pytest.raises(UserError, match=r"tokens cannot be written to .*No space left.*data.cache_dir"):
            data.prepare_data()
    assert not list((tmp_path / ".tokens").iterdir())
