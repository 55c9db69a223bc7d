"""Rows as the page draws them: to the bit, thinned without losing a peak, never an error."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from made_runs import MadeRun
from shoal.page import rows


def lines(*trees: object) -> list[bytes]:
    return [json.dumps(tree).encode() for tree in trees]


def test_numbers_cross_to_the_bit() -> None:
    draw = random.Random(1)
    losses = [draw.uniform(0, 9) for _ in range(50)]
    given_ = lines(*({"step": at + 1, "loss": loss} for at, loss in enumerate(losses)))
    found, last = rows.columns(given_, last_step=0)
    assert json.loads(json.dumps(found))["steps"]["loss"] == losses
    assert last == 50


def test_time_is_that_of_the_steps_also_of_those_that_were_not_logged() -> None:
    every_tenth = [{"step": 10 * n, "loss": 1.0, "step_seconds": 0.5} for n in range(1, 4)]
    found, last = rows.columns(lines(*every_tenth), last_step=0)
    assert found["steps"]["elapsed"] == [5.0, 5.0, 5.0]
    more, _ = rows.columns(lines({"step": 40, "loss": 1.0, "step_seconds": 0.5}), last_step=last)
    assert more["steps"]["elapsed"] == [5.0]


def test_evaluations_keep_their_scores_and_texts() -> None:
    row = {"step": 3, "evaluation_loss": 2.5, "accuracy": 0.5, "seconds": 0.1}
    found, _ = rows.columns(
        lines({**row, "completions": [["a", "b" * 5000]]}, {**row, "evaluation_loss": None}),
        last_step=0,
    )
    assert found["evaluations"][0] == {**row, "completions": [["a", "b" * 2000]]}
    assert found["evaluations"][1]["evaluation_loss"] is None and found["steps"]["step"] == []


@pytest.mark.parametrize(
    "line",
    [
        b'{"step": 1, "loss": ',
        b'{"step": "one"}',
        b'{"step": 1.5}',
        b'{"loss": 1.0}',
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"step": 1, "loss": NaN}',
        b'{"step": 1, "loss": "low"}',
    ],
)
def test_what_is_no_row_is_counted(line: bytes) -> None:
    good = lines({"step": 2, "loss": 1.0, "of_a_newer_version": {"any": [1]}})
    found, last = rows.columns([line, *good, b""], last_step=0)
    assert found["steps"]["loss"] == [1.0] and found["broken"] == 1 and last == 2


def test_few_rows_are_all_drawn_and_many_keep_their_extremes() -> None:
    draw = random.Random(2)
    losses = [draw.gauss(0, 1) for _ in range(100_000)]
    assert rows.envelope(losses[:4800]) == list(range(4800))
    kept = rows.envelope(losses)
    assert len(kept) <= 3 * rows.BUCKETS + 1 and kept[0] == 0 and kept[-1] == 99_999
    assert losses.index(max(losses)) in kept and losses.index(min(losses)) in kept
    # of every neighbourhood, as a screen would show it
    for start in range(0, 100_000, 1000):
        part = range(start, start + 1000)
        assert max(losses[start : start + 1000]) == max(losses[at] for at in kept if at in part)


@given(st.lists(st.none() | st.floats(allow_nan=False), max_size=200), st.integers(1, 9))
def test_an_envelope_is_a_part_of_the_rows(losses: list[float | None], buckets: int) -> None:
    kept = rows.envelope(losses, buckets=buckets)
    assert kept == sorted(set(kept)) and set(kept) <= set(range(len(losses)))
    finite = [loss for loss in losses if loss is not None]
    if finite:
        drawn = [losses[at] for at in kept if losses[at] is not None]
        assert (min(drawn), max(drawn)) == (min(finite), max(finite))


def test_runs_of_one_length_keep_common_steps() -> None:
    """So that the digits of two long runs can be compared."""
    draw = random.Random(3)
    one, other = ([draw.random() for _ in range(20_000)] for _ in range(2))
    assert len(set(rows.envelope(one)) & set(rows.envelope(other))) >= rows.BUCKETS


def test_time_is_whole_where_rows_are_thinned() -> None:
    many = [MadeRun.row(step) for step in range(1, 20_001)]
    found, _ = rows.columns(lines(*many), last_step=0)
    assert len(found["steps"]["step"]) < 5000 and found["of"] == 20_000
    total = sum(row["step_seconds"] for row in many)
    assert sum(found["steps"]["elapsed"]) == pytest.approx(total, rel=1e-9)


def test_events_are_cut_to_what_is_shown() -> None:
    stack = {"event": "stuck", "rank": 1, "text": "x" * 1000, "stack": "y" * 10_000, "who": ["z"]}
    changed = {"event": "changed", "key": "train.steps", "before": 1, "after": 2}
    found, broken = rows.events([*lines(stack, changed, {"text": "none"}), b"{", b""])
    assert found[0] == {"event": "stuck", "rank": 1, "text": "x" * 400}
    assert found[1]["text"] == "train.steps: 1 -> 2" and broken == 2


def test_a_servers_rows_become_rates() -> None:
    row = {"at": 1000.0, "seconds": 2.0, "requests": 6, "made_tokens": 50, "running": 3}
    times = {"first_token_seconds": {"median": 0.1, "p95": 0.4}, "answer_seconds": None}
    found = rows.served(
        lines({**row, **times, "of_a_newer_version": 1}, {"at": 1.0}, {**row, "seconds": 0.0})
    )
    assert found["broken"] == 1 and found["of"] == 1
    assert found["newest"]["of_a_newer_version"] == 1
    assert found["served"] == {
        "at": [1000.0],
        "requests_per_second": [3.0],
        "tokens_per_second": [25.0],
        "running": [3],
        "waiting": [0],
        "first_token": [0.4],
        "answer": [None],
    }
