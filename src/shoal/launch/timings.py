"""What was timed on this machine for a recipe, kept for its next start, and what it decides."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash

from shoal.config.recipe import Recipe
from shoal.engine.decision import Decision, WorkerSetup
from shoal.engine.job import Inputs
from shoal.environment import cache_directory, free_memory_bytes, machine_name, usable_cores
from shoal.launch.candidates import (
    Timed,
    best_of,
    described,
    micro_batches_of,
    setups_of,
)
from shoal.launch.directory import write_whole
from shoal.launch.memory import SPARE, memory_of_worker, needed_bytes
from shoal.launch.pool import WorkerPool
from shoal.launch.tune import Tuner
from shoal.layout import Layout
from shoal.observe.console import Console
from shoal.plan.workload import Workload


def tuned(
    recipe: Recipe,
    decision: Decision,
    *,
    inputs: Inputs,
    workload: Workload | None,
    pool: WorkerPool,
    console: Console,
) -> Decision:
    """`decision` (all cores, by rule), or what was timed to be faster on the recipe itself."""
    setups = setups_of(recipe, cores=usable_cores())
    tokens = recipe.data.sequence_tokens if workload is None else workload.sequence_tokens
    if not recipe.launch.tune:
        return _untimed(decision, "launch.tune is false")
    if (
        len(setups) == 1
        and len(micro_batches_of(recipe, count=setups[0].count, row_tokens=tokens)) == 1
    ):
        return _with_setup(decision, setups[0])  # nothing is left open
    if not _all_fit(recipe, decision, setups=setups, workload=workload):
        return _untimed(decision, "too large to try out the ways beside one another")
    path = _path(recipe, inputs=inputs, setups=setups, compute=decision.compute)
    rows, when = _kept(path, console=console), "timed before on this machine"
    if not rows:
        tuner = Tuner(
            recipe,
            inputs=inputs,
            decision=decision,
            pool=pool,
            console=console,
            row_tokens=tokens,
        )
        rows = tuner.run(setups)
        when = f"timed in {tuner.seconds:.1f} s"
        for error in dict.fromkeys(tuner.errors):
            console.line(f"warning: a setup could not be timed: {error}")
        if not rows:
            return _untimed(decision, f"no setup was ready within {tuner.seconds:.0f} s")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps([row.to_json() for row in rows]) + "\n")
    best = best_of(rows)
    return replace(
        _with_setup(decision, best.setup),
        micro_batch_samples=best.micro,
        reason=described(rows, best, when=when),
        measured=_record(rows, best),
        predicted={"step_seconds": best.step_seconds},
    )


def _untimed(decision: Decision, why: str) -> Decision:
    return replace(decision, reason=f"{decision.reason}, not timed ({why})")


def _with_setup(decision: Decision, setup: WorkerSetup) -> Decision:
    return replace(
        decision,
        layout=Layout(replicate=setup.count),
        workers=setup.workers,
        threads_per_worker=setup.threads,
    )


def _record(rows: Sequence[Timed], best: Timed) -> dict[str, Any]:
    """What plan.json keeps: all candidates, and the speed-up over one worker with one core.

    Where that is the choice, over the next best.
    """
    others = [row for row in rows if row.is_one_core != best.is_one_core]
    record: dict[str, Any] = {"candidates": [row.to_json() for row in rows]}
    if others:
        beside = min(others, key=lambda row: row.step_seconds)
        record["speedup"] = beside.step_seconds / best.step_seconds
        record["beside"] = str(beside.setup)
    return record


def _all_fit(
    recipe: Recipe,
    decision: Decision,
    *,
    setups: Sequence[WorkerSetup],
    workload: Workload | None,
) -> bool:
    """Whether all setups can be built beside one another in the free memory."""
    free = free_memory_bytes()
    if workload is None or free is None:
        return True
    needed: dict[tuple[str, int], float] = {}
    for setup in setups:
        tried = _with_setup(decision, setup)
        tried = replace(tried, predicted=memory_of_worker(recipe, tried, workload=workload))
        needed[setup.workers, setup.count] = needed_bytes(tried) or 0.0
    return sum(needed.values()) <= SPARE * free


def _kept(path: Path, *, console: Console) -> list[Timed]:
    """What an earlier start has timed; a damaged file is said, and timed anew."""
    if not path.is_file():
        return []
    try:
        rows = [Timed.from_json(row) for row in json.loads(path.read_text(encoding="utf-8"))]
        if not rows:
            raise ValueError("no rows")
        return rows
    except (OSError, ValueError, TypeError, RecursionError) as error:
        console.line(f"warning: {path} is damaged ({error!r}); timing anew")
        return []


def _path(recipe: Recipe, *, inputs: Inputs, setups: Sequence[WorkerSetup], compute: str) -> Path:
    """Where the timings of this recipe on this machine are kept, by all that bears on speed."""
    train, data = recipe.train, recipe.data
    tree = recipe.model_dump(mode="json")
    key = {
        "shoal": version("shoal"),
        "model": [tree["model"], inputs.vocabulary_size, tree["task"]["kind"]],
        "data": [inputs.data_directory, data.sequence_tokens],
        "train": [train.global_batch_samples, train.micro_batch_samples, tree["train"]["freeze"]],
        "optimizer": train.optimizer.kind,
        "parallel": [recipe.parallel.recompute, recipe.parallel.compile],
        "sync": tree["sync"],
        "compute": compute,
        "setups": [str(setup) for setup in setups],
    }
    name = xxhash.xxh3_64_hexdigest(json.dumps(key, sort_keys=True).encode())
    return cache_directory() / "timed" / f"{machine_key()}-{name}.json"


def machine_key() -> str:
    """A short word for this processor, these cores and this torch: what timings depend on."""
    parts = [machine_name(), str(usable_cores()), version("torch")]
    return xxhash.xxh3_64_hexdigest("\n".join(parts).encode())
