"""Decide what a recipe leaves open: workers, threads, micro batch, number format; and say why."""

from __future__ import annotations

import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import xxhash

from shoal.config.recipe import Recipe
from shoal.engine.decision import (
    Decision,
    divisible,
    given_layout,
    largest_micro_batch,
)
from shoal.engine.prepare import Inputs
from shoal.environment import cache_directory, usable_cores
from shoal.errors import ConfigError, Problem, UserError
from shoal.launch.attempt import Attempt
from shoal.launch.pool import WorkerPool
from shoal.layout import Layout
from shoal.legal import not_yet
from shoal.observe.console import Console

_MICRO_TOKENS = 2048
"""Tokens of a micro batch when none is measured: enough to fill matrix products, small in cache."""


def check(recipe: Recipe) -> Layout:
    """Refuse what cannot run, before anything is fetched or started. Raises ConfigError."""
    layout = given_layout(recipe)
    problems = list(not_yet(layout, policy=recipe.sync.kind, codec=recipe.sync.codec.kind))
    problems += divisible(recipe, replicate=layout.replicate)
    if recipe.launch.workers == "threads":
        if recipe.parallel.fewest_replicas is not None:
            what = "threads of one process live and die together: their degree cannot shrink"
            hint = "use launch.workers=processes, or a fixed degree"
            problems.append(Problem("parallel.replicate", what, hint))
        if layout.workers != layout.replicate:
            problems.append(
                Problem("launch.workers", "threads carry the replicate axis only; use processes")
            )
        if recipe.model.dropout == "framework":
            hint = "use model.dropout=keyed, or launch.workers=processes"
            problems.append(
                Problem("model.dropout", "framework dropout is refused with threads", hint)
            )
    if problems:
        raise ConfigError(problems)
    return layout


def choose(recipe: Recipe, *, inputs: Inputs, pool: WorkerPool, console: Console) -> Decision:
    """The decision for this machine. Measures (once per model and machine) where the recipe asks.

    Raises ConfigError for what is refused.
    """
    layout, cores = check(recipe), usable_cores()
    given = recipe.parallel.replicate is not None or not recipe.parallel.auto
    if given and layout.workers > cores:
        console.line(
            f"warning: {layout.workers} workers share {cores} cores; more workers than cores "
            "only makes each slower (fine for a test)"
        )
    if given or recipe.train.exact:
        found = _measured(recipe, inputs, pool=pool, console=console, only_format=True)
        return _by_rule(recipe, layout=layout, cores=cores, found=found)
    found = _measured(recipe, inputs, pool=pool, console=console)
    if found["devices"]:
        replicate = _replicas(recipe, at_most=found["devices"])
        layout = Layout(replicate=replicate)
        return _by_rule(recipe, layout=layout, cores=cores, found=found)
    return _by_measure(recipe, found=found, cores=cores)


def decide_joined(recipe: Recipe, *, cores_per_worker: int, found: dict[str, Any]) -> Decision:
    """The decision for workers that another launcher has started. Raises ConfigError."""
    layout = check(recipe)
    cores = cores_per_worker * layout.workers
    return _by_rule(recipe, layout=layout, cores=cores, found=found)


def _replicas(recipe: Recipe, *, at_most: int) -> int:
    """The largest degree up to `at_most` that divides the global batch."""
    batch = recipe.train.global_batch_samples
    return max(n for n in range(1, min(at_most, batch) + 1) if batch % n == 0)


def _kind(recipe: Recipe, *, replicate: int, devices: int) -> Literal["threads", "processes"]:
    if recipe.launch.workers != "auto":
        return recipe.launch.workers
    if recipe.parallel.fewest_replicas is not None:
        return "processes"
    if replicate > 1 and not devices and recipe.model.dropout != "framework":
        return "threads"
    return "processes"


