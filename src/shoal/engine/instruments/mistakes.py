"""Planned mistakes: what strategies get wrong in the field, made on purpose to show they are seen.

For proofs and tests only (`shoal parity --plant`); each is made on the objects of a run after they
were built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from shoal.comm.flat import Span
from shoal.comm.group import ProcessGroup
from shoal.engine.passes import Micro
from shoal.engine.step import Counted, Votes
from shoal.engine.training import Training
from shoal.errors import ConfigError, Problem, nearest
from shoal.models.experts import experts_of
from shoal.models.kernels import MaskRequest
from shoal.observe.events import Report
from shoal.parallel.local import local
from shoal.parallel.mesh import Mesh
from shoal.parallel.stages import own_blocks
from shoal.sync.policy import Gradients, Reduced


def _mean_of_means(training: Training) -> None:
    """Each micro batch divided by its own number of targets, and by the number of micro batches."""
    passes, step, settings = training.passes, training.step, training.job.recipe.train
    train, count, known = passes.train, step.count, Counted(0, Votes(), [])

    def counting(*arguments: object, **named: object) -> Counted:
        nonlocal known
        known = count(*arguments, **named)  # type: ignore[arg-type]
        return known

    def own_means(
        micros: Sequence[Micro], *, scale: float, step: int, done: Callable[[int], None]
    ) -> list[float]:
        sums = []
        for micro in micros:
            size = training.job.decision.micro_batch_samples
            num_micro_batches = settings.global_batch_samples // size
            own = max(1, training.task.count(micro.batch)) * num_micro_batches
            sums += train([micro], scale=scale * known.targets / own, step=step, done=done)
        return sums

    step.count = counting  # type: ignore[method-assign]
    passes.train = own_means  # type: ignore[method-assign]


def _without_reduction(training: Training) -> None:
    """No sum over replicas, nor over the axes inside."""

    def reduce(gradients: Gradients) -> Reduced:
        return Reduced(Span(0, gradients.flat.numel()), gradients.flat)

    training.policy.reduce = reduce  # type: ignore[method-assign]
    training.policy.buckets = lambda *, numel: []  # type: ignore[method-assign]
    training.replica.sum_partial = lambda gradients: None  # type: ignore[method-assign]


def _doubled_reduction(training: Training) -> None:
    """Sums over replicas and over the axes inside, twice."""
    once, finish = training.policy.reduce, training.replica.sum_partial

    def reduce(gradients: Gradients) -> Reduced:
        return once(replace(gradients, flat=once(gradients).values, nodes=[]))

    def finish_twice(gradients: Mapping[str, Tensor]) -> None:
        finish(gradients)
        finish(gradients)

    training.policy.reduce = reduce  # type: ignore[method-assign]
    training.policy.buckets = lambda *, numel: []  # type: ignore[method-assign]
    training.replica.sum_partial = finish_twice  # type: ignore[method-assign]


def _averaged_over_replicas(training: Training) -> None:
    """A mean over replicas where the sum belongs."""
    once = training.policy.reduce

    def reduce(gradients: Gradients) -> Reduced:
        found = once(gradients)
        found.values.div_(training.ranks.num_parts)
        return found

    training.policy.reduce = reduce  # type: ignore[method-assign]


def _same_shards(training: Training) -> None:
    """Every rank of a replica begins with the values of the first (DTensor's own init on CPU)."""
    training.ranks.inside.broadcast_(training.state.values)


def _lost_tie(training: Training) -> None:
    """The head has a copy of the embedding that is its own."""
    names = next((group for group in training.anatomy.ties), None)
    if names is None:
        raise ConfigError([Problem("fault", "lost-tie: this model has no tied parameters")])
    for name in names[1:]:
        path, _, leaf = name.rpartition(".")
        module = training.model.get_submodule(path)
        shared = module._parameters[leaf]
        assert shared is not None, f"{name}: tied to nothing"
        module._parameters[leaf] = nn.Parameter(local(shared).clone())


def _missing_partial(training: Training) -> None:
    """The gradients of norms stay partial sums."""
    sharded = training.replica.sharded
    norms = (name for name in sharded.holdings if "norm" in name.lower())
    sharded.holdings = sharded.holdings.changed({n: {"partial": frozenset()} for n in norms})


def _wrong_context_mask(training: Training) -> None:
    """One rank of the context axis sees only keys that are near, as under a window."""
    context = training.replica.context
    if context is None:
        raise ConfigError([Problem("fault", "wrong-mask: needs parallel.context of 2 or more")])
    kernel: Any = context.kernel
    right = kernel.mask

    def mask(request: MaskRequest) -> Any:
        return right(replace(request, window=request.num_queries // 2))

    if context.exchange.rank == 1:
        object.__setattr__(kernel, "mask", mask)


def _lost_expert(training: Training) -> None:
    """The gradient of one expert of each block is lost on the last rank along expert."""
    replica = training.replica
    finish, mesh = replica.sum_partial, replica.sharded.mesh
    if mesh.degree("expert") == 1:
        what = "lost-expert: this layout spreads no experts"
        raise ConfigError([Problem("fault", what, "give parallel.expert a degree above 1")])
    lost = mesh.coordinate("expert") == mesh.degree("expert") - 1
    prefixes = tuple(f"{path}." for path in experts_of(replica.model))

    def finish_less(gradients: Mapping[str, Tensor]) -> None:
        for name, gradient in gradients.items():
            if lost and name.startswith(prefixes):
                gradient[0].zero_()
        finish(gradients)

    replica.sum_partial = finish_less  # type: ignore[method-assign]


def _swapped_stages(training: Training) -> None:
    """Each rank of a pipeline begins with the blocks of the next one."""
    mesh = training.ranks.mesh
    line = ProcessGroup(_of_pipeline(training).group("pipeline"))
    first = own_blocks(training.model, training.anatomy)[0]
    values = [local(each) for each in first.parameters()]
    parts = line.gather(torch.cat([each.flatten() for each in values]))
    flat = parts[(mesh.coordinate("pipeline") + 1) % line.size]
    for value, part in zip(values, flat.split([each.numel() for each in values])):
        value.copy_(part.view(value.shape))


def _wrong_layer_types(training: Training) -> None:
    """The first block of each later stage reads the type of a layer of another kind."""
    config = training.model.config
    types = list(getattr(config, "layer_types", None) or ())
    if len(set(types)) < 2:
        raise ConfigError([Problem("fault", "wrong-layer-types: all layers are of one type")])
    _of_pipeline(training)
    for stage in training.replica.sharded.stages.own:  # type: ignore[union-attr]
        own = types[stage.start]
        if not stage.is_first:
            types[stage.start] = next(each for each in types if each != own)
    config.layer_types = types  # type: ignore[union-attr]


def _tie_summed_twice(training: Training) -> None:
    """The gradient that both ends of a pipeline have a part of is summed, and summed again."""
    once, holdings = training.replica.sum_partial, training.replica.holdings
    _of_pipeline(training)
    tied = [name for name, each in holdings.items() if "pipeline" in each.partial]

    def twice(gradients: Mapping[str, Tensor]) -> None:
        once(gradients)
        once({name: gradients[name] for name in tied})

    training.replica.sum_partial = twice  # type: ignore[method-assign]


def _of_pipeline(training: Training) -> Mesh:
    mesh = training.ranks.mesh
    if mesh.degree("pipeline") == 1:
        raise ConfigError([Problem("fault", "is of a pipeline", "give parallel.pipeline=2")])
    return mesh


MISTAKES: dict[str, Callable[[Training], None]] = {
    "mean-of-means": _mean_of_means,
    "no-reduction": _without_reduction,
    "double-reduction": _doubled_reduction,
    "mean-for-sum": _averaged_over_replicas,
    "same-shards": _same_shards,
    "lost-tie": _lost_tie,
    "missing-partial": _missing_partial,
    "wrong-mask": _wrong_context_mask,
    "lost-expert": _lost_expert,
    "swapped-stages": _swapped_stages,
    "wrong-layer-types": _wrong_layer_types,
    "tie-summed-twice": _tie_summed_twice,
}


@torch.no_grad()
def attach(name: str, training: Training, report: Report) -> None:
    """Make the mistake `name`. Raises ConfigError for one that nobody knows."""
    if name not in MISTAKES:
        raise ConfigError([Problem("fault", f"unknown mistake {name!r}", nearest(name, MISTAKES))])
    MISTAKES[name](training)
