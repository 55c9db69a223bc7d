"""Faults in replicas of several workers: real kills and stops, each noticed, named and undone."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shoal.prove.rehearse import Fault, Rehearsal, rehearse
from tiny import Bench, Run

LENGTH = ("train.steps=16", "train.evaluate_every_steps=8", "checkpoint.every_steps=8")
FOUR = (*LENGTH, "parallel={replicate: 2, shard: 2}", "train.micro_batch_samples=2")
SHARDS = (*LENGTH, "parallel={shard: 2}", "train.micro_batch_samples=2")
PAIR = (*LENGTH, "parallel={tensor: 2}", "train.micro_batch_samples=2")
ROWS = (*LENGTH, "parallel={context: 4}", "train.micro_batch_samples=2")
STAGES = (*LENGTH, "parallel={pipeline: 2}", "train.micro_batch_samples=4")
STAGES_OF_TWO = (*LENGTH, "parallel={replicate: 2, pipeline: 2}", "train.micro_batch_samples=4")
slow = pytest.mark.slow
MIXTURE = (
    "model={kind: config, architecture: mixtral, hidden_size: 32, intermediate_size: 48,"
    " num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2, num_local_experts: 4}"
)


def rehearsed(bench: Bench, *faults: str, overrides: tuple[str, ...]) -> Rehearsal:
    """The recipe with `faults`, beside a clean run that is trained once."""
    clean = bench.run(*overrides)
    planned = [Fault.parse(text) for text in faults]
    out = bench.new_path()
    out.mkdir()
    return rehearse(
        bench.recipe, overrides, faults=planned, out=out, pool=bench.pool, clean=clean.path
    )


def events_of(found: Rehearsal, name: str) -> list[dict[str, Any]]:
    """The run's events of one name."""
    lines = (found.run / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def assert_as_if_nothing(found: Rehearsal) -> None:
    """The same digits, the same weights, every sample once, nothing committed lost."""
    assert found.survived, f"{found}\n{found.message}"
    assert found.same_digits and found.same_weights, str(found)
    assert Run(found.run).digits == Run(found.clean).digits, "every row, evaluations too"
    print(found)


@slow
@pytest.mark.parametrize(
    ("layout", "fault"),
    [
        ("{replicate: 2, shard: 2, expert: 2}", "kill:1@12:forward"),
        ("{replicate: 2, shard: 2, expert: 2}", "kill:2@12:backward"),
        ("{shard: 4, expert: 2}", "kill:3@12:backward"),
        ("{replicate: 2}", "kill:1@12:reducing"),
    ],
)
def test_a_part_of_the_experts_is_replaced(bench: Bench, layout: str, fault: str) -> None:
    """From another replica or the save; the step done again counts its experts' load once."""
    overrides = (*LENGTH, MIXTURE, f"parallel={layout}", "train.micro_batch_samples=2")
    assert_as_if_nothing(rehearsed(bench, fault, overrides=overrides))


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        "kill:1@12:forward",
        pytest.param("kill:2@12:backward", marks=slow),
        pytest.param("kill:3@12:reducing", marks=slow),
        pytest.param("kill:0@12:apply", marks=slow),
        pytest.param("kill:0@8:save", marks=slow),
        pytest.param("kill:1@8:save", marks=slow),
        pytest.param("kill:3@12:commit", marks=slow),
        pytest.param("kill:0@1", marks=slow),
        pytest.param("raise:2@12", marks=slow),
    ],
)
def test_a_part_of_a_replica_is_replaced_from_the_other(bench: Bench, fault: str) -> None:
    found = rehearsed(bench, fault, overrides=FOUR)
    assert_as_if_nothing(found)
    (seen,) = found.faults
    assert seen.culprit_named
    # as in test_rehearsing: on a quiet machine 0.2 and 2 s
    assert seen.detection_seconds is not None and seen.detection_seconds < 2
    assert seen.recovery_seconds is not None and seen.recovery_seconds < 15
    assert found.steps_redone <= 1, "the step under way, and no committed one"
    assert events_of(found, "restarted") == []


@pytest.mark.parametrize(
    "fault",
    [
        "kill:1@12:backward",
        pytest.param("kill:2@12:forward", marks=slow),
        pytest.param("kill:3@12:reducing", marks=slow),
        pytest.param("kill:0@8:save", marks=slow),
    ],
)
def test_a_stage_is_replaced_from_its_place_in_the_other_replica(bench: Bench, fault: str) -> None:
    """The others wait for it in the middle of a schedule; nothing of the step was applied."""
    found = rehearsed(bench, fault, overrides=STAGES_OF_TWO)
    assert_as_if_nothing(found)
    assert found.faults[0].culprit_named
    assert found.steps_redone <= 1
    assert events_of(found, "restarted") == []


