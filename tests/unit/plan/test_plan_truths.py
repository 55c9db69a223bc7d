"""Formulas that are known from papers: bubbles, ZeRO memory, ring bytes, activations, FLOPs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner_score.profiles import FSDP, MEGATRON, MEGATRON_CLASSIC
from shoal.layout import Layout
from shoal.legal import facts_from_config
from shoal.plan.cost.constants import DEFAULT
from shoal.plan.cost.memory import Stage as At
from shoal.plan.cost.memory import activation_bytes, memory_of
from shoal.plan.cost.pipeline import in_flight, step_seconds
from shoal.plan.cost.traffic import ring_bytes
from shoal.plan.schedules import Times, idle_fraction, play
from shoal.plan.workload import Candidate, Workload, flops_per_token, stage_blocks

GPT = facts_from_config(
    {
        "model_type": "gpt2",
        "n_embd": 12288,
        "n_layer": 96,
        "n_head": 96,
        "vocab_size": 51200,
        "n_positions": 2048,
    }
)
SEVEN = facts_from_config(
    {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 11008,
        "vocab_size": 32000,
    }
)


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 4), (4, 8), (8, 8), (8, 64)])
def test_bubbles_as_published_and_as_played(stages: int, micro_batches: int) -> None:
    """(p-1)/(m+p-1), divided by the chunks, and a third of it with split backward.

    The simulator takes every pass in turn and knows none of these formulas. Sums of binary
    fractions of at most 64 micro batches: equal to a billionth.
    """
    plain = (stages - 1) / (micro_batches + stages - 1)
    for schedule, chunks, expected in (
        ("gpipe", 1, plain),
        ("1f1b", 1, plain),
        ("interleaved-1f1b", 2, (stages - 1) / (2 * micro_batches + stages - 1)),
        ("interleaved-1f1b", 4, (stages - 1) / (4 * micro_batches + stages - 1)),
        ("interleaved-zero-bubble", 1, (stages - 1) / (3 * micro_batches + stages - 1)),
        ("interleaved-zero-bubble", 2, (stages - 1) / (6 * micro_batches + stages - 1)),
    ):
        whole = step_seconds(
            schedule, stages=[1.0] * stages, micro_batches=micro_batches, chunks=chunks
        )
        assert 1 - micro_batches / whole == pytest.approx(expected, abs=1e-9)
        one = Times(forward=1 / chunks, backward_input=1 / chunks, backward_weight=1 / chunks)
        pieces = play(
            schedule, stages=[one] * (stages * chunks), ranks=stages, micro_batches=micro_batches
        )
        assert idle_fraction(pieces, ranks=stages) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("stages", "micro_batches"), [(4, 16), (8, 64)])
def test_v_schedule(stages: int, micro_batches: int) -> None:
    """Published as free of bubbles on a rank's own clock, holding p micro batches on each rank.

    The last rank of the V is played without a gap; the simulator's greedy choice leaves the first
    ones less than a third of what 1f1b would leave. Half stages: 2 p of them are p micro batches,
    one more may be entering.
    """
    one = Times(forward=1.0, backward_input=1.0, backward_weight=1.0)
    pieces = play(
        "zbv-zero-bubble", stages=[one] * 2 * stages, ranks=stages, micro_batches=micro_batches
    )
    for rank in range(stages):
        own = [piece for piece in pieces if piece.rank == rank]
        span = max(piece.stop for piece in own) - min(piece.start for piece in own)
        idle = span - 6 * micro_batches
        assert idle <= 6 * (stages - 1) / 3
        if rank == stages - 1:
            assert idle == pytest.approx(0, abs=1e-9)
        held = most = 0
        for piece in sorted(own, key=lambda piece: piece.stop):
            held += {"F": 1, "B": 0, "W": -1}[piece.kind]
            most = max(most, held)
        assert most <= 2 * stages + 1
    assert in_flight(
        "zbv-zero-bubble", stages=stages, stage=0, micro_batches=micro_batches, chunks=2
    ) == float(stages)


def test_uneven_stages_wait_for_the_slowest() -> None:
    """With one slow stage: m times the slow one, plus one pass through the others.

    An upper bound: the wait for the slow stage hides a part of filling the fast ones, at most
    their share of one micro batch (9 of 105), so the played step lies within a tenth below.
    """
    seconds = [3.0, 6.0, 3.0, 3.0]
    predicted = step_seconds("1f1b", stages=seconds, micro_batches=16)
    assert predicted == 16 * 6 + 9
    stages = [
        Times(forward=each / 3, backward_input=each / 3, backward_weight=each / 3)
        for each in seconds
    ]
    pieces = play("1f1b", stages=stages, ranks=4, micro_batches=16)
    played = max(piece.stop for piece in pieces)
    assert 0.9 * predicted <= played <= predicted


def test_activations_in_flight() -> None:
    """1f1b holds p - stage; interleaved p (1 + (p-1)/(p v)) on the first (2205.05198, 4.2.3)."""
    assert in_flight("1f1b", stages=8, stage=0, micro_batches=64) == 8
    assert in_flight("1f1b", stages=8, stage=7, micro_batches=64) == 1
    assert in_flight("gpipe", stages=8, stage=0, micro_batches=64) == 64
    first = in_flight("interleaved-1f1b", stages=8, stage=0, micro_batches=64, chunks=3)
    assert first == pytest.approx(8 * (1 + 7 / (8 * 3)))


def test_activation_bytes_of_the_selective_recompute_paper() -> None:
    """34 s b h + 5 a s^2 b without tensor, and as equations 2 to 4 and table 2 divide it."""
    h, a, s, t = GPT.hidden, GPT.heads, 2048, 8
    classic = replace(MEGATRON_CLASSIC, fused=True)
    split = replace(classic, sequence_parallel=True)

    def one(software=classic, **settings) -> float:
        return activation_bytes(GPT, sequence_tokens=s, software=software, **settings)

    assert one() == 34 * h + 5 * a * s
    assert one(tensor=t) == pytest.approx(10 * h + (24 * h + 5 * a * s) / t)
    assert one(split, tensor=t) == pytest.approx((34 * h + 5 * a * s) / t)
    assert one(split, tensor=t, recompute="selective") == pytest.approx(34 * h / t)
    assert one(recompute="full") == 2 * h


@pytest.mark.parametrize("shard", [1, 2, 8, 64])
def test_zero_memory(shard: int) -> None:
    """ZeRO's table (1910.02054): (2+2+12) P, then 12, 14 and 16 of the 16 bytes over N.

    Our software keeps gradients in float32: 4 instead of 2. The formulas hold exactly.
    """
    workload = Workload(facts=SEVEN, sequence_tokens=2048, global_batch_samples=64)
    parameters = SEVEN.parameters
    for level, expected in (
        ("optimizer", (2 + 4) + 12 / shard),
        ("gradients", 2 + (4 + 12) / shard),
        ("parameters", (2 + 4 + 12) / shard),
    ):
        candidate = Candidate(layout=Layout(shard=shard), level=level)
        memory = memory_of(
            At(index=0, blocks=32, count=1),
            workload=workload,
            candidate=candidate,
            software=FSDP,
            constants=DEFAULT,
        )
        whole = (2 + 4) + 12 if shard == 1 else expected
        assert memory.states == pytest.approx(whole * parameters)


def test_ring_bytes() -> None:
    """2 (n-1)/n for all-reduce, half of that for the others; nothing for one rank."""
    assert ring_bytes("all-reduce", num_bytes=1000, size=4) == 1500
    assert ring_bytes("all-gather", num_bytes=1000, size=4) == 750
    assert ring_bytes("reduce-scatter", num_bytes=1000, size=1) == 0


def test_flops_both_ways_of_counting_attention() -> None:
    """6 N + 12 L h s with all keys, half of the attention term when masked keys do not count."""
    matrices = SEVEN.parameters - SEVEN.embedding_parameters
    attention = 12 * 32 * 4096 * 2048
    full = flops_per_token(SEVEN, sequence_tokens=2048)
    assert full == pytest.approx(6 * matrices + attention)
    causal = flops_per_token(SEVEN, sequence_tokens=2048, attention="causal")
    assert causal == pytest.approx(6 * matrices + attention / 2)


def test_stages_balanced_by_cost_count_the_head() -> None:
    """A head worth four blocks leaves the last of four stages one block (20 / 4 = 5 each)."""
    facts = facts_from_config(
        {
            "model_type": "llama",
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "intermediate_size": 8192,
            "vocab_size": 131072,
            "tie_word_embeddings": True,
        }
    )
    assert stage_blocks(facts, stages=4, sequence_tokens=4096, balanced=True) == [5, 5, 5, 1]
    assert stage_blocks(facts, stages=3, sequence_tokens=4096) == [6, 5, 5]
    assert MEGATRON.balanced_stages is False
