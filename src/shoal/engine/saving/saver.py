"""Saves: behind the back of the loop, which only waits for a copy; the last one is waited for.

A save is a copy of this rank's part into memory that is kept for the purpose
(the stall), then a thread that writes, hashes and flushes it. The ranks meet in the hidden folder
of the save only, never in the training's process group: each leaves a report beside its part once
the part is on the disk; rank 0 publishes when it has all reports of this step and this attempt.
Who dies when does not matter: without a report there is no manifest, without a manifest no
checkpoint, and the one before stays.
"""

from __future__ import annotations

import json
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from shoal.boxes import Piece
from shoal.checkpoint.disks import COPIES
from shoal.checkpoint.manifest import NAME, Part
from shoal.checkpoint.objects import StoreError
from shoal.checkpoint.store import Store
from shoal.comm.group import Group
from shoal.comm.messages import broadcast_json, gather_json
from shoal.engine.membership.orders import Disk
from shoal.engine.saving.parts import pieces_of
from shoal.engine.state import FlatState
from shoal.errors import RunError, disk_problem
from shoal.layout import Layout

Note = tuple[str, dict[str, Any]]
"""An event: its name and its fields."""

KEPT = "kept"
"""A note that a save is whole on this rank's disk: for the coordinator, who has it count or not."""
_LOOK_SECONDS = 0.02
_NOTHING: Mapping[str, Any] = {}
_FAILED = "the next save tries again; the checkpoints before it are as they were"


class _NotPublished(Exception):
    """Why a save under way does not become a checkpoint."""


def _attempted(call: Callable[[], object], *, until: float) -> str | None:
    """Do it; what the disk or the store had against it, in words, or None.

    `until`: the time to which it is tried again where the store is away.
    """
    try:
        call()
    except StoreError as error:
        if error.away and time.monotonic() < until:
            time.sleep(1.0)
            return _attempted(call, until=until)
        return str(error)
    except OSError as error:
        full = disk_problem(error)
        return full or f"{error.strerror or error} ({error.filename or 'file'})"
    return None


class Snapshot:
    """Copies of pieces, in memory that is used again by the next copy."""

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}

    def take(self, pieces: Iterable[Piece[Tensor]]) -> list[Piece[Tensor]]:
        """The same pieces with tensors of their own, on the CPU."""
        kept, self._kept = self._kept, {}
        copies = []
        for piece in pieces:
            key, tensor = f"{piece.kind}/{piece.name}/{piece.box}", piece.tensor.detach()
            own = kept.get(key)
            if own is None or (own.shape, own.dtype) != (tensor.shape, tensor.dtype):
                own = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            own.copy_(tensor)
            self._kept[key] = own
            copies.append(replace(piece, tensor=own))
        return copies


class _Place(NamedTuple):
    """Where a rank stands in a save."""

    rank: int
    """Among those that save to one place, of which the first publishes."""
    size: int
    part: int
    """Which part of the whole it writes, in `layout`."""
    layout: Layout


@dataclass
class _Save:
    """One save under way on this rank."""

    step: int
    rank: int
    size: int
    part: int
    host: int | None
    token: str
    generation: int
    pieces: list[Piece[Tensor]]
    facts: dict[str, Any]
    own: dict[str, Any]
    owns: list[dict[str, Any]] | None = None
    """Of all ranks, where they are known already."""
    stall_seconds: float = 0.0
    began: float = field(default_factory=time.monotonic)
    abandoned: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None
    last: bool = False
    """Nothing follows, so that it is worth trying again."""
    needed: Sequence[int] = ()
    """Steps whose saves the first host will read whole."""
    collecting: bool = False
    """Waits for the other ranks' reports only."""
    problem: str | None = None
    """Why it failed, once its thread has ended."""


