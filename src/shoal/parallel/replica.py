"""The model of one rank: built on the meta device, cut for this rank, and given its values."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shoal.comm.group import watched
from shoal.errors import ConfigError, ModelError, Problem, nearest
from shoal.models import init
from shoal.models.adapter import attach, new_head, rounded_shapes
from shoal.models.anatomy import (
    Anatomy,
    anatomy_of,
    canonical_parameters,
    check_logits,
    weight_decay_names,
)
from shoal.models.draw import InitRecord
from shoal.models.dropout import apply_keyed
from shoal.models.forward_context import ForwardContext, set_forward_context
from shoal.models.huggingface import build_meta
from shoal.models.init import Source
from shoal.models.kernels import local
from shoal.models.on_grid import put_on_grid
from shoal.models.pretrained import PretrainedWeights, folder_config
from shoal.models.routing import Load, balance_of
from shoal.models.small import small_model
from shoal.parallel import shard
from shoal.parallel.apply import apply
from shoal.parallel.local import Holdings, ShardedModel, sharded_of
from shoal.parallel.materialise import materialise
from shoal.parallel.mesh import Mesh
from shoal.parallel.model import ModelSettings
from shoal.parallel.rows import Context
from shoal.parallel.settings import Settings
from shoal.parallel.vocabulary import Vocabulary


@dataclass
class Replica:
    """A model, whole or cut. What every strategy needs around a forward and backward is here."""

    settings: ModelSettings
    model: nn.Module
    anatomy: Anatomy
    record: InitRecord
    shapes: dict[str, tuple[int, ...]]
    """Of every parameter of the whole model, tied ones once; known before it is cut."""
    decayed: frozenset[str]
    frozen: frozenset[str]
    matrices: frozenset[str]
    """Matrices of the blocks: what Muon is for."""
    notes: list[str]
    """What a person should know about its dropout."""
    rounded: dict[str, tuple[int, int]]
    """Of frozen matrices [out, in] that are no parameters but kept in few bits."""

    @property
    def sharded(self) -> ShardedModel:
        """How it was cut."""
        return sharded_of(self.model)

    @property
    def holdings(self) -> Holdings:
        """What this rank has of each parameter."""
        return self.sharded.holdings

    @property
    def is_cut(self) -> bool:
        """Whether other ranks have parts of it."""
        return self.sharded.mesh.layout.replica_workers > 1

    @property
    def vocabulary(self) -> Vocabulary | None:
        """The part of the vocabulary whose logits this rank has; None: all."""
        return self.sharded.vocabulary

    @property
    def context(self) -> Context | None:
        """The part of each row that this rank has; None: whole rows."""
        return self.sharded.context

    @property
    def num_parameters(self) -> int:
        """Elements of the whole model, tied ones once."""
        return sum(math.prod(shape) for shape in [*self.shapes.values(), *self.rounded.values()])

    def run(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """`function(model, *arguments)`, with what it needs of the model gathered. PeersLost."""
        if not self.is_cut:
            return shard.forward(self.model, function, *arguments)
        around = ForwardContext(kernel=self.context.kernel if self.context else local)
        with set_forward_context(around):
            return watched(lambda: shard.forward(self.model, function, *arguments))

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients. Raises PeersLost."""
        if not self.is_cut:
            loss.backward()  # type: ignore[no-untyped-call]
            return
        watched(loss.backward)

    def sum_partial(self, gradients: Mapping[str, Tensor]) -> None:
        """After the step's last backward: the sums that axes still lack. Raises PeersLost."""
        if self.is_cut:
            watched(lambda: self.holdings.sum_partial(gradients))

    def load(self) -> Tensor:
        """What experts were given since the last call, to be summed over ranks [N] (N may be 0)."""
        load: Load | None = getattr(self.model, "shoal_load", None)
        given = load.take() if load is not None else torch.zeros(0, dtype=torch.float64)
        mesh = self.sharded.mesh
        # ranks along tensor have the same tokens
        return torch.zeros_like(given) if mesh.coordinate("tensor") else given

    def load_figures(self, given: Tensor) -> dict[str, float]:
        """What a row of metrics tells of summed loads."""
        load: Load | None = getattr(self.model, "shoal_load", None)
        return load.figures(given) if load is not None else {}

    def norm(self, tensors: Mapping[str, Tensor]) -> float:
        """Norm over the replica of tensors of which each rank has its part. Raises PeersLost."""
        return watched(lambda: self.holdings.norm(tensors))


def build_replica(settings: ModelSettings) -> Replica:
    """The whole model on the meta device, with keyed dropout. Raises ModelError, ConfigError."""
    config = settings.config
    model = build_meta(config, auto_class=settings.auto_class, dropout=settings.dropout)
    keyed = settings.dropout == "keyed"
    notes = apply_keyed(model, seed=settings.seed, asked=config) if keyed else []
    model.shoal_balance = balance_of(model, settings.balance)  # type: ignore[assignment]
    record, trained = _with_adapter(model, settings)
    anatomy = anatomy_of(model)
    if settings.grid is not None:
        put_on_grid(model, settings.grid, blocks=(anatomy.blocks, *anatomy.more_blocks))
    named = canonical_parameters(model)
    frozen = frozen_names(named, patterns=settings.freeze, trained=trained)
    frozen |= {name for name, each in named.items() if not each.requires_grad}
    for name in frozen:
        named[name].requires_grad_(False)
    inside = anatomy.blocks + "."
    decayed = weight_decay_names(model)
    matrices = frozenset(n for n in decayed if n.startswith(inside) and named[n].dim() == 2)
    return Replica(
        settings,
        model,
        anatomy=anatomy,
        record=record,
        shapes={name: tuple(each.shape) for name, each in named.items()},
        decayed=decayed,
        frozen=frozenset(frozen),
        matrices=matrices,
        notes=notes,
        rounded=rounded_shapes(model),
    )


