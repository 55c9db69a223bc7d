"""Every policy over a killed worker, in every phase: what is lost is what the policy promises.

Under a policy of replicas that step by themselves the steps of the lost one since the last round
are lost, and its samples with them; no step of the run is, and the run ends with one model.
"""

from __future__ import annotations

import json

import pytest

from shoal.prove.rehearse import Fault, Rehearsal, rehearse
from tiny import Bench, Run

LENGTH = ("train.steps=16", "train.evaluate_every_steps=8", "checkpoint.every_steps=8")
TWO = (*LENGTH, "parallel.replicate=2", "launch.workers=processes", "train.micro_batch_samples=2")
POLICIES = {
    "diloco": "sync={kind: diloco, every_steps: 4}",
    "local-sgd": "sync={kind: local-sgd, every_steps: 4}",
    "streaming": "sync={kind: streaming-diloco, every_steps: 4}",
    "gossip": "sync={kind: gossip, meet_every_steps: 4}",
    "diloco-int8": "sync={kind: diloco, every_steps: 4, codec: {kind: int8, error_feedback: true}}",
    "int8": "sync={kind: every-step, codec: {kind: int8, error_feedback: true}}",
    "topk": "sync={kind: every-step, codec: {kind: topk}}",
    "powersgd": "sync={kind: every-step, codec: {kind: powersgd, rank: 2}}",
}
PHASES = ("batches", "forward", "backward", "reduce", "reducing", "apply", "commit", "save")
slow = pytest.mark.slow


def rehearsed(bench: Bench, fault: str, *overrides: str) -> Rehearsal:
    clean, out = bench.run(*overrides), bench.new_path()
    out.mkdir()
    planned = [Fault.parse(fault)]
    return rehearse(
        bench.recipe, overrides, faults=planned, out=out, pool=bench.pool, clean=clean.path
    )


def assert_survived(found: Rehearsal, *, kept: bool) -> None:
    """`kept`: replicas step together, so no sample of a committed step is lost."""
    (seen,) = found.faults
    assert found.ended == "done" and seen.fired and seen.culprit_named, f"{found}\n{found.message}"
    assert found.committed_steps_lost == 0
    run, clean = Run(found.run), Run(found.clean)
    assert len(run.losses) == 16
    assert abs(run.losses[-1] / clean.losses[-1] - 1) < 0.03, "what it learns, it learns"
    assert not (kept and found.sample_problems), str(found)
    for problem in found.sample_problems:
        assert "workers read 8 samples, expected 16" in problem, "those of one replica, no others"
    assert len(found.sample_problems) <= 4, "of one round at most"


CASES = [
    pytest.param(name, f"kill:{rank}@{step}:{phase}", marks=slow)
    for number, name in enumerate(POLICIES)
    for rank, step, phase in [
        *((1 - n % 2, 8 - n % 3, phase) for n, phase in enumerate(PHASES[:-1], start=number)),
        (1, 8, "save"),
        (1, 16, "commit"),
    ]
]


@pytest.mark.parametrize(("name", "fault"), [("diloco", "kill:1@8:reducing"), *CASES])
def test_a_killed_worker(bench: Bench, name: str, fault: str) -> None:
    together = "every-step" in POLICIES[name]
    assert_survived(rehearsed(bench, fault, *TWO, POLICIES[name]), kept=together)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["local-sgd", pytest.param("gossip", marks=slow)])
def test_rows_that_a_dead_writer_did_not_come_to_are_added_once(bench: Bench, name: str) -> None:
    """The writer is slow, so the other has done step 8 when it dies before its own step 6."""
    out = bench.new_path()
    out.mkdir()
    faults = [Fault.parse("slow:0@5:0.5"), Fault.parse("kill:0@6:batches")]
    overrides, clean = (*TWO, POLICIES[name]), bench.run(*TWO, POLICIES[name]).path
    found = rehearse(bench.recipe, overrides, faults=faults, out=out, pool=bench.pool, clean=clean)
    assert found.ended == "done" and found.committed_steps_lost == 0, found.message
    steps = [row["step"] for row in Run(found.run).rows if "loss" in row]
    assert steps == list(range(1, 17)), "in order, each once"
    assert "rows-lost" not in Run(found.run).events


@pytest.mark.parametrize(
    "name", ["diloco", *(pytest.param(each, marks=slow) for each in ("streaming", "powersgd"))]
)
def test_a_flipped_bit_of_outer_momentum_or_warm_start_is_found(bench: Bench, name: str) -> None:
    """The last vector of the state is the policy's; of two replicas the save decides."""
    found = rehearsed(bench, "flip-optimizer:0@10", *TWO, POLICIES[name])
    assert found.survived, f"{found}\n{found.message}"
    (seen,) = found.faults
    assert seen.noticed_as == "repaired" and found.same_weights
    lines = (found.run / "events.jsonl").read_text().splitlines()
    (event,) = [each for each in map(json.loads, lines) if each["event"] == "repaired"]
    kind = "powersgd/q" if name == "powersgd" else "outer/momentum"
    assert f"{kind} model." in event["text"]


@slow
@pytest.mark.parametrize("name", ["diloco", "streaming"])
def test_of_three_the_flipped_one_is_repaired(bench: Bench, name: str) -> None:
    four = (*LENGTH, "parallel.replicate=4", "launch.workers=processes")
    four = (*four, "train.micro_batch_samples=2", POLICIES[name])
    found = rehearsed(bench, "flip-optimizer:2@10", *four)
    assert found.ended == "done" and found.steps_redone == 0, f"{found}\n{found.message}"
    (seen,) = found.faults
    assert seen.noticed_as == "repaired" and seen.culprit_named


@slow
@pytest.mark.parametrize("name", [*POLICIES, "groups"])
def test_a_killed_worker_of_four(bench: Bench, name: str) -> None:
    """Some of the survivors may have met already when it goes, and some not."""
    four = (*LENGTH, "parallel.replicate=4", "launch.workers=processes")
    groups = "sync={kind: local-sgd, every_steps: 2, group_replicas: 2, outer_every_steps: 8}"
    four = (*four, "train.micro_batch_samples=2", POLICIES.get(name, groups))
    for fault in ("kill:2@8:reducing", "kill:3@8:commit"):
        found = rehearsed(bench, fault, *four)
        (seen,) = found.faults
        assert found.ended == "done" and seen.culprit_named, f"{found}\n{found.message}"
        assert found.committed_steps_lost == 0
