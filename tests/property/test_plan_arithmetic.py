"""Properties of the planner's arithmetic over many numbers."""

from __future__ import annotations

import itertools
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from planner_score.profiles import MEGATRON
from shoal.layout import Layout
from shoal.legal import facts_from_config
from shoal.plan.cost.constants import DEFAULT
from shoal.plan.cost.step import Estimator
from shoal.plan.cost.traffic import Group, Traffic
from shoal.plan.hardware import parse_cluster
from shoal.plan.schedules import Times, play, rank_of_stage
from shoal.plan.software import SHOAL
from shoal.plan.workload import Candidate, Workload, stage_blocks

FACTS = facts_from_config(
    {
        "model_type": "llama",
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "vocab_size": 128256,
    }
)
CLUSTER = parse_cluster("8x8xA100")
powers = st.sampled_from([1, 2, 4, 8])


@given(st.integers(1, 130), st.integers(1, 16), st.booleans())
def test_every_block_is_in_one_stage(layers: int, stages: int, balanced: bool) -> None:
    if stages > layers:
        return
    facts = replace(FACTS, layers=layers)
    blocks = stage_blocks(facts, stages=stages, sequence_tokens=2048, balanced=balanced)
    assert len(blocks) == stages
    assert sum(blocks) == layers
    assert min(blocks) >= 0
    if not balanced:
        assert max(blocks) - min(blocks) <= 1


@given(
    st.sampled_from(["gpipe", "1f1b", "interleaved-1f1b", "interleaved-zero-bubble"])
    | st.just("zbv-zero-bubble"),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 3),
    st.lists(st.floats(0.1, 3.0), min_size=3, max_size=3),
    st.sampled_from([0.0, 0.25]),
)
@settings(max_examples=60, deadline=None)
def test_schedules_run_each_pass_once_and_in_order(
    schedule: str, ranks: int, rounds: int, chunks: int, seconds: list[float], send: float
) -> None:
    """Each pass of each micro batch once per stage, after what it needs, one at a time per rank."""
    chunks = {"gpipe": 1, "1f1b": 1, "zbv-zero-bubble": 2}.get(schedule, chunks)
    micro_batches, count = ranks * rounds, ranks * chunks
    times = Times(forward=seconds[0], backward_input=seconds[1], backward_weight=seconds[2])
    pieces = play(
        schedule,
        stages=[times] * count,
        ranks=ranks,
        micro_batches=micro_batches,
        send_seconds=send,
    )
    kinds = "FBW" if "zero" in schedule else "FB"
    stop = {(p.kind, p.micro_batch, p.stage): p.stop for p in pieces}
    assert set(stop) == set(itertools.product(kinds, range(micro_batches), range(count)))
    assert len(pieces) == len(stop)
    for piece in pieces:
        assert piece.rank == rank_of_stage(schedule, stage=piece.stage, ranks=ranks)
        if piece.kind == "F" and piece.stage:
            needs = stop["F", piece.micro_batch, piece.stage - 1]
        elif piece.kind == "B" and piece.stage < count - 1:
            needs = stop["B", piece.micro_batch, piece.stage + 1]
        elif piece.kind != "F":
            needs = stop["F" if piece.kind == "B" else "B", piece.micro_batch, piece.stage]
        else:
            continue
        assert piece.start >= needs - 1e-9 * (1 + needs)
    for rank in range(ranks):
        own = sorted((p for p in pieces if p.rank == rank), key=lambda p: p.start)
        assert all(a.stop <= b.start + 1e-9 for a, b in itertools.pairwise(own))


@given(
    st.sampled_from(["all-reduce", "all-gather", "reduce-scatter", "all-to-all"]),
    st.integers(1, 64),
    powers,
    st.floats(1, 1e10),
)
def test_collectives_never_get_cheaper_by_sending_more(
    operation: str, size: int, stride: int, num_bytes: float
) -> None:
    traffic, group = Traffic(CLUSTER, DEFAULT), Group(size, stride)
    one = traffic.collective(operation, group=group, num_bytes=num_bytes)
    assert one >= 0
    assert (one == 0) == (size == 1)
    assert traffic.collective(operation, group=group, num_bytes=2 * num_bytes) >= one


@given(powers, powers, st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.booleans())
@settings(deadline=None)
def test_predictions_are_sane(
    shard: int, tensor: int, pipeline: int, micro: int, ours: bool
) -> None:
    """Parts add up, nothing is negative, recompute saves memory and never time, and utilisation

    stays below one.
    """
    layout = Layout(shard=shard, tensor=tensor, pipeline=pipeline)
    workload = Workload(facts=FACTS, sequence_tokens=2048, global_batch_samples=64)
    estimator = Estimator(workload, CLUSTER, SHOAL if ours else MEGATRON)
    candidate = Candidate(layout=layout, micro_batch_samples=micro)
    kept = estimator.predict(candidate)
    assert min(kept.seconds.values()) >= 0
    assert 0 < kept.mfu < 1
    assert abs(sum(kept.seconds.values()) - kept.step_seconds) < 1e-12
    redone = estimator.predict(replace(candidate, recompute="full"))
    assert redone.step_seconds >= kept.step_seconds
    assert redone.peak.activations < kept.peak.activations
    assert estimator.floor_seconds(candidate) <= kept.step_seconds
    assert estimator.memory_bytes(candidate) == kept.peak.total


@given(st.sampled_from([1, 2, 4, 8, 16, 32, 64]))
@settings(deadline=None)
def test_sharding_never_costs_memory(shard: int) -> None:
    """Each level splits more than the one before, and more ranks never hold more states."""
    workload = Workload(facts=FACTS, sequence_tokens=2048, global_batch_samples=64)
    estimator = Estimator(workload, CLUSTER)
    states = [
        estimator.predict(Candidate(layout=Layout(shard=shard), level=level)).first.states
        for level in ("optimizer", "gradients", "parameters")
    ]
    assert states == sorted(states, reverse=True)
    whole = estimator.predict(Candidate(layout=Layout())).first.states
    assert states[0] <= whole * (1 + 1e-12)
