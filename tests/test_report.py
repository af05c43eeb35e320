"""Test `litgpt report`: one page for any journal, and no other change."""

import base64
import json
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from architectures import ARCHITECTURES
from litgpt.config import Config
from litgpt.utils import CLI
from test_search import TEACHER, make_checkpoint, run

from litgpt_whittle.commands.report import setup
from litgpt_whittle.errors import UserError
from litgpt_whittle.evaluations import best_of
from litgpt_whittle.index_plan import n_params
from litgpt_whittle.journal import (
    Evaluation,
    Journal,
    read_journal,
)
from litgpt_whittle.reports.report import write_report
from litgpt_whittle.spaces.bins import Bin
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.subnet import SubNet


class Page(HTMLParser):
    """Parse a page as a browser would."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open, self.sources, self.text = [], [], ""
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open, "a tag is not closed"

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "link", "iframe")
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def header(teacher: Config, score: str = "perplexity") -> dict:
    return {"teacher": {"name": teacher.name, "architecture": asdict(teacher)}, "settings": {"score": score, "seed": 7}}


def write_journal(out_dir: Path, teacher: Config, space: str, bins: list[str], n: int = 4, predicted=False) -> Path:
    """Write a journal of random candidates with made-up scores; the last one of each bin failed."""
    out_dir.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    with Journal(out_dir / "journal.jsonl", header(teacher)) as journal:
        for bin in bins:
            for i in range(n):
                subnet, score = Space(teacher, space, Bin.parse(bin)).sample(rng), float(rng.uniform(5, 50))
                scores = {"perplexity": score} | ({"predicted": score + 1} if predicted else {})
                scores, error = (scores, None) if i < n - 1 else ({}, "out of memory")
                size = n_params(teacher, subnet)
                index = len(journal.evaluations)
                journal.append(
                    Evaluation(
                        index=index,
                        bin=bin,
                        subnet=subnet.to_dict(),
                        n_params=size,
                        scores=scores,
                        seed=7,
                        batches=1,
                        tokens=64,
                        seconds=30.0,
                        error=error,
                    )
                )
    return out_dir


def pictures(out_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out_dir.glob("*.png")}


def test_a_search_leaves_a_report_and_the_journal_alone_gives_the_same(tmp_path, capsys):
    out = tmp_path / "out"
    run(make_checkpoint(tmp_path / "teacher"), out, bin=["8K-10K", "14K±5%"], iterations=6)
    printed = capsys.readouterr().out
    for best in best_of(read_journal(out / "journal.jsonl")[1]).values():
        [line] = [line for line in printed.splitlines() if line.strip().startswith(best.bin)]
        assert f"{best.scores['perplexity']:.2f}" in line and f"{best.n_params:,}" in line
    journal = (out / "journal.jsonl").read_bytes()
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy/journal.jsonl").write_bytes(journal)
    CLI(setup, args=[str(tmp_path / "copy")])
    again = capsys.readouterr().out
    assert again.splitlines()[:4] == [line for line in printed.splitlines() if line in again]
    assert (tmp_path / "copy/journal.jsonl").read_bytes() == journal
    assert (tmp_path / "copy/report.html").read_text() == (out / "report.html").read_text()
    names = {"search.png", "candidates.png", "dimensions.png"}
    names |= {"architecture-8K-10K.png", "architecture-13.3K-14.7K.png"}
    assert set(pictures(out)) == names and pictures(out) == pictures(tmp_path / "copy")
    assert {path.name for path in (tmp_path / "copy").iterdir()} == names | {"journal.jsonl", "report.html"}


def test_the_page_needs_nothing_else(tmp_path):
    out = write_journal(tmp_path, TEACHER, "fine_layerwise", ["8K-10K"], predicted=True)
    write_report(out)
    page = Page(out / "report.html")
    assert "http" not in (out / "report.html").read_text() and "url(" not in (out / "report.html").read_text()
    prefix = "data:image/png;base64,"
    assert all(source.startswith(prefix) for source in page.sources)
    embedded = [base64.b64decode(source.removeprefix(prefix)) for source in page.sources]
    assert sorted(embedded) == sorted(pictures(out).values()) and len(embedded) == 5


@pytest.mark.parametrize(
    ("name", "space"),
    [
        ("pythia-14m", "coarse_uniform"),
        ("pythia-14m", "fine_uniform"),
        ("Llama-3.1-8B", "coarse_layerwise"),
        ("Mixtral-8x7B-v0.1", "fine_layerwise"),
        ("latent", "fine_layerwise"),
    ],
)
def test_all_bins_of_any_space_are_reported(tmp_path, name, space):
    teacher = ARCHITECTURES.get(name, TEACHER)
    whole = n_params(teacher, SubNet.full(teacher))
    bins = [str(Bin.parse(f"{share * whole:.0f}±10%")) for share in (0.4, 0.6)]
    printed = write_report(write_journal(tmp_path, teacher, space, bins))
    page = Page(tmp_path / "report.html")
    for bin in bins:
        assert bin in page.text and bin in printed and f"4 of {bin}" in page.text
        assert (tmp_path / f"architecture-{bin}.png").is_file()
    assert f"Search of {teacher.name}" in page.text and "Failed: 2 (out of memory)" in page.text
    assert "took 4.0 minutes" in page.text and "seed: 7" in page.text


def test_a_bin_without_a_score_is_named(tmp_path):
    write_journal(tmp_path, TEACHER, "coarse_uniform", ["8K-10K"], n=2)
    lines = (tmp_path / "journal.jsonl").read_text().splitlines()
    failed = json.loads(lines[2]) | {"bin": "13.3K-14.7K"}
    (tmp_path / "journal.jsonl").write_text("\n".join([*lines[:2], json.dumps(failed)]) + "\n")
    assert "13.3K-14.7K" not in write_report(tmp_path)
    assert "1 of 8K-10K, 1 of 13.3K-14.7K" in Page(tmp_path / "report.html").text


def test_a_running_search_is_reported_and_not_disturbed(tmp_path):
    write_journal(tmp_path, TEACHER, "fine_uniform", ["8K-10K"])
    path = tmp_path / "journal.jsonl"
    with Journal(path, header(TEACHER), resume=True) as journal, open(path, "ab") as torn:
        torn.write(b'{"index": 4, "bi')
        torn.flush()
        before = path.read_bytes()
        write_report(tmp_path)
        assert path.read_bytes() == before and len(journal.evaluations) == 4
    assert "4 of 8K-10K" in Page(tmp_path / "report.html").text


def test_sections_appear_only_with_their_data(tmp_path):
    write_journal(tmp_path / "plain", TEACHER, "coarse_uniform", ["8K-10K"])
    write_journal(tmp_path / "more", TEACHER, "coarse_uniform", ["8K-10K"], predicted=True)
    (tmp_path / "more/importance.png").write_bytes(b"\x89PNG drawn by someone else")
    for name in ("plain", "more"):
        write_report(tmp_path / name)
    plain, more = (Page(tmp_path / name / "report.html") for name in ("plain", "more"))
    assert "The surrogate" not in plain.text and "Importance" not in plain.text
    assert "The surrogate" in more.text and "Importance" in more.text and len(more.sources) == len(plain.sources) + 2


def test_names_are_escaped(tmp_path):
    teacher = Config(**(asdict(TEACHER) | {"name": '<b>"&{0}'}))
    write_report(write_journal(tmp_path, teacher, "coarse_uniform", ["8K-10K"]))
    assert 'Search of <b>"&{0}' in Page(tmp_path / "report.html").text


OLD = {"version": 1, "teacher": {"name": "t"}, "settings": {}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not the folder of a search: it has no journal.jsonl"),
        ("", "is not the journal of a search"),
        ('{"some": "json"}\n', "is not the journal of a search"),
        ("text\n", "line 1 of the journal .* is damaged"),
        (json.dumps(OLD) + "\n", "was written by another version"),
        (json.dumps({"version": 2, **header(TEACHER)}) + "\n", "has no candidate with a score among its 0 evaluations"),
    ],
)
def test_folders_without_a_search_are_refused_in_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "journal.jsonl").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        setup(tmp_path)
    assert "\n" not in str(error.value) and not (tmp_path / "report.html").exists()


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=f"{re.escape(repr(str(tmp_path / 'nowhere')))} is not the folder of a search"):
        setup(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
