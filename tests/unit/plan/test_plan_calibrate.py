"""Measurements of a machine: read, fitted, learned from; and files that cannot be used."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.comm.flat import CHUNK
from shoal.errors import UserError
from shoal.layout import Layout
from shoal.legal import facts_from_config
from shoal.plan import calibrate, measurements
from shoal.plan.cost.compute import Cut
from shoal.plan.machine import find_here
from shoal.plan.measurements import REFERENCE, Condition, Measurements, Seen
from shoal.plan.rates import Rates
from shoal.plan.search import Space
from shoal.plan.software import SHOAL
from shoal.plan.workload import Candidate, Crew, Workload

RATE = 1e11  # FLOPs per second of a core, whatever the shape
HOST, BYTE, START, LOGIT = 1e-3, 2e-10, 2e-3, 3e-9
SHAPES = [(tokens, width, 256) for tokens in (64, 256, 2048) for width in (256, 1024)]


def condition(workers: str, busy: int, threads: int, *, slower: float = 1.0) -> Condition:
    """What a machine would show whose times follow the model exactly: `threads` x a core's rate."""
    rate = RATE * threads / slower
    plain = Condition(
        workers=workers,
        busy=busy,
        threads=threads,
        products=tuple(
            ("fp32", kind, *shape, 2.0 * shape[0] * shape[1] * shape[2] / rate)
            for kind in ("forward", "input", "weight")
            for shape in SHAPES
        ),
        attention=tuple(("fp32", row, 64, row * 64e-11 * slower / threads) for row in (64, 256)),
        streams=tuple((size, size / 1e10 * slower) for size in (1e6, 1e8)),
        updates=((1000, 1e-6 * slower),),
    )
    rates = Rates({**calibrate._raw(plain)})
    blocks = []
    for count in (1, 3):
        for samples, row in ((1, 64), (2, 256), (4, 256)):
            parts, known = calibrate._parts(
                calibrate.reference_facts("llama", blocks=count),
                precision="fp32",
                samples=samples,
                row_tokens=row,
                rates=rates,
            )
            fitted = [slower * each for each in (HOST, BYTE, START, LOGIT)]
            seconds = known + sum(a * b for a, b in zip(parts, fitted, strict=True))
            blocks.append(("fp32", "llama", count, samples, row, seconds))
    return replace(plain, blocks=tuple(blocks))


MEASURED = Measurements(
    name="two cores",
    cores=2,
    memory_bytes=8e9,
    conditions=(
        condition("processes", 1, 1),
        condition("processes", 1, 2),
        condition("processes", 2, 1, slower=1.1),
        replace(
            condition("threads", 2, 1, slower=1.2), products=(), attention=(), streams=()
        ),  # as engine/calibrate.py leaves them out
    ),
    reduces=(
        ("processes", 2, 32.0, 2e-4),
        ("processes", 2, 1e6, 2e-3),
        ("processes", 2, 1e7, 2e-2),
        ("threads", 2, 32.0, 1e-4),
        ("threads", 2, 1e6, 1e-3),
        ("threads", 2, 1e7, 1e-2),
    ),
    start_seconds=0.05,
)
SMALL = facts_from_config({**REFERENCE["llama"], "num_hidden_layers": 6, "hidden_size": 384})
WORK = Workload(facts=SMALL, sequence_tokens=128, global_batch_samples=16, precision="fp32")


def step_seconds(crew: Crew, micro: int = 4) -> float:
    estimator = calibrate.estimator_for(MEASURED, crew, workload=WORK)
    candidate = Candidate(layout=Layout(replicate=crew.count), micro_batch_samples=micro)
    return estimator.predict(candidate).step_seconds


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "some" / "machine.json"
    measured = replace(MEASURED, runs=(SEEN,))
    measurements.save_measurements(measured, path)
    assert measurements.load_measurements(path) == measured


def test_what_blocks_cost_beyond_products_is_recovered() -> None:
    """A machine made of four known figures: the fit finds each (exact up to rounding)."""
    rates = calibrate.rates_of(MEASURED, Crew("processes", 1, 1))
    for name, wanted in zip(
        ("host", "byte", "start", "logit"), (HOST, BYTE, START, LOGIT), strict=True
    ):
        assert rates.block(name, precision="fp32", kind="gated") == pytest.approx(wanted, rel=1e-6)
        assert rates.block(name, precision="fp32", kind="plain") == pytest.approx(wanted, rel=1e-6)


