"""Test where a command's notes go: to standard error, once, and nowhere from the Python API."""

import logging
import os

import forked
import pytest

from litgpt_whittle import console, processes

NOTE = "the data is short"


@pytest.fixture
def logger(monkeypatch):
    logger = logging.getLogger("litgpt_whittle")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    return logger


def test_notes_are_shown_once_on_standard_error(logger, capsys):
    for _ in range(2):
        console.show_log()
    logging.getLogger("litgpt_whittle.batches").info(NOTE)
    assert capsys.readouterr() == ("", f"{NOTE}\n")


def test_only_the_first_rank_shows_notes(logger, capsys, monkeypatch):
    console.show_log()
    monkeypatch.setattr(processes, "rank", lambda: 1)
    logger.info(NOTE)
    assert capsys.readouterr() == ("", "")


def test_results_and_notes_keep_their_order_and_the_api_shows_no_notes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import logging, sys\n"
        "from litgpt_whittle.console import show_log\n"
        "sys.stderr = sys.stdout\n"
        "logger = logging.getLogger('litgpt_whittle.files')\n"
        "logger.info('not shown')\n"
        "show_log()\n"
        "print('a result')\n"
        "logger.info('a note')\n"
        "print('another result')\n"
    )
    done = forked.Program(script).finish()
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(os.linesep)[:3] == ["a result", "a note", "another result"]
