"""Numbers as people write and read them, there and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.units import (
    format_bytes,
    format_count,
    format_seconds,
    parse_bytes,
    parse_count,
    parse_seconds,
)


@pytest.mark.parametrize(
    ("text", "value"), [("7", 7), ("2B", 2_000_000_000), ("1.5k", 1500), ("3e2 M", 300_000_000)]
)
def test_counts(text: str, value: int) -> None:
    assert parse_count(text) == value


@pytest.mark.parametrize(
    ("text", "value"), [("24 GiB", 24 * 2**30), ("80GB", 80 * 10**9), ("512 b", 512)]
)
def test_bytes(text: str, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize(("text", "value"), [("8h", 28800.0), ("90 s", 90.0), ("1.5min", 90.0)])
def test_durations(text: str, value: float) -> None:
    assert parse_seconds(text) == value


def test_what_is_no_quantity() -> None:
    for parse, text, said in (
        (parse_count, "many", "'many' is not a number with a unit"),
        (parse_count, "3 cows", "unknown suffix 'cows'; use k, M, B or T"),
        (parse_bytes, "3 cows", "unknown unit 'cows'; use one of b, kb"),
        (parse_seconds, "3 cows", "unknown unit 'cows'; use s, m, h or d"),
    ):
        with pytest.raises(ValueError, match=said):
            parse(text)


def test_in_words() -> None:
    assert [format_bytes(n) for n in (512, 1536, 3 * 2**40)] == ["512 B", "1.5 KiB", "3.0 TiB"]
    assert format_count(999_999) == "1M"
    assert [format_count(n) for n in (999, 4_200_000, 5e12)] == ["999", "4.2M", "5T"]
    assert [format_seconds(s) for s in (2.5, 75, 3725, 11_250_000)] == [
        "2.5 s",
        "1m 15s",
        "1h 02m",
        "130 days",
    ]


@given(st.integers(0, 10**14))
def test_a_count_reads_back_to_three_digits(count: int) -> None:
    # three digits are kept: half a unit of the third is 0.5 %
    assert parse_count(format_count(count)) == pytest.approx(count, rel=0.005, abs=0.5)
