"""What a server leaves for the page: rows of real requests, losses, and no text of theirs."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import NAME, Served

from made_runs import MadeRun
from shoal.errors import RunError
from shoal.launch.serving import Seen
from shoal.launch.serving_record import MOST_BYTES, ROWS, Record, _lane, _times, held_record
from shoal.observe.events import read_lines

ABOUT = {"model": "tiny", "address": "http://127.0.0.1:1/v1", "threads": 1}


def ask(served: Served, **fields: Any) -> httpx.Response:
    body = {"model": NAME, "prompt": "The river of the north", "max_tokens": 12, "seed": 1}
    body |= {"ignore_eos": True, **fields}
    return httpx.post(f"{served.url}/v1/completions", json=body, timeout=60)


def record(served: Served, folder: Path, said: list[str]) -> Record:
    served.fleet.lately.take()  # what other tests asked
    return Record(folder, served.fleet, about=ABOUT, say=said.append)


def test_rows_count_what_was_asked_and_made(served: Served, tmp_path: Path) -> None:
    said: list[str] = []
    with record(served, tmp_path, said):
        for number in range(5):
            assert ask(served, seed=number).status_code == 200
        with httpx.stream(
            "POST",
            f"{served.url}/v1/completions",
            json={"model": NAME, "prompt": "A", "max_tokens": 400, "stream": True},
            timeout=60,
        ) as left:
            next(left.iter_lines())
    rows = read_lines(tmp_path / ROWS)
    total = {key: sum(row[key] for row in rows) for key in ("requests", "answered", "failed")}
    assert total == {"requests": 6, "answered": 5, "failed": 0}
    assert 60 <= sum(row["made_tokens"] for row in rows) < 60 + 400
    prompts = sum(row["asked_tokens"] for row in rows)
    assert prompts > 5 * len("The river") / 4 and sum(row["seconds"] for row in rows) > 0
    first, last = (
        [row[key]["median"] for row in rows if row[key]]
        for key in ("first_token_seconds", "answer_seconds")
    )
    assert 0 < min(first) <= max(last)
    assert [each["rank"] for each in rows[-1]["replicas"]] == [0, 1]
    assert all(0 <= each["cache"] <= 1 for row in rows for each in row["replicas"])
    assert json.loads((tmp_path / "serving.json").read_text()) == ABOUT
    names = [row["event"] for row in read_lines(tmp_path / "events.jsonl")]
    assert names == ["started", "finished"] and said == []
    everything = "".join(path.read_text() for path in tmp_path.iterdir())
    assert "river" not in everything  # counts and times, no texts


def test_a_killed_replica_is_told_and_counts_never_fall(served: Served, tmp_path: Path) -> None:
    """What a replica had counted is gone with it; in sums it stays."""
    assert ask(served, max_tokens=40).status_code == 200
    before = served.fleet.counts()
    restarts = served.fleet.restarts
    with record(served, tmp_path, []):
        for pid in [each for each in served.fleet.workers().values() if each]:
            os.kill(pid, signal.SIGKILL)
        while served.fleet.restarts < restarts + 2:
            time.sleep(0.01)
        after = served.fleet.counts()
        metrics = httpx.get(f"{served.url}/metrics").text
        served.fleet.wait_ready(timeout_seconds=60)
        assert ask(served).status_code == 200
    assert before["made_tokens"] >= 40
    assert all(after[key] >= before[key] for key in before)
    (line,) = [x for x in metrics.splitlines() if x.startswith("vllm:generation_tokens_total{")]
    assert float(line.split()[-1]) >= before["made_tokens"]
    events = [(row["event"], row.get("rank")) for row in read_lines(tmp_path / "events.jsonl")]
    assert {("lost", 0), ("lost", 1), ("recovered", 0), ("recovered", 1)} <= set(events)
    assert read_lines(tmp_path / ROWS)[-1]["restarts"] == restarts + 2


def test_a_full_queue_is_counted(served: Served, tmp_path: Path) -> None:
    with record(served, tmp_path, []):
        answer = ask(served, n=16, max_tokens=200)  # 16 of 128 that may run; then fill the queue
        assert answer.status_code == 200
        served.fleet.router._most_requests = -1
        try:
            assert ask(served).status_code == 429
        finally:
            served.fleet.router._most_requests = served.fleet.settings.queue_requests
    rows = read_lines(tmp_path / ROWS)
    assert sum(row["refused"] for row in rows) == 1
    assert sum(row["requests"] for row in rows) == 17
    assert sum(row["answered"] for row in rows) == 16


def test_what_cannot_be_written_is_said_once(served: Served, tmp_path: Path) -> None:
    said: list[str] = []
    folder = tmp_path / "record"
    folder.mkdir()
    writing = record(served, folder, said)
    folder.rmdir()
    with writing:
        assert ask(served).status_code == 200
        time.sleep(2.2)
    assert len(said) == 1 and "No such file or directory; the server goes on" in said[0]


def test_rows_begin_anew_where_they_are_many(served: Served, tmp_path: Path) -> None:
    (tmp_path / ROWS).write_text("{}\n" * (MOST_BYTES // 3 + 1))
    with record(served, tmp_path, []):
        assert ask(served).status_code == 200
    assert len(read_lines(tmp_path / ROWS)) < 10
    assert (tmp_path / "serving-before.jsonl").stat().st_size > MOST_BYTES


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    MadeRun(tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("")
    with (
        pytest.raises(RunError, match="found a run; choose another"),
        held_record(str(tmp_path / "run")),
    ):
        pass
    with pytest.raises(RunError, match="found other files"), held_record(str(tmp_path / "mine")):
        pass
    with pytest.raises(RunError, match="cannot be made"), held_record("/proc/1/record"):
        pass
    with held_record(str(tmp_path / "new")) as folder:
        assert folder is not None
        (folder / "serving.json").write_text("{}")
        (folder / ROWS).write_text("{}\n")
        with pytest.raises(RunError, match="another server writes to it"), held_record(str(folder)):
            pass
    with held_record(str(tmp_path / "new")) as again:  # a server that begins again goes on in it
        assert again is not None and (again / ROWS).read_text() == "{}\n"


def test_lanes_of_replicas() -> None:
    idle = Seen(ready=True, requests=0, silent_seconds=900.0, step_seconds=0.1, state={})
    busy = replace(idle, requests=3, silent_seconds=0.5)
    states = [
        _lane(0, each)["state"]
        for each in (replace(idle, ready=False), idle, busy, replace(busy, silent_seconds=2.5))
    ]
    assert states == ["starts", "waits", "computes", "silent"]
    slow = replace(busy, silent_seconds=2.5, step_seconds=0.5)
    assert _lane(0, slow)["state"] == "computes"


def test_95_of_100_are_within() -> None:
    assert _times([]) is None
    assert _times([3.0]) == {"median": 3.0, "p95": 3.0}
    assert _times([float(each) for each in range(1, 101)]) == {"median": 50.5, "p95": 95.0}
    assert _times([float(each) for each in range(20, 0, -1)]) == {"median": 10.5, "p95": 19.0}
