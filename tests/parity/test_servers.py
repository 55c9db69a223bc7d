"""Parameter servers by the product's own loop: what each consistency must equal and keep."""

from __future__ import annotations

import json
import statistics

import pytest
from safetensors.torch import load_file

from shoal.comm.flat import CHUNK
from shoal.engine.job import Instruments
from shoal.launch import local
from tiny import Bench, Run

TWO = ("parallel.replicate=2", "launch.workers=processes")
SYNCHRONOUS = "sync={kind: server, consistency: {kind: bounded, staleness: 0}%s}"
SGD = (
    "train.optimizer={kind: sgd, learning_rate: 0.05}",
    "train.max_gradient_norm=null",
    "train.steps=20",
)
ADAMW = ("train.max_gradient_norm=null", "train.steps=20")


def largest_difference(found: Run, wanted: Run) -> float:
    """Over all exported weights, relative to the largest of each tensor."""
    ours, theirs = (load_file(run.path / "model" / "model.safetensors") for run in (found, wanted))
    assert ours.keys() == theirs.keys()
    pairs = [(ours[name], theirs[name]) for name in theirs]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cut", "more"),
    [
        pytest.param("parallel.shard={degree: 2, level: parameters}", "", id="parameters"),
        pytest.param(
            "parallel.shard={degree: 2, level: optimizer}",
            ", servers: 2",
            id="optimizer",
            marks=pytest.mark.slow,
        ),
        pytest.param("parallel.context=2", "", id="context", marks=pytest.mark.slow),
        pytest.param("parallel.pipeline=2", "", id="pipeline", marks=pytest.mark.slow),
    ],
)
def test_each_rank_of_a_cut_replica_pushes_its_own_part(bench: Bench, cut: str, more: str) -> None:
    how = (*TWO, *SGD, "train.micro_batch_samples=2", "model.tie_word_embeddings=false")
    wanted = bench.run(*how)
    found = bench.run(*how, cut, SYNCHRONOUS % more)
    assert largest_difference(found, wanted) < 5e-6, "the shards' sums have another order"


@pytest.mark.slow
@pytest.mark.timed
def test_beside_a_slow_worker_the_others_keep_their_speed(bench: Bench) -> None:
    """Issue: 90 %, of one whose peer takes four times as long. Pairs alternate, medians count."""
    how = (*TWO, "train.steps=20", "train.micro_batch_samples=4", "train.evaluate_every_steps=0")
    how = (
        *how,
        "checkpoint.every_steps=0",
        "sync={kind: server, consistency: {kind: asynchronous}}",
    )
    ratios = []
    for _ in range(3):
        even = bench.train(*how)
        step = statistics.median(row["compute_seconds"] for row in even.rows[3:] if "loss" in row)
        fault = {"kind": "slow", "rank": 1, "step": 1, "number": 0, "argument": str(3 * step / 2)}
        out = bench.new_path()
        local.train(
            bench.recipe,
            how,
            out=out,
            console=False,
            pool=bench.pool,
            instruments=Instruments(planned_faults=(fault,)),
        )
        speeds = [
            statistics.median(row["tokens_per_second"] for row in run.rows[3:] if "loss" in row)
            for run in (Run(out), even)
        ]
        ratios.append(speeds[0] / speeds[1])
    assert statistics.median(ratios) >= 0.9, ratios


@pytest.mark.slow
def test_a_trace_has_the_ranks_of_every_replica(bench: Bench) -> None:
    run = bench.run(*TWO, "train.steps=4", "observe.trace=true", SYNCHRONOUS % "")
    events = json.loads((run.path / "trace.json").read_text())["traceEvents"]
    named = {each["args"]["name"] for each in events if each["name"] == "process_name"}
    assert named == {"worker 0", "worker 1"}
    assert {each["pid"] for each in events if each["name"] == "forward"} == {0, 1}
    assert not list(run.path.glob("trace-from-*"))


