"""Choose the layout for several hosts, by what was measured of their links (plan/over_hosts.py)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from shoal.config.recipe import Recipe
from shoal.engine.decision import Decision, given_layout, largest_micro_batch
from shoal.engine.job import Inputs
from shoal.environment import usable_cores
from shoal.launch import calls
from shoal.launch.choose import (
    check_decision_respects_recipe,
    decide_joined,
    fitting_samples,
    formats_here,
    is_open,
    workload_for,
)
from shoal.launch.devices import space_of
from shoal.launch.examined import refuse_wrong_model
from shoal.launch.links import Links
from shoal.launch.memory import SPARE, candidate_of
from shoal.launch.pool import WorkerPool
from shoal.launch.refuse import combination_of
from shoal.layout import Layout, workers_of_hosts
from shoal.legal import problems
from shoal.observe.console import Console
from shoal.plan.cost.memory import memory_on_cpu
from shoal.plan.over_hosts import Hosts, Price, choose, layouts, price
from shoal.plan.workload import DEGREES, Candidate, Workload
from shoal.units import format_bytes


def choose_over_hosts(
    recipe: Recipe,
    *,
    inputs: Inputs,
    here: Sequence[calls.Here],
    count: int,
    links: Links | None,
    pool: WorkerPool,
    console: Console,
) -> Decision:
    """The decision for `count` hosts, of which `here` have answered. Raises ConfigError.

    Threads by the host with fewest cores for each worker. A layout that a recipe gives is taken; a
    warning tells the price of tensor and context between hosts.
    """
    refuse_wrong_model(recipe, inputs=inputs, pool=pool, console=console)
    formats = dict(formats_here(recipe, pool=pool, console=console))
    workload = workload_for(recipe, inputs=inputs, compute=formats["compute"])
    least = min(here, key=lambda host: host.cores)
    hosts = None
    if links is not None:
        rate = formats["peaks"][formats["compute"]] / usable_cores()
        hosts = Hosts(
            count=count,
            cores=max(1, least.cores),
            flops_per_second=rate,
            inside=links.inside,
            between=links.between,
        )
    prices, why = list[Price](), ""
    if is_open(recipe) and count > 1:
        memory = min(host.memory_bytes for host in here)
        prices, why = _planned(recipe, hosts, workload, memory=memory, devices=formats["devices"])
        best = prices[0].candidate.layout if prices else _a_replica_each(recipe, count=count)
        recipe, asked = given(recipe, best), recipe
    else:
        asked = recipe
    layout = given_layout(recipe)
    most = max(workers_of_hosts(layout, num_hosts=count))
    cores = min(max(1, host.cores // most) for host in here)
    decision = decide_joined(recipe, inputs=inputs, cores_per_worker=cores, formats=formats)
    if prices and hosts is not None:
        decision = replace(
            decision,
            reason=_why(prices, hosts, here=here),
            predicted={**decision.predicted, "step_seconds": prices[0].step_seconds},
        )
    elif why:
        decision = replace(decision, reason=f"a replica for each host: {why}")
    if links is not None:
        decision = replace(decision, measured={**decision.measured, "links": links.to_json()})
    check_decision_respects_recipe(asked, decision)
    if hosts is not None and workload is not None:
        for line in far_axes(candidate_of(recipe, decision), workload=workload, hosts=hosts):
            console.line(line)
    return decision


def given(recipe: Recipe, layout: Layout) -> Recipe:
    """The recipe with the degrees of `layout` where it leaves them open."""
    open_axes = [axis for axis in DEGREES if getattr(recipe.parallel, axis) is None]
    degrees = {axis: layout.degree(axis) for axis in open_axes}
    degrees = {name: n for name, n in degrees.items() if n > 1 or name == "replicate"}
    return recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update=degrees)})


def _a_replica_each(recipe: Recipe, *, count: int) -> Layout:
    layout = given_layout(recipe)
    return replace(layout, replicate=recipe.parallel.replicas or count)


def _planned(
    recipe: Recipe,
    hosts: Hosts | None,
    workload: Workload | None,
    *,
    memory: int,
    devices: int,
) -> tuple[list[Price], str]:
    """What may be chosen, the fastest first; else why nothing can be judged."""
    if hosts is None:
        return [], "the links between hosts could not be measured"
    if workload is None:
        return [], "the sizes of this family are not known"
    if devices:
        return [], "GPUs over several hosts are not planned yet"
    threads = recipe.launch.threads_per_worker
    cores = None if threads == "auto" else threads
    fixed = space_of(recipe, layout=given_layout(recipe)).fixed
    degrees = {axis: int(str(fixed[axis])) for axis in DEGREES if axis in fixed}

    def fits(candidate: Candidate) -> bool:
        most = max(workers_of_hosts(candidate.layout, num_hosts=hosts.count))
        need = most * memory_on_cpu(candidate, workload=workload).live
        return not memory or need <= SPARE * memory

    able = layouts(workload, hosts=hosts, fixed=degrees, threads=cores)
    if recipe.checkpoint.where == "local":  # each host saves a whole replica
        able = (layout for layout in able if layout.replicate >= hosts.count)
    tried = [each for layout in able for each in _candidate(recipe, layout, workload=workload)]
    found = choose(tried, workload=workload, hosts=hosts, fits=fits, threads=cores)
    return found, "" if found else "no other layout uses all hosts, is legal and fits"


def _candidate(recipe: Recipe, layout: Layout, *, workload: Workload) -> Iterator[Candidate]:
    """The recipe in a layout, with the micro batch that it would get, if that is legal."""
    recipe, micro = given(recipe, layout), recipe.train.micro_batch_samples
    parts = layout.replicate * layout.shard
    if recipe.train.global_batch_samples % parts:
        return
    if micro == "auto":
        most = fitting_samples(recipe, workload)
        micro = largest_micro_batch(recipe, parts=parts, at_most=most)
    asked = replace(combination_of(recipe, layout), micro_batch_samples=micro)
    if not problems(asked.of_model(workload.facts)):
        yield Candidate(
            layout=layout,
            micro_batch_samples=micro,
            level=recipe.parallel.sharding.level,
            recompute=recipe.parallel.recompute,
            schedule=recipe.parallel.pipelining.schedule,
            chunks=recipe.parallel.pipelining.stages,
            policy=recipe.sync.kind,
            every_steps=getattr(recipe.sync, "every_steps", 1),
            codec=recipe.sync.codec.kind,
        )


def _why(prices: Sequence[Price], hosts: Hosts, *, here: Sequence[calls.Here]) -> str:
    """The choice in one line."""
    best, *others = prices
    text = (
        f"predicted {best.step_seconds:.3g} s a step over {hosts.count} hosts, "
        f"{best.between_seconds:.2g} s of it for {format_bytes(best.between_bytes)} between them "
        f"({_link(hosts)})"
    )
    if others:
        text += f"; next best {others[0].candidate.layout}, {others[0].step_seconds:.3g} s"
    least = min(here, key=lambda host: host.cores)
    if any(host.cores != least.cores for host in here):
        text += f"; reckoned with the {least.cores} cores of {least.name}, the fewest"
    return text


def _link(hosts: Hosts) -> str:
    between = hosts.between
    return f"{format_bytes(between.bytes_per_second)}/s, {1000 * between.seconds:.2g} ms one way"


def far_axes(candidate: Candidate, *, workload: Workload, hosts: Hosts) -> Iterator[str]:
    """A warning for each axis that talks in every block and lies between hosts."""
    layout, places = candidate.layout, hosts.places(candidate.layout)
    there = price(candidate, workload=workload, hosts=hosts).seconds
    near = replace(hosts, between=hosts.inside)
    inside = price(candidate, workload=workload, hosts=near).seconds
    for axis in ("tensor", "context"):
        if any(len({places[rank] for rank in ranks}) > 1 for ranks in layout.groups(axis)):
            yield (
                f"warning: {axis} {layout.degree(axis)} lies between hosts and talks in every "
                f"block: about {there[axis]:.2g} s of a step ({_link(hosts)}), inside a host "
                f"{inside[axis]:.2g} s; parallel.pipeline and parallel.replicate send less"
            )
