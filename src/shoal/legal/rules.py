"""Which layout, policy and codec a model can run with, and the nearest choice that is legal."""

from __future__ import annotations

from dataclasses import fields

from shoal.errors import Problem, nearest
from shoal.layout import Layout
from shoal.legal.facts import ModelFacts
from shoal.legal.families.table import axes_of, family_of

POLICIES = ("every-step", "local-sgd", "diloco", "server", "hogwild")
CODECS = ("none", "bf16", "fp16", "int8", "int4", "topk", "powersgd")

SHARD_LEVELS = ("parameters", "gradients", "optimizer")
"""What of a replica is cut along shard: all of it, all but the parameters in forward and backward,
or the optimizer state alone (docs/layouts.md has the memory of each)."""
RECOMPUTE = ("none", "selective", "full")

IMPLEMENTED_AXES = frozenset({"replicate", "shard", "tensor"})
IMPLEMENTED_POLICIES = frozenset({"every-step"})
IMPLEMENTED_CODECS = frozenset({"none"})


def tensor_degrees(facts: ModelFacts) -> list[int]:
    """Tensor degrees that divide the query heads, key-value heads and feed-forward width."""
    widths = [facts.heads, facts.key_value_heads]
    widths += [facts.feed_forward] if facts.expert_layers < facts.layers else []
    widths += [facts.expert_feed_forward] if facts.experts else []
    return [n for n in range(1, facts.heads + 1) if all(width % n == 0 for width in widths)]


def problems(
    facts: ModelFacts,
    layout: Layout,
    *,
    policy: str = "every-step",
    codec: str = "none",
    workers: str = "processes",
    count: int | None = None,
    sequence_tokens: int | None = None,
    shard_level: str = "parameters",
    recompute: str = "none",
) -> list[Problem]:
    """Everything that makes this run impossible, each with the nearest legal choice.

    `workers` is `"processes"`, `"threads"` or `"auto"`; `count` the number of workers there are,
    when that is known; `sequence_tokens` the row length, when it is known.
    """
    found = [*_axis_problems(facts, layout), *_degree_problems(facts, layout)]
    if count is not None and layout.workers != count:
        found.append(_count_problem(layout, count=count))
    if (
        sequence_tokens is not None
        and sequence_tokens % (2 * layout.context)
        and (layout.context > 1)
    ):
        found.append(
            Problem(
                "parallel.context",
                f"{layout.context} ranks need rows of a multiple of {2 * layout.context} tokens "
                f"(two slices each, so that causal work is even), got {sequence_tokens}",
                f"set data.sequence_tokens to "
                f"{-(-sequence_tokens // (2 * layout.context)) * 2 * layout.context}",
            )
        )
    found += _kind_problems(shard_level=shard_level, recompute=recompute)
    found += _worker_problems(layout, policy=policy, workers=workers)
    found += _exchange_problems(layout, policy=policy, codec=codec)
    return found


def _axis_problems(facts: ModelFacts, layout: Layout) -> list[Problem]:
    able = axes_of(facts.family)
    found = []
    for axis in ("shard", "context", "tensor", "pipeline"):
        if layout.degree(axis) > 1 and axis not in able:
            found.append(
                Problem(
                    f"parallel.{axis}",
                    f"a {facts.family} model cannot be cut along {axis}, got {layout.degree(axis)}",
                    f"set it to 1 and use shard={layout.degree(axis)} instead; {facts.family} "
                    f"supports {', '.join(sorted(able))}",
                )
            )
    if layout.expert > 1 and not facts.experts:
        found.append(
            Problem(
                "parallel.expert",
                f"a {facts.family} model has no experts to spread, got {layout.expert}",
                "set it to 1; expert needs a mixture-of-experts model",
            )
        )
    return found


def _degree_problems(facts: ModelFacts, layout: Layout) -> list[Problem]:
    found = []
    if layout.tensor > 1 and "tensor" in axes_of(facts.family):
        legal = tensor_degrees(facts)
        if layout.tensor not in legal:
            close = min(legal, key=lambda degree: abs(degree - layout.tensor))
            found.append(
                Problem(
                    "parallel.tensor",
                    f"{layout.tensor} does not divide {facts.heads} query heads, "
                    f"{facts.key_value_heads} key-value heads and the feed-forward width",
                    f"degrees that do: {', '.join(map(str, legal))}; the nearest is {close}",
                )
            )
    if layout.pipeline > facts.layers:
        found.append(
            Problem(
                "parallel.pipeline",
                f"{layout.pipeline} stages for {facts.layers} blocks: a stage would be empty",
                f"at most {facts.layers}",
            )
        )
    if facts.experts and facts.experts % layout.expert:
        legal = [n for n in range(1, facts.experts + 1) if facts.experts % n == 0]
        close = min(legal, key=lambda degree: abs(degree - layout.expert))
        found.append(
            Problem(
                "parallel.expert",
                f"{layout.expert} does not divide {facts.experts} experts",
                f"the nearest degree that does is {close}",
            )
        )
    return found