@slow
@pytest.mark.parametrize("fault", ["stop:0@12", "stop:1@12", "spin:0@12", "spin:1@12"])
def test_the_stuck_stage_is_named_not_the_one_that_waits_for_it(bench: Bench, fault: str) -> None:
    found = rehearsed(bench, fault, overrides=STAGES)
    assert_as_if_nothing(found)
    assert found.faults[0].culprit_named
    (stuck,) = events_of(found, "stuck")
    assert stuck["rank"] == int(fault[5])


@slow
def test_parts_of_both_replicas(bench: Bench) -> None:
    """One after the other at different places: each place still has a holder."""
    found = rehearsed(bench, "kill:0@5:backward", "kill:3@9:reducing", overrides=FOUR)
    assert_as_if_nothing(found)
    assert [seen.fired for seen in found.faults] == [True] * 2


@slow
@pytest.mark.parametrize(
    "overrides", [SHARDS, PAIR, ROWS, STAGES], ids=["shard", "tensor", "context", "pipeline"]
)
def test_without_another_replica_the_save_is_what_is_left(
    bench: Bench, overrides: tuple[str, ...]
) -> None:
    found = rehearsed(bench, "kill:1@12:backward", overrides=overrides)
    assert_as_if_nothing(found)
    assert found.faults[0].culprit_named
    assert found.steps_redone == 4  # 9 to 11 were committed, 12 was under way
    (restarted,) = events_of(found, "restarted")
    assert "from the last checkpoint" in restarted["text"]


@slow
def test_a_part_of_each_row_is_replaced_from_the_other_replica(bench: Bench) -> None:
    """Its partner waits for keys and values that do not come."""
    both = (*LENGTH, "parallel={replicate: 2, context: 2}", "train.micro_batch_samples=2")
    found = rehearsed(bench, "kill:1@12:forward", "kill:2@14:backward", overrides=both)
    assert_as_if_nothing(found)
    assert [seen.culprit_named for seen in found.faults] == [True] * 2
    assert events_of(found, "restarted") == []


@slow
@pytest.mark.parametrize(
    ("rank", "overrides"), [(0, PAIR), (1, PAIR), (1, ROWS)], ids=["first", "second", "of four"]
)
@pytest.mark.parametrize("kind", ["stop", "spin"])
def test_the_stopped_one_of_a_pair_is_named(
    bench: Bench, kind: str, rank: int, overrides: tuple[str, ...]
) -> None:
    """Its partner waits inside forward, where no collective of ours says so."""
    found = rehearsed(bench, f"{kind}:{rank}@12", overrides=overrides)
    assert_as_if_nothing(found)
    assert found.faults[0].culprit_named
    (stuck,) = events_of(found, "stuck")
    assert stuck["rank"] == rank


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flip-parameter", pytest.param("flip-optimizer", marks=slow)])
def test_a_flipped_bit_in_one_shard_is_found(bench: Bench, kind: str) -> None:
    """Of two that differ none is known to be right: both are named, and the save decides."""
    found = rehearsed(bench, f"{kind}:3@12", overrides=FOUR)
    assert_as_if_nothing(found)
    assert found.steps_redone == 3
    (repaired,) = events_of(found, "repaired")
    assert "rank 1, 3" in repaired["text"]


@slow
@pytest.mark.parametrize("kind", ["flip-parameter", "flip-optimizer"])
def test_of_three_shards_the_minority_is_repaired(bench: Bench, kind: str) -> None:
    six = (
        *(*LENGTH, "parallel={replicate: 3, shard: 2}", "train.micro_batch_samples=2"),
        "train.global_batch_samples=24",
    )
    found = rehearsed(bench, f"{kind}:3@12", overrides=six)
    assert_as_if_nothing(found)
    (repaired,) = events_of(found, "repaired")
    assert found.faults[0].culprit_named
    assert "(rank 3)" in repaired["text"] and "repaired from rank 1" in repaired["text"]
    assert found.steps_redone == 0


@pytest.mark.slow
def test_an_elastic_degree_goes_on_with_one_cut_replica(bench: Bench) -> None:
    elastic = (
        *(*LENGTH, "parallel={replicate: {min: 1, max: 2}, shard: 2}"),
        "train.micro_batch_samples=2",
    )
    found = rehearsed(bench, "kill:1@6", overrides=elastic)
    assert found.survived, f"{found}\n{found.message}"
    assert found.largest_loss_difference is not None
    assert found.largest_loss_difference < 1e-5  # the promise for another degree
    members = [event["members"] for event in events_of(found, "generation")]
    assert members == [[2, 3], [0, 1, 2, 3]], "without the lost one's replica, then with it"
