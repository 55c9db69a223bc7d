"""Between the tensors of training and the checkpoint store: who writes what, and reading back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal.boxes import Piece
from shoal.checkpoint.manifest import Part
from shoal.checkpoint.store import Reader, Store
from shoal.comm.group import Group
from shoal.comm.messages import broadcast_json, gather_json
from shoal.config.locked import LOCKED, changed
from shoal.config.recipe import Recipe
from shoal.engine.state import FlatState
from shoal.errors import RunError, disk_problem


def pieces_of(state: FlatState, *, rank: int, size: int) -> Iterator[Piece[Tensor]]:
    """What `rank` writes: every box belongs to one of the ranks that have it, bytes spread evenly.

    Ranks that have a box in common agree on who writes it without asking: those at one place along
    shard, of all replicas, and of all places along tensor where the tensor is not cut along it.
    """
    cut = state.cut
    replicas = range(size // cut.workers)
    here, replica = cut.coordinates(rank % cut.workers), rank // cut.workers
    loads = {(r, t): 0 for r in replicas for t in range(cut.tensor)}
    for kind in ("parameter", *state.moments):
        for name, pieces in state.pieces(kind).items():
            shape, owners = state.shapes[name], []
            num_bytes = prod(shape) * 4 // cut.shard
            if name in state.cut_names:
                for t in range(cut.tensor):
                    owners.append(min(((r, t) for r in replicas), key=loads.__getitem__))
                    loads[owners[-1]] += num_bytes // cut.tensor
            else:
                owners.append(min(loads, key=loads.__getitem__))
                loads[owners[-1]] += num_bytes
            if (replica, here["tensor"]) in owners:
                for piece in pieces:
                    yield Piece(name, kind, shape, piece.box, piece.tensor)


def save(
    store: Store,
    state: FlatState,
    *,
    group: Group,
    step: int,
    facts: dict[str, Any],
    keep: int,
    random_state: str = "",
) -> Path:
    """Save all ranks' parts and publish them. Raises RunError on every rank when one rank failed.

    All ranks call it. It returns on every rank only once the checkpoint has its final name.
    """
    problem = None
    if group.rank == 0:
        problem = attempted(lambda: store.begin(step))
    problem = broadcast_json(group, problem)
    part = Part()
    if problem is None:

        def write() -> None:
            nonlocal part
            pieces = pieces_of(state, rank=group.rank, size=group.size)
            part = store.write_part(step, rank=group.rank, pieces=pieces)

        problem = attempted(write)
    own = {"problem": problem, "part": part.to_json(), "random_state": random_state}
    reports = gather_json(group, own)
    problem = next((r["problem"] for r in reports if r["problem"]), None)
    if problem is None and group.rank == 0:
        parts = [Part.from_json(report["part"]) for report in reports]
        whole = {**facts, "random_states": [report["random_state"] for report in reports]}
        problem = attempted(lambda: store.publish(step, parts=parts, state=whole, keep=keep))
    problem = broadcast_json(group, problem)
    if problem is not None:
        raise RunError(
            f"{store.folder}: step {step} could not be saved: {problem}. The checkpoints before it "
            "are as they were; put that right (checkpoint.keep=1 takes least room) and resume the "
            "run"
        )
    return store.path(step)


def random_state() -> str:
    """This rank's global generator, as hexadecimal (for dropout: framework)."""
    return bytes(torch.get_rng_state().numpy()).hex()


def attempted(call: Callable[[], object]) -> str | None:
    """Do it; what the disk had against it, in words, or None."""
    try:
        call()
    except OSError as error:
        full = disk_problem(error)
        return full or f"{error.strerror or error} ({error.filename or 'file'})"
    return None


def choose_checkpoint(store: Store, *, group: Group, sink: Any) -> int:
    """The newest whole checkpoint, found by rank 0 and known to all; says what was passed over."""
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


def load(reader: Reader, state: FlatState, *, group: Group) -> None:
    """Fill parameters and optimizer state from a checkpoint written in any layout.

    Raises RunError when the checkpoint is of another model or optimizer.
    """
    if not group.computes_in_place or group.rank == 0:
        for kind in ("parameter", *state.moments):
            wanted = {name: state.shapes[name] for name in state.named(kind)}
            _check_names(reader, kind, wanted)
            for name, pieces in state.pieces(kind).items():
                for piece in pieces:
                    with torch.no_grad():
                        piece.tensor.copy_(reader.read(name, kind=kind, box=piece.box))
    group.barrier()


def _check_names(reader: Reader, kind: str, shapes: dict[str, tuple[int, ...]]) -> None:
    saved, wanted = set(reader.names(kind)), set(shapes)
    if kind != "parameter":  # a frozen set may differ; states that are missing start at zero
        if saved and not wanted <= saved:
            missing = sorted(wanted - saved)[0]
            raise RunError(
                f"{reader.folder}: has no {kind} of {missing}; expected a checkpoint of the same "
                "optimizer and train.freeze"
            )
        if not saved and wanted:
            raise RunError(
                f"{reader.folder}: has no optimizer state {kind!r}; expected a checkpoint of the "
                "same train.optimizer.kind"
            )
    elif saved != wanted:
        other = sorted(saved ^ wanted)[0]
        raise RunError(
            f"{reader.folder}: a checkpoint of another model: {other} is only in "
            f"{'the checkpoint' if other in saved else 'the recipe'}; resume with the model it "
            "was trained with"
        )
    for name in wanted & saved:
        if reader.shape(name, kind=kind) != shapes[name]:
            raise RunError(
                f"{reader.folder}: a checkpoint of another model: {name} has the shape "
                f"{reader.shape(name, kind=kind)}, expected {shapes[name]}"
            )


def check_same_run(saved: dict[str, Any], recipe: Recipe, *, at: Path) -> None:
    """A resumed run keeps what makes it that run. Raises RunError."""
    for path in changed(saved, recipe.model_dump(mode="json")):
        raise RunError(
            f"{at}: {path} differs from the run that was saved; a resumed run keeps "
            f"{', '.join(LOCKED)}. Start a new run with --out for other values"
        )
