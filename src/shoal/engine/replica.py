"""The model of one rank: built on the meta device, cut for its place, and given its values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shoal.comm.group import Group, watched
from shoal.config.recipe import Muon, Recipe
from shoal.engine import state as flat
from shoal.engine.decision import Decision
from shoal.engine.model import small_model
from shoal.engine.state import FlatState
from shoal.models import init
from shoal.models.anatomy import (
    Anatomy,
    anatomy_of,
    canonical_parameters,
    check_logits,
    hidden_of,
    logits_of,
    weight_decay_names,
)
from shoal.models.draw import InitRecord
from shoal.models.dropout import apply_keyed, wants_dropout
from shoal.models.huggingface import build_meta
from shoal.models.init import Source
from shoal.models.probe import probe_keyed_dropout, probe_packing
from shoal.parallel import held, shard
from shoal.parallel.apply import Settings, apply
from shoal.parallel.materialise import materialise
from shoal.parallel.mesh import Mesh
from shoal.parallel.vocabulary import Vocabulary


@dataclass
class Replica:
    """A model, whole or cut. What every strategy needs around a forward and backward is here."""

    model: nn.Module
    anatomy: Anatomy
    record: InitRecord
    decayed: frozenset[str]
    frozen: frozenset[str]
    matrices: frozenset[str]
    """Matrices of the blocks: what Muon is for."""
    notes: list[str]
    """What a person should know about its dropout."""

    @property
    def is_cut(self) -> bool:
        """Whether other ranks have parts of it."""
        return held.placed_of(self.model).mesh.layout.replica_workers > 1

    @property
    def vocabulary(self) -> Vocabulary | None:
        """The part of the vocabulary whose logits this rank has; None: all."""
        return held.placed_of(self.model).vocabulary

    @property
    def num_parameters(self) -> int:
        """Elements of the whole model, tied ones once."""
        cuts = held.placed_of(self.model).cuts
        return sum(torch.Size(cut.shape).numel() for cut in cuts.values())

    def forward(self, function: Callable[[], Tensor]) -> Tensor:
        """What `function` gives, which runs the model. Raises PeersLost."""
        if not self.is_cut:
            return shard.forward(self.model, function)
        return watched(lambda: shard.forward(self.model, function))

    @torch.no_grad()
    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits of the last token [B, 1, V], on every rank. Collective in a replica; PeersLost.

        Of a model that gives one state per sample (an image's class): [B, V].
        """

        def compute() -> Tensor:
            hidden = hidden_of(self.model, batch)
            hidden = hidden[:, -1:] if hidden.dim() == 3 else hidden
            part = logits_of(self.model)(hidden)
            return part if self.vocabulary is None else self.vocabulary.gather(part)

        return self.forward(compute)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients. Raises PeersLost."""
        if not self.is_cut:
            loss.backward()  # type: ignore[no-untyped-call]
            return
        watched(loss.backward)

    def finish_gradients(self) -> None:
        """After the step's last backward: the sums that the tensor axis still lacks."""
        if self.is_cut:
            watched(lambda: held.sum_partial_gradients(self.model))

    def own_square(self, state: FlatState) -> float:
        """Square of the norm of those gradients on this rank that count (held.counted)."""
        names = held.counted(self.model)
        views = state.trainable(state.gradients).items()
        return sum(float(held.squares_of(view).sum()) for name, view in views if name in names)

    def norm(self, values: Tensor, state: FlatState) -> float:
        """Norm of flat gradients of which each rank of the replica has its part. PeersLost."""
        named = state.trainable(values)
        return watched(lambda: held.norm(self.model, named))


def build_replica(recipe: Recipe, *, config: Any, auto_class: str) -> Replica:
    """The whole model on the meta device, with keyed dropout. Raises ModelError, ConfigError."""
    model = build_meta(config, auto_class=auto_class, dropout=recipe.model.dropout)
    keyed = recipe.model.dropout == "keyed"
    notes = apply_keyed(model, seed=recipe.seed, asked=config) if keyed else []
    anatomy = anatomy_of(model)
    named = canonical_parameters(model)
    frozen = flat.frozen_names(named, patterns=recipe.train.freeze)
    for name in frozen:
        named[name].requires_grad_(False)
    matrices = frozenset[str]()
    if isinstance(recipe.train.optimizer, Muon):
        inside = anatomy.blocks + "."
        matrices = frozenset(n for n, p in named.items() if n.startswith(inside) and p.dim() == 2)
    return Replica(
        model,
        anatomy=anatomy,
        record=init.record(model),
        decayed=weight_decay_names(model),
        frozen=frozenset(frozen),
        matrices=matrices,
        notes=notes,
    )


def cut(replica: Replica, recipe: Recipe, *, mesh: Mesh, decision: Decision) -> None:
    """Cut the model for this rank of `mesh`, in place; of a replica of one worker nothing goes."""
    settings = Settings(
        shard_level=decision.shard_level_of(recipe),
        recompute=decision.recompute_of(recipe),
        compile=recipe.parallel.compile,
        offload=recipe.parallel.sharding.offload,
    )
    run = watched if mesh.layout.replica_workers > 1 else _plain
    run(lambda: apply(replica.model, replica.anatomy, mesh, settings))


def _plain(call: Callable[[], None]) -> None:
    call()


def fill(
    replica: Replica,
    state: FlatState,
    *,
    seed: int,
    source: Source | None = None,
    draws: bool = True,
) -> None:
    """Make the model real over `state`; its values are drawn or read from `source`.

    `draws` False: the state has its values already, or gets them later.
    """
    materialise(
        replica.model,
        record=replica.record,
        seed=seed,
        source=source,
        storage=state.named("parameter"),
        gradients=state.trainable(state.gradients),
        fill=draws,
    )
    replica.model.train()


def allocate(
    replica: Replica, recipe: Recipe, *, group: Group, dtype: torch.dtype = torch.float32
) -> FlatState:
    """The zeroed state of a model that was cut."""
    regions = flat.regions_of(
        shard.storage_shapes(replica.model),
        decayed=replica.decayed,
        matrices=replica.matrices,
        frozen=replica.frozen,
    )
    return flat.allocate(
        regions,
        group=group,
        optimizer=recipe.train.optimizer,
        device=held.placed_of(replica.model).storage_device,
        model=replica.model,
        dtype=dtype,
    )


def check(replica: Replica, recipe: Recipe, *, config: Any, auto_class: str) -> None:
    """Check on a few tokens that logits, packing and keyed dropout are right for this model.

    On a small model of the same kind where this one is cut or compiled, else on itself.
    Raises ModelError.
    """
    probed, anatomy = replica.model, replica.anatomy
    if replica.is_cut or recipe.parallel.compile:
        probed = small_model(config, recipe, auto_class=auto_class)
        anatomy = anatomy_of(probed)
    if check_logits(probed, anatomy).whole_logits and probed is not replica.model:
        replica.model.shoal_whole_logits = True  # type: ignore[assignment]
    if recipe.data.packing:
        probe_packing(probed)
    if recipe.model.dropout == "keyed" and wants_dropout(config):
        probe_keyed_dropout(probed)
    replica.model.train()
