"""Searches the legal layouts of a cluster for the fastest, cheapest or smallest that fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from shoal.errors import UserError
from shoal.layout import Layout
from shoal.legal import (
    CHOSEN_AXES,
    Combination,
    ModelFacts,
    axes_of,
    fits_schedule,
    not_yet,
    problems,
    tensor_degrees,
)
from shoal.legal.schedules import ZERO_BUBBLE
from shoal.plan.cost.step import Estimator, Prediction
from shoal.plan.hardware import GIB, Cluster, Nodes
from shoal.plan.workload import LEVELS, Candidate, Workload

GOALS = ("speed", "cost", "devices")


@dataclass(frozen=True, kw_only=True)
class Space:
    """What the search may choose; a value given by the user narrows the axis to it.

    `fixed` maps names of `Candidate` fields and axes to their one allowed value; a policy, its
    period and its codec are only ever what is fixed, since they change what is learned.
    `runnable` leaves only what shoal itself runs today. `headroom` is the share of device memory
    that a plan must leave free: the error of the memory model.
    """

    fixed: dict[str, object] = field(default_factory=dict)
    runnable: bool = False
    headroom: float = 0.04

    def allows(self, name: str, *, value: object) -> bool:
        """Whether `value` is allowed for `name`."""
        return name not in self.fixed or self.fixed[name] == value


@dataclass(frozen=True, kw_only=True)
class Found:
    """The best plan, the runners-up with another layout, and the best of each family."""

    best: Prediction
    runners_up: list[Prediction]
    families: dict[str, Prediction]
    examined: int

    @property
    def rejected(self) -> dict[str, Prediction]:
        """The best of each other family."""
        return {name: each for name, each in self.families.items() if each is not self.best}


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def layouts(
    facts: ModelFacts, *, cluster: Cluster, workload: Workload, space: Space
) -> Iterator[Layout]:
    """Every legal layout that uses all devices; see `problems` of legal.py for the rules."""
    able = axes_of(facts.family) if facts.family != "stated sizes" else axes_of("llama")
    node, workers = cluster.node_devices, cluster.workers
    tensors = [t for t in tensor_degrees(facts) if t <= node] if "tensor" in able else [1]
    for tensor in tensors:
        if workers % tensor or not space.allows("tensor", value=tensor):
            continue
        for pipeline in divisors(workers // tensor):
            allowed = pipeline == 1 or "pipeline" in able
            if (
                pipeline > facts.layers
                or not allowed
                or not space.allows("pipeline", value=pipeline)
            ):
                continue
            rest = workers // tensor // pipeline
            chosen = "context" in CHOSEN_AXES or "context" in space.fixed or not space.runnable
            for context in _contexts(rest, workload=workload, allowed="context" in able and chosen):
                if space.allows("context", value=context):
                    yield from _splits(
                        Layout(tensor=tensor, pipeline=pipeline, context=context),
                        facts=facts,
                        copies=rest // context,
                        node=node,
                        space=space,
                    )


def _contexts(rest: int, *, workload: Workload, allowed: bool) -> list[int]:
    """Context degrees that leave each rank at least 2,048 tokens of a row, in two slices."""
    if not allowed:
        return [1]
    tokens = workload.sequence_tokens
    most = tokens // 2048
    able = [c for c in divisors(rest) if c <= most and c & (c - 1) == 0 and tokens % (2 * c) == 0]
    return sorted({1, *able})


def _splits(
    inner: Layout, *, facts: ModelFacts, copies: int, node: int, space: Space
) -> Iterator[Layout]:
    """Ways to divide `copies` between shard and replicate: one, all, or within a node."""
    near = max(1, node // (inner.tensor * inner.context))
    options = {1, copies} | ({near} if copies % near == 0 else set())
    if {"shard", "replicate"} & set(space.fixed):
        options = {shard for shard in divisors(copies) if space.allows("shard", value=shard)}
    for shard in sorted(options):
        if not space.allows("replicate", value=copies // shard):
            continue
        whole = replace(inner, shard=shard, replicate=copies // shard)
        for expert in divisors(shard * inner.context) if facts.experts else [1]:
            spread = replace(whole, expert=expert)
            allowed = space.allows("expert", value=expert) and facts.experts % expert == 0
            if allowed and not (space.runnable and _refused(spread, facts=facts, space=space)):
                yield spread


def _refused(layout: Layout, *, facts: ModelFacts, space: Space) -> bool:
    """Whether a run in this layout would not start, or not under the policy that is asked for."""
    fixed = {key: str(space.fixed[key]) for key in ("policy", "codec") if key in space.fixed}
    asked = Combination(layout=layout, workers="processes", **fixed).of_model(facts)  # type: ignore[arg-type]
    return bool(not_yet(asked) or [p for p in problems(asked) if p.where.startswith("sync.")])


def _candidates(layout: Layout, *, workload: Workload, space: Space) -> Iterator[Candidate]:
    """Every other choice for a layout; recompute is left to `_least_recompute`."""
    copies = layout.replicate * layout.shard
    if workload.global_batch_samples % copies:
        return
    share = workload.global_batch_samples // copies
    levels = LEVELS if layout.shard > 1 else ("parameters",)
    for micro in divisors(share):
        if micro > 64 or not space.allows("micro_batch_samples", value=micro):
            continue
        micro_batches = share // micro
        for schedule, chunks in _schedules(layout, workload=workload, micro_batches=micro_batches):
            if not space.allows("schedule", value=schedule):
                continue
            if not space.allows("chunks", value=chunks):
                continue
            for level in levels:
                apart = schedule in ZERO_BUBBLE and layout.shard > 1 and level != "optimizer"
                if apart and space.runnable:  # legal/rules.py
                    continue
                if space.allows("level", value=level):
                    yield Candidate(
                        layout=layout,
                        micro_batch_samples=micro,
                        schedule=schedule,
                        chunks=chunks,
                        level=level,
                        policy=str(space.fixed.get("policy", "every-step")),
                        every_steps=int(str(space.fixed.get("every_steps", 1))),
                        codec=str(space.fixed.get("codec", "none")),
                    )


def _schedules(
    layout: Layout, *, workload: Workload, micro_batches: int
) -> Iterator[tuple[str, int]]:
    """Schedules worth trying. gpipe is left out: as long as 1f1b, and never holds less."""
    stages, layers = layout.pipeline, workload.facts.layers
    if fits_schedule("1f1b", ranks=stages, micro_batches=micro_batches):
        yield "1f1b", 1
    if stages == 1:
        return
    if micro_batches % stages == 0:
        for chunks in (2, 4, 8):
            if stages * chunks <= layers:
                yield "interleaved-1f1b", chunks
        if stages * 2 <= layers:
            yield "interleaved-zero-bubble", 2
    if stages * 2 <= layers and micro_batches >= 2 * stages:
        yield "zbv-zero-bubble", 2


def _least_recompute(estimator: Estimator, *, candidate: Candidate, space: Space) -> list[str]:
    """Recompute kinds to try, least first: the first that fits is the fastest."""
    if (
        candidate.schedule in ZERO_BUBBLE and space.runnable
    ):  # they take apart what recompute needs whole
        return ["none"] if space.allows("recompute", value="none") else []
    if "recompute" in space.fixed:
        return [str(space.fixed["recompute"])]
    middle = [] if estimator.software.flash else ["selective"]
    return ["none", *middle, "full"]


def find(estimator: Estimator, *, space: Space | None = None, runners_up: int = 4) -> Found:
    """The fastest plan that fits, with those that come next.

    Exact over the space: a candidate is only passed over when it does not fit, or when the
    compute of its slowest stage alone takes longer than the best plan of its family.
    Raises UserError when nothing fits, with the smallest change that would.
    """
    space = space or Space()
    by_layout: dict[Layout, Prediction] = {}
    examined = 0
    for candidate in _everything(estimator, space=space):
        examined += 1
        known = by_layout.get(candidate.layout)
        if known and estimator.floor_seconds(candidate) >= known.step_seconds:
            continue
        prediction = _first_that_fits(estimator, candidate=candidate, space=space)
        if prediction and (known is None or prediction.step_seconds < known.step_seconds):
            by_layout[candidate.layout] = prediction
    if not by_layout:
        raise UserError(_nothing_fits(estimator, space=space, examined=examined))
    ordered = sorted(by_layout.values(), key=lambda each: each.step_seconds)
    families: dict[str, Prediction] = {}
    for prediction in ordered:
        families.setdefault(family_of(prediction.candidate.layout), prediction)
    return Found(
        best=ordered[0],
        runners_up=ordered[1 : runners_up + 1],
        families=families,
        examined=examined,
    )


def _everything(estimator: Estimator, *, space: Space) -> Iterator[Candidate]:
    """Every candidate of the space, layout by layout; recompute is left to the search."""
    workload = estimator.workload
    for layout in layouts(
        workload.facts, cluster=estimator.cluster, workload=workload, space=space
    ):
        yield from _candidates(layout, workload=workload, space=space)


def _first_that_fits(
    estimator: Estimator, *, candidate: Candidate, space: Space
) -> Prediction | None:
    for recompute in _least_recompute(estimator, candidate=candidate, space=space):
        tried = candidate if recompute == "none" else replace(candidate, recompute=recompute)
        if estimator.fits(tried, headroom=space.headroom):
            return estimator.predict(tried)
    return None


def family_of(layout: Layout) -> str:
    """The axes that a layout cuts along, as words; the replicate axis is named when alone."""
    names = [axis for axis in ("shard", "context", "tensor", "pipeline") if layout.degree(axis) > 1]
    if layout.expert > 1:
        names.append("expert")
    return " + ".join(names) or ("replicate" if layout.replicate > 1 else "one worker")


def _nothing_fits(estimator: Estimator, *, space: Space, examined: int) -> str:
    """Says by how much the best attempt misses, and the smallest change that would fit."""
    workload, cluster = estimator.workload, estimator.cluster
    if not examined:
        return (
            f"no layout of {cluster.workers} devices can run {workload.global_batch_samples} "
            f"samples per step of this {workload.facts.family} model: the replicas must divide the "
            "batch, tensor its heads, pipeline its blocks. Change the batch or the devices, or "
            "leave more axes open."
        )
    least = min(
        estimator.memory_bytes(replace(candidate, recompute="full"))
        for candidate in _everything(estimator, space=space)
    )
    have = cluster.smallest_memory_bytes
    change = _more_devices(estimator, space=space)
    return (
        f"{workload.facts.parameters / 1e9:.3g}B parameters do not fit on {cluster} at any of "
        f"{examined} layouts: the smallest needs {least / GIB:.1f} GiB per device with full "
        f"recompute, a device has {have / GIB:.1f} GiB.\n    {change}"
    )


def _more_devices(estimator: Estimator, *, space: Space) -> str:
    """The smallest doubling of nodes that fits, as a sentence."""
    cluster = estimator.cluster
    for factor in (2, 4, 8, 16, 32, 64, 128):
        groups = tuple(replace(group, count=group.count * factor) for group in cluster.groups)
        larger = replace(cluster, groups=groups)
        wider = replace(
            estimator,
            cluster=larger,
            workload=replace(
                estimator.workload,
                global_batch_samples=estimator.workload.global_batch_samples * factor,
            ),
        )
        for candidate in _everything(wider, space=space):
            if wider.fits(replace(candidate, recompute="full"), headroom=space.headroom):
                return (
                    f"The smallest change that fits: {larger.workers} such devices (or a "
                    "smaller model, or shorter rows)."
                )
    return "No number of such devices up to 128 times as many would do: use larger devices."


def subclusters(cluster: Cluster) -> Iterator[Cluster]:
    """Smaller clusters of the same nodes: parts of one node, then 1, 2, 4, ... nodes."""
    if len(cluster.groups) > 1:
        yield cluster
        return
    group = cluster.groups[0]
    devices = 1
    while devices < group.devices:
        part = Nodes(count=1, devices=devices, device=group.device)
        yield replace(cluster, groups=(part,))
        devices *= 2
    count = 1
    while count < group.count:
        yield replace(cluster, groups=(replace(group, count=count),))
        count *= 2
    yield cluster


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What one number of devices gives: seconds and US dollars for the whole run (0 unknown)."""

    prediction: Prediction
    cluster: Cluster
    seconds: float
    price: float


def offers(estimator: Estimator, *, tokens: int, space: Space | None = None) -> list[Offer]:
    """The best plan of each smaller cluster and of the whole one, for a run over `tokens`."""
    result = []
    for part in subclusters(estimator.cluster):
        try:
            best = find(replace(estimator, cluster=part), space=space).best
        except UserError:
            continue
        seconds = tokens / best.tokens_per_second
        result.append(
            Offer(
                prediction=best,
                cluster=part,
                seconds=seconds,
                price=seconds / 3600 * part.price_per_hour,
            )
        )
    return result


def choose(
    found: list[Offer], *, goal: str, deadline: float | None = None, budget: float | None = None
) -> Offer | None:
    """The offer that serves `goal` within the deadline (seconds) and the budget (US dollars)."""
    fitting = [
        offer
        for offer in found
        if (deadline is None or offer.seconds <= deadline)
        and (budget is None or offer.price <= budget)
    ]
    if not fitting:
        return None
    if goal == "devices":
        return min(fitting, key=lambda offer: offer.cluster.workers)
    if goal == "cost":
        return min(fitting, key=lambda offer: offer.price)
    return min(fitting, key=lambda offer: offer.seconds)
