"""Test that data modules are checked before anything expensive starts, with one-line errors."""

import errno
import json
from pathlib import Path

import pytest
import requests
from checkpoints import write_random_model
from litgpt.config import Config
from litgpt.data import JSON, Alpaca, DataModule, LitData, MicroLlama, TextFiles, TinyLlama
from litgpt.tokenizer import Tokenizer as LitGPTTokenizer
from texts import documents, write_jsonl, write_tokenizer
from tokenizers import Tokenizer

from litgpt_whittle.commands import cache_teacher, distill, extract, pretrain_supernet, prune, rank, search
from litgpt_whittle.data import HFText
from litgpt_whittle.data.loading import check_data, connect, explained, train_loader, val_loader
from litgpt_whittle.errors import UserError
from litgpt_whittle.training.args import TrainArgs

CONFIG = Config(
    n_layer=2, n_embd=16, n_head=2, padded_vocab_size=300, vocab_size=300, block_size=32, rotary_percentage=1.0
)


@pytest.fixture
def folder(tmp_path):
    """Make a teacher whose tokenizer has one token without an embedding, a sub-network, and text."""
    write_random_model(write_tokenizer(tmp_path / "teacher"), CONFIG)
    tokenizer = Tokenizer.from_file(str(tmp_path / "teacher/tokenizer.json"))
    tokenizer.add_tokens([f"<|added {i}|>" for i in range(300 - tokenizer.get_vocab_size() + 1)])
    tokenizer.save(str(tmp_path / "teacher/tokenizer.json"))
    (tmp_path / "cut.yaml").write_text("n_layer: 1\n")
    write_jsonl(tmp_path / "text.jsonl", documents(40))
    return tmp_path


def commands(folder, data):
    teacher, out = folder / "teacher", folder / "out"
    train = TrainArgs(max_tokens=64, global_batch_size=1, micro_batch_size=1, max_seq_length=16)
    training = {"data": data, "out_dir": out, "train": train, "initial_checkpoint_dir": teacher, "devices": 1}
    return {
        "rank": lambda: rank.setup(teacher, data, out),
        "search": lambda: search.setup(teacher, bin="1K-1M", data=data, out_dir=out),
        "extract": lambda: extract.setup(teacher, folder / "cut.yaml", out, repair=True, data=data),
        "prune": lambda: prune.setup(teacher, out, data=data),
        "cache_teacher": lambda: cache_teacher.setup(teacher, data, out),
        "distill": lambda: distill.setup(**training, teacher_checkpoint_dir=teacher),
        "pretrain_supernet": lambda: pretrain_supernet.setup(**training),
    }


COMMANDS = ("rank", "search", "extract", "prune", "cache_teacher", "distill", "pretrain_supernet")


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_reads_text_with_tokens_that_the_model_does_not_know(folder, command):
    tokenizer = Tokenizer.from_file(str(folder / "teacher/tokenizer.json"))
    write_jsonl(folder / "text.jsonl", [*documents(40), tokenizer.id_to_token(300)])
    write_jsonl(folder / "more.jsonl", [*documents(20, seed=1), tokenizer.id_to_token(300)])
    data = HFText(str(folder / "text.jsonl"), val_path=str(folder / "more.jsonl"))
    match = r"data has the token '<\|added .*\|>' with id 300 where padded_vocab_size is 300; remove it"
    with pytest.raises(UserError, match=match):
        commands(folder, data)[command]()
    assert not list(folder.glob(".tokens/*/about.json")) and not list((folder / "out").rglob("*.pth"))