def test_a_step_is_the_sum_of_its_parts() -> None:
    """By hand: 4 micro batches of 512 tokens on one core; products at one rate, all else linear."""
    facts, tokens = SMALL, 512
    matrices = facts.layers * (facts.block_parameters - 2 * facts.hidden)
    products = 6.0 * tokens * (matrices + facts.vocabulary * facts.hidden) / RATE
    attention = facts.layers * tokens * facts.heads * 128 * facts.head_size * 1e-11
    rates = calibrate.rates_of(MEASURED, Crew("processes", 1, 1))
    estimator = calibrate.estimator_for(MEASURED, Crew("processes", 1, 1), workload=WORK)
    moved = sum(estimator.pricing.compute.elementwise_bytes(Cut(tokens)))
    rest = facts.layers * (HOST + BYTE * moved) + START + LOGIT * tokens * facts.vocabulary
    memory = rates.stream(12.0 * facts.parameters)
    memory += rates.stream(4.0 * tokens * facts.hidden) * 3
    once = 1e-9 * facts.parameters + calibrate.STEP_SECONDS
    found = step_seconds(Crew("processes", 1, 1))
    assert found == pytest.approx(4 * (products + attention + rest + memory) + once, rel=1e-3)


def test_company_slows_a_worker_and_shared_cores_more() -> None:
    """One core alone, two busy, four workers on two cores: each of them twice as slow."""
    alone = calibrate.rates_of(MEASURED, Crew("processes", 1, 1))
    both = calibrate.rates_of(MEASURED, Crew("processes", 2, 1))
    four = calibrate.rates_of(MEASURED, Crew("processes", 4, 1))
    shape = {"precision": "fp32", "tokens": 256, "columns": 256, "depth": 256}
    assert both.product("input", **shape) == pytest.approx(1.1 * alone.product("input", **shape))
    assert four.product("input", **shape) == pytest.approx(2 * both.product("input", **shape))
    whole = calibrate.rates_of(MEASURED, Crew("processes", 1, 2))
    assert whole.peak("fp32") == pytest.approx(2 * RATE)
    # Threads were timed at blocks only: their products are those of as many processes.
    threads = calibrate.rates_of(MEASURED, Crew("threads", 2, 1))
    assert threads.product("input", **shape) == both.product("input", **shape)
    assert threads.block("host", precision="fp32", kind="gated") > both.block(
        "host", precision="fp32", kind="gated"
    )


def test_between_measured_numbers_of_threads() -> None:
    """Two of four threads: the geometric mean of one and four, when one and four are known."""
    four = replace(
        MEASURED,
        cores=4,
        conditions=(condition("processes", 4, 1), condition("processes", 1, 4)),
    )
    rates = calibrate.rates_of(four, Crew("processes", 2, 2))
    assert rates.peak("fp32") == pytest.approx(2 * RATE)
    assert {str(crew) for crew in calibrate.crews(four)} >= {
        "1 worker x 4 threads",
        "2 threads x 2 threads",
        "4 processes x 1 thread",
    }


def test_the_best_of_the_machine() -> None:
    """Sums and updates decide: replicas as processes are slower to sum than threads here, yet the
    blocks of threads are slower by 9 %; the found plan is the fastest of all pairs tried by hand.
    """
    found = find_here(MEASURED, workload=WORK, space=Space(fixed={"shard": 1}))
    by_hand = {
        (crew, micro): step_seconds(crew, micro)
        for crew in calibrate.crews(MEASURED)
        for micro in (1, 2, 4, 8, 16)
        if 16 // crew.count % micro == 0
    }
    crew = min(by_hand, key=lambda key: by_hand[key])[0]
    least = min(by_hand.values())
    chosen = found.best.candidate
    assert chosen.crew is not None and chosen.crew.count == crew.count
    assert found.best.step_seconds == by_hand[chosen.crew, chosen.micro_batch_samples]
    assert found.best.step_seconds <= 1.02 * least
    smaller = [
        s
        for (c, micro), s in by_hand.items()
        if c == chosen.crew and micro < chosen.micro_batch_samples
    ]
    assert all(seconds > 1.02 * least for seconds in smaller)
    assert set(found.families) == {str(each) for each in calibrate.crews(MEASURED)}
    alone = find_here(MEASURED, workload=WORK, space=Space(fixed={"shard": 1, "replicate": 1}))
    assert alone.best.candidate.crew is not None and alone.best.candidate.crew.count == 1
    with pytest.raises(UserError, match="no layout of 2 devices"):
        find_here(
            MEASURED,
            workload=replace(WORK, global_batch_samples=3),
            space=Space(fixed={"shard": 1, "replicate": 2}),
            among=[Crew("processes", 2, 1)],
        )


@pytest.mark.parametrize("micro", [1, 2, 4, 8])
def test_a_micro_batch_that_is_given_stays(micro: int) -> None:
    """A smaller one that costs hardly more was taken instead, and the key of the recipe ignored."""
    fixed = {"shard": 1, "micro_batch_samples": micro}
    found = find_here(MEASURED, workload=WORK, space=Space(fixed=fixed))
    plans = [found.best, *found.runners_up, *found.families.values()]
    assert {each.candidate.micro_batch_samples for each in plans} == {micro}


