"""Test text as blocks of tokens: all of it, once, in a resumable order."""

import json
import pickle
import sys
from collections import Counter

import lightning as L
import pytest
import tokenizers
import torch
from jsonargparse import ArgumentParser
from litgpt.args import TrainArgs
from litgpt.pretrain import get_dataloaders
from litgpt.tokenizer import Tokenizer
from texts import documents, write_jsonl, write_tokenizer

from litgpt_whittle import plugin
from litgpt_whittle.data import HFText, hf_text
from litgpt_whittle.data.loading import connect
from litgpt_whittle.data.token_file import Document, Windows, is_written, write_tokens
from litgpt_whittle.errors import UserError
from litgpt_whittle.training.data_stream import DataStream

DOCUMENTS = documents(60)
LENGTH = 8


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def corpus(tmp_path):
    return write_jsonl(tmp_path / "corpus.jsonl", DOCUMENTS)


def opened(tokenizer, path, **options):
    data = HFText(str(path), **options)
    data.connect(tokenizer, batch_size=4, max_seq_length=LENGTH)
    data.prepare_data()
    data.setup()
    return data


def stream_of(tokenizer, texts):
    """Return the reference: every document's tokens, EOS after each."""
    return [i for text in texts for i in [*tokenizer.processor.encode(text).ids, tokenizer.eos_id]]


def text_of(dataset):
    return [dataset[0][0].item(), *(i for window in dataset for i in window[1:].tolist())]


def test_blocks_are_the_documents_one_after_the_other(tokenizer, corpus, tmp_path):
    held_out = write_jsonl(tmp_path / "held_out.jsonl", documents(20, seed=1))
    data = opened(tokenizer, corpus, val_path=str(held_out))
    for dataset, texts in ((data.train_dataset, DOCUMENTS), (data.val_dataset, documents(20, seed=1))):
        expected = stream_of(tokenizer, texts)
        n = (len(expected) - 1) // LENGTH
        assert len(dataset) == n and all(len(window) == LENGTH + 1 for window in dataset)
        assert text_of(dataset) == expected[: n * LENGTH + 1]


@pytest.fixture(scope="module")
def tokenizer_with_bos(tmp_path_factory):
    """Make a tokenizer that begins every text with BOS, as those of Gemma and Llama do."""
    folder = write_tokenizer(tmp_path_factory.mktemp("bos"))
    processor = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    processor.add_special_tokens(["<bos>"])
    bos_id = processor.token_to_id("<bos>")
    processor.post_processor = tokenizers.processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", bos_id)])
    processor.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"bos_token": "<bos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer(folder)


def test_blocks_begin_with_bos_where_the_tokenizer_begins_texts_with_it(tokenizer, tokenizer_with_bos, corpus):
    bos_id, expected = tokenizer_with_bos.bos_id, stream_of(tokenizer, DOCUMENTS)
    held_out = {"val_path": str(write_jsonl(corpus.with_name("held_out.jsonl"), documents(20, seed=1)))}
    dataset = opened(tokenizer_with_bos, corpus, **held_out).train_dataset
    assert len(dataset) == len(expected) // LENGTH
    assert all(len(window) == LENGTH + 1 and window[0] == bos_id for window in dataset)
    targets = [i for window in dataset for i in window[1:].tolist()]
    assert targets == expected[: len(dataset) * LENGTH]  # every token is predicted once
    assert text_of(opened(tokenizer_with_bos, corpus, bos=False, **held_out).train_dataset)[: len(targets)] == targets
    # named only by tokenizer_config.json, as in models whose prompts begin with it but whose text does not
    named = Tokenizer(write_tokenizer(corpus.parent / "named"))
    named.bos_id = named.eos_id
    assert text_of(opened(named, corpus, **held_out).train_dataset)[: len(targets)] == targets
    assert opened(named, corpus, bos=True, **held_out).train_dataset[1][0] == named.bos_id
    with pytest.raises(UserError, match="data.bos needs a BOS token, and the tokenizer of .* names no bos_token"):
        opened(tokenizer, corpus, bos=True, **held_out)


def test_train_and_validation_share_no_document(tokenizer, corpus):
    data = opened(tokenizer, corpus, val_fraction=0.3)
    kept = {part: data._place(part, data._sources(part)[0])[0] for part in ("train", "validation")}
    counts = {part: json.loads((folder / "about.json").read_text()) for part, folder in kept.items()}
    assert counts["train"]["n_documents"] + counts["validation"]["n_documents"] == len(DOCUMENTS)
    assert counts["train"]["n_tokens"] + counts["validation"]["n_tokens"] == len(stream_of(tokenizer, DOCUMENTS))
    decoded = {part: tokenizer.processor.decode(text_of(getattr(data, f"{name}_dataset")))
               for part, name in (("train", "train"), ("validation", "val"))}  # fmt: skip
    firsts = [" ".join(text.split()[:4]) for text in DOCUMENTS]
    assert not any(f in decoded["train"] and f in decoded["validation"] for f in firsts if len(f) > 15)


