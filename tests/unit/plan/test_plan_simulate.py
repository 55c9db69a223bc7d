"""The simulator: agrees with the prediction, answers at once, writes what viewers open."""

from __future__ import annotations

import json
import re
import time

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from planner_score.profiles import MEGATRON
from shoal.layout import Layout
from shoal.legal import facts_from_config
from shoal.plan import goodput, picture
from shoal.plan.cost.step import Estimator
from shoal.plan.explain import choices
from shoal.plan.hardware import GIB, parse_cluster
from shoal.plan.schedules import Times, play
from shoal.plan.search import Space, find
from shoal.plan.simulate import Timeline, simulate_step, trace
from shoal.plan.workload import SCHEDULES, Candidate, Workload

LARGE = facts_from_config(
    {
        "model_type": "llama",
        "hidden_size": 16384,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "intermediate_size": 53248,
        "vocab_size": 128256,
    }
)


def estimator_of(cluster: str, *, batch: int) -> Estimator:
    workload = Workload(facts=LARGE, sequence_tokens=8192, global_batch_samples=batch)
    return Estimator(workload, parse_cluster(cluster), MEGATRON)


def busy_seconds(timeline: Timeline, *, lane: str, stage: int) -> float:
    """Seconds that a lane of a stage is occupied."""
    own = [span for span in timeline.spans if (span.lane, span.stage) == (lane, stage)]
    return sum(span.stop - span.start for span in own)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_played_step_is_the_predicted_one(schedule: str) -> None:
    """Within 6 %: the played V schedule is greedy, and uneven stages hide a part of filling."""
    chunks = {"gpipe": 1, "1f1b": 1, "interleaved-1f1b": 3}.get(schedule, 2)
    candidate = Candidate(
        layout=Layout(shard=8, tensor=8, pipeline=8),
        schedule=schedule,
        chunks=chunks,
        level="optimizer",
    )
    estimator = estimator_of("64x8xH100", batch=512)
    predicted = estimator.predict(candidate)
    timeline = simulate_step(estimator, candidate=candidate)
    assert timeline.seconds == pytest.approx(predicted.step_seconds, rel=0.06)
    assert timeline.copies == 64
    for stage in range(timeline.stages):
        busy = busy_seconds(timeline, lane="compute", stage=stage)
        assert 0 < busy <= timeline.seconds * (1 + 1e-9)
    assert busy_seconds(timeline, lane="link tensor", stage=0) > 0
    assert busy_seconds(timeline, lane="shard", stage=0) > 0


@pytest.mark.timed
def test_16384_devices_within_two_seconds() -> None:
    """Lanes stand for all devices that do the same, so the answer does not grow with them."""
    estimator = estimator_of("2048x8xH100", batch=2048)
    candidate = Candidate(
        layout=Layout(shard=128, tensor=8, pipeline=16),
        schedule="interleaved-1f1b",
        chunks=4,
        level="optimizer",
    )
    started = time.process_time()
    timeline = simulate_step(estimator, candidate=candidate)
    events = json.loads(trace(timeline))["traceEvents"]
    assert time.process_time() - started < 2.0
    (axes,) = picture.step(timeline).axes
    assert len([event for event in events if event["ph"] == "X"]) == len(timeline.spans)
    assert {event["ph"] for event in events} == {"M", "X"}
    assert "predicted" in axes.get_title()


def test_long_steps_are_cut_short() -> None:
    """A step of 4,096 micro batches is played in part, and as long as predicted all the same."""
    estimator = estimator_of("8x8xH100", batch=4096)
    candidate = Candidate(layout=Layout(tensor=8, pipeline=8), level="optimizer")
    timeline = simulate_step(estimator, candidate=candidate)
    assert timeline.shown_micro_batches < timeline.micro_batches == 4096
    predicted = estimator.predict(candidate).step_seconds
    assert timeline.seconds == pytest.approx(predicted, rel=0.02)


@pytest.mark.parametrize(
    ("schedule", "stages", "micro_batches", "message"),
    [
        ("1f2b", 4, 4, "unknown schedule '1f2b'; known: gpipe"),
        ("1f1b", 6, 4, "6 stages do not divide over 4 ranks"),
        ("1f1b", 8, 4, "1f1b has one stage per rank, got 2"),
        ("zbv-zero-bubble", 4, 4, "two stages per rank, got 1"),
        ("interleaved-1f1b", 8, 6, "multiples of 4 ranks, got 6"),
    ],
)
def test_schedules_that_cannot_be_placed(
    schedule: str, stages: int, micro_batches: int, message: str
) -> None:
    one = Times(forward=1.0, backward_input=1.0, backward_weight=1.0)
    with pytest.raises(ValueError, match=message):
        play(schedule, stages=[one] * stages, ranks=4, micro_batches=micro_batches)