class Saver:
    """One rank's saves. All ranks call `save` at the same steps.

    `patience_seconds`: how long the loop waits for an earlier save before it leaves one out.
    """

    def __init__(
        self,
        store: Store,
        *,
        keep: int,
        background: bool = False,
        patience_seconds: float | None = None,
    ) -> None:
        self.store, self.keep, self.background = store, keep, background
        self.stall_seconds: list[float] = []
        """What each save cost the loop."""
        self.num_waits = 0
        """Saves that found an earlier one still being written."""
        self._patience_seconds = patience_seconds or store.patience_seconds
        self._snapshot = Snapshot()
        self._notes: queue.SimpleQueue[Note] = queue.SimpleQueue()
        self._running: _Save | None = None
        self._token = ""
        self.generation = 0
        """In which this rank is, where its coordinator says which saves count: they wait for it."""
        self.disk: Disk | None = None
        """Where hosts share no storage: who saves on this rank's."""

    def divide(self, disk: Disk | None) -> None:
        """From now on only these save on this rank's disk; None: all save to one place."""
        self.disk = disk
        self.store.divided = disk is not None and disk.host is not None

    def notes(self) -> list[Note]:
        """What happened since the last call, to be told as events (by rank 0)."""
        return [self._notes.get() for _ in range(self._notes.qsize())]

    def leave(self, *, token: str = "") -> None:
        """The ranks change, or the state goes back: a save under way is not published any more.

        Call it on every rank. The next `save` begins anew, with `token` (hexadecimal, the same on
        all ranks and new) or one that the ranks then agree on.
        """
        if self._running is not None:
            self._running.abandoned.set()
        self._token = token

    def save(
        self,
        state: FlatState,
        *,
        group: Group,
        layout: Layout,
        step: int,
        facts: Callable[[], dict[str, Any]],
        own: Mapping[str, Any] = _NOTHING,
        equal: bool = True,
        last: bool = False,
        needed: Sequence[int] = (),
        while_waiting: Callable[[], object] = lambda: None,
    ) -> None:
        """Save `step`; nobody may change `state` during the call.

        `facts`: gives, on rank 0, what the manifest holds; `own`: what it holds of every rank
        (`random_state`, the policy's facts). `equal`: whether replicas hold the same
        parameters now. `last`: nothing follows, so it is waited for and a failure is an error
        (RunError on every rank). A failure of any other is a note, and the run goes on.
        `needed`: after the last one, steps whose saves rank 0 will read.
        `while_waiting`: called now and then during a wait; raises what should end it.
        """
        began = time.monotonic()
        waited_for = last or not self.background
        free = self._wait(step, while_waiting)
        if waited_for:
            self.leave()
        known, owns = facts() if group.rank == 0 else {}, None
        if self.disk is not None:  # each of them has a manifest of its own
            known, owns = broadcast_json(group, known), gather_json(group, dict(own))
        if waited_for or free:
            running = None
            if not (group.shares_memory and group.rank):
                place = self._place(group, layout)
                token = self._agree_on_token(group)
                found = pieces_of(state, rank=place.part, layout=place.layout, equal=equal)
                running = _Save(
                    step,
                    rank=place.rank,
                    size=place.size,
                    part=place.part,
                    host=None if self.disk is None else self.disk.host,
                    token=token,
                    generation=self.generation,
                    pieces=list(found) if waited_for else self._snapshot.take(found),
                    facts=known,
                    own=dict(own),
                    owns=owns,
                    began=began,
                    last=last,
                    needed=needed,
                )
                self._begin(running)
            if waited_for:
                self._see_to_its_end(
                    running, group=group, step=step, last=last, while_waiting=while_waiting
                )
        self.stall_seconds.append(time.monotonic() - began)

    def wait(self, *, timeout_seconds: float) -> bool:
        """Wait for the save under way, if any; whether there is none any more."""
        if self._running is not None and self._running.thread is not None:
            self._running.thread.join(timeout_seconds)
            return not self._running.thread.is_alive()
        return True

    # --- in the loop

    def _place(self, group: Group, layout: Layout) -> _Place:
        if group.shares_memory:
            return _Place(0, 1, 0, Layout())
        rank, size = group.rank, layout.workers
        if self.disk is None:
            return _Place(rank, size, rank, layout)
        here, count = self.disk.ranks.index(rank), len(self.disk.ranks)
        if self.disk.host is None:
            return _Place(here, count, here, layout.with_workers(count))
        return _Place(here, count, rank, layout)

    def _wait(self, step: int, while_waiting: Callable[[], object]) -> bool:
        """Wait for an earlier save, not without end; whether this one may begin."""
        if self.wait(timeout_seconds=0):
            return True
        earlier, began = self._running, time.monotonic()
        assert earlier is not None, "something runs"
        self.num_waits += 1
        while not self.wait(timeout_seconds=_LOOK_SECONDS):
            while_waiting()
            if time.monotonic() - began > self._patience_seconds:
                break
        seconds = time.monotonic() - began
        text = f"step {step} waited {seconds:.2f} s for the save of step {earlier.step}"
        fields = {"step": step, "seconds": seconds}
        if self.wait(timeout_seconds=0):
            text += "; a larger checkpoint.every_steps or a faster disk avoids it"
            self._notes.put(("save-waited", {**fields, "text": text}))
            return True
        if earlier.collecting:  # nothing of this rank is unfinished: give the others up
            earlier.abandoned.set()
            self.wait(timeout_seconds=1.0)
        free = self.wait(timeout_seconds=0)
        text += ", which is still being written" + ("" if free else f"; step {step} is not saved")
        self._notes.put(("save-waited" if free else "save-skipped", {**fields, "text": text}))
        return free

    def _agree_on_token(self, group: Group) -> str:
        """The hidden folder's mark: once for these ranks, which are all here then."""
        if not self._token:
            made = (f"g{self.generation}-" if self.generation else "") + secrets.token_hex(8)
            alone = group.size == 1 or group.shares_memory
            self._token = made if alone else broadcast_json(group, made)
        return self._token

    def _begin(self, running: _Save) -> None:
        running.stall_seconds = time.monotonic() - running.began
        running.thread = threading.Thread(
            target=self._work, args=(running,), name=f"save-{running.step}", daemon=True
        )
        self._running = running
        running.thread.start()

    def _see_to_its_end(
        self,
        running: _Save | None,
        *,
        group: Group,
        step: int,
        last: bool,
        while_waiting: Callable[[], object],
    ) -> None:
        """Wait until the save is published or has failed; all ranks learn which."""
        while running is not None and not self.wait(timeout_seconds=_LOOK_SECONDS):
            while_waiting()
        problem = broadcast_json(group, running.problem if running is not None else None)
        if self.disk is not None and running is not None:
            leads = running.rank == 0
            found = [each for each in gather_json(group, [leads, running.problem]) if each[0]]
            bad = [each[1] for each in found if each[1] is not None]
            copies = self.disk.count if self.disk.host is not None else COPIES
            problem = bad[0] if len(found) - len(bad) < min(copies, self.disk.count) else None
        if problem is not None and last:
            raise RunError(
                f"{self.store.place}: step {step} could not be saved: {problem}. The checkpoints "
                "before it are as they were; put that right (checkpoint.keep=1 takes least room) "
                "and resume the run"
            )

    # --- in the thread

    def _work(self, running: _Save) -> None:
        try:
            until = time.monotonic() + (self.store.away_seconds if running.last else 0.0)
            problem = _attempted(lambda: self._write(running), until=until)
        except _NotPublished as error:
            problem = str(error)
        except Exception as error:  # a thread's error would be nobody's
            problem = f"{type(error).__name__}: {error}"
        running.problem = problem
        if problem is None:
            return
        if running.rank:
            self._report(running, problem=problem)
            return
        where = self.store.place
        text = f"{where}: step {running.step} could not be saved: {problem}; {_FAILED}"
        self._notes.put(("save-failed", {"step": running.step, "text": text}))
        with suppress(OSError):
            self.store.abandon(running.step, token=running.token)

    def _write(self, running: _Save) -> None:
        """Write this rank's part; rank 0 then waits for the others' and publishes.

        Raises OSError, _NotPublished.
        """
        store, step, token = self.store, running.step, running.token
        store.prepare(step, rank=running.rank, token=token, generation=running.generation)
        part = store.write_part(step, rank=running.part, pieces=running.pieces, token=token)
        if running.rank:
            self._report(running, part=part)
            return
        running.collecting = True
        others = [self._hear(running, rank=rank) for rank in range(1, running.size)]
        running.collecting = False
        owns = running.owns or [running.own, *(each["own"] for each in others)]
        state = {
            **running.facts,
            **({"generation": running.generation} if running.generation else {}),
            **({"save": token} if running.owns is not None else {}),
            "random_states": [own.get("random_state", "") for own in owns],
            "policies": [own.get("policy", {}) for own in owns],
        }
        store.drop_reports(step, ranks=range(1, running.size), token=token)
        if running.abandoned.is_set():
            raise _NotPublished("given up, for the workers changed")
        parts = [part, *(Part.from_json(each["part"]) for each in others)]
        number = running.generation
        known: dict[str, Any] = {"keep": self.keep, "token": token, "generation": number}
        where = store.publish(step, parts=parts, state=state, host=running.host, **known)
        fields = {
            "step": step,
            "seconds": time.monotonic() - running.began,
            "stall_seconds": running.stall_seconds,
            "at": where.name,
            **({"generation": number, "keep": self.keep, "best": store.best} if number else {}),
        }
        if self.disk is None:
            self._notes.put(("saved", fields))
            return
        manifest = xxhash.xxh3_128_hexdigest((where / NAME).read_bytes())
        more = {"token": token, "manifest": manifest, "disks": self.disk.count}
        more |= {"host": running.host, "needed": list(running.needed)}
        self._notes.put((KEPT, {**fields, **more}))

    def _report(
        self, running: _Save, *, part: Part | None = None, problem: str | None = None
    ) -> None:
        """Tell rank 0 that this part is there, or why it is not."""
        known: dict[str, Any] = {"rank": running.rank, "token": running.token}
        body = {
            "token": running.token,
            "step": running.step,
            "rank": running.rank,
            "own": running.own,
            "problem": problem,
            "part": part.to_json() if part else None,
        }
        try:
            self.store.put_report(running.step, json.dumps(body).encode(), **known)
        except OSError:
            if problem is None:
                raise
            with suppress(OSError):  # on a full disk there is room for a name
                self.store.put_report(running.step, b"", **known)

    def _hear(self, running: _Save, *, rank: int) -> dict[str, Any]:
        """The report of `rank`, when it comes. Raises _NotPublished; OSError."""
        store, step, token, pause = self.store, running.step, running.token, _LOOK_SECONDS
        while (text := store.report(step, rank=rank, token=token)) is None:
            if running.abandoned.wait(pause):
                raise _NotPublished(f"the part of rank {rank} did not come")
            pause = min(2 * pause, store.look_seconds)
        report: dict[str, Any] = json.loads(text or '{"problem": "no room to say why"}')
        if report["problem"]:
            raise _NotPublished(f"rank {rank}: {report['problem']}")
        expected = {"token": running.token, "step": running.step, "rank": rank}
        if {name: report[name] for name in expected} != expected:
            raise _NotPublished(f"the report of rank {rank} is not of this save")
        for file in report["part"]["files"]:
            size = store.size(step, file["file"], token=token)
            if size not in (None, file["num_bytes"]):
                raise _NotPublished(f"{file['file']} has {size} bytes, not {file['num_bytes']}")
        return report
