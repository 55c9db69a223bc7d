"""observe.trace writes a Chrome trace in the loop's own words, one row of spans per worker."""

from __future__ import annotations

import json

from tiny import Bench

WORDS = {"batches", "verify", "forward_backward", "update", "save"}


def test_trace_holds_every_workers_spans(bench: Bench) -> None:
    run = bench.run(
        "parallel.replicate=2",
        "train.steps=3",
        "train.evaluate_every_steps=0",
        "checkpoint.every_steps=0",
        "observe.trace=true",
    )
    content = json.loads((run.path / "trace.json").read_text(encoding="utf-8"))
    spans = [event for event in content["traceEvents"] if event["ph"] == "X"]
    assert content["otherData"] == {"spans_left_out": 0}
    for rank in (0, 1):
        names = [span["name"] for span in spans if span["tid"] == rank]
        assert set(names) == WORDS
        assert names.count("update") == 3 and names.count("save") == 1
        assert names.count("verify") == 4, "before each step, and before the save"
    for span in spans:
        assert span["dur"] >= 0 and span["args"]["step"] in range(4)


def test_no_trace_unless_asked(bench: Bench) -> None:
    run = bench.run("parallel.replicate=1", "train.steps=3", "train.evaluate_every_steps=0")
    assert not (run.path / "trace.json").exists()
