"""Test parsing of quantities and ranges."""

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from litgpt_whittle.errors import UserError
from litgpt_whittle.quantities import Unit, format_amount, format_range, parse_amount, parse_range

UNITS = get_args(Unit)


@pytest.mark.parametrize(
    ("text", "unit", "least", "most"),
    [
        ("800M", "FLOPs per token", 0, 8e8),
        ("600M-800M", "FLOPs per token", 6e8, 8e8),
        ("600 - 800 M", "FLOPs per token", 6e8, 8e8),
        ("999M–1.2G", "FLOPs per token", 9.99e8, 1.2e9),
        ("1e-3", "seconds", 0, 1e-3),
        ("1e-3-2e-3", "seconds", 1e-3, 2e-3),
        ("500us-2ms", "seconds", 5e-4, 2e-3),
        ("1GB-1GiB", "bytes", 1e9, 2**30),
        ("3-3", "parameters", 3, 3),
        (1_000_000, "parameters", 0, 1e6),
        (0.5, "seconds", 0, 0.5),
    ],
)
def test_ranges_are_read(text, unit, least, most):
    assert parse_range(text, unit) == pytest.approx((least, most))


@pytest.mark.parametrize("text", ["", "-5M", "5M-", "1-2-3", "0-5M", "5M-6x", "5M±1M"])
def test_unreadable_ranges_are_refused(text):
    with pytest.raises(UserError, match="an amount in parameters looks like 410M"):
        parse_range(text, "parameters")


def test_a_reversed_range_is_refused():
    with pytest.raises(UserError, match="a range must ascend, got '2ms-1ms'; swap its ends"):
        parse_range("2ms-1ms", "seconds")


@pytest.mark.parametrize(
    ("amount", "unit", "text"),
    [
        (812_345_678, "FLOPs per token", "812.3M"),
        (12_582_912, "bytes", "12.58MB"),
        (7, "bytes", "7B"),
        (0.0015, "seconds", "1.5ms"),
        (2.5, "seconds", "2.5s"),
        (2e-7, "seconds", "0.2us"),
        (410e6, "parameters", "410M"),
        (5, "parameters", "5"),
        (0, "bytes", "0B"),
    ],
)
def test_amounts_are_written_as_people_do(amount, unit, text):
    assert format_amount(amount, unit) == text


@given(st.sampled_from(UNITS), st.floats(1e-9, 1e15), st.floats(1, 1e3))
def test_what_is_written_is_read_again(unit, least, factor):
    assert parse_amount(format_amount(least, unit), unit) == pytest.approx(least, rel=1e-3)
    for amounts in ((0.0, least), (least, least * factor)):
        assert parse_range(format_range(amounts, unit), unit) == pytest.approx(amounts, rel=1e-3)