def test_formats() -> None:
    """bfloat16 where its products are 1.15 times as fast, float32 where they are emulated."""
    assert calibrate.fastest_format(MEASURED) == ("fp32", 0.0)

    def with_bf16(factor: float) -> Measurements:
        wide = MEASURED.conditions[1]
        rows = [("bf16", *row[1:5], row[5] / factor) for row in wide.products]
        return replace(MEASURED, conditions=(replace(wide, products=(*wide.products, *rows)),))

    assert calibrate.fastest_format(with_bf16(2.5)) == ("bf16", pytest.approx(2.5))
    assert calibrate.fastest_format(with_bf16(1.1))[0] == "fp32"
    assert calibrate.fastest_format(with_bf16(0.01))[0] == "fp32"


def test_what_was_not_measured_is_said() -> None:
    only = Rates({("product", "bf16", "input", 8, 8, 8): 1.0})
    with pytest.raises(UserError, match=r"not measured in fp32.*known: bf16"):
        only.precision("fp32")


def test_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"has not been measured: run shoal plan --calibrate"):
        calibrate.this_machine()
    measurements.save_measurements(MEASURED, measurements.measurements_path())
    assert calibrate.this_machine() == MEASURED


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "expected format 'shoal-measurements-3', got 'list'"),
        ('{"format": "shoal-measurements-1"}', "got 'shoal-measurements-1'"),
        ('{"format": "shoal-measurements-3"}', "KeyError.*expected name, cores, memory_bytes"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "machine.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        measurements.load_measurements(path)


def test_measurements_without_products_or_with_no_time_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    measurements.save_measurements(replace(MEASURED, conditions=()), path)
    with pytest.raises(UserError, match="no matrix product in them"):
        measurements.load_measurements(path)
    broken = replace(MEASURED, reduces=(("threads", 2, 32.0, 0.0),))
    measurements.save_measurements(broken, path)
    with pytest.raises(UserError, match="seconds must be more than zero"):
        measurements.load_measurements(path)


SEEN = Seen(
    run="a",
    predicted_seconds=1.0,
    measured_seconds=1.2,
    predicted_bytes=100.0,
    measured_bytes=90.0,
    state_bytes=50.0,
)


def test_learning_from_runs() -> None:
    """Runs that all took 20 % longer, with activations of 40 bytes instead of 50: three of them
    move the model three quarters of the way, one of them half."""
    learned = calibrate.learn([SEEN] * 3)
    assert learned.time == pytest.approx(1.2**0.75)
    assert learned.activations == pytest.approx(0.8**0.75)
    assert learned.median_error_after < learned.median_error_before
    assert calibrate.learn([SEEN]).time == pytest.approx(1.2**0.5)
    assert calibrate.learn([]) == calibrate.Correction()


def test_what_was_learned_is_in_the_next_prediction_and_taken_out_again(tmp_path: Path) -> None:
    """A prediction holds the factor; a run's plan.json says so, and `read_run` divides by it."""
    crew = Crew("processes", 1, 1)
    candidate = Candidate(layout=Layout(), micro_batch_samples=4)
    before = calibrate.estimator_for(MEASURED, crew, workload=WORK).predict(candidate)
    taught = replace(MEASURED, runs=(SEEN,) * 3)
    after = calibrate.estimator_for(taught, crew, workload=WORK).predict(candidate)
    assert after.step_seconds == pytest.approx(1.2**0.75 * before.step_seconds)
    assert after.peak.activations == pytest.approx(0.8**0.75 * before.peak.activations)
    padded = SMALL.parameters + 16384  # flat buffers end on whole chunks
    assert after.peak.states == before.peak.states == 16.0 * padded
    predicted = calibrate.predicted_for(after)
    outcome = {"step_seconds": 2.0, "peak_memory_bytes": 7e7}
    (tmp_path / "plan.json").write_text(json.dumps({"predicted": predicted, "outcome": outcome}))
    seen = calibrate.read_run(tmp_path)
    assert seen.predicted_seconds == pytest.approx(before.step_seconds)
    assert (seen.measured_seconds, seen.measured_bytes) == (2.0, 7e7)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(UserError, match="no prediction and measurement to learn from"):
        calibrate.read_run(tmp_path)


def test_states_of_threads_and_bfloat16() -> None:
    """16 bytes per parameter in either format; bfloat16 halves most activations and adds casts."""
    crew = Crew("threads", 2, 1)
    candidate = Candidate(layout=Layout(replicate=2), micro_batch_samples=4)
    memory = {}
    for precision in ("fp32", "bf16"):
        work = replace(WORK, precision=precision)
        estimator = calibrate.estimator_for(MEASURED, crew, workload=work)
        assert estimator.software.name == SHOAL.name
        assert estimator.software.padding_parameters == CHUNK, "two halves of a chunk"
        memory[precision] = estimator.predict(candidate).peak
    padded = SMALL.parameters + 16384  # flat buffers end on whole chunks
    assert memory["bf16"].states == memory["fp32"].states == 16.0 * padded
    assert memory["bf16"].activations < memory["fp32"].activations
