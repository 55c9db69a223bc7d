"""Choose the layout for the accelerators of this machine, by the hardware table and the plan."""

from __future__ import annotations

from dataclasses import replace

from shoal.config.recipe import Recipe, Shard
from shoal.engine.decision import Decision
from shoal.errors import UserError
from shoal.launch.memory import candidate_of
from shoal.launch.refuse import combination_of
from shoal.layout import Layout
from shoal.legal import open_axes
from shoal.plan.cost.step import Estimator
from shoal.plan.devices import device_named
from shoal.plan.from_recipe import choices_of
from shoal.plan.hardware import Cluster, Nodes
from shoal.plan.search import Found, Space, find
from shoal.plan.workload import DEGREES, Workload


def on_devices(
    recipe: Recipe,
    decision: Decision,
    *,
    workload: Workload,
    layout: Layout,
    devices: int,
    device_name: str,
) -> Decision:
    """The fastest plan that fits: axes the recipe leaves open, micro batch, level, recompute.

    `decision`: what stands when the hardware table does not know the device, or when nothing seems
    to fit; then the run itself will tell. `layout`: the degrees that the recipe gives.
    """
    estimator = _estimator(workload, devices=devices, device_name=device_name)
    if estimator is None:
        return replace(decision, reason=f"{decision.reason}; {device_name} is unknown")
    try:
        found = find(estimator, space=space_of(recipe, layout=layout))
    except UserError:
        return replace(decision, reason=f"{decision.reason}; it may not fit")
    best, name = found.best, estimator.cluster.groups[0].device.name
    return replace(
        decision,
        layout=best.candidate.layout,
        workers="processes",
        micro_batch_samples=best.candidate.micro_batch_samples,
        shard_level=best.candidate.level,
        recompute=best.candidate.recompute,
        schedule=best.candidate.schedule,
        stages_per_rank=best.candidate.chunks,
        reason=f"predicted {best.step_seconds:.3g} s a step on {name}{_instead(found)}",
        predicted=best.to_json(),
    )


def predicted_on_devices(
    recipe: Recipe, decision: Decision, *, workload: Workload, devices: int, device_name: str
) -> Decision:
    """The decision that the recipe makes, with the time and memory that are predicted for it."""
    estimator = _estimator(workload, devices=devices, device_name=device_name)
    if estimator is None or decision.layout.workers > devices:
        return decision
    prediction = estimator.predict(candidate_of(recipe, decision))
    return replace(decision, predicted=prediction.to_json())


def _estimator(workload: Workload, *, devices: int, device_name: str) -> Estimator | None:
    """None for a device that the hardware table does not know."""
    known = device_named(device_name)
    if known is None:
        return None
    cluster = Cluster(
        groups=(Nodes(count=1, devices=devices, device=known),),
        network_bytes_per_second=known.network_bytes_per_second,
    )
    return Estimator(workload, cluster)


def space_of(recipe: Recipe, *, layout: Layout) -> Space:
    """What the recipe leaves to the plan. `recompute: none` is what stands where nobody chose."""
    parallel = recipe.parallel
    fixed = choices_of(recipe, layout=layout).fixed
    able = open_axes(combination_of(recipe, layout))
    if parallel.fewest_replicas is not None:
        able &= {"replicate"}
    fixed |= {axis: layout.degree(axis) for axis in DEGREES if axis not in able}
    if isinstance(parallel.shard, Shard):
        fixed["level"] = parallel.shard.level
    if parallel.recompute != "none":
        fixed["recompute"] = parallel.recompute
    return Space(fixed=fixed)


def _instead(found: Found) -> str:
    """What whole replicas would have cost, where something else was chosen."""
    if found.best.candidate.layout.replica_workers == 1:
        return ""
    other = found.families.get("replicate")
    if other is None:
        return "; whole replicas do not fit"
    return f"; whole replicas {other.step_seconds / found.best.step_seconds - 1:+.0%}"