def test_tokens_without_an_embedding_are_no_fault_where_the_text_has_none(folder):
    data = HFText(str(folder / "text.jsonl"), val_fraction=0.5)
    check_data(data, folder / "teacher", 300)
    connect(data, folder / "teacher", 1, 16)
    token = Tokenizer.from_file(str(folder / "teacher/tokenizer.json")).id_to_token(300)
    write_jsonl(folder / "text.jsonl", [*documents(40), token])
    data = HFText(str(folder / "text.jsonl"), val_fraction=0.5)
    connect(data, folder / "teacher", 1, 16)  # tokenises without knowing the model
    check_data(data, folder / "teacher", 300)
    with pytest.raises(UserError, match="with id 300 where padded_vocab_size is 300"):
        data.setup()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_checks_its_data_before_it_begins(folder, command):
    """With three modules, each with a different fault."""
    write_tokenizer(folder / "teacher")
    (folder / "records.json").write_text(
        json.dumps([{"instruction": "a", "output": "b"}, {"prompt": "a", "output": "b"}] * 9)
    )
    records = JSON(folder / "records.json", val_split_fraction=0.5)
    missing = LitData(folder / "nowhere")
    for data, problem in (
        (HFText(str(folder / "text.jsonl"), train_split="nonsense"), "data.train_split 'nonsense' is not in"),
        (records, "must have the texts 'instruction' and 'output', record .* has 'prompt', 'output' and no text"),
        (missing, "LitData needs the package litdata|data.data_path must be a folder, and there is no .*nowhere'"),
    ):
        with pytest.raises(UserError, match=problem) as error:
            commands(folder, data)[command]()
        assert "\n" not in str(error.value) and not (folder / "out").exists()


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda folder: TinyLlama(folder / "nowhere"), "of TinyLlama in data.data_path must be .*slimpajama/train'"),
        (lambda folder: MicroLlama(folder / "nowhere"), "of MicroLlama in data.data_path must be .*slimpajama/train'"),
        (lambda folder: LitData(folder, split_names=("a", "b")), "data.data_path must be a folder, and .*/a'"),
        (lambda folder: TextFiles(folder / "nowhere"), "data.train_data_path must be a folder"),
        (lambda folder: TextFiles(folder, folder / "nowhere"), "data.val_data_path must be a folder"),
    ],
)
def test_folders_that_are_not_there_are_named(tmp_path, monkeypatch, make, problem):
    data, tokenizer = make(tmp_path), write_tokenizer(tmp_path / "tokenizer")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(UserError, match=problem) as error:
        check_data(data, tokenizer, 300)
    assert "\n" not in str(error.value)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"^{type(data).__name__} needs the package litdata; install it"):
        check_data(data, tokenizer, 300)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"data": []}, "JSON cannot read its data|must be a list of records"),
        ("[{", "JSON cannot read its data .JSONDecodeError"),
        ([["a", "b"]] * 4, "must be a list of records, got also a list"),
        ([{"instruction": "a", "output": 1}] * 4, "no text 'output'"),
        ([{"instruction": None, "output": "a"}] * 4, "no text 'instruction'"),
    ],
)
def test_records_that_are_no_instructions_are_refused(tmp_path, content, problem):
    (tmp_path / "a.json").write_text(content if isinstance(content, str) else json.dumps(content))
    data = JSON(tmp_path / "a.json", val_split_fraction=0.5)
    with pytest.raises(UserError, match=problem):
        check_data(data, write_tokenizer(tmp_path / "tokenizer"), 300)


def test_instruction_data_without_a_tokenizer_is_refused(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": "a", "output": "b"}] * 4))
    data = JSON(tmp_path / "a.json", val_split_fraction=0.5)
    with pytest.raises(UserError, match="JSON needs a tokenizer; put the model's tokenizer.json"):
        check_data(data, None, 300)
    check_data(data, write_tokenizer(tmp_path / "tokenizer"), 300)


def test_a_download_that_fails_is_one_line(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise requests.exceptions.ConnectionError("HTTPSConnectionPool: Max retries exceeded\nmore")

    monkeypatch.setattr(requests, "get", offline)
    data = Alpaca(download_dir=tmp_path / "alpaca")
    with pytest.raises(UserError, match=r"^Alpaca downloads its data, which failed \(HTTPSC.*exceeded\); connect to"):
        connect(data, write_tokenizer(tmp_path / "tokenizer"), 2, 16)


class Broken(DataModule):
    """A data module that fails in every place."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def connect(self, *_, **__) -> None: ...

    def prepare_data(self) -> None:
        raise self.error

    setup = train_dataloader = val_dataloader = lambda self: self.prepare_data()


@pytest.mark.parametrize("opens", [lambda data: connect(data, None, 1, 8), train_loader, val_loader])
def test_a_package_file_or_connection_that_is_missing_is_named_wherever_it_is_needed(opens):
    for error, problem in (
        (ModuleNotFoundError("no", name="litdata"), "^Broken needs the package litdata; install it"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.txt"), "^Broken cannot read its data .*a.txt"),
        (ConnectionError("offline"), "^Broken downloads its data, which failed .offline"),
    ):
        with pytest.raises(UserError, match=problem):
            opens(Broken(error))
    with pytest.raises(KeyError):  # an error in the module's own code keeps its traceback
        opens(Broken(KeyError("x")))


def test_what_is_explained_already_stays(tmp_path):
    with pytest.raises(UserError, match="^once$"), explained(Broken(OSError())):
        raise UserError("once")


def test_added_tokens_within_the_padding_are_no_fault(tmp_path):
    write_jsonl(tmp_path / "text.jsonl", documents(5))
    folder: Path = write_tokenizer(tmp_path / "tokenizer")
    largest = max(LitGPTTokenizer(folder).processor.get_vocab().values())
    for data in (HFText(str(tmp_path / "text.jsonl")), Alpaca()):
        check_data(data, folder, largest + 1)
    with pytest.raises(UserError, match=f"has ids up to {largest} where padded_vocab_size is {largest};"):
        check_data(Alpaca(), folder, largest)  # before its text is downloaded