def test_an_epoch_shows_every_block_once_in_an_order_of_its_own(tokenizer, corpus):
    data = opened(tokenizer, corpus)
    blocks = Counter(tuple(window.tolist()) for window in data.train_dataset)

    def epochs(n, **options):
        loader = opened(tokenizer, corpus, **options).train_dataloader()
        return [[tuple(row) for batch in loader for row in batch.tolist()] for _ in range(n)]

    first, second = epochs(2)
    assert Counter(first) <= blocks and len(first) == len(data.train_dataset) // 4 * 4
    assert first != second and [first, second] == epochs(2)
    assert epochs(1, seed=1)[0] != first


@pytest.mark.parametrize("stop", [1, 7, 30, 45])
def test_data_goes_on_where_it_stopped_in_any_epoch(tokenizer, corpus, stop):
    def stream():
        return DataStream(opened(tokenizer, corpus).train_dataloader())

    unbroken, stopped, resumed = stream(), stream(), stream()
    expected = [next(unbroken) for _ in range(stop + 20)]
    for _ in range(stop):
        next(stopped)
    resumed.load_state_dict(stopped.state_dict())
    for batch in expected[stop:]:
        assert torch.equal(next(resumed), batch)
    assert resumed.epoch == unbroken.epoch


def test_text_is_tokenised_once_and_again_when_it_changes(tokenizer, corpus, monkeypatch):
    calls = []
    monkeypatch.setattr(hf_text, "encode", lambda *args, encode=hf_text.encode: calls.append(1) or encode(*args))
    opened(tokenizer, corpus)
    assert len(calls) == 2  # training and validation data
    opened(tokenizer, corpus)
    assert len(calls) == 2
    opened(tokenizer, corpus, max_documents=50)
    assert len(calls) == 4
    write_jsonl(corpus, DOCUMENTS[1:])
    opened(tokenizer, corpus)
    assert len(calls) == 6


def test_a_crash_leaves_nothing_that_is_taken_for_tokens(tokenizer, corpus, monkeypatch):
    def crashing(*args, encode=hf_text.encode):
        for i, ids in enumerate(encode(*args)):
            if i == 10:
                raise KeyboardInterrupt
            yield ids

    monkeypatch.setattr(hf_text, "encode", crashing)
    with pytest.raises(KeyboardInterrupt):
        opened(tokenizer, corpus)
    data = HFText(str(corpus))
    data.connect(tokenizer, max_seq_length=LENGTH)
    assert not is_written(data._place("train", data._sources("train")[0])[0])
    monkeypatch.undo()
    assert len(opened(tokenizer, corpus).train_dataset)


def test_of_two_processes_that_write_the_same_tokens_the_first_ones_stay(tmp_path):
    write_tokens(tmp_path / "other/tokens", [Document([1, 2])], 0, 300, {"fingerprint": "the other one's"})

    def documents():
        yield Document([1, 2])
        (tmp_path / "other/tokens").rename(tmp_path / "tokens")

    write_tokens(tmp_path / "tokens", documents(), 0, 300, {"fingerprint": "this one's"})
    assert Windows(tmp_path / "tokens", 2).fingerprint == "the other one's"
    assert {path.name for path in tmp_path.iterdir()} == {"tokens", "other"}


def test_all_kinds_of_files_give_the_same_tokens(tokenizer, corpus, tmp_path):
    import pandas

    pandas.DataFrame({"text": DOCUMENTS, "other": range(len(DOCUMENTS))}).to_parquet(tmp_path / "corpus.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, text in enumerate(DOCUMENTS):
        (folder / f"{i:03d}.py").write_text(text)
    (folder / ".hidden").write_text("no")
    expected = text_of(opened(tokenizer, corpus).train_dataset)
    for path, options in ((tmp_path / "corpus.parquet", {}), (folder, {}), (corpus, {"streaming": True})):
        assert text_of(opened(tokenizer, path, cache_dir=tmp_path / "c", **options).train_dataset) == expected


def test_caps_are_kept_to(tokenizer, corpus, tmp_path):
    held_out = {"val_path": str(write_jsonl(tmp_path / "held_out.jsonl", documents(20, seed=1)))}
    assert opened(tokenizer, corpus, max_documents=7, **held_out).train_dataset.about["n_documents"] == 7
    capped = opened(tokenizer, corpus, max_tokens=100, **held_out).train_dataset
    assert capped.about["n_tokens"] == 100
    assert text_of(capped)[:50] == stream_of(tokenizer, DOCUMENTS)[:50]


def test_stock_litgpt_takes_it(tokenizer, corpus):
    data = HFText(str(corpus))
    fabric = L.Fabric(accelerator="cpu", devices=1)
    train, val = get_dataloaders(fabric, data, tokenizer, TrainArgs(micro_batch_size=4), LENGTH)
    assert next(iter(train)).shape == (4, LENGTH + 1) and next(iter(val)).dtype == torch.int64
    again = pickle.loads(pickle.dumps(train))  # litgpt pickles it into its checkpoints
    assert len(list(again)) == len(train)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"val_fraction": 0.0}, "data.val_fraction must lie between 0 and 1"),
        ({"val_fraction": 1.0}, "data.val_fraction must lie between 0 and 1"),
        ({"max_documents": 0}, "data.max_documents must be at least 1"),
        ({"max_tokens": -1}, "data.max_tokens must be at least 1"),
        ({"val_split": "train"}, "data.val_split must not be data.train_split"),
        ({"val_path": "SAME"}, "data.val_path must not be the training data"),
        ({"text_column": "body"}, "data.text_column 'body' is not in .*; its columns are text"),
        (
            {"max_documents": 1, "val_fraction": 0.5},
            "has too few documents for a (train|validation) split",
        ),
    ],
)
def test_what_is_wrong_is_told_in_one_line(tokenizer, corpus, options, problem):
    options = {name: str(corpus) if value == "SAME" else value for name, value in options.items()}
    with pytest.raises(UserError, match=problem) as error:
        opened(tokenizer, corpus, **options)
    assert "\n" not in str(error.value)


