"""Decide what a recipe leaves open: workers, cores, micro batch, number format; and say why."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, Literal, TypedDict

import msgspec

from shoal.config.recipe import Recipe, Shard
from shoal.engine.decision import (
    Decision,
    Format,
    format_of,
    given_layout,
    largest_micro_batch,
)
from shoal.engine.job import Inputs
from shoal.environment import cache_directory, usable_cores
from shoal.errors import ConfigError, ModelError, Problem, UserError
from shoal.launch.candidates import most_replicas
from shoal.launch.devices import on_devices, predicted_on_devices
from shoal.launch.directory import write_whole
from shoal.launch.examined import refuse_wrong_model
from shoal.launch.measuring import measuring_job, wait_for_imports
from shoal.launch.memory import memory_of_worker
from shoal.launch.pool import WorkerPool
from shoal.launch.refuse import check, combination_of, refuse, refuse_illegal, trained_config
from shoal.launch.timings import machine_key, tuned
from shoal.layout import Layout
from shoal.legal import OWN_PARAMETERS
from shoal.observe.console import Console
from shoal.plan.devices import device_named
from shoal.plan.from_recipe import workload_of
from shoal.plan.workload import DEGREES, FORMATS, Workload, flops_per_token
from shoal.tasks.kinds import kind_of

_MICRO_TOKENS = 2048
"""Tokens of a micro batch when none is timed: enough to fill matrix products, small in cache."""


class _Formats(TypedDict):
    """What is kept of `measured_formats`."""

    devices: int
    device_name: str | None
    format_ratio: float
    compute: Format
    peaks: dict[Format, float]


def choose(recipe: Recipe, *, inputs: Inputs, pool: WorkerPool, console: Console) -> Decision:
    """The decision for this machine. Times (once per machine and recipe) what is left open.

    Raises ConfigError for what is refused.
    """
    layout, cores = check(recipe), usable_cores()
    auto, given = recipe.parallel.auto, recipe.parallel.replicate is not None
    if (given or not auto) and layout.workers > cores:
        console.line(
            f"warning: {layout.workers} workers share {cores} cores; more workers than cores "
            "only makes each slower (fine for a test)"
        )
    refuse_illegal(recipe, layout, config=trained_config(recipe, inputs=inputs))
    refuse_wrong_model(recipe, inputs=inputs, pool=pool, console=console)
    formats = formats_here(recipe, pool=pool, console=console)
    inside = layout.replica_workers
    planned = is_open(recipe)
    if auto and not given and (formats["devices"] or planned or inside > 1):
        room = max(1, (formats["devices"] or cores) // inside)
        layout = replace(layout, replicate=most_replicas(recipe, at_most=room, shards=layout.shard))
    workload = workload_for(recipe, inputs=inputs, compute=formats["compute"])
    if 0 < formats["devices"] < layout.workers:
        console.line(
            f"warning: {layout.workers} workers share {formats['devices']} GPUs and exchange "
            "through the host's memory: slower than a worker per GPU (fine for a test)"
        )
    decision = _by_rule(recipe, layout=layout, cores=cores, formats=formats, workload=workload)
    if planned and workload is not None and formats["devices"]:
        decision = on_devices(
            recipe,
            decision,
            workload=workload,
            layout=layout,
            devices=formats["devices"],
            device_name=formats["device_name"],
        )
    elif workload is not None and formats["devices"]:
        decision = predicted_on_devices(
            recipe,
            decision,
            workload=workload,
            devices=formats["devices"],
            device_name=formats["device_name"],
        )
    elif planned and inside == 1 and not formats["devices"]:
        decision = tuned(
            recipe, decision, inputs=inputs, workload=workload, pool=pool, console=console
        )
    check_decision_respects_recipe(recipe, decision)
    return _with_figures(recipe, decision, workload=workload, formats=formats)


def is_open(recipe: Recipe) -> bool:
    """Whether a plan chooses the layout: not of exact runs, nor of tasks that play."""
    plays = kind_of(recipe.task.kind).plays
    return recipe.parallel.auto and not recipe.train.exact and not plays


def check_decision_respects_recipe(recipe: Recipe, decision: Decision) -> None:
    """A plan fills only what a recipe leaves open. Raises RuntimeError: the fault is shoal's."""
    launch, parallel, taken = recipe.launch, recipe.parallel, decision.layout
    given: dict[str, tuple[Any, Any]] = {
        "train.micro_batch_samples": (
            recipe.train.micro_batch_samples,
            decision.micro_batch_samples,
        ),
        "launch.threads_per_worker": (launch.threads_per_worker, decision.threads_per_worker),
        "precision.compute": (recipe.precision.compute, decision.compute),
    }
    asked = given_layout(recipe)
    for axis in DEGREES:
        if getattr(parallel, axis) is not None:
            given[f"parallel.{axis}"] = (asked.degree(axis), taken.degree(axis))
    if taken.workers > 1:  # a lone worker is a process either way
        given["launch.workers"] = (launch.workers, decision.workers)
    if isinstance(parallel.shard, Shard) and taken.shard > 1:
        given["parallel.shard.level"] = (parallel.shard.level, decision.shard_level_of(recipe))
    if parallel.pipeline is not None and taken.pipeline > 1:
        wanted = (parallel.pipelining.schedule, parallel.pipelining.stages)
        given["parallel.pipeline.schedule"] = (wanted, decision.schedule_of(recipe))
    if parallel.recompute != "none":
        given["parallel.recompute"] = (parallel.recompute, decision.recompute_of(recipe))
    for key, (wanted, got) in given.items():
        if wanted not in ("auto", got):
            raise RuntimeError(f"{key}: the recipe says {wanted}, the plan took {got}")


