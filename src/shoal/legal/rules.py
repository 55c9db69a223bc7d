"""What is legal: every rule on which layout, policy, codec and model go together, in this one file.

A rule sees one `Combination` and gives the problems in it, each with the nearest legal choice. From
the same rules come the refusals before a start, the planner's space, and the tables in docs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from shoal.errors import Problem, nearest
from shoal.layout import Layout
from shoal.legal.combination import Combination, axis_names
from shoal.legal.facts import ModelFacts
from shoal.legal.families.family import WITH_EXPERTS
from shoal.legal.families.table import axes_of, family_of
from shoal.legal.schedules import (
    ONE_STAGE,
    SCHEDULES,
    ZERO_BUBBLE,
    fits_schedule,
    schedule_takes,
)

POLICIES = (
    *("every-step", "local-sgd", "diloco", "streaming-diloco", "gossip"),
    *("server", "hogwild"),
)
CODECS = ("none", "bf16", "fp16", "int8", "int4", "sign", "topk", "powersgd")
SHARD_LEVELS = ("parameters", "gradients", "optimizer")
"""What of a replica is cut along shard: all of it, all but the parameters in forward and backward,
or the optimizer state alone (docs/guide/layouts.md has the memory of each)."""
CONTEXT_KINDS = ("ring", "ulysses")
"""How attention finds what other ranks of the context axis have."""
RECOMPUTE = ("none", "selective", "full")

IMPLEMENTED_AXES = frozenset({"replicate", "shard", "context", "tensor", "pipeline", "expert"})
IMPLEMENTED_POLICIES = frozenset(POLICIES)
CHOSEN_AXES = IMPLEMENTED_AXES - {"context"}
"""Those that a plan chooses by itself. Attention of a ring is not one of the fused kernels by which
plans reckon, so that its speed on GPUs is not known: who wants it says so."""
OWN_PARAMETERS = frozenset({"local-sgd", "diloco", "streaming-diloco", "gossip", "server"})
"""Policies under which replicas hold different parameters between two meetings."""
IMPLEMENTED_CODECS = frozenset(CODECS)


Rule = Callable[[Combination], Iterator[Problem]]


def tensor_degrees(facts: ModelFacts) -> list[int]:
    """Tensor degrees that divide the query heads, key-value heads and feed-forward width."""
    widths = [facts.heads, facts.key_value_heads, *_widths(facts)]
    return [n for n in range(1, facts.heads + 1) if all(width % n == 0 for width in widths)]


def problems(combination: Combination) -> list[Problem]:
    """Everything that keeps this run from starting today, each with the nearest legal choice."""
    return [*not_yet(combination), *illegal(combination)]


def illegal(combination: Combination) -> list[Problem]:
    """What of this run can never be."""
    return [problem for rule in _RULES for problem in rule(combination)]


def open_axes(combination: Combination) -> frozenset[str]:
    """Axes that may have a degree above 1 in this run today: a plan chooses among them."""
    able = WITH_EXPERTS if combination.family is None else axes_of(combination.family)
    return frozenset(
        axis
        for axis in CHOSEN_AXES & able
        if not [*_cut_replica(replace(combination, layout=of_two(axis)))]
    )


def of_two(axis: str) -> Layout:
    """The smallest layout of degree 2 along an axis; experts lie along shard."""
    return Layout(**{"shard" if axis == "expert" else axis: 2}, expert=2 if axis == "expert" else 1)


def not_yet(combination: Combination) -> list[Problem]:
    """What of this run is designed but not built: legal, and refused all the same."""
    layout, family = combination.layout, combination.family
    found = [
        Problem(
            f"parallel.{axis}",
            f"{axis} is not there yet, got {layout.degree(axis)}",
            f"set it to 1; today these axes run: {', '.join(sorted(IMPLEMENTED_AXES))}",
        )
        for axis in axis_names()
        if layout.degree(axis) > 1 and axis not in IMPLEMENTED_AXES
    ]
    wants_table = layout.tensor > 1 and family is not None and "tensor" in axes_of(family)
    if wants_table and family_of(str(family)).tensor is None:
        what = f"a {family} model has no table for the tensor axis yet, got {layout.tensor}"
        hint = f"set it to 1 and use shard={layout.tensor} instead"
        found.append(Problem("parallel.tensor", what, hint))
    kinds = (
        ("policy", "sync.kind", combination.policy, POLICIES, IMPLEMENTED_POLICIES),
        ("codec", "sync.codec", combination.codec, CODECS, IMPLEMENTED_CODECS),
    )
    for kind, where, name, known, built in kinds:
        if name in known and name not in built:
            hint = f"today these run: {', '.join(sorted(built))}"
            found.append(Problem(where, f"the {kind} {name} is not there yet", hint))
    return found


def _widths(facts: ModelFacts) -> list[int]:
    dense = [facts.feed_forward] if facts.expert_layers < facts.layers else []
    shared = [facts.shared_feed_forward] if facts.shared_feed_forward else []
    return dense + ([facts.expert_feed_forward, *shared] if facts.experts else [])


def _close(legal: list[int], degree: int) -> int:
    return min(legal, key=lambda each: abs(each - degree))


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _axes_of_model(combination: Combination) -> Iterator[Problem]:
    family, facts = combination.family, combination.facts
    for axis in combination.cut_axes if family is not None else ():
        degree, able = combination.layout.degree(axis), axes_of(str(family))
        instead = (
            f"set it to 1 and use {'replicate' if axis == 'shard' else 'shard'}={degree} instead"
        )
        if facts is None and axis != "shard":
            what = f"shoal has no table for the family {family}, so such a model cannot be cut "
            what += f"along {axis}, got {degree}"
            yield Problem(f"parallel.{axis}", what, f"{instead}, which takes any family")
        elif facts is not None and axis == "expert" and not facts.experts:
            what = f"a {family} model has no experts to spread, got {degree}"
            hint = "set it to 1; expert needs a mixture-of-experts model"
            yield Problem("parallel.expert", what, hint)
        elif axis not in (*able, "expert"):
            what = f"a {family} model cannot be cut along {axis}, got {degree}"
            hint = f"{instead}; {family} supports {', '.join(sorted(able))}"
            yield Problem(f"parallel.{axis}", what, hint)


def _degrees(combination: Combination) -> Iterator[Problem]:
    facts, layout = combination.facts, combination.layout
    if facts is None:
        return
    legal = tensor_degrees(facts)
    if layout.tensor > 1 and layout.tensor not in legal and "tensor" in axes_of(facts.family):
        widths = " and ".join(map(str, _widths(facts)))
        what = f"{layout.tensor} does not divide {facts.heads} query heads, "
        what += f"{facts.key_value_heads} key-value heads and the feed-forward width {widths}"
        hint = f"degrees that do: {', '.join(map(str, legal))}; "
        hint += f"the nearest is {_close(legal, layout.tensor)}"
        yield Problem("parallel.tensor", what, hint)
    if facts.experts % layout.expert:
        what = f"{layout.expert} does not divide {facts.experts} experts"
        near = _close(_divisors(facts.experts), layout.expert)
        yield Problem("parallel.expert", what, f"the nearest degree that does is {near}")
    if 1 < layout.expert < layout.context and layout.shard == 1:
        what = (
            f"{layout.context} context ranks would have the same {layout.expert} parts of experts"
        )
        hint = f"set it to {layout.context}, or parallel.shard to 2"
        yield Problem("parallel.expert", what, hint)


def _number_of_workers(combination: Combination) -> Iterator[Problem]:
    layout, count = combination.layout, combination.num_workers
    if count is None or layout.workers == count:
        return
    fixed = layout.replica_workers
    if count % fixed == 0:
        hint = f"set parallel.replicate to {count // fixed}"
    elif fixed <= count:
        hint = f"with {fixed} workers per replica the nearest count below is "
        hint += f"{count - count % fixed}"
    else:
        hint = f"one replica alone needs {fixed} workers: lower a degree"
    what = f"the degrees ({layout}) multiply to {layout.workers} workers, but there are {count}"
    yield Problem("parallel", what, hint)


def _batch(combination: Combination) -> Iterator[Problem]:
    """The global batch is split over replicate x shard in whole micro batches."""
    batch, micro = combination.global_batch_samples, combination.micro_batch_samples
    layout = combination.layout
    parts = layout.replicate * layout.shard
    sharded = layout.shard > 1
    if batch is not None and batch % parts:
        near = sorted(sorted(_divisors(batch), key=lambda n: abs(n - parts))[:2])
        what = f"{layout.replicate} replicas" + (f" x {layout.shard} shards" if sharded else "")
        yield Problem(
            "parallel.shard" if sharded else "parallel.replicate",
            f"{what} do not divide global_batch_samples {batch}",
            f"nearest degrees that do: {', '.join(map(str, near))}",
        )
    elif batch is not None and micro is not None and (batch // parts) % micro:
        share, whose = batch // parts, "a shard's" if sharded else "a replica's"
        what = f"{micro} does not divide {whose} share of {share} samples"
        fits = max(size for size in _divisors(share) if size <= micro)
        yield Problem("train.micro_batch_samples", what, f"use a divisor, such as {fits}")


def _rows(combination: Combination) -> Iterator[Problem]:
    """What cutting rows along the sequence asks of rows, heads, task and dropout."""
    tokens, degree = combination.sequence_tokens, combination.layout.context
    facts, is_ring = combination.facts, combination.context_kind == "ring"
    if degree == 1:
        return
    multiple = 2 * degree if is_ring else degree
    if tokens is not None and tokens % multiple:
        slices = "two slices each, so that causal work is even" if is_ring else "a slice each"
        what = f"{degree} ranks need rows of a multiple of {multiple} tokens ({slices}), "
        hint = f"set data.sequence_tokens to {-(-tokens // multiple) * multiple}"
        yield Problem("parallel.context", f"{what}got {tokens}", hint)
    heads = combination.layout.tensor * degree
    if not is_ring and facts is not None:
        both = math.gcd(facts.heads, facts.key_value_heads)
        if both % heads:
            near = [n for n in _divisors(both) if n % combination.layout.tensor == 0]
            what = f"ulysses gives each rank whole heads: {heads} (context x tensor) does not "
            what += f"divide {facts.heads} query heads and {facts.key_value_heads} key-value heads"
            nearest_degree = _close(near, heads) // combination.layout.tensor if near else 1
            hint = f"set parallel.context.kind to ring, or the degree to {nearest_degree}"
            yield Problem("parallel.context", what, hint)
    if not combination.token_losses:
        what = "the loss of this task is not a sum over tokens, so its rows cannot be cut, "
        hint = f"set it to 1 and use shard={degree} instead"
        yield Problem("parallel.context", f"{what}got {degree}", hint)
    if combination.dropout == "framework":
        what = "framework dropout has no key, so that ranks of the context axis would drop alike"
        yield Problem("model.dropout", what, "set it to keyed or off, or parallel.context to 1")


def _kinds(combination: Combination) -> Iterator[Problem]:
    kinds = (
        ("parallel.pipeline.schedule", combination.schedule, SCHEDULES),
        ("parallel.shard.level", combination.shard_level, SHARD_LEVELS),
        ("parallel.context.kind", combination.context_kind, CONTEXT_KINDS),
        ("parallel.recompute", combination.recompute, RECOMPUTE),
    )
    for where, kind, known in kinds:
        if kind not in known:
            what = f"expected one of {', '.join(known)}; got {kind!r}"
            yield Problem(where, what, nearest(kind, known))


def _cut_replica(combination: Combination) -> Iterator[Problem]:
    """What a replica of several workers cannot do, whatever its model."""
    layout, cut = combination.layout, combination.cut_axes
    if cut and combination.exact:
        yield from _exact(combination)
    if layout.pipeline > 1 and not combination.runs_once:
        what = "this task needs more than one forward of the model, or compares samples, which "
        hint = f"use parallel.shard={layout.pipeline} instead"
        yield Problem("parallel.pipeline", what + "stages cannot", hint)
    if cut and combination.workers == "threads":
        what = f"threads carry the replicate axis only, got {', '.join(cut)}"
        hint = f"set launch.workers to processes, or {' and '.join(cut)} to 1"
        yield Problem("launch.workers", what, hint)
    if layout.tensor > 1 and combination.dropout == "framework":
        what = "framework dropout differs between ranks of the tensor axis, which compute the same "
        hint = "set model.dropout to keyed or off, or parallel.tensor to 1"
        yield Problem("model.dropout", what + "tokens", hint)
    if combination.offload and layout.expert > 1 and layout.expert_shard == 1:
        what = f"experts that no other rank has stay on the device, got expert {layout.expert}"
        hint = f"set it to false, or parallel.shard to {2 * layout.shard}"
        yield Problem("parallel.shard.offload", what, hint)
    balanced = combination.facts is not None and combination.facts.balanced
    for axis in ("context", "pipeline") if balanced and combination.balance != "off" else ():
        if layout.degree(axis) > 1:
            what = f"a rank of the {axis} axis sees a part of what the balance loss is a product of"
            yield Problem("model.balance", what, f"set it to off, or parallel.{axis} to 1")
    if layout.tensor > 1 and combination.grid_group is not None:
        what = "a scale is of a whole row of weights, of which a rank has a part"
        yield Problem("parallel.tensor", what, f"use parallel.shard={layout.tensor} instead")
    if layout.tensor > 1 and combination.whole_logits:
        what = "the model or the task needs whole rows of logits, so its head cannot be cut by "
        yield Problem("parallel.tensor", what + "vocabulary", "set it to 1")


def _grid(combination: Combination) -> Iterator[Problem]:
    """Groups of inputs that share a scale divide the inputs of every layer."""
    group, facts = combination.grid_group, combination.facts
    if not group or facts is None:
        return
    inputs = {facts.hidden, facts.heads * facts.value_head_size, facts.feed_forward}
    wrong = sorted(each for each in inputs if each % group)
    if wrong:
        fitting = [n for n in range(1, group) if all(each % n == 0 for each in inputs)]
        what = f"{group} does not divide the {wrong[0]} inputs of a layer"
        yield Problem("train.quantise.group", what, f"{fitting[-1]} does")


def _exact(combination: Combination) -> Iterator[Problem]:
    """A micro batch's gradients must be complete before the next one's begin."""
    layout, facts = combination.layout, combination.facts
    if combination.cut_axes != ["pipeline"]:
        what = f"holds for whole replicas and for stages of a pipeline only, got {layout}"
        yield Problem("train.exact", what, "set it to false, or use parallel.replicate alone")
    elif combination.schedule not in ONE_STAGE:
        what = f"{combination.schedule} mixes the gradients of micro batches on a rank"
        yield Problem("train.exact", what, "set parallel.pipeline.schedule to 1f1b")
    elif facts is not None and facts.tied:
        what = "the embedding is tied to the head, so each end of the pipeline has a part of its "
        what += "gradient, which are summed once a step"
        hint = "set model.tie_word_embeddings=false, or use parallel.replicate alone"
        yield Problem("train.exact", what, hint)


def _pipeline(combination: Combination) -> Iterator[Problem]:
    layout, name, here = combination.layout, combination.schedule, "parallel.pipeline"
    ranks, each, facts = layout.pipeline, combination.stages_per_rank, combination.facts
    if ranks == 1:
        return
    if name in ONE_STAGE and each > 1:
        hint = "set it to 1, or the schedule to interleaved-1f1b"
        yield Problem(f"{here}.stages_per_rank", f"{name} has one, got {each}", hint)
    elif name not in ONE_STAGE and (each == 1 or (name == "zbv-zero-bubble" and each > 2)):
        hint = "set it to 2, or the schedule to 1f1b"
        wants = "exactly two" if name == "zbv-zero-bubble" else "two or more"
        yield Problem(f"{here}.stages_per_rank", f"{name} needs {wants}, got {each}", hint)
    stages = ranks * each
    if facts is not None and stages > facts.layers:
        what = f"{stages} stages for {facts.layers} blocks: a stage would be empty"
        most = facts.layers // each
        yield Problem(here, what, f"at most {most}" if most > 1 else f"use shard={ranks} instead")
    split = combination.split
    if split and (len(split) != stages or (facts and sum(split) != facts.layers)):
        what = f"expected {stages} numbers"
        what += f" that add up to {facts.layers} blocks" if facts else ""
        hint = "give one for each stage, first to last, or leave it out"
        yield Problem(f"{here}.split", f"{what}, got {list(split)}", hint)
    yield from _enough_micro_batches(combination)
    if name in ZERO_BUBBLE:
        yield from _whole_backward(combination)


def _enough_micro_batches(combination: Combination) -> Iterator[Problem]:
    layout, name, batch = combination.layout, combination.schedule, combination.global_batch_samples
    parts = layout.replicate * layout.shard
    if batch is None or batch % parts or name not in SCHEDULES:
        return
    share, ranks, micro = batch // parts, layout.pipeline, combination.micro_batch_samples

    def sizes(degree: int) -> list[int]:
        counts = {size: share // size for size in _divisors(share)}
        return [s for s, n in counts.items() if fits_schedule(name, ranks=degree, micro_batches=n)]

    able = sizes(ranks)
    if micro in able or (micro is None and able) or (micro is not None and share % micro):
        return
    count = "few samples" if micro is None else f"{share // micro} micro batches of {micro} samples"
    wants = f"{ranks} or more" if name in ("1f1b", "zbv-zero-bubble") else f"a multiple of {ranks}"
    what = f"{name} on {ranks} ranks needs {wants} micro batches a step, got {count}"
    near = next(degree for degree in range(ranks, 0, -1) if sizes(degree))
    hint = f"set it to {max(able)}" if able else f"the nearest degree that has enough is {near}"
    yield Problem("train.micro_batch_samples" if able else "parallel.pipeline", what, hint)


def _whole_backward(combination: Combination) -> Iterator[Problem]:
    """What needs a micro batch's backward in one piece, which zero-bubble schedules do not make."""
    name, level = combination.schedule, combination.shard_level
    hint = "set parallel.pipeline.schedule to 1f1b or interleaved-1f1b"
    if combination.layout.shard > 1 and level != "optimizer":
        what = f"{level} are scattered after each backward, which {name} takes apart"
        yield Problem("parallel.shard.level", what, f"set it to optimizer, or {hint[4:]}")
    for where, is_on in (
        ("parallel.recompute", combination.recompute != "none"),
        ("parallel.compile", combination.compile),
    ):
        if is_on:
            what = f"needs each backward in one piece, which {name} takes apart"
            yield Problem(where, what, hint)


