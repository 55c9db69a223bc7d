"""Rows and events: complete lines, whoever writes them, and what a crash leaves is read."""

from __future__ import annotations

import json
import math
import os
import threading
from pathlib import Path

import pytest

from shoal.observe.events import JsonLines, Report, RunFiles, Tee, cut_after, read_lines


def test_numbers_that_json_has_no_word_for_are_null(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "deep/rows.jsonl")
    lines.append({"step": 1, "loss": math.nan, "norm": math.inf})
    lines.close()
    assert read_lines(tmp_path / "deep/rows.jsonl") == [{"step": 1, "loss": None, "norm": None}]


def test_a_row_is_on_disk_at_once(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "rows.jsonl")
    lines.append({"step": 1})
    assert read_lines(tmp_path / "rows.jsonl") == [{"step": 1}]
    lines.close()


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_lines(path) == [{"step": 1}]
    assert read_lines(tmp_path / "none.jsonl") == []


def test_what_is_no_row_is_left_out_and_cut_away(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = b'{"step": 1, "text": "snow \xe2\x98\x83"}\n{"event": "saved"}\n'
    bad = [b"\xff", b"[1]", b'"words"', b'{"step": null}', b'{"step": "2"}', b"\x00", b"[" * 99999]
    path.write_bytes(good + b"\n".join(bad))
    rows = [{"step": 1, "text": "snow \u2603"}, {"event": "saved"}]
    assert read_lines(path) == rows
    assert cut_after(path, step=1) == 0
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows


def test_what_follows_a_step_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"step": step, "loss": 1.0} for step in range(1, 6)] + [{"sources": {"a": 3}}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 6')
    assert cut_after(path, step=3) == 2
    assert [row.get("step") for row in read_lines(path)] == [1, 2, 3, None]
    assert path.read_text().endswith("\n"), "the half line is gone, the next row begins a line"
    assert cut_after(path, step=3) == 0
    assert [found.name for found in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_half_line_goes_even_when_no_row_does(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 1}\n{"st')
    assert cut_after(path, step=1) == 0
    assert path.read_text() == '{"step": 1}\n'


def test_a_run_s_files(tmp_path: Path) -> None:
    sink = Tee([RunFiles(tmp_path)])
    sink.row({"step": 1, "loss": 2.0})
    sink.event("saved", {"step": 1})
    sink.close()
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]
    (event,) = read_lines(tmp_path / "events.jsonl")
    assert (event["event"], event["step"]) == ("saved", 1)
    assert event["happened_at"].endswith("+00:00")


def test_long_messages_of_many_threads_stay_whole() -> None:
    """A pipe takes at most 4 KiB in one piece; completions are longer."""
    read, write = os.pipe()
    report = Report(write)
    heard: list[bytes] = []

    def listen() -> None:
        while data := os.read(read, 1 << 16):
            heard.append(data)

    def talk(rank: int) -> None:
        for number in range(20):
            report.say("alive", rank=rank, number=number, text="x" * 9000)

    listener = threading.Thread(target=listen)
    listener.start()
    talkers = [threading.Thread(target=talk, args=(rank,)) for rank in range(4)]
    for thread in talkers:
        thread.start()
    for thread in talkers:
        thread.join()
    os.close(write)
    listener.join()
    os.close(read)
    messages = [json.loads(line) for line in b"".join(heard).splitlines()]
    assert len(messages) == 80
    for rank in range(4):
        assert [m["number"] for m in messages if m["rank"] == rank] == list(range(20))


def test_a_parent_that_is_gone_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    report = Report(write)
    report.say("alive", rank=0)
    with pytest.raises(BrokenPipeError):  # there is really nobody
        os.write(write, b"x")
    os.close(write)


def test_a_new_row_never_joins_a_half_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "started"}\n{"event": "sa')
    lines = JsonLines(path)
    lines.append({"event": "resumed"})
    lines.close()
    assert [row["event"] for row in read_lines(path)] == ["started", "resumed"]
