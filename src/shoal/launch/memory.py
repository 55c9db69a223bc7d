"""The out-of-memory doctor: refuses a run that cannot fit, and explains one that did not.

Fixes are ordered by what they cost: first those that change only the speed a little, then those
that change how many workers there are, last those that change what is learned.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from shoal.config.recipe import Recipe
from shoal.engine.decision import Decision
from shoal.engine.job import Job
from shoal.errors import ConfigError, Problem
from shoal.launch.deaths import Death
from shoal.launch.refuse import combination_of
from shoal.legal import open_axes
from shoal.observe.events import read_lines
from shoal.plan.cost.memory import memory_on_cpu
from shoal.plan.workload import FORMATS, Candidate, Workload
from shoal.units import format_bytes

SPARE = 0.95
"""Share of the free memory that a run may plan with."""


def candidate_of(recipe: Recipe, decision: Decision) -> Candidate:
    """What was decided, as plans reckon with it."""
    schedule, chunks = decision.schedule_of(recipe)
    return Candidate(
        layout=decision.layout,
        micro_batch_samples=decision.micro_batch_samples,
        level=decision.shard_level_of(recipe),
        recompute=decision.recompute_of(recipe),
        schedule=schedule,
        chunks=chunks,
        policy=recipe.sync.kind,
        codec=recipe.sync.codec.kind,
    )


def memory_of_worker(recipe: Recipe, decision: Decision, *, workload: Workload) -> dict[str, float]:
    """Peak of one worker on this machine, by formula; what of it is state is exact."""
    memory = memory_on_cpu(
        candidate_of(recipe, decision),
        workload=replace(workload, precision=FORMATS[decision.compute]),
    )
    return {"peak_memory_bytes": memory.live, "state_bytes": memory.states}


def needed_bytes(decision: Decision) -> float | None:
    """Predicted bytes of all workers together; None when the peak of one is not known.

    Threads share parameters and optimizer state; processes hold everything each.
    """
    peak = decision.predicted.get("peak_memory_bytes")
    if peak is None:
        return None
    count = decision.layout.workers
    if decision.workers == "threads" and count > 1:
        # of AdamW's 16 bytes an element, 4 of the weight and 8 of the moments are one copy for all
        shared = 0.75 * decision.predicted.get("state_bytes", 0.0)
        return shared + count * (peak - shared)
    return count * peak


def refuse_what_cannot_fit(recipe: Recipe, decision: Decision, *, free_bytes: int | None) -> None:
    """Raises ConfigError, with the fixes ordered by their cost, for a run that needs too much."""
    need = needed_bytes(decision)
    if need is None or free_bytes is None or need <= SPARE * free_bytes:
        return
    what = (
        f"needs about {format_bytes(need)} at its peak, and {format_bytes(free_bytes)} are free "
        f"({decision.layout.workers} {decision.workers}, micro batch "
        f"{decision.micro_batch_samples})"
    )
    raise ConfigError([Problem("memory", what, "; or ".join(fixes(recipe, decision)))])


def fixes(recipe: Recipe, decision: Decision) -> Iterator[str]:
    """What would need less, the cheapest first."""
    micro, count = decision.micro_batch_samples, decision.layout.replicate
    if micro > 1:
        yield f"train.micro_batch_samples={micro // 2} (a little slower, the same curve)"
    if decision.recompute_of(recipe) == "none":
        yield "parallel.recompute=full (activations made again, a third more compute, same curve)"
    if decision.workers == "processes" and count > 1:
        yield "launch.workers=threads (one copy of parameters and optimizer state for all)"
        if "shard" in open_axes(combination_of(recipe, decision.layout)):
            cut = f"parallel.shard={decision.layout.shard * count} parallel.replicate=1"
            yield f"{cut} (state divided instead of copied, the same curve)"
    if count > 1:
        yield f"parallel.replicate={count // 2} (fewer workers, the same curve)"
    if decision.compute == "float32":
        yield "precision.compute=bfloat16 (smaller activations, rounds more)"
    if recipe.data.sequence_tokens > 64:
        yield f"data.sequence_tokens={recipe.data.sequence_tokens // 2} (learns from shorter rows)"
    yield "a smaller model"


def explained(job: Job, death: Death) -> str:
    """After a real one: what was measured, what it was doing, and the same fixes; else nothing."""
    if death.kind != "out-of-memory":
        return ""
    recipe, decision, run, where = job.recipe, job.decision, job.run, death.where
    lines = [f"out of memory at {where}; {decision.layout.workers} {decision.workers}"]
    for name, value in _measured(run).items():
        lines.append(f"  {name}: {format_bytes(value)}")
    lines += [f"  needs less: {fix}" for fix in fixes(recipe, decision)]
    return "\n".join(lines)


def _measured(run: Path) -> dict[str, float]:
    rows: list[dict[str, Any]] = [r for r in read_lines(run / "metrics.jsonl") if "loss" in r]
    names = {
        "peak of live tensors in one worker": "peak_memory_bytes",
        "private memory of one worker": "peak_private_bytes",
    }
    found = {}
    for words, key in names.items():
        values = [row[key] for row in rows if row.get(key)]
        if values:
            found[words] = float(max(values))
    return found