def _kind_problems(*, shard_level: str, recompute: str) -> list[Problem]:
    kinds = (
        ("parallel.shard.level", shard_level, SHARD_LEVELS),
        ("parallel.recompute", recompute, RECOMPUTE),
    )
    return [
        Problem(where, f"expected one of {', '.join(known)}; got {kind!r}", nearest(kind, known))
        for where, kind, known in kinds
        if kind not in known
    ]


def _count_problem(layout: Layout, *, count: int) -> Problem:
    fixed = layout.workers // layout.replicate
    if count % fixed == 0:
        hint = f"set parallel.replicate to {count // fixed}"
    else:
        close = max(n for n in range(1, count + 1) if n % fixed == 0) if fixed <= count else 0
        hint = (
            f"with {fixed} workers per replica the nearest count below is {close}"
            if close
            else f"one replica alone needs {fixed} workers: lower a degree"
        )
    return Problem(
        "parallel",
        f"the degrees ({layout}) multiply to {layout.workers} workers, but there are {count}",
        hint,
    )


def _worker_problems(layout: Layout, *, policy: str, workers: str) -> list[Problem]:
    found = []
    cut = [f.name for f in fields(layout) if f.name != "replicate" and layout.degree(f.name) > 1]
    if workers == "threads" and cut:
        found.append(
            Problem(
                "launch.workers",
                f"threads carry the replicate axis only, got {', '.join(cut)}",
                f"set launch.workers to processes, or {' and '.join(cut)} to 1",
            )
        )
    if policy == "hogwild" and workers == "processes":
        found.append(
            Problem(
                "sync.kind",
                "hogwild needs workers that share one copy of the parameters, got processes",
                "set launch.workers to threads, or sync.kind to every-step",
            )
        )
    return found


def _exchange_problems(layout: Layout, *, policy: str, codec: str) -> list[Problem]:
    found = []
    if policy not in POLICIES:
        found.append(Problem("sync.kind", f"unknown policy {policy!r}", nearest(policy, POLICIES)))
    if codec not in CODECS:
        found.append(Problem("sync.codec", f"unknown codec {codec!r}", nearest(codec, CODECS)))
    elif codec != "none" and layout.replicate == 1:
        found.append(
            Problem(
                "sync.codec",
                f"{codec} has nothing to compress: there is one replica",
                "set it to none, or parallel.replicate to 2 or more",
            )
        )
    return found


def not_yet(
    layout: Layout, *, policy: str = "every-step", codec: str = "none", family: str | None = None
) -> list[Problem]:
    """What of this run is designed but not built: legal, and refused all the same.

    `family`: the model's, where it is known.
    """
    found = [
        Problem(
            f"parallel.{field.name}",
            f"{field.name} is not there yet, got {layout.degree(field.name)}",
            f"set it to 1; today these axes run: {', '.join(sorted(IMPLEMENTED_AXES))}",
        )
        for field in fields(layout)
        if layout.degree(field.name) > 1 and field.name not in IMPLEMENTED_AXES
    ]
    tabled = (
        family is None or family_of(family).tensor is not None or "tensor" not in axes_of(family)
    )
    if layout.tensor > 1 and not tabled:
        found.append(
            Problem(
                "parallel.tensor",
                f"a {family} model has no table for the tensor axis yet, got {layout.tensor}",
                f"set it to 1 and use shard={layout.tensor} instead",
            )
        )
    if policy in POLICIES and policy not in IMPLEMENTED_POLICIES:
        found.append(
            Problem(
                "sync.kind",
                f"the policy {policy} is not there yet",
                f"today these run: {', '.join(sorted(IMPLEMENTED_POLICIES))}",
            )
        )
    if codec in CODECS and codec not in IMPLEMENTED_CODECS:
        found.append(
            Problem(
                "sync.codec",
                f"the codec {codec} is not there yet",
                f"today these run: {', '.join(sorted(IMPLEMENTED_CODECS))}",
            )
        )
    return found