def _workers(combination: Combination) -> Iterator[Problem]:
    if combination.workers == "threads" and combination.elastic:
        what = "threads of one process live and die together: their degree cannot shrink"
        hint = "use launch.workers=processes, or a fixed degree"
        yield Problem("parallel.replicate", what, hint)
    if combination.workers == "threads" and combination.dropout == "framework":
        hint = "use model.dropout=keyed, or launch.workers=processes"
        yield Problem("model.dropout", "framework dropout is refused with threads", hint)
    if combination.policy in OWN_PARAMETERS and combination.workers == "threads":
        what = f"{combination.policy} needs parameters of each replica's own: threads share one "
        hint = "set launch.workers to processes, or sync.kind to every-step"
        yield Problem("sync.kind", what + "copy", hint)
    if combination.policy in OWN_PARAMETERS and combination.exact:
        what = f"holds for replicas that step together, got {combination.policy}"
        yield Problem("train.exact", what, "set it to false, or sync.kind to every-step")
    if combination.policy == "server":
        yield from _copies_at_servers(combination)
    if combination.policy == "server" and combination.elastic:
        what = "replicas around a server go on without a lost one anyhow"
        yield Problem("parallel.replicate", what, "give a fixed degree")
    if combination.policy == "hogwild" and combination.exact:
        what = "holds for replicas that step together, got hogwild"
        yield Problem("train.exact", what, "set it to false, or sync.kind to every-step")
    if combination.policy == "hogwild" and combination.cut_axes:
        axes = " and ".join(combination.cut_axes)
        what = f"threads share whole parameters, without locks, got {axes}"
        yield Problem("sync.kind", what, f"set {axes} to 1, or sync.kind to every-step")
    apart = combination.workers == "processes" and combination.layout.replicate > 1
    if combination.policy == "hogwild" and apart:
        what = "hogwild needs workers that share one copy of the parameters, got processes"
        hint = "set launch.workers to threads, or sync.kind to every-step"
        yield Problem("sync.kind", what, hint)


