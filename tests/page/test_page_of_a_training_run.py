"""The page beside real training: a worker that is killed is red and named, orders are obeyed."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from shoal_page import Screen, served

sys.path.append(str(Path(__file__).parents[1] / "fault"))

from processes import server_and_workers, started, wait_for_step

from shoal.observe.events import read_lines
from tiny import Bench, Run

TWO = ("parallel.replicate=2", "launch.workers=processes", "train.micro_batch_samples=1")
LONG = ("train.steps=100000", "train.evaluate_every_steps=0", "checkpoint.every_steps=0")


@pytest.mark.slow
@pytest.mark.timed
def test_a_killed_worker_is_red_and_named_within_two_seconds(
    browser: Any, bench: Bench, tmp_path: Path
) -> None:
    run = Run(tmp_path / "runs" / "killed")
    with started("train", bench.recipe, *TWO, *LONG, "--out", run.path) as training:
        wait_for_step(run, 5)
        with served(run.path.parent) as server:
            window = Screen(browser, server)
            page = window.open("killed")
            page.locator("#lane-1", has_text="worker 1: ").wait_for()
            _, workers = server_and_workers(training.pid)
            began = time.monotonic()
            os.kill(workers[1], signal.SIGKILL)
            page.locator("#lane-1.lost").wait_for()
            took = time.monotonic() - began
            assert "worker 1" in page.inner_text("#lane-1")
            assert took < 2.0
            page.locator("#events").get_by_text("recovered").wait_for()
            page.locator("#lane-1:not(.lost)").wait_for()
            assert page.locator("#lane-0.lost").count() == 0
            page.on("dialog", lambda dialog: dialog.accept())
            page.click("#STOP")
            assert training.wait(timeout=60) == 75
            page.locator("#STOP:disabled").wait_for()
            page.locator("#checkpoints").get_by_text("step").wait_for()
            window.close()
    said = [row["event"] for row in read_lines(run.path / "events.jsonl")]
    assert "lost" in said and "saved" in said