def test_data_that_cannot_be_used_is_named(tokenizer, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "broken.jsonl").write_text('{"text": ')
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    (mixed / "a.jsonl").write_text('{"text": "a"}')
    (mixed / "b.txt").write_text("b")
    for name, problem in (
        ("nowhere/at-all", "cannot be found, neither as a file or folder nor on the Hugging Face hub"),
        (tmp_path / "broken.jsonl", "cannot be read"),
        (tmp_path / "empty.jsonl", "is empty"),
        (tmp_path / "blank.txt", "is empty"),
        (mixed, "must be of one kind"),
    ):
        with pytest.raises(UserError, match=problem) as error:
            opened(tokenizer, name, cache_dir=tmp_path / "cache")
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="^data.val_path 'nowhere/at-all' cannot be found"):
        opened(tokenizer, corpus, val_path="nowhere/at-all", cache_dir=tmp_path / "cache")
    data = HFText(str(corpus))
    data.connect(tokenizer, max_seq_length=10**6)
    data.prepare_data()
    with pytest.raises(UserError, match="must fill a block of 1000001 tokens"):
        data.setup()
    data.connect(None, max_seq_length=LENGTH)
    with pytest.raises(UserError, match="needs a tokenizer; set --tokenizer_dir .*where the command has no such flag"):
        data.prepare_data()
    data.connect(Tokenizer(write_tokenizer(tmp_path / "no_eos", eos=False)), max_seq_length=LENGTH)
    with pytest.raises(UserError, match="names no eos_token"):
        data.prepare_data()


def test_its_mistakes_are_told_in_one_line_wherever_they_are_found(monkeypatch, capsys):
    """For an optional argument, jsonargparse tries several types and wraps the errors that they raise."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=HFText | None)
    monkeypatch.setattr(sys, "excepthook", lambda *_: pytest.fail("a traceback"))
    plugin.show_user_errors_in_one_line(set())
    try:
        parser.instantiate_classes(parser.parse_args(["--data=HFText", "--data.path=a", "--data.val_path=a"]))
    except ValueError as error:
        assert not isinstance(error, UserError) and "\n" in str(error)
        sys.excepthook(type(error), error, error.__traceback__)
    assert capsys.readouterr().err == (
        "error: data.val_path must not be the training data 'a'; leave it out to split that\n"
    )


def test_a_search_does_not_wait_for_training_text_to_be_tokenised(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", documents(30)), write_jsonl(tmp_path / "val.jsonl", documents(30, seed=1))
    data = HFText(str(tmp_path / "train.jsonl"), val_path=str(tmp_path / "val.jsonl"), cache_dir=tmp_path / "cache")
    connect(data, write_tokenizer(tmp_path / "teacher"), 2, 16, validation_only=True)
    assert [folder.name.partition("-")[0] for folder in (tmp_path / "cache").iterdir()] == ["validation"]
    assert len(data.val_dataloader()) > 0
    connect(data, tmp_path / "teacher", 2, 16)  # readable by everyone
    assert len(data.train_dataloader()) > 0


def test_a_split_that_catches_no_document_says_so(tmp_path):
    teacher = write_tokenizer(tmp_path / "teacher")
    write_jsonl(tmp_path / "few.jsonl", documents(2))
    module = HFText(path=str(tmp_path / "few.jsonl"), val_fraction=1e-9)
    module.connect(Tokenizer(teacher), 2, 8)
    with pytest.raises(UserError, match="has too few documents for a validation split .*val_path"):
        module.prepare_data()