def drawn_goodput(
    reliability: goodput.Reliability,
    *,
    workers: int,
    interval_seconds: float,
    run_seconds: float,
    seed: int = 0,
) -> float:
    """The share of kept time by drawing failures: knows nothing of Daly's formula."""
    generator = np.random.default_rng(seed)
    mean = goodput.failure_seconds(reliability, workers=workers)
    kept = now = 0.0
    while now < run_seconds:
        failure = now + generator.exponential(mean)
        cycle = interval_seconds + reliability.save_seconds
        cycles = int((failure - now) // cycle)
        kept += cycles * interval_seconds
        now = failure
        restart = reliability.restart_seconds
        # A failure during the restart begins it anew.
        while True:
            again = generator.exponential(mean)
            if again >= restart:
                now += restart
                break
            now += again
    return kept / now


def test_goodput_agrees_with_drawn_failures() -> None:
    """Daly's expectation against 3,000 drawn failures: their mean is known to 2 %, the waste is a

    tenth of the time, so the shares differ by less than half a percent.
    """
    trust = goodput.Reliability()
    interval = goodput.best_interval_seconds(trust, workers=16384)
    expected = goodput.expected_goodput(trust, workers=16384, interval_seconds=interval)
    drawn = drawn_goodput(
        trust, workers=16384, interval_seconds=interval, run_seconds=3000 * 11_000.0
    )
    assert drawn == pytest.approx(expected, abs=0.005)
    for other in (interval / 2, interval * 2):
        assert goodput.expected_goodput(trust, workers=16384, interval_seconds=other) < expected
    # Young's formula holds while saves are short against failures.
    young = (2 * trust.save_seconds * goodput.failure_seconds(trust, workers=16384)) ** 0.5
    assert interval == pytest.approx(young, rel=0.05)
    hopeless = goodput.Reliability(device_failure_seconds=60.0)
    assert goodput.expected_goodput(hopeless, workers=64, interval_seconds=3600.0) == 0.0


def test_policies_bear_stragglers_in_their_order() -> None:
    """Agreeing at every step waits most; over periods the jitter averages out."""
    jitter = goodput.Jitter(spread=0.1)
    every = goodput.waiting_factor(jitter, replicas=64)
    period = goodput.waiting_factor(jitter, replicas=64, policy="local-sgd", every_steps=50)
    assert every > period > 1.0
    # One slow replica holds up every synchronous policy by its whole factor, up to the jitter.
    slow = goodput.Jitter(spread=0.0, slow_share=1 / 64, slow_factor=1.5)
    assert goodput.waiting_factor(slow, replicas=64) == pytest.approx(1.5)
    assert goodput.waiting_factor(
        slow, replicas=64, policy="diloco", every_steps=100
    ) == pytest.approx(1.5)


def words_of(axes: Axes) -> list[str]:
    """What the axes say: in the bars, below, above and in the legend."""
    legend = axes.get_legend()
    texts = [*axes.texts, axes.title, axes.xaxis.label, *axes.get_yticklabels()]
    return [each.get_text() for each in [*texts, *(legend.get_texts() if legend else [])]]


def colours_of(axes: Axes) -> set[str]:
    """Of everything that has an area."""
    patches = [patch.get_facecolor() for patch in axes.patches]
    several = [colour for each in axes.collections for colour in each.get_facecolor()]
    return {to_hex(colour) for colour in [*patches, *several]}


def test_the_picture_of_plans_can_be_read() -> None:
    """One colour for one thing, each named in a legend; numbers beside the bars, axes with units,
    every plan named above its bar."""
    colours = [*picture.TIME.values(), *picture.MEMORY.values()]
    assert len(set(colours)) == len(colours)
    found = find(estimator_of("64x8xH100", batch=512), space=Space())
    time, memory = picture.plans(found).axes
    for axes, named, unit in ((time, picture.TIME, "s"), (memory, picture.MEMORY, "GiB")):
        said = words_of(axes)
        assert {named[name] for name in named if name in said} == colours_of(axes)
        assert axes.get_xlabel() == unit and "Predicted" in axes.get_title()
        for plan in [found.best, *found.runners_up]:
            assert choices(plan.candidate) in said
    said = [text.strip() for text in words_of(memory)]
    assert f"{found.best.peak.total / GIB:.3g} GiB" in said and "a device has 79.1 GiB" in said
    assert any(re.fullmatch(r"[\d.]+ s", text.strip()) for text in words_of(time))


def test_the_picture_of_a_step_can_be_read() -> None:
    estimator = estimator_of("8x8xH100", batch=64)
    candidate = Candidate(layout=Layout(tensor=8, pipeline=8), level="optimizer")
    (axes,) = picture.step(simulate_step(estimator, candidate=candidate)).axes
    said = words_of(axes)
    assert {"forward", "backward", "tensor communication", "stage 1", "stage 8"} <= set(said)
    assert "compute communication" not in said
    assert axes.get_xlabel() == "s" and "predicted" in axes.get_title()
    legend = {**picture.PASSES} | {f"{name} communication": c for name, c in picture.TIME.items()}
    assert colours_of(axes) <= {legend[text] for text in said if text in legend}
    assert len(set(picture.PASSES.values())) == len(picture.PASSES)