def _copies_at_servers(combination: Combination) -> Iterator[Problem]:
    """Each rank pulls its own part when it comes to it: of parameters that two ranks hold, one
    might get what another replica's push has changed meanwhile, and the other not."""
    facts, axes = combination.facts, combination.cut_axes
    copying = {"tensor", "expert"} | ({"pipeline"} if facts is not None and facts.tied else set())
    copied = [axis for axis in axes if axis in copying]
    if copied:
        named, by_stages = " and ".join(copied), copied == ["pipeline"]
        why = "the embedding, which is the head too" if by_stages else "some parameters"
        what = f"ranks along {named} hold copies of {why}, and may pull them at different moments"
        hint = f"set {named} to 1 (shard and context go with it), or sync.kind to every-step"
        if by_stages:
            hint = "set model.tie_word_embeddings=false, or sync.kind to every-step"
        yield Problem("sync.kind", what, hint)


def _exchange(combination: Combination) -> Iterator[Problem]:
    policy, codec = combination.policy, combination.codec
    if policy not in POLICIES:
        yield Problem("sync.kind", f"unknown policy {policy!r}", nearest(policy, POLICIES))
    if codec not in CODECS:
        yield Problem("sync.codec", f"unknown codec {codec!r}", nearest(codec, CODECS))
    elif codec != "none" and combination.layout.replicate == 1:
        what = f"{codec} has nothing to compress: there is one replica"
        yield Problem("sync.codec", what, "set it to none, or parallel.replicate to 2 or more")
    if codec in CODECS and codec != "none" and policy in ("local-sgd", "gossip"):
        what = f"{policy} exchanges parameters, which {codec} would round without end, got {codec}"
        yield Problem("sync.codec", what, "set it to none, or sync.kind to diloco")
    if codec in ("topk", "powersgd") and policy == "streaming-diloco":
        what = f"a fragment is one message on its way, and {codec} is none of one size, got {codec}"
        yield Problem("sync.codec", what, "set it to int8 or int4, or sync.kind to diloco")
    facts = combination.facts
    if facts is not None and combination.fragments > facts.layers:
        what = f"{combination.fragments} fragments of whole blocks, and there are {facts.layers}"
        yield Problem("sync.fragments", what, f"set it to {facts.layers} at most")
    if codec in CODECS and codec != "none" and combination.workers == "threads":
        what = f"{codec} compresses what crosses between processes: threads share their memory"
        yield Problem("sync.codec", what, "set launch.workers to processes, or the codec to none")
    if codec in CODECS and codec != "none" and combination.exact:
        what = f"{codec} rounds what each replica has, so other replicas give other bits"
        yield Problem("train.exact", what, "set it to false, or sync.codec.kind to none")


def _shares(combination: Combination) -> Iterator[Problem]:
    """Shares by speed move whole micro batches from one replica to another."""
    batch, micro = combination.global_batch_samples, combination.micro_batch_samples
    if combination.shares == "equal" or batch is None:
        return
    layout = combination.layout
    if micro is None:
        what = "measured shares are whole micro batches, whose size decides how fine they can be"
        each = max(1, batch // (4 * layout.replicate * layout.shard))
        yield Problem("train.micro_batch_samples", what, f"set a number, such as {each}")
        return
    least, _ = schedule_takes(combination.schedule, ranks=layout.pipeline)
    each = batch // (micro * layout.shard * layout.replicate)
    if layout.replicate > 1 and 0 < each <= least:
        what = (
            f"each replica has {each} micro batch{'es' if each > 1 else ''} and needs as many, so "
        )
        hint = "set train.micro_batch_samples lower, or sync.shares to equal"
        yield Problem("sync.shares", what + "none can be given to another", hint)


_RULES: tuple[Rule, ...] = (
    *(_axes_of_model, _degrees, _number_of_workers, _batch, _rows, _shares),
    *(_kinds, _cut_replica, _grid, _pipeline, _workers, _exchange),
)
