"""Who writes what of the state into a checkpoint, and reading it back in any layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from shoal.boxes import Box, Piece
from shoal.checkpoint.store import Reader, Store
from shoal.comm.group import Group
from shoal.comm.messages import broadcast_json
from shoal.config.locked import LOCKED, changed
from shoal.config.recipe import Recipe
from shoal.engine.state import FlatState, Progress
from shoal.errors import RunError
from shoal.layout import Layout


def pieces_of(
    state: FlatState, *, rank: int, layout: Layout, equal: bool = True
) -> Iterator[Piece]:
    """What `rank` writes: every box belongs to one of the ranks that have it, bytes spread evenly.

    `equal`: whether replicas hold the same parameters now. What differs between replicas is written
    by each, under the kind KIND@REPLICA.
    """
    replica = layout.replica_of(rank)
    alone = state.holdings.owners(replicas=1)
    shared = state.holdings.owners(replicas=layout.replicate)
    for vector in state.vectors.values():
        same = vector.must_equal(steady=not equal)
        owners = shared if same else alone
        here = state.holdings.here(replica if same else 0)
        kind = vector.kind if same else f"{vector.kind}@{replica}"
        for piece in state.pieces(vector):
            if owners.get(piece.name) == here:
                yield replace(piece, kind=kind)


def random_state() -> str:
    """This rank's global generator, as hexadecimal (for dropout: framework)."""
    return bytes(torch.get_rng_state().numpy()).hex()


def choose_checkpoint(store: Store, *, group: Group, sink: Any) -> int:
    """The newest whole checkpoint, found by rank 0 and known to all; says what was passed over.

    Raises RunError where there is none that is good.
    """
    answer: dict[str, Any] = {}
    if group.rank == 0:
        try:
            answer["step"] = store.newest_good(
                on_bad=lambda step, why: sink.event(
                    "checkpoint-damaged", {"step": step, "text": f"{why}; using an older one"}
                )
            )
        except RunError as error:
            answer["problem"] = str(error)
    answer = broadcast_json(group, answer)
    if "problem" in answer:
        raise RunError(answer["problem"])
    return int(answer["step"])


def load(
    reader: Reader,
    state: FlatState,
    *,
    shapes: dict[str, tuple[int, ...]],
    group: Group,
    layout: Layout,
    same_policy: bool = True,
) -> None:
    """Fill parameters and states from a checkpoint written in any layout.

    `same_policy`: it was saved under this one; under another, what must be equal now is the mean.
    `shapes`: of all parameters of the whole model; what a checkpoint leaves out is there already.
    Raises RunError when the checkpoint is of
    another model or optimizer.
    """
    if not group.computes_in_place or group.rank == 0:
        replica = layout.replica_of(group.rank)
        for vector in state.vectors.values():
            wanted = {name: state.holdings[name].shape for name in state.saved(vector)}
            source = SavedKind(
                reader,
                vector.kind,
                sums=vector.sums,
                replica=replica,
                replicas=layout.replicate,
                mean=vector.equal and not same_policy,
            )
            if vector.optional and not source.names:
                vector.tensor.zero_()
                continue
            _check_names(source, wanted, whole=shapes.keys() - state.unsaved)
            for piece in state.pieces(vector) if source.names else ():
                with torch.no_grad():
                    piece.tensor.copy_(source.read(piece.name, box=piece.box))
    group.barrier()


