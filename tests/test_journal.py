"""Test the journal: it survives a kill at any byte, and resumes only under its own settings."""

import json
import math
import os

import pytest

from litgpt_whittle import files
from litgpt_whittle.errors import UserError
from litgpt_whittle.files import file_fingerprint
from litgpt_whittle.journal import (
    Evaluation,
    Journal,
    open_record,
    read_journal,
)

HEADER = {"teacher": {"name": "t", "weights": "ab"}, "settings": {"seed": 1, "bin": ["1M-2M"], "space": "fine_uniform"}}


def evaluation(index: int, perplexity: float | None = 3.25) -> Evaluation:
    return Evaluation(
        index=index,
        bin="1M-2M",
        subnet={"n_embd": 8, "n_layer": "0,2-3"},
        n_params=1_500_000 + index,
        scores={"perplexity": perplexity, "nll": 0.1 + 0.2},
        seed=1,
        batches=2,
        tokens=64,
        seconds=0.5,
    )


def write(path, n: int) -> list[Evaluation]:
    with Journal(path, HEADER) as journal:
        for i in range(n):
            journal.append(evaluation(i))
    return [evaluation(i) for i in range(n)]


def test_what_was_written_is_read(tmp_path):
    path = tmp_path / "journal.jsonl"
    written = write(path, 3)
    header, found = read_journal(path)
    assert found == written and header["teacher"] == HEADER["teacher"] and header["settings"] == HEADER["settings"]
    assert len(path.read_text().splitlines()) == 4
    assert evaluation(0, None).score("perplexity") == math.inf


def test_each_evaluation_is_on_the_disk_when_append_returns(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path, HEADER) as journal:
        for i in range(3):
            journal.append(evaluation(i))
            assert len(read_journal(path)[1]) == i + 1


def test_a_journal_killed_at_any_byte_is_repaired(tmp_path):
    whole = tmp_path / "whole.jsonl"
    written = write(whole, 2)
    content = whole.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for size in range(ends[0], len(content) + 1):
        path = tmp_path / "torn.jsonl"
        path.write_bytes(content[:size])
        n = sum(end <= size for end in ends) - 1
        assert read_journal(path)[1] == written[:n]
        with Journal(path, HEADER, resume=True) as journal:
            assert journal.evaluations == written[:n]
            for i in range(n, 2):
                journal.append(evaluation(i))
        assert path.read_bytes() == content


def test_a_last_line_of_garbage_is_dropped(tmp_path):
    path = tmp_path / "journal.jsonl"
    write(path, 2)
    content = path.read_bytes()
    path.write_bytes(content + b"\0\0\0\0\n")
    with Journal(path, HEADER, resume=True) as journal:
        assert len(journal.evaluations) == 2
    assert path.read_bytes() == content


def test_damage_elsewhere_is_refused(tmp_path):
    path = tmp_path / "journal.jsonl"
    write(path, 3)
    lines = path.read_text().splitlines(keepends=True)
    for broken, message in [
        ([lines[0], "{\n", *lines[2:]], "line 2"),
        ([lines[0], lines[1], lines[3]], "lacks evaluation 1"),
        (["[]\n", *lines[1:]], "is not the journal of a search"),
        ([], "is not the journal of a search"),
    ]:
        path.write_text("".join(broken))
        with pytest.raises(UserError, match=message):
            Journal(path, HEADER, resume=True)
        assert path.read_text() == "".join(broken)


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [("settings", "seed", 2), ("teacher", "weights", "cd"), ("settings", "bin", ["1M-2M", "3M-4M"]), ("data", "x", 1)],
)
def test_other_settings_are_refused_by_name(tmp_path, section, name, value):
    path = tmp_path / "journal.jsonl"
    write(path, 1)
    other = json.loads(json.dumps(HEADER))
    other.setdefault(section, {})[name] = value
    before = path.read_bytes()
    with pytest.raises(UserError, match=rf"{section}\.{name} was .* and is "):
        Journal(path, other, resume=True)
    assert path.read_bytes() == before


def test_nothing_to_resume_and_nothing_to_overwrite(tmp_path):
    path = tmp_path / "journal.jsonl"
    with pytest.raises(UserError, match="nothing to resume"):
        Journal(path, HEADER, resume=True)
    assert not path.exists()
    write(path, 1)
    with pytest.raises(UserError, match="holds a search already"):
        Journal(path, HEADER)
    assert len(read_journal(path)[1]) == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has no flock")
def test_two_writers_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "journal.jsonl"
    monkeypatch.setattr(files, "PATIENCE", 0)
    with open_record(path, HEADER):
        with pytest.raises(UserError, match="another process"), open_record(path, HEADER, resume=True):
            pass
    with open_record(path, HEADER, resume=True) as record:
        assert record.evaluations == []


def test_files_are_told_apart_wherever_they_lie(tmp_path):
    content = bytearray(os.urandom(2**18))
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(content)
    other.write_bytes(content)
    assert file_fingerprint(one) == file_fingerprint(other)
    content[2**17] ^= 1
    other.write_bytes(content)
    assert file_fingerprint(one) != file_fingerprint(other)
    other.write_bytes(b"")
    assert file_fingerprint(other) != file_fingerprint(one)