@pytest.mark.parametrize(
    "sync",
    [
        "consistency: {kind: asynchronous}",
        pytest.param(
            "consistency: {kind: bounded, staleness: 3}, delay_compensation: 0.1, servers: 2",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "consistency: {kind: quorum, least: 1, grace_seconds: 0.01}, push: deltas,"
            " every_steps: 3, optimizer: {kind: adam}",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["asynchronous", "bounded", "quorum"],
)
def test_a_record_replays_to_the_same_digits(bench: Bench, sync: str) -> None:
    """Not what a second run by itself gives: the order of pushes and pulls decides."""
    how = (*TWO, "train.steps=20")
    first = bench.train(*how, f"sync={{kind: server, {sync}}}")
    again = bench.train(*how, f"sync={{kind: server, {sync}, replay: {first.path}}}")
    assert again.digits == first.digits and again.weights == first.weights
    orders = [(run.path / "server" / "order-0.jsonl").read_text() for run in (first, again)]
    ours, theirs = ([line for line in o.splitlines() if "leave" not in line] for o in orders)
    assert ours == theirs


def test_every_byte_is_counted(bench: Bench) -> None:
    """A push and a pull of the parameters in float32 at every step, but no pull after the last."""
    run = bench.run(*TWO, *SGD, SYNCHRONOUS % "")
    rows = [row for row in run.rows if "loss" in row]
    parameters = json.loads((run.path / "summary.json").read_text())["parameters"]
    padded = -(-parameters // CHUNK) * CHUNK
    assert all(4 * 2 * parameters <= row["sent_bytes"] <= 4 * 2 * 2 * padded for row in rows[:-1])
    assert rows[-1]["sent_bytes"] * 2 == rows[0]["sent_bytes"]


@pytest.mark.parametrize(
    ("codec", "share", "loss"),
    [
        ("{kind: int8}", 1 + 4 / 256, 0.01),
        pytest.param("{kind: bf16}", 2, 0.01, marks=pytest.mark.slow),
        pytest.param(
            "{kind: int4, error_feedback: true}", 1 / 2 + 4 / 128, 0.02, marks=pytest.mark.slow
        ),
    ],
)
def test_pushes_may_be_encoded(bench: Bench, codec: str, share: float, loss: float) -> None:
    """`share`: bytes of a value; the padding to whole blocks is below one of them a part."""
    wanted = bench.run(*TWO, *SGD, SYNCHRONOUS % "")
    run = bench.run(*TWO, *SGD, SYNCHRONOUS % f", codec: {codec}")
    pulled = wanted.rows[1]["sent_bytes"] / 2
    pushed = run.rows[1]["sent_bytes"] - pulled
    assert pushed == pytest.approx(share * pulled / 4, rel=1e-9), "chunks are whole blocks"
    ours, theirs = (each.evaluations[-1]["evaluation_loss"] for each in (run, wanted))
    assert ours == pytest.approx(theirs, rel=loss) and ours != theirs


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("optimizer", "more", "tolerance"),
    [
        (SGD, "", 1e-6),
        (SGD, ", servers: 2", 1e-6),
        (SGD, ", push: deltas, optimizer: {kind: sgd}", 1e-6),
        (ADAMW, "", 1e-5),
    ],
)
def test_without_staleness_it_is_every_step(
    bench: Bench, optimizer: tuple[str, ...], more: str, tolerance: float
) -> None:
    """The server's mean over targets is the gradient of the global batch; AdamW divides by the
    root of squares near zero at first, which makes more of the order of a sum."""
    wanted = bench.run(*TWO, *optimizer)
    found = bench.run(*TWO, *optimizer, SYNCHRONOUS % more)
    assert largest_difference(found, wanted) < tolerance
    theirs = {row["step"]: row["evaluation_loss"] for row in wanted.evaluations}
    for row in found.evaluations:
        assert row["evaluation_loss"] == pytest.approx(theirs[row["step"]], rel=1e-5)
