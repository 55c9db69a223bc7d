"""observe.trace writes a Chrome trace in the loop's own words: a row per worker and stream."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny import Bench

WORDS = {"batches", "verify", "forward_backward", "forward", "backward", "update", "save"}
SHORT = ("train.steps=3", "train.evaluate_every_steps=0", "checkpoint.every_steps=0")


def events_of(run: Path) -> list[dict[str, Any]]:
    content = json.loads((run / "trace.json").read_text(encoding="utf-8"))
    assert content["otherData"] == {"spans_left_out": 0}
    events: list[dict[str, Any]] = content["traceEvents"]
    return events


def of(
    events: list[dict[str, Any]], *, rank: int, row: int = 0, phase: str = "X"
) -> list[dict[str, Any]]:
    found = [e for e in events if (e["ph"], e["pid"], e["tid"]) == (phase, rank, row)]
    return sorted(found, key=lambda event: event["ts"])


def test_trace_holds_every_workers_spans(bench: Bench) -> None:
    run = bench.run("parallel.replicate=2", *SHORT, "observe.trace=true")
    events = events_of(run.path)
    for rank in (0, 1):
        spans = of(events, rank=rank)
        names = [span["name"] for span in spans]
        assert set(names) == WORDS
        assert names.count("update") == 3 and names.count("save") == 1
        assert names.count("verify") == 4, "before each step, and before the save"
        for span in spans:
            assert span["dur"] >= 0 and span["args"]["step"] in range(4)
        sent = {span["name"] for span in of(events, rank=rank, row=1)}
        assert {"all_reduce", "wait"} <= sent
    rows = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert rows == {(r, s): n for r in (0, 1) for s, n in enumerate(("compute", "communication"))}


def test_reductions_begin_before_backward_ends(bench: Bench) -> None:
    """Of each step the first buckets, those of the last layers, are on their way by then."""
    run = bench.run(
        *("parallel.replicate=2", "launch.workers=processes", "sync.bucket_bytes=65536"),
        *(*SHORT, "train.micro_batch_samples=2", "observe.trace=true"),
    )
    events = events_of(run.path)
    for rank in (0, 1):
        begun = of(events, rank=rank, row=2, phase="b")
        spans = of(events, rank=rank)
        for step in range(3):
            passes = [s for s in spans if s["name"] == "backward" and s["args"]["step"] == step]
            assert len(passes) > 1, "several micro batches"
            last = passes[-1]
            ended = last["ts"] + last["dur"]
            around = next(s for s in spans if s["name"] == "update" and s["args"]["step"] == step)
            own = [e for e in begun if passes[0]["ts"] < e["ts"] < around["ts"]]
            during = [e for e in own if last["ts"] < e["ts"] < ended]
            assert len(during) >= len(own) // 2 > 0, "the larger part begins inside the last one"
            assert during == own[: len(during)], "and none in an earlier one"


def test_parts_of_rows_travel_beside_compute(bench: Bench) -> None:
    """The next keys and values are on their way while a rank computes with those it has."""
    run = bench.run("parallel={replicate: 1, context: 2}", *SHORT, "observe.trace=true")
    events = events_of(run.path)
    for rank in (0, 1):
        begun = {e["id"]: e["ts"] for e in of(events, rank=rank, row=2, phase="b")}
        ended = {e["id"]: e["ts"] for e in of(events, rank=rank, row=2, phase="e")}
        waits = [s for s in of(events, rank=rank, row=1) if s["name"] == "ring"]
        assert len(begun) == len(ended) == len(waits) > 0
        flown = sum(ended[each] - start for each, start in begun.items())
        assert sum(span["dur"] for span in waits) < flown
        within = [s for s in of(events, rank=rank) if s["name"] in ("forward", "backward")]
        for span in within:
            ended_at = span["ts"] + span["dur"]
            assert any(span["ts"] < start < ended_at for start in begun.values())


def test_stages_compute_beside_one_another(bench: Bench) -> None:
    """While the second has a micro batch, the first computes the next one."""
    run = bench.run(
        *("parallel={replicate: 1, pipeline: 2}", "train.micro_batch_samples=2"),
        *(*SHORT, "observe.trace=true"),
    )
    events = events_of(run.path)
    passes = {
        (rank, s["name"], s["args"]["step"], s["args"]["micro_batch"]): (
            s["ts"],
            s["ts"] + s["dur"],
        )
        for rank in (0, 1)
        for s in of(events, rank=rank)
        if s["name"] in ("forward", "backward")
    }
    beside = 0
    for (rank, name, step, micro), (start, stop) in passes.items():
        following = passes.get((0, name, step, micro + 1))
        if rank == 1 and name == "forward" and following is not None:
            assert passes[0, name, step, micro][1] < start, "it has come from the first stage"
            beside += following[0] < stop and start < following[1]
    assert beside
    assert any(span["name"] == "send" for span in of(events, rank=0, row=1))
    assert all(row["communication_seconds"] > 0 for row in run.rows)


def test_no_trace_unless_asked(bench: Bench) -> None:
    run = bench.run("parallel.replicate=1", "train.steps=3", "train.evaluate_every_steps=0")
    assert not (run.path / "trace.json").exists()