def _by_rule(recipe: Recipe, *, layout: Layout, cores: int, found: dict[str, Any]) -> Decision:
    chosen = recipe.train.micro_batch_samples
    fitting = max(1, _MICRO_TOKENS // recipe.data.sequence_tokens)
    if recipe.train.exact:  # nothing that changes a bit may depend on the number of workers
        threads, reason = 1, "exact: one thread and one micro batch, whatever the degree"
        eighth = max(1, recipe.train.global_batch_samples // 8)
        micro = (
            largest_micro_batch(recipe, replicate=1, at_most=min(fitting, eighth))
            if chosen == "auto"
            else chosen
        )
        if (recipe.train.global_batch_samples // layout.replicate) % micro:
            problem = f"{micro} samples a micro batch do not divide a share of {layout.replicate}"
            raise ConfigError([Problem("train.micro_batch_samples", problem)])
    else:
        threads, reason = max(1, cores // layout.workers), "as the recipe says"
        micro = (
            largest_micro_batch(recipe, replicate=layout.replicate, at_most=fitting)
            if chosen == "auto"
            else chosen
        )
    if recipe.launch.threads_per_worker != "auto":
        threads = recipe.launch.threads_per_worker
    kind = _kind(recipe, replicate=layout.replicate, devices=found["devices"])
    if kind == "threads" and layout.replicate > 1 and recipe.launch.workers == "auto":
        reason += "; threads share one copy of the parameters"
    if recipe.precision.compute == "auto":
        reason += f"; {_about_format(found)}"
    return Decision(layout, kind, threads, micro, _format(found["compute"]), reason)


def _about_format(found: dict[str, Any]) -> str:
    return f"bfloat16 products are {found['format_ratio']:.1f} x float32's here"


def _format(compute: str) -> Literal["float32", "bfloat16"]:
    if compute == "float16":
        raise UserError(
            "precision.compute: float16 needs loss scaling, which is not there yet; "
            "use bfloat16 or float32"
        )
    return "bfloat16" if compute == "bfloat16" else "float32"


def _by_measure(recipe: Recipe, *, found: dict[str, Any], cores: int) -> Decision:
    rows = found["rows"]
    if recipe.launch.workers != "auto":
        rows = [r for r in rows if r["workers"] in ("solo", recipe.launch.workers)]
    if recipe.model.dropout == "framework":
        rows = [r for r in rows if r["workers"] != "threads"]
    best = max(rows, key=lambda row: row["samples_per_second"])
    lone = max(row["samples_per_second"] for row in found["rows"] if row["workers"] == "solo")
    speedup = best["samples_per_second"] / lone
    measured: dict[str, Any] = {"rows": found["rows"], "format_ratio": found["format_ratio"]}
    if best["workers"] == "solo":
        others = [row["samples_per_second"] for row in rows if row["workers"] != "solo"]
        why = "this machine has one core"
        if others:
            ratio = lone / max(others)
            why = f"one worker with {cores} threads is {ratio:.2f} x the best of replicas"
        measured["why_one"] = why
    else:
        measured["speedup"] = speedup
        why = f"{speedup:.2f} x one worker with {cores} threads"
    if found["compute"] == "bfloat16":
        why += f"; {_about_format(found)}"
    threads = recipe.launch.threads_per_worker
    return Decision(
        Layout(replicate=best["replicate"]),
        "processes" if best["workers"] == "processes" else "threads",
        best["threads_per_worker"] if threads == "auto" else threads,
        best["micro_batch_samples"],
        found["compute"],
        f"measured {why}",
        measured,
        {"step_seconds": recipe.train.global_batch_samples / best["samples_per_second"]},
    )


def _measured(
    recipe: Recipe,
    inputs: Inputs,
    *,
    pool: WorkerPool,
    console: Console,
    only_format: bool = False,
) -> dict[str, Any]:
    """Measurements of this recipe on this machine, from the cache or from a short run."""
    cores = usable_cores()
    replicate = _replicas(recipe, at_most=cores)
    wanted = _sizes(recipe, replicate=replicate)
    if only_format:
        wanted, replicate = {"solo": [], "replicas": []}, 1
    key = {
        "model": recipe.model.model_dump(mode="json"),
        "task": recipe.task.kind,
        "sequence": recipe.data.sequence_tokens,
        "compute": recipe.precision.compute,
        "wanted": wanted,
        "workers": [cores, replicate],
        "device": recipe.launch.device,
        "torch": version("torch"),
        "machine": _machine(),
    }
    name = xxhash.xxh3_64_hexdigest(json.dumps(key, sort_keys=True).encode())
    path = cache_directory() / "measured" / f"{name}.json"
    if path.is_file():
        cached: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return cached
    console.phase("measuring this machine (number formats, workers, micro batch)")
    found = _measure(recipe, inputs, pool=pool, console=console, size=replicate, wanted=wanted)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}")
    beside.write_text(json.dumps(found, indent=1), encoding="utf-8")
    os.replace(beside, path)
    return found


def _machine() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith(("model name", "CPU part")):
                return line.partition(":")[2].strip()
    import platform

    return platform.processor() or platform.machine()


def _sizes(recipe: Recipe, *, replicate: int) -> dict[str, list[int]]:
    chosen = recipe.train.micro_batch_samples
    batch = recipe.train.global_batch_samples
    if chosen != "auto":
        share = batch // replicate
        return {"solo": [chosen], "replicas": [chosen] if share % chosen == 0 else [share]}
    fitting = max(1, _MICRO_TOKENS // recipe.data.sequence_tokens)

    def around(degree: int) -> list[int]:
        sizes = {
            largest_micro_batch(recipe, replicate=degree, at_most=n)
            for n in (max(1, fitting // 2), fitting, fitting * 2)
        }
        return sorted(sizes)

    return {"solo": around(1)[-2:], "replicas": around(replicate)}


def _measure(
    recipe: Recipe,
    inputs: Inputs,
    *,
    pool: WorkerPool,
    console: Console,
    size: int,
    wanted: dict[str, Any],
) -> dict[str, Any]:
    payload = {
        "recipe": recipe.model_dump(mode="json"),
        "inputs": inputs.to_json(),
        "wanted": wanted,
        "size": size,
    }
    with tempfile.TemporaryDirectory(prefix="shoal-") as folder:
        store = str(Path(folder) / "store")
        workers = [
            pool.start("shoal.engine.measure:run", {**payload, "rank": rank, "store": store})
            for rank in range(size)
        ]
        attempt = Attempt(console)
        found: dict[str, Any] | None = None
        while any(worker.status is None for worker in workers):
            for worker, message in pool.events(timeout_seconds=1.0):
                if message is not None and message["kind"] == "measured":
                    found = message
                elif message is not None and worker in workers:
                    attempt.hear(message)
            if attempt.errors:
                pool.kill(workers)
    if found is None:
        raise attempt.failure()
    return {key: found[key] for key in ("rows", "compute", "format_ratio", "devices")}
