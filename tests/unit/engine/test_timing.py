"""Timing workers run the recipe's own training, step by step as ordered."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from shoal.config.load import load_recipe
from shoal.engine.decision import Decision
from shoal.engine.job import Job
from shoal.launch.pool import Worker
from shoal.launch.prepare import prepare_inputs
from shoal.layout import Layout
from tiny import Bench


def heard(bench: Bench, workers: list[Worker], kind: str) -> dict[str, Any]:
    """The next message of a kind; an error is raised."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for worker, message in bench.pool.events(timeout_seconds=0.5, only=workers):
            assert message is not None, f"worker {worker.name} ended"
            assert message["kind"] != "error", message
            if message["kind"] == kind:
                return message
    raise AssertionError(f"no {kind} within a minute")


@pytest.mark.quick(1)
@pytest.mark.parametrize(("kind", "count"), [("threads", 2), ("processes", 2), ("processes", 1)])
def test_steps_in_any_micro_batch_are_timed(
    bench: Bench, tmp_path: Path, kind: Any, count: int
) -> None:
    """Passes and update apart; more rows take longer; nothing is written."""
    recipe = load_recipe(str(bench.recipe))
    inputs = prepare_inputs(recipe, say=lambda text: None)
    decision = Decision(Layout(replicate=count), kind, 1, 1, "float32", "")
    payload = Job(recipe, tmp_path, inputs, decision).to_json()
    size = 1 if kind == "threads" else count
    target = "shoal.engine.timing:run"
    workers = [bench.pool.start(target, {**payload, "rank": rank}) for rank in range(size)]
    try:
        heard(bench, workers, "built")
        spent = {}
        for micro, samples, times in ((1, 1, 1), (2, 8, 3), (1, 1, 5)):
            order = {"micro": micro, "samples": samples, "threads": 1, "times": times}
            for worker in workers:
                bench.pool.send(worker, order)
            spent[samples] = heard(bench, workers, "turn")
        assert all(each["passes"] > 0 and each["update"] > 0 for each in spent.values())
        assert spent[8]["passes"] > spent[1]["passes"]
        hashes = kind == "processes" and count > 1  # replicas show every step that they are equal
        assert all((each["hashing"] > 0) == hashes for each in spent.values())
        assert all(each["update"] > each["hashing"] for each in spent.values())
        assert not [path for path in tmp_path.iterdir() if not path.name.startswith("meeting-")]
    finally:
        bench.pool.kill(workers)
