"""From the measurements of a machine to devices that the cost model can plan with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, log
from pathlib import Path
from statistics import median

import numpy as np

from shoal.errors import UserError
from shoal.legal import ModelFacts, facts_from_config
from shoal.plan.cost.compute import Cut
from shoal.plan.cost.constants import DEFAULT
from shoal.plan.cost.measured import MeasuredCompute
from shoal.plan.cost.step import Estimator, Prediction
from shoal.plan.hardware import Cluster, Device, Nodes
from shoal.plan.measurements import (
    REFERENCE,
    Condition,
    Measurements,
    Seen,
    load_measurements,
    measurements_path,
)
from shoal.plan.rates import Key, Rates
from shoal.plan.software import SHOAL
from shoal.plan.workload import Crew, Workload

WORTH_IT = 1.15
"""bfloat16 is chosen when its matrix products are at least this much faster than float32's."""

STEP_SECONDS = 0.003
"""Reading a batch, checking it and writing a row: what a step costs on any machine measured."""

MEETINGS = 5
"""How often the replicas meet in a step beside the sum of gradients: targets, losses, norm."""

_SMALL = 32.0  # bytes of such a meeting


def crews(
    measured: Measurements,
    *,
    count: int | None = None,
    workers: str | None = None,
    threads: int | None = None,
) -> Iterator[Crew]:
    """Crews that fill the machine, a lone worker with one thread, and what is fixed."""
    for size in range(1, measured.cores + 1) if count is None else [count]:
        filling = max(1, measured.cores // size)
        for each in {filling, 1 if size == 1 else filling} if threads is None else {threads}:
            kinds = ["processes"] if size == 1 else ["threads", "processes"]
            for kind in kinds if workers is None or size == 1 else [workers]:
                yield Crew(kind, size, each)


def rates_of(measured: Measurements, crew: Crew) -> Rates:
    """Times of one worker of `crew`: of the nearest conditions, blended; more on shared cores.

    With one thread each: between a lone worker and all cores busy, by the busy cores. With more:
    between one thread and all cores in one worker, by the logarithm of the threads.
    """
    cores = measured.cores
    busy = min(cores, crew.count * crew.threads)
    one = _timed(measured, workers=crew.workers, busy=1, threads=1)
    result = _timed(measured, workers=crew.workers, busy=cores, threads=1)
    if cores > 1 and busy < cores:
        result = one.blended(result, share=(busy - 1) / (cores - 1))
    threads = min(crew.threads, cores)
    if threads > 1:
        whole = _timed(measured, workers=crew.workers, busy=1, threads=cores)
        result = result.blended(whole, share=log(threads) / log(cores))
    result = result.scaled(max(1.0, crew.count * crew.threads / cores))
    reduces: dict[Key, float] = {
        ("reduce", ranks, num_bytes): seconds
        for kind, ranks, num_bytes, seconds in measured.reduces
        if kind == crew.workers
    }
    return Rates({**result.seconds, **reduces})


def _timed(measured: Measurements, *, workers: str, busy: int, threads: int) -> Rates:
    """The rates of one condition; what threads were not timed at is that of processes."""

    def distance(each: Condition) -> float:
        far = abs(log(each.threads / threads)) + abs(log(each.busy / busy))
        return far + 0.1 * (each.workers != workers)

    nearest = min(measured.conditions, key=distance)
    seconds = dict(_raw(nearest))
    alike = [
        each
        for each in measured.conditions
        if (each.busy, each.threads) == (nearest.busy, nearest.threads) and each is not nearest
    ]
    for each in alike:
        seconds = {**_raw(each), **seconds}
    plain = Rates(seconds)
    return Rates({**seconds, **_fitted(nearest.blocks, rates=plain)})


def _raw(condition: Condition) -> dict[Key, float]:
    found: dict[Key, float] = {("product", *row[:-1]): row[-1] for row in condition.products}
    found |= {("attention", *row[:-1]): row[-1] for row in condition.attention}
    found |= {("stream", num_bytes): seconds for num_bytes, seconds in condition.streams}
    if condition.updates:
        found["update",] = median(seconds / count for count, seconds in condition.updates)
    return found


def _fitted(
    rows: Sequence[tuple[str, str, int, int, int, float]], *, rates: Rates
) -> dict[Key, float]:
    """What whole blocks take beyond their products and attention, by precision and kind of block.

    Least squares of relative errors over the timed REFERENCE models: seconds per block, per byte
    of elementwise traffic, per micro batch, and per logit, none below zero.
    """
    found: dict[Key, float] = {}
    for precision, family in sorted({row[:2] for row in rows}):
        design, rest = [], []
        chosen = [row[2:] for row in rows if row[:2] == (precision, family)]
        for blocks, samples, row_tokens, seconds in chosen:
            facts = reference_facts(family, blocks=blocks)
            parts, known = _parts(
                facts, precision=precision, samples=samples, row_tokens=row_tokens, rates=rates
            )
            design.append([part / seconds for part in parts])
            rest.append(1.0 - known / seconds)
        solved = _not_negative(np.array(design), np.array(rest))
        kind = "gated" if facts.gated else "plain"
        for name, value in zip(("host", "byte", "start", "logit"), solved, strict=True):
            found[name, precision, kind] = max(float(value), 1e-15)
    return found


def _parts(
    facts: ModelFacts, *, precision: str, samples: int, row_tokens: int, rates: Rates
) -> tuple[list[float], float]:
    """(blocks, elementwise bytes, 1, logits) of a micro batch, and its known seconds."""
    workload = Workload(
        facts=facts, sequence_tokens=row_tokens, global_batch_samples=samples, precision=precision
    )
    tokens = samples * row_tokens
    compute = MeasuredCompute(workload, _device("", rates=rates, memory_bytes=0.0), SHOAL, DEFAULT)
    traffic = sum(compute.elementwise_bytes(Cut(tokens)))
    known = facts.layers * compute.block(Cut(tokens)).total
    known += compute.head(tokens=tokens, tensor=1).total + compute.embedding(tokens=tokens).total
    known += compute.stream(SHOAL.accumulated(precision) * facts.parameters)
    return [float(facts.layers), facts.layers * traffic, 1.0, tokens * facts.vocabulary], known


def _not_negative(design: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Least squares without negative results: negative ones are set to 0, the rest solved anew."""
    columns = list(range(design.shape[1]))
    result = np.zeros(design.shape[1])
    while columns:
        part = design[:, columns]
        scale = np.abs(part).max(axis=0)
        solved = np.linalg.lstsq(part / scale, wanted, rcond=None)[0] / scale
        if (solved >= 0).all():
            result[columns] = solved
            break
        columns = [c for c, value in zip(columns, solved, strict=True) if value > 0]
    return result


def reference_facts(family: str, *, blocks: int) -> ModelFacts:
    """Facts of a REFERENCE model of `blocks` blocks."""
    return facts_from_config(reference_config(family, blocks=blocks))


def reference_config(family: str, *, blocks: int) -> dict[str, object]:
    """The config.json of a REFERENCE model of `blocks` blocks."""
    key = "n_layer" if family == "gpt2" else "num_hidden_layers"
    return {**REFERENCE[family], key: blocks}


def _device(name: str, *, rates: Rates, memory_bytes: float) -> Device:
    precisions = {str(key[1]) for key in rates.seconds if key[0] == "product"}
    peak = {precision: rates.peak(precision) for precision in precisions}
    link = 1e6 / rates.reduce(1e6, ranks=2) if rates.reduce(1e6, ranks=2) else 1e9
    return Device(
        name=name,
        generation="measured",
        peak=peak,
        achievable=dict.fromkeys(peak, 1.0),
        memory_bytes=memory_bytes,
        memory_bytes_per_second=64e6 / max(rates.stream(64e6), 1e-9),
        multiprocessors=0,
        node_devices=1 << 20,
        node_link_bytes_per_second=link,
        network_bytes_per_second=link,
        rates=rates,
    )


def estimator_for(measured: Measurements, crew: Crew, *, workload: Workload) -> Estimator:
    """The cost model for a crew of this machine; corrected by the runs it has seen."""
    learned = learn(measured.runs)
    rates = rates_of(measured, crew)
    device = _device(measured.name, rates=rates, memory_bytes=measured.memory_bytes / crew.count)
    meeting = rates.reduce(_SMALL, ranks=crew.count) if crew.count > 1 else 0.0
    return Estimator(
        workload,
        Cluster(
            groups=(Nodes(count=1, devices=crew.count, device=device),),
            network_bytes_per_second=device.network_bytes_per_second,
            source=str(crew),
        ),
        replace(
            SHOAL,
            step_host_seconds=STEP_SECONDS + MEETINGS * meeting,
            on_cpu=True,
            shares_update=crew.workers == "threads",
        ),
        replace(
            DEFAULT,
            reserve_share=0.0,
            context_bytes=0.0,
            activation_factor=learned.activations,
            time_factor=learned.time,
        ),
    )


def predicted_for(prediction: Prediction) -> dict[str, float]:
    """What plan.json keeps of a prediction; `read_run` reads it back.

    The peak is of live tensors (DESIGN 5.9); `state_bytes` of them are exact.
    """
    return {
        "step_seconds": prediction.step_seconds,
        "peak_memory_bytes": prediction.peak.live,
        "state_bytes": prediction.peak.states,
        "time_factor": prediction.time_factor,
    }


def this_machine() -> Measurements:
    """The machine as last measured; raises UserError when it never was."""
    path = measurements_path()
    if not path.is_file():
        raise UserError(
            "this machine has not been measured: run shoal plan --calibrate (under a minute), or "
            "give --cluster, such as 8xH100, or a cluster file (docs/planner.md shows one)"
        )
    return load_measurements(path)


def fastest_format(measured: Measurements) -> tuple[str, float]:
    """The number format to compute in, and how much faster bf16's products are than fp32's.

    The ratio is the median over shapes and kinds of product on all cores; 0 where bf16 was not
    timed.
    """
    widest = max(measured.conditions, key=lambda each: each.busy * each.threads)
    seconds = {row[:-1]: row[-1] for row in widest.products}
    ratios = [
        wide / seconds["bf16", *key[1:]]
        for key, wide in seconds.items()
        if key[0] == "fp32" and ("bf16", *key[1:]) in seconds
    ]
    ratio = median(ratios) if ratios else 0.0
    return ("bf16" if ratio >= WORTH_IT else "fp32"), ratio


@dataclass(frozen=True, kw_only=True)
class Correction:
    """Factors on predicted time and activations learned from runs, and how far those lie off."""

    time: float = 1.0
    activations: float = 1.0
    runs: int = 0
    median_error_before: float = 0.0
    median_error_after: float = 0.0


def learn(runs: Sequence[Seen]) -> Correction:
    """Median ratio of measured to predicted, shrunk towards 1 when there are few runs.

    With n runs the logarithm of the ratio counts n / (n + 1): one run moves the model half of
    the way, since a single run may have been disturbed.
    """
    if not runs:
        return Correction()
    weight = len(runs) / (len(runs) + 1)

    def factor(ratios: list[float]) -> float:
        return exp(weight * median([log(ratio) for ratio in ratios])) if ratios else 1.0

    time = factor([run.measured_seconds / run.predicted_seconds for run in runs])
    sized = [
        (run.measured_bytes - run.state_bytes) / (run.predicted_bytes - run.state_bytes)
        for run in runs
        if min(run.predicted_bytes, run.measured_bytes) > run.state_bytes > 0
    ]
    before = [abs(run.predicted_seconds / run.measured_seconds - 1) for run in runs]
    after = [abs(time * run.predicted_seconds / run.measured_seconds - 1) for run in runs]
    return Correction(
        time=time,
        activations=factor(sized),
        runs=len(runs),
        median_error_before=median(before),
        median_error_after=median(after),
    )


def read_run(run: Path) -> Seen:
    """The prediction and measurement that a finished run keeps in plan.json.

    Expects `predicted` and `outcome`, each with `step_seconds` and optionally
    `peak_memory_bytes`; `predicted` with the factors that were in it. Raises UserError naming the
    file and what it lacks.
    """
    path = run / "plan.json"
    try:
        data: Mapping[str, Mapping[str, float]] = json.loads(path.read_text(encoding="utf-8"))
        predicted, measured = data["predicted"], data["outcome"]
        return Seen(
            run=str(run.resolve()),
            predicted_seconds=float(predicted["step_seconds"]) / predicted.get("time_factor", 1.0),
            measured_seconds=float(measured["step_seconds"]),
            predicted_bytes=float(predicted.get("peak_memory_bytes") or 0.0),
            measured_bytes=float(measured.get("peak_memory_bytes") or 0.0),
            state_bytes=float(predicted.get("state_bytes") or 0.0),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: no prediction and measurement to learn from ({error!r}); expected "
            "`predicted` and `outcome`, each with step_seconds"
        ) from error