class SavedKind:
    """One kind of a checkpoint: saved once for all replicas, or by each of them.

    Of what each has saved a replica gets its own back; in another number of replicas each gets the
    mean, or its part of the sum where only that matters.
    """

    def __init__(
        self,
        reader: Reader,
        kind: str,
        *,
        sums: bool = False,
        replica: int = 0,
        replicas: int = 1,
        mean: bool = False,
    ) -> None:
        """`mean`: also where each replica has saved its own."""
        self._reader, self._kind, self._sums = reader, kind, sums
        self._replicas = replicas
        self.kinds = saved_kinds(reader, kind)
        if len(self.kinds) == replicas and not mean:
            self.kinds = [self.kinds[replica]]
        self.names = reader.names(self.kinds[0]) if self.kinds else []

    @property
    def folder(self) -> Path:
        """Where the checkpoint is."""
        return self._reader.folder

    @property
    def kind(self) -> str:
        """What it is a kind of."""
        return self._kind

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        return self._reader.shape(name, kind=self.kinds[0])

    def read(self, name: str, *, box: Box | None = None) -> Tensor:
        """The values of a box."""
        total = self._reader.read(name, kind=self.kinds[0], box=box)
        for kind in self.kinds[1:]:
            total = total + self._reader.read(name, kind=kind, box=box)
        if len(self.kinds) == 1:
            return total
        return total / (self._replicas if self._sums else len(self.kinds))


def saved_kinds(reader: Reader, kind: str) -> list[str]:
    """`kind` as it was saved: itself, or KIND@0, KIND@1, ...; nothing where it was not saved."""
    if reader.names(kind):
        return [kind]
    found = 0
    while reader.names(f"{kind}@{found}"):
        found += 1
    return [f"{kind}@{number}" for number in range(found)]


def _check_names(source: SavedKind, wanted: dict[str, tuple[int, ...]], *, whole: set[str]) -> None:
    saved, kind = set(source.names), source.kind
    if kind != "parameter":  # a frozen set may differ; states that are missing start at zero
        if saved and not set(wanted) <= saved:
            missing = sorted(set(wanted) - saved)[0]
            raise RunError(
                f"{source.folder}: has no {kind} of {missing}; expected a checkpoint of the same "
                "optimizer and train.freeze"
            )
        if not saved and wanted:
            raise RunError(
                f"{source.folder}: has no optimizer state {kind!r}; expected a checkpoint of the "
                "same train.optimizer.kind"
            )
    elif saved != whole:
        other = sorted(saved ^ whole)[0]
        raise RunError(
            f"{source.folder}: a checkpoint of another model: {other} is only in "
            f"{'the checkpoint' if other in saved else 'the recipe'}; resume with the model it "
            "was trained with"
        )
    for name in wanted.keys() & saved:
        if source.shape(name) != wanted[name]:
            raise RunError(
                f"{source.folder}: a checkpoint of another model: {name} has the shape "
                f"{source.shape(name)}, expected {wanted[name]}"
            )


def check_same_run(saved: dict[str, Any], recipe: Recipe, *, at: Path) -> None:
    """A resumed run keeps what makes it that run. Raises RunError."""
    for path in changed(saved, recipe.model_dump(mode="json")):
        raise RunError(
            f"{at}: {path} differs from the run that was saved; a resumed run keeps "
            f"{', '.join(LOCKED)}. Start a new run with --out for other values"
        )


def check_progress(reader: Reader, *, steps: int, batch: int) -> None:
    """What a checkpoint says of its progress goes with its step and the run. Raises RunError.

    `batch`: samples of a step.
    """
    step = reader.step
    if step > steps:
        raise RunError(
            f"{reader.folder}: is of step {step}, but the run has {steps} steps; give train.steps "
            f"at least {step}, or remove that folder if it is not of this run"
        )
    try:
        found = msgspec.convert(reader.state["progress"], type=Progress)
    except (KeyError, msgspec.ValidationError) as error:
        raise RunError(f"{reader.folder}: does not say where the run was: {error}") from None
    right = Progress(step, min(found.applied_steps, step), max(found.tokens, 0), step * batch)
    if found != replace(right, seconds=found.seconds) or not found.seconds >= 0:
        raise RunError(
            f"{reader.folder}: its progress cannot be that of step {step}: {asdict(found)}; remove "
            "that folder, and resume from the checkpoint before it"
        )
