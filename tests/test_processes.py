"""Measures of a process, on the systems that count them differently."""

import resource
import sys

import psutil
import pytest

from litgpt_whittle.processes import peak_resident


def test_the_peak_of_memory_is_that_of_the_system():
    """The oracle is psutil, whose figure of now is below the peak, but for what the kernel has not yet added up."""
    now = psutil.Process().memory_info().rss
    assert 0.9 * now < peak_resident() < 100 * now


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_the_peak_is_in_bytes_on_every_system(monkeypatch, platform, unit):
    """getrusage(2): kilobytes on Linux, bytes on macOS."""
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: resource.struct_rusage([0.0, 0.0, 5000, *range(13)]))
    assert peak_resident() == 5000 * unit