def check_decision(recipe: Recipe, decision: Decision) -> None:
    """What was decided earlier goes with the recipe. Raises ConfigError, RuntimeError."""
    check_decision_respects_recipe(recipe, decision)
    micro, threads = decision.micro_batch_samples, decision.threads_per_worker
    if min(micro, threads) < 1:
        raise ConfigError([Problem("plan", f"micro batch {micro}, {threads} threads a worker")])
    refuse(
        replace(
            combination_of(recipe, decision.layout),
            workers=decision.workers if decision.layout.workers > 1 else "processes",
            micro_batch_samples=micro,
        )
    )


def decide_joined(
    recipe: Recipe, *, inputs: Inputs, cores_per_worker: int, formats: dict[str, Any]
) -> Decision:
    """The decision for workers that another launcher has started. Raises ConfigError."""
    layout = check(recipe)
    refuse_illegal(recipe, layout, config=trained_config(recipe, inputs=inputs))
    cores = cores_per_worker * layout.workers
    formats = {**formats, "compute": _compute(recipe, formats=formats)}
    workload = workload_for(recipe, inputs=inputs, compute=formats["compute"])
    decision = _by_rule(recipe, layout=layout, cores=cores, formats=formats, workload=workload)
    return _with_figures(recipe, decision, workload=workload, formats=formats)


def _kind(recipe: Recipe, *, layout: Layout, devices: int) -> Literal["threads", "processes"]:
    if recipe.launch.workers != "auto":
        return recipe.launch.workers
    if recipe.sync.kind == "hogwild":
        return "threads" if layout.replicate > 1 else "processes"
    alone = recipe.sync.kind in OWN_PARAMETERS or recipe.sync.codec.kind != "none"
    alone = alone or recipe.launch.link is not None
    if alone or recipe.parallel.fewest_replicas is not None or layout.replica_workers > 1:
        return "processes"
    if layout.replicate > 1 and not devices and recipe.model.dropout != "framework":
        return "threads"
    return "processes"


