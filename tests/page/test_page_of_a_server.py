"""The page beside a real `shoal serve`: requests, latency, cache, a replica that is killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from shoal_page import Screen, served

sys.path.extend(str(Path(__file__).parents[1] / each) for each in ("fault", "unit/serve"))

from processes import server_and_workers
from served import NAME, write_model

from tiny import shoal


@contextmanager
def server(folder: Path, record: Path) -> Iterator[tuple[str, int]]:
    """`shoal serve` as a process of its own: its address and number."""
    settings = ("replicate=2", "threads=1", "port=0", f"record={record}")
    process = subprocess.Popen(
        shoal("serve", folder, *settings), stdout=subprocess.PIPE, stderr=sys.stderr, text=True
    )
    try:
        assert process.stdout is not None
        said = re.search(r"at (http://\S+/v1)", process.stdout.readline())
        assert said is not None
        yield said[1], process.pid
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_requests_and_a_killed_replica_are_seen(browser: Any, tmp_path: Path) -> None:
    record = tmp_path / "runs" / "served"
    with server(write_model(tmp_path / NAME), record) as (url, pid), served(record.parent) as page:
        window = Screen(browser, page)
        shown = window.open("served")
        for rank in (0, 1):
            shown.locator(f"#lane-{rank}", has_text=f"replica {rank}: waits").wait_for()
        ends = threading.Event()

        def ask() -> None:
            while not ends.is_set():
                body = {"model": NAME, "prompt": "The river", "max_tokens": 50, "ignore_eos": True}
                answer = httpx.post(f"{url}/completions", json=body, timeout=120)
                assert answer.status_code == 200

        askers = [threading.Thread(target=ask) for _ in range(4)]
        for each in askers:
            each.start()
        try:
            shown.locator("#lane-0", has_text="replica 0: computes").wait_for()
            shown.locator("#traffic canvas").wait_for()
            shown.locator("#cache .bar").nth(1).wait_for()
            figures = shown.locator("#now")
            figures.get_by_text(re.compile(r"ms \(95 %: |s \(95 %: ")).first.wait_for()
            assert "requests per second" in figures.inner_text() and NAME in figures.inner_text()
            assert shown.locator("#loss").is_hidden() and shown.locator("#SAVE").is_disabled()
            _, replicas = server_and_workers(pid)
            os.kill(replicas[0], signal.SIGKILL)
            shown.locator(".lost", has_text="ended (status -9)").wait_for()
            shown.locator("#events", has_text="is ready again").wait_for()
            shown.locator("#lanes .lost").wait_for(state="detached")
        finally:
            ends.set()
            for each in askers:
                each.join()
        window.close()
    assert '"event": "finished"' in (record / "events.jsonl").read_text()