def _with_adapter(
    model: nn.Module, settings: ModelSettings
) -> tuple[InitRecord, frozenset[str] | None]:
    """How a meta model begins, with its adapters if any; what is trained then, None without."""
    record, adapter = init.record(model), settings.adapter
    if adapter is None:
        return record, None
    anatomy = anatomy_of(model)
    names, record = attach(
        model,
        settings=adapter,
        blocks=(anatomy.blocks, *anatomy.more_blocks),
        seed=settings.seed,
        dropout=settings.dropout,
        record=record,
    )
    return record, frozenset([*names, *new_head(model)])


def frozen_names(
    names: Iterable[str], *, patterns: Iterable[str], trained: frozenset[str] | None = None
) -> set[str]:
    """Names matched by the recipe's `train.freeze`, and all but `trained` where an adapter is.

    Raises ConfigError for an idle pattern.
    """
    known = list(names)
    frozen = set() if trained is None else set(known) - trained
    problems: list[Problem] = []
    for pattern in patterns:
        hits = set(fnmatch.filter(known, pattern))
        if not hits:
            hint = nearest(pattern.strip("*"), known)
            problems.append(Problem("train.freeze", f"{pattern!r} matches no parameter", hint))
        frozen |= hits
    if len(frozen) == len(known):
        problems.append(Problem("train.freeze", "every parameter is frozen; nothing to train"))
    if problems:
        raise ConfigError(problems)
    return frozen


def cut(replica: Replica, *, mesh: Mesh, settings: Settings) -> None:
    """Cut the model for this rank of `mesh`, in place; of a replica of one worker nothing goes.

    Raises ModelError for what cannot be cut so, PeersLost.
    """
    if mesh.layout.replica_workers == 1:
        apply(replica.model, replica.anatomy, mesh, settings)
    else:
        watched(lambda: apply(replica.model, replica.anatomy, mesh, settings))


def cut_anew(replica: Replica, *, mesh: Mesh, settings: Settings) -> None:
    """Build the model again and cut it for other groups: its exchanges belong to those it met."""
    marked = getattr(replica.model, "shoal_whole_logits", False)
    new = build_replica(replica.settings)
    new.model.shoal_whole_logits = marked  # type: ignore[assignment]
    cut(new, mesh=mesh, settings=settings)
    replica.model, replica.anatomy = new.model, new.anatomy


def fill(
    replica: Replica,
    *,
    storage: dict[str, Tensor],
    gradients: dict[str, Tensor] | None = None,
    source: Source | None = None,
    draws: bool = True,
) -> None:
    """Make the model real over `storage`; its values are drawn or read from `source`.

    `draws` False: the storage has its values already, or gets them later. Raises ModelError.
    """
    materialise(
        replica.model,
        record=replica.record,
        seed=replica.settings.seed,
        source=source,
        storage=storage,
        gradients=gradients,
        fill=draws,
    )
    replica.model.train()


def frozen_model(folder: str, *, like: ModelSettings, device: torch.device) -> nn.Module:
    """The model of a folder, whole, ready to evaluate and without gradients: a teacher.

    Raises ModelError for a folder that lacks a weight, and for one of another vocabulary.
    """
    config = folder_config(folder, auto_class=like.auto_class, settings={})
    own, theirs = (getattr(each, "vocab_size", None) for each in (like.config, config))
    if own != theirs:
        raise ModelError(
            f"{folder}: its vocabulary has {theirs} tokens, that of the model which learns {own}\n"
            "    use a teacher with the same tokenizer"
        )
    model = build_meta(config, auto_class=like.auto_class)
    weights = PretrainedWeights(folder, model=model)
    weights.refuse_missing()
    init.materialise(model, record=init.record(model), seed=0, source=weights)
    check_logits(model, anatomy_of(model))
    return model.to(device).eval().requires_grad_(False)


def mark_logits(replica: Replica, *, compiled: bool) -> None:
    """Check on a few tokens that head(hidden) is the model's logits; mark a model where it is not.

    On a small model of the same kind where this one is cut or compiled, else on itself. All else
    was held against transformers before workers started (parallel/oracle.py).
    """
    settings, probed, anatomy = replica.settings, replica.model, replica.anatomy
    if replica.is_cut or compiled:
        probed = small_model(
            settings.config,
            auto_class=settings.auto_class,
            dropout=settings.dropout,
            seed=settings.seed,
        )
        anatomy = anatomy_of(probed)
    if check_logits(probed, anatomy).whole_logits and probed is not replica.model:
        replica.model.shoal_whole_logits = True  # type: ignore[assignment]
    replica.model.train()