def fitting_samples(recipe: Recipe, workload: Workload | None) -> int:
    """Samples of a micro batch at most, where none is timed."""
    tokens = recipe.data.sequence_tokens if workload is None else workload.sequence_tokens
    return max(1, _MICRO_TOKENS // tokens)


def _by_rule(
    recipe: Recipe,
    *,
    layout: Layout,
    cores: int,
    formats: dict[str, Any],
    workload: Workload | None = None,
) -> Decision:
    """What needs no plan: the layout is given, and the rest follows from cores and tokens."""
    chosen, fitting = recipe.train.micro_batch_samples, fitting_samples(recipe, workload)
    if recipe.train.exact:  # nothing that changes a bit may depend on the number of workers
        threads, reason = 1, "exact: one thread and one micro batch, whatever the degree"
        eighth = max(1, recipe.train.global_batch_samples // 8)
        micro = (
            largest_micro_batch(recipe, parts=1, at_most=min(fitting, eighth))
            if chosen == "auto"
            else chosen
        )
        if (recipe.train.global_batch_samples // layout.replicate) % micro:
            problem = f"{micro} samples a micro batch do not divide a share of {layout.replicate}"
            raise ConfigError([Problem("train.micro_batch_samples", problem)])
    else:
        threads = max(1, cores // layout.workers)
        reason = "by rule" if recipe.parallel.auto else "as the recipe says"
        micro = (
            largest_micro_batch(recipe, parts=layout.replicate * layout.shard, at_most=fitting)
            if chosen == "auto"
            else chosen
        )
    if recipe.launch.threads_per_worker != "auto":
        threads = recipe.launch.threads_per_worker
    kind = _kind(recipe, layout=layout, devices=formats["devices"])
    if kind == "threads" and layout.replicate > 1 and recipe.launch.workers == "auto":
        reason += "; threads share one copy of the parameters"
    return Decision(layout, kind, threads, micro, formats["compute"], reason)


def workload_for(recipe: Recipe, *, inputs: Inputs, compute: str) -> Workload | None:
    """The step of the recipe, or None for a family whose sizes are not known."""
    try:
        config = trained_config(recipe, inputs=inputs)
        return workload_of(recipe, config=config, precision=FORMATS[compute])
    except ModelError:
        return None


def _with_figures(
    recipe: Recipe, decision: Decision, *, workload: Workload | None, formats: dict[str, Any]
) -> Decision:
    """The decision with what the model FLOPs of a token are, and the peak of what it runs on."""
    flops = None
    if workload is not None:
        flops = flops_per_token(workload.facts, sequence_tokens=workload.sequence_tokens)
    predicted = decision.predicted
    if workload is not None and not formats["devices"]:
        predicted = {**predicted, **memory_of_worker(recipe, decision, workload=workload)}
    note = ""
    if recipe.precision.compute == "auto" and decision.compute == "bfloat16":
        note = f"; bfloat16 products are {formats['format_ratio']:.1f} x float32's here"
    return replace(
        decision,
        reason=decision.reason + note,
        predicted=predicted,
        flops_per_token=flops,
        device=formats["device_name"] or "cpu",
        peak_flops_per_second=_peak(decision, formats=formats),
    )


def _peak(decision: Decision, *, formats: dict[str, Any]) -> float | None:
    """FLOPs per second of all workers: by the hardware table on devices, else as measured.

    Of a CPU, the fastest product that its cores were seen to do, for the cores that are used.
    """
    if formats["devices"]:
        known = device_named(formats["device_name"])
        peak = known.peak.get(FORMATS[decision.compute]) if known else None
        return peak * decision.layout.workers if peak else None
    cores = usable_cores()
    used = min(cores, decision.layout.workers * decision.threads_per_worker)
    return float(formats["peaks"][decision.compute]) * used / cores


def _compute(recipe: Recipe, *, formats: dict[str, Any]) -> Format:
    wanted = recipe.precision.compute
    if wanted == "float16" and not formats["devices"]:
        raise UserError(
            "precision.compute: float16 needs a GPU, got a CPU, where it is slower than float32 "
            "and overflows; use float32, or bfloat16 where doctor calls it fast"
        )
    return format_of(wanted, auto=formats["compute"])


def formats_here(recipe: Recipe, *, pool: WorkerPool, console: Console) -> dict[str, Any]:
    """Devices and number formats of this machine, from the cache or from a worker's look."""
    wanted = recipe.launch.device
    path = cache_directory() / "machines" / f"{machine_key()}-{wanted}.json"
    found: dict[str, Any] = {}
    if path.is_file():
        try:
            found = dict(msgspec.convert(json.loads(path.read_bytes()), type=_Formats))
        except (OSError, ValueError, RecursionError) as error:
            console.line(f"warning: {path} is damaged ({error!r}); measuring anew")
    if not found:
        wait_for_imports(pool, console=console)
        console.phase("looking at this machine's number formats")
        payload = {"device": wanted, "threads": usable_cores()}
        target = "shoal.engine.measure:run_formats"
        found = measuring_job(target, payload, pool=pool, console=console)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(found, indent=1) + "\n")
    return {**found, "compute": _compute(recipe, formats=found)}
