"""A loop that the user owns, on several workers: mesh, holdings, policy and a flat gradient.

Nothing here trains. The user's model, optimizer, loss and loader stay his; the fleet divides the
batches, sums gradients over the workers by the parts that `shoal train` is made of, and saves. The
loss is a mean over targets, so a worker's gradients are weighted by its targets and divided by all
of the step: the numbers of one process, however the batch falls on workers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from shoal.checkpoint.store import Store
from shoal.comm.flat import FlatLayout, Vector
from shoal.comm.group import Group, watched
from shoal.comm.messages import broadcast_json
from shoal.config.sync import SyncSection, is_same
from shoal.engine.membership.agree import check_same_program
from shoal.engine.membership.digest import (
    ReplicasDiffer,
    compare,
    differing_tensors,
    digest_of,
)
from shoal.engine.saving.parts import choose_checkpoint, load, random_state
from shoal.engine.saving.saver import Saver
from shoal.engine.state import ALL, FlatState, regions_of
from shoal.errors import RunError, UserError, WorkerError
from shoal.fleet import moments
from shoal.fleet.batches import Batches, Part, part_of
from shoal.fleet.checks import marks, refuse_changed, refuse_model
from shoal.layout import Layout, Share
from shoal.models.anatomy import canonical_name, canonical_parameters
from shoal.observe.events import Tee
from shoal.parallel import shard
from shoal.parallel.local import Holdings, ShardedModel, local, mark
from shoal.parallel.ranks import Ranks
from shoal.parallel.settings import Settings
from shoal.sync.kinds import KEEPS_EQUAL_STATE, create
from shoal.sync.policy import Division, Given, Gradients, Policy

Model = TypeVar("Model", bound=nn.Module)
Optimizer = TypeVar("Optimizer", bound=torch.optim.Optimizer)

_NEVER = 0
"""The last step of a loop whose length nobody knows."""
_HALF = 2**32


@dataclass(frozen=True)
class Stepped:
    """What a step came to; the same on all workers that stepped together."""

    loss: float
    """Mean over the targets of all of them."""
    targets: int
    gradient_norm: float
    """Of the whole model, before clipping."""
    applied: bool
    """False where the gradients were not finite, or nothing had a target."""


class Fleet:
    """One worker's end of the fleet. Every worker makes the same calls in the same order."""

    def __init__(self, ranks: Ranks, *, sync: SyncSection, settings: Settings) -> None:
        self.steps = 0
        """Steps so far."""
        self._ranks, self._sync, self._settings = ranks, sync, settings
        self._model: nn.Module | None = None
        self._named: dict[str, nn.Parameter] = {}
        """The parameters as the optimizer has them; a shard's model has others between passes."""
        self._optimizer: torch.optim.Optimizer
        self._state: FlatState
        self._policy: Policy
        self._part: Part | None = None
        self._labels: int | None = None
        self._targets, self._loss, self._digest = 0, 0.0, 0
        self._seen: dict[str, float] | None = None
        """Marks of every gradient after the last backward; None: there was none."""
        self._is_stepping = False

    # --- who is there

    @property
    def world(self) -> Group:
        """All workers."""
        return self._ranks.world

    @property
    def rank(self) -> int:
        """This worker's number."""
        return self.world.rank

    @property
    def size(self) -> int:
        """Number of workers."""
        return self.world.size

    @property
    def is_first(self) -> bool:
        """Whether this is the worker that prints and writes."""
        return self.rank == 0

    @property
    def layout(self) -> Layout:
        """Degrees of replicate and shard."""
        return self._ranks.layout

    @property
    def device(self) -> torch.device:
        """Where this worker computes."""
        return self._ranks.mesh.device

    # --- the model

    def parallelize(self, model: Model, optimizer: Optimizer) -> tuple[Model, Optimizer]:
        """Cut the model, and let the optimizer step what this worker has of it; both are changed.

        All begin with the weights of worker 0. Raises ModelError for a model that cannot be
        divided, UserError for an optimizer of other parameters.
        """
        if self._model is not None:
            raise UserError("fleet.parallelize: one model and one optimizer; call it once")
        named = canonical_parameters(model)
        refuse_model(model, named, optimizer)
        kinds = {name: f"{[*each.shape]} {each.dtype}" for name, each in named.items()}
        check_same_program(self.world, recipe={"model": kinds}, parameters=len(named))
        model.to(self.device)
        for tensor in (*named.values(), *model.buffers()):
            self.world.broadcast_(tensor.data)
        whole = {name: each.detach() for name, each in named.items()}
        names = {id(each): name for name, each in named.items()}
        frozen = [name for name, each in named.items() if not each.requires_grad]
        self._model, self._optimizer = model, optimizer
        self._state = self._allocated(model, whole, frozen=frozen)
        self._named = canonical_parameters(model)
        for group in optimizer.param_groups:
            group["params"] = [self._named[names[id(each)]] for each in group["params"]]
        optimizer.register_step_pre_hook(self._refuse_step)
        if not self.is_first:  # or dropout would be the same on rows that are not
            torch.manual_seed(torch.initial_seed() + self.rank)
        trained = self._state.values[: self._state.trainable_numel]
        given = Given(Division(1, 1), trained, self._state.layout, _NEVER, torch.initial_seed())
        self._policy = create(self._sync, given)
        ranks = self._ranks
        self._policy.enter(world=ranks.world, peers=ranks.peers, inside=ranks.inside)
        self._state.add(self._policy.vectors())
        return model, optimizer

    def _allocated(
        self, model: nn.Module, whole: Mapping[str, Tensor], *, frozen: list[str]
    ) -> FlatState:
        """The model over one vector, with this rank's part of `whole` in it."""
        mesh = self._ranks.mesh
        holdings = Holdings.whole(mesh, {name: each.shape for name, each in whole.items()})
        sharded = ShardedModel(mesh, holdings)
        mark(model, sharded)
        sharded.holdings = self._watched(
            lambda: shard.apply_shard_called(model, mesh, holdings, self._settings)
        )
        shapes = shard.storage_shapes(model)
        layout = FlatLayout.of(regions_of(shapes, decayed=(), matrices=(), frozen=frozen))
        dtype, device = next(iter(whole.values())).dtype, sharded.storage_device
        values = torch.zeros(layout.numel, dtype=dtype, device=device)
        gradients = torch.zeros(layout.regions["frozen"].start, dtype=dtype, device=device)
        vectors = {"parameter": Vector("parameter", values, ALL)}
        state = FlatState(layout, gradients, vectors, sharded.holdings)
        storage = state.named("parameter")
        with torch.no_grad():
            for name, slots in state.slots.items():
                for slot in slots:
                    slot.of(storage[name]).copy_(whole[name][slot.box.slices])
        shard.adopt(model, storage.__getitem__)
        return state

    @property
    def _parameters(self) -> dict[str, nn.Parameter]:
        if self._model is None:
            raise UserError("fleet: call model, optimizer = fleet.parallelize(model, optimizer)")
        return self._named

    # --- the loop

    def batches(self, loader: Iterable[Any]) -> Batches:
        """This worker's rows of every batch of `loader`, which counts all workers' rows together.

        Raises DataError for what gives no batches.
        """
        return Batches(loader, self)

    def share_of(self, rows: int) -> Share:
        """This worker's rows of a global batch."""
        return part_of(rows, part=self._ranks.part, parts=self._ranks.num_parts)

    def reads(self, part: Part | None, *, labels: int | None = None) -> None:
        """A batch is handed out (batches.py); None: it was the last."""
        self._part, self._labels = part, labels
        if part is not None:
            self._digest = (self._digest * 31 + part.digest) % _HALF

    def backward(self, loss: Tensor, *, targets: int | None = None) -> None:
        """The backward of a mean loss; several before a step add up.

        `targets`: over how many the loss is a mean. Without it those of the batch's `labels` that
        are not -100, else the rows. Raises UserError, PeersLost.
        """
        parameters = self._parameters
        if loss.dim():
            raise UserError(
                f"fleet.backward: expected one number, the mean over targets; got {[*loss.shape]}"
            )
        weight = self._weight(targets)
        self._watched(lambda: loss.backward(torch.full_like(loss, weight)))
        self._targets += weight
        self._loss += loss.item() * weight if weight else 0.0
        self._seen = marks(parameters)

    def _weight(self, targets: int | None) -> int:
        """Targets that count: none of a row that another worker computes as well."""
        if self._part is not None and not self._part.rows:
            return 0
        if targets is None:
            if self._part is None:
                raise UserError(
                    "fleet.backward: how many targets is this loss a mean over? Read the batch "
                    "from fleet.batches(loader), or say fleet.backward(loss, targets=...)"
                )
            targets = self._part.rows if self._labels is None else self._labels
        return int(targets)

    def step(self, *, max_gradient_norm: float | None = None) -> Stepped:
        """Sum the gradients, clip them if wanted, and let the optimizer step; forget them.

        Raises UserError where gradients were changed by hand, or there are none; WorkerError where
        workers read different batches or hold different weights; PeersLost.
        """
        parameters, policy, state = self._parameters, self._policy, self._state
        refuse_changed(self._seen, parameters)
        policy.before_step(self.steps)
        has = self._collect(parameters)
        targets, loss, some = self._meet(has)
        state.gradients.div_(max(targets, 1))
        reduced = policy.reduce(Gradients(state.gradients, state.layout, targets=targets))
        norm = (
            self._norm(reduced.values) if self._is_cut else reduced.norm(numel=len(state.gradients))
        )
        applied = (
            math.isfinite(norm) and (targets if reduced.targets is None else reduced.targets) > 0
        )
        if applied:
            if max_gradient_norm is not None and norm > max_gradient_norm:
                reduced.values.mul_(max_gradient_norm / (norm + 1e-6))
            for name, view in state.trainable(reduced.values).items():
                own = parameters[name]
                own.grad = shard.over(own, view) if name in some else None
            with self._stepping():
                self._optimizer.step()
        self.steps += 1
        for each in parameters.values():
            each.grad = None
        shard.give_up(self._model)  # type: ignore[arg-type]
        self._targets, self._loss, self._digest, self._seen = 0, 0.0, 0, None
        policy.after_step(self.steps - 1, targets=targets)
        return Stepped(loss / max(targets, 1), targets, norm, applied)

    def mean(self, value: Tensor | float, *, targets: int | None = None) -> float:
        """The mean of a batch's mean `value` over all workers, each weighted by its targets.

        `targets`: as of `backward`. For evaluations, once per batch. Raises PeersLost.
        """
        weight = self._weight(targets)
        total = float(value) * weight if weight else 0.0
        sums = torch.tensor([total, float(weight)], dtype=torch.float64)
        self.world.sum_(sums)
        return float(sums[0] / sums[1]) if sums[1] else math.nan

    # --- a step's parts

    @property
    def _is_cut(self) -> bool:
        return self._ranks.layout.replica_workers > 1

    def _watched(self, call: Callable[[], Any]) -> Any:
        return watched(call) if self._is_cut else call()

    def _norm(self, values: Tensor) -> float:
        return float(watched(lambda: self._state.holdings.norm(self._state.trainable(values))))

    @torch.no_grad()
    def _collect(self, parameters: Mapping[str, nn.Parameter]) -> list[bool]:
        """Copy the gradients into the flat vector; which parameters have one."""
        has, self._state.gradients[:] = [], 0
        for name, view in self._state.trainable(self._state.gradients).items():
            gradient = parameters[name].grad
            has.append(gradient is not None)
            if gradient is not None:
                own = local(gradient)
                (view.narrow(0, 0, len(own)) if view.dim() else view).copy_(own)
        return has

    def _meet(self, has: list[bool]) -> tuple[int, float, set[str]]:
        """Targets and loss of all that step together, and the names that have a gradient."""
        digest = self._hash()
        mine = [self._targets, self._loss, self._digest, digest // _HALF, digest % _HALF, *has]
        group = self._policy.together
        rows = [each.tolist() for each in group.gather(torch.tensor(mine, dtype=torch.float64))]
        step = self.steps + 1
        if len({row[2] for row in rows}) > 1:
            raise WorkerError(
                f"step {step}: the workers read different batches; let every worker make the same "
                "loader, and give a sampler that draws at random a generator with a seed"
            )
        try:
            digests = [int(row[3]) * _HALF + int(row[4]) for row in rows]
            if group is self.world:
                compare(digests, layout=self.layout)
        except ReplicasDiffer:
            found = differing_tensors(self.world, self._state, layout=self.layout)
            named = ", ".join(f"{name} (worker {r[-1]})" for name, r in [*found.items()][:3])
            raise WorkerError(
                f"step {step}: replicas hold different weights: {named}; weights may only change "
                "by fleet.step and fleet.load, the same on every worker"
            ) from None
        names = list(self._state.trainable(self._state.gradients))
        some = {name for number, name in enumerate(names) if any(row[5 + number] for row in rows)}
        return int(sum(row[0] for row in rows)), sum(row[1] for row in rows), some

    def _hash(self) -> int:
        """Of the weights, where replicas must have the same ones and are to show it; else 0."""
        every = self._sync.verify_every_steps
        if every == "auto":
            every = 1 if self.device.type == "cpu" else 100
        due = bool(every) and self.steps % every == 0 and self._ranks.num_replicas > 1
        return digest_of(self._state) if due and not self._policy.alone else 0

    @contextmanager
    def _stepping(self) -> Iterator[None]:
        self._is_stepping = True
        try:
            yield
        finally:
            self._is_stepping = False

    def _refuse_step(self, *_: Any) -> None:
        if not self._is_stepping:
            raise UserError(
                "optimizer.step() would change this worker's weights alone; call fleet.step(), "
                "which sums the gradients and then lets the optimizer step"
            )

    # --- saving

    def save(self, folder: str | Path, *, more: Any = None, keep: int = 2) -> Path:
        """Write a checkpoint of weights and optimizer to folder/step-00000100; any layout reads it.

        `more`: JSON-able, such as {"epoch": 3}; `load` gives it back. `keep`: newest ones that are
        kept. Raises RunError when it could not be written, PeersLost.
        """
        parameters, state, policy = self._parameters, self._state, self._policy
        store, equal = Store(Path(folder)), policy.equal_after(self.steps)
        sync = self._sync.model_dump(mode="json")
        vectors, facts = moments.taken(
            self._optimizer, parameters, state, equal=self._sync.kind in KEEPS_EQUAL_STATE
        )
        saved = state.beside(vectors)
        Saver(store, keep=keep).save(
            saved,
            group=self.world,
            layout=self.layout,
            step=self.steps,
            facts=lambda: {"own_loop": {"optimizer": facts, "more": more, "sync": sync}},
            own={"random_state": random_state(), "policy": policy.facts()},
            equal=equal,
            last=True,
        )
        return store.path(self.steps)

    def load(self, folder: str | Path) -> Any:
        """Go on from the newest good checkpoint in `folder`: what `save` had as `more`.

        None where nothing was saved yet. Raises RunError for one of another model or optimizer.
        """
        parameters, state = self._parameters, self._state
        store = Store(Path(folder))
        if not broadcast_json(self.world, bool(store.steps())):
            return None
        step = choose_checkpoint(store, group=self.world, sink=Tee([]))
        reader = store.open(step)
        facts = reader.state.get("own_loop")
        if facts is None:
            raise RunError(f"{reader.folder}: was saved by shoal train; go on by shoal resume")
        equal = self._sync.kind in KEEPS_EQUAL_STATE
        vectors = moments.room_for(facts["optimizer"], state, equal=equal)
        whole = state.beside(vectors)
        shapes = {name: holding.shape for name, holding in state.holdings.items()}
        same = is_same(facts.get("sync", {}), self._sync)
        world, layout = self.world, self.layout
        load(reader, whole, shapes=shapes, group=world, layout=layout, same_policy=same)
        moments.give(self._optimizer, parameters, state, vectors=vectors, facts=facts["optimizer"])
        self.steps = step
        policies = reader.state.get("policies", [])
        if same and len(policies) == self.size:
            self._policy.restore(policies[self.rank])
        else:
            self._policy.begin(step)
        shard.give_up(self._model)  # type: ignore[arg-type]
        return facts["more"] if facts["more"] is not None else {}

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """The whole model on every worker, on the CPU, as `model.state_dict()` names it.

        Of replicas that are apart (between two averages) the mean. Raises PeersLost.
        """
        parameters, ranks = self._parameters, self._ranks
        model, storage, whole = self._model, self._state.named("parameter"), {}
        assert model is not None, "parallelized"
        shard.give_up(model)
        for name in parameters:
            full = torch.zeros(self._state.holdings[name].shape, dtype=storage[name].dtype)
            for slot in self._state.slots[name]:
                full[slot.box.slices] = slot.of(storage[name]).cpu()
            if self._is_cut:
                ranks.inside.sum_(full)
            if not self._policy.equal_after(self.steps):
                ranks.peers.sum_(full)
                full /= ranks.peers.size
            whole[name] = full
        tied = {id(each): name for name, each in parameters.items()}
        found = {
            canonical_name(name): whole[tied[id(each)]]
            for name, each in model.named_parameters(remove_duplicate=False)
        }
        known = {canonical_name(name): each for name, each in model.state_dict().items()}
        return {name: found.get(name, known[name].cpu()) for name in known}
