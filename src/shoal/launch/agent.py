"""The agent of a host: a local site in a loop, at the orders of a coordinator. No torch.

A coordinator that is silent for longer than the lease counts as gone: its workers are ended, since
without it they can neither meet nor save, and the agent waits for the next one. Where others stand
by to lead, workers are kept for a while: the agent goes over to whoever leads in a later term.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import zmq

from shoal.checkpoint.objects import Objects
from shoal.comm.guard import Guard
from shoal.comm.keys import Keys
from shoal.comm.line import LARGEST_MESSAGE
from shoal.data.prepare import prepared_damage
from shoal.engine.membership.program import code_hash
from shoal.environment import usable_cores, usable_memory_bytes
from shoal.launch import calls
from shoal.launch.host_files import HostFiles, Task, disk_of
from shoal.launch.links import Answering, measure
from shoal.launch.object_store import problem_of
from shoal.launch.peers import is_cached, piece
from shoal.launch.pool import Worker, WorkerPool
from shoal.launch.reach import unreached
from shoal.launch.site import LocalSite, Slot

TARGETS = ("shoal.launch.worker:run",)
"""What an agent starts for a coordinator, and nothing else."""
STOPPED = 75
_WAIT_SECONDS = 0.2
SEEN_SECONDS = 0.2
"""So often an agent says how its workers are."""


def facts(**more: Any) -> calls.Here:
    """What this host is, and what `more` there is to say."""
    return calls.Here(
        name=socket.gethostname(),
        cores=usable_cores(),
        memory_bytes=usable_memory_bytes() or 0,
        shoal=version("shoal"),
        torch=version("torch"),
        code=code_hash(),
        **more,
    )


class Agent:
    """Serves coordinators with the run's secret; `serve` returns after a run with `once`."""

    def __init__(
        self,
        pool: WorkerPool,
        *,
        keys: Keys,
        bind: str = "127.0.0.1",
        port: int = 0,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Raises ChannelError where it cannot listen."""
        self._pool, self._keys, self._say = pool, keys, say
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            self._guard = Guard(
                self._context,
                keys=keys,
                largest_frame=LARGEST_MESSAGE,
                high_water_mark=0,
                bind=bind,
                port=port,
            )
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self.address = self._guard.address
        self._answering = Answering(bind)
        self._decoder = msgspec.msgpack.Decoder(calls.ToAgent)
        self._peer: bytes | None = None
        self._hello = calls.Hello(coordinator="", nonce="", run="")
        self._site: LocalSite | None = None
        self._workers: dict[int, Worker] = {}
        self._states: dict[int, calls.Running] = {}
        self._watched: set[int] = set()
        self._tested: deque[tuple[bytes, calls.Reached | calls.Linked]] = deque()
        self._files = HostFiles(keys)
        self._heard_at = self._turned_at = self._signed_at = 0.0
        self.ended: int | None = None
        """Exit status of the last run, once it has ended."""
        self.leaving = False
        """Set by whoever asks this agent to end: once the run does without its workers, it does."""

    def serve(self, *, once: bool = False) -> int:
        """Turn until a run has ended (`once`), or for ever; its exit status."""
        while not (once and self.ended is not None):
            self.turn()
            idle = all(worker.status is not None for worker in self._workers.values())
            if self.leaving and idle:
                return STOPPED if self.ended is None else self.ended
        assert self.ended is not None, "the loop has ended for it"
        return self.ended

    def close(self) -> None:
        """End the workers and stop listening."""
        self._leave()
        self._files.close()
        self._guard.close()
        self._answering.close()
        self._context.destroy(linger=0)

    def turn(self) -> None:
        """Everything that has come, or comes within a moment."""
        self._watch()
        ready = self._guard.ready(timeout_seconds=_WAIT_SECONDS)
        if self._guard.socket in ready:
            while self._guard.socket.poll(0):
                self._hear(self._guard.socket.recv_multipart())
        self._pass_on()
        self._check_lease()

    # --- the coordinator

    def _hear(self, frames: list[bytes]) -> None:
        peer, *rest = frames
        try:
            (text,) = rest
            message = self._decoder.decode(text)
        except (ValueError, msgspec.DecodeError):
            return  # whoever sent it has the secret and another version; `Hello` says so
        if isinstance(message, calls.Hello):
            self._greet(peer, message)
        elif isinstance(message, calls.AskReach | calls.AskLink):
            tested = threading.Thread(target=self._test, args=(peer, message), daemon=True)
            tested.start()
        elif isinstance(message, calls.AskPiece):
            self._answer(piece(message, run=self._hello.run), peer=peer)
        elif peer == self._peer:
            self._heard_at = time.monotonic()
            self._follow(message)

    def _greet(self, peer: bytes, hello: calls.Hello) -> None:
        known, silent = self._hello, time.monotonic() - self._heard_at
        other = self._peer is not None and hello.nonce != known.nonce
        later = other and hello.run == known.run and hello.term > known.term
        busy = other and not later and silent <= known.lease_seconds
        if busy or not hello.ranks:
            who = f"{self._hello.run} of {self._hello.coordinator}" if busy else ""
            self._answer(facts(busy=who, open_port=self._answering.port), peer=peer)
            return
        missing, lacks, disk = _seen(hello)
        if not missing:
            if not (later and hello.adopts and hello.ranks == known.ranks):
                self._leave()  # it has lost us meanwhile, and begins anew
                self._site = LocalSite(self._pool, num_ranks=hello.ranks, keys=self._keys)
            self._peer, self._hello, self._heard_at = peer, hello, time.monotonic()
            self._say(f"at work for {hello.run}, as {hello.coordinator} says")
        left = {n for n, worker in self._workers.items() if worker.status is None}
        running = tuple(each for n, each in self._states.items() if n in left and not missing)
        more = {"missing": missing, "lacks": lacks, "disk": disk, "running": running}
        self._answer(facts(**more, open_port=self._answering.port), peer=peer)

    def _follow(self, message: calls.ToAgent) -> None:
        site = self._site
        if site is None:
            return
        if isinstance(message, calls.Start):
            self._start(site, message)
        elif isinstance(message, calls.Bye):
            self._leave()
            self.ended = message.status
            self._say(f"the run has ended (status {message.status})")
        elif isinstance(message, Task):
            self._files.follow(message, run=Path(self._hello.run))
        elif isinstance(message, calls.Order | calls.Signal | calls.AskStack):
            if message.worker not in self._workers:
                return
            worker = self._workers[message.worker]
            if isinstance(message, calls.Order):
                site.send(worker, message.order)
                if message.order.get("order") == "generation":
                    number = int(message.order["number"])
                    self._note(message.worker, generation=number, waiting=False)
            elif isinstance(message, calls.Signal):
                site.signal(worker, message.number)
            else:
                text = site.stack(worker, stopped=message.stopped)
                self._answer(calls.Stack(worker=message.worker, text=text))

    def _start(self, site: LocalSite, message: calls.Start) -> None:
        if message.target not in TARGETS:
            text = f"an agent does not start {message.target}"
            said = {"kind": "error", "user": True, "type": "RunError", "text": text, "rank": 0}
            self._answer(calls.Said(worker=message.worker, message=said))
            self._answer(calls.Said(worker=message.worker, status=2))
            return
        slot = Slot(message.index, message.kind)
        started = site.start(message.target, message.payload, slot=slot, ranks=message.ranks)
        self._workers[message.worker] = started
        self._states[message.worker] = calls.Running(worker=message.worker, rank=message.index)

    def _test(self, peer: bytes, asked: calls.AskReach | calls.AskLink) -> None:
        if isinstance(asked, calls.AskReach):
            found = unreached(asked.addresses)
            self._tested.append((peer, calls.Reached(number=asked.number, unreached=found)))
        else:
            link = measure(asked.address, sends=asked.sends)
            self._tested.append((peer, calls.Linked(link=link)))

    def _answer(
        self, message: calls.ToCoordinator | calls.Piece, *, peer: bytes | None = None
    ) -> None:
        whom = peer or self._peer
        if whom is not None:
            with suppress(zmq.ZMQError):  # it has gone: its lease will say so
                frames = [whom, msgspec.msgpack.encode(message)]
                self._guard.socket.send_multipart(frames, flags=zmq.NOBLOCK)

    def _check_lease(self) -> None:
        """End the workers of a coordinator that is gone; not for time in which we were stopped."""
        now = time.monotonic()
        if now - self._turned_at > 1.0:
            self._heard_at = now
        self._turned_at = now
        silent = now - self._heard_at
        kept = self._hello.keep_seconds
        if self._peer is not None and silent > self._hello.lease_seconds + kept:
            self._say(f"{self._hello.coordinator} is silent for {silent:.0f} s: its workers end")
            self._leave()

    def _leave(self) -> None:
        """End all workers."""
        if self._site is not None:
            self._site.close()
        self._site, self._peer = None, None
        self._workers.clear()
        self._states.clear()

    def _note(self, worker: int, **more: Any) -> None:
        """How far a worker is, for whoever takes it on."""
        self._states[worker] = msgspec.structs.replace(self._states[worker], **more)

    # --- the workers

    def _watch(self) -> None:
        """Let `ready` return also when a worker says something."""
        now = set(self._pool.descriptors(self._workers.values()))
        for descriptor in self._watched - now:
            self._guard.forget(descriptor)
        for descriptor in now - self._watched:
            self._guard.register(descriptor)
        self._watched = now

    def _pass_on(self) -> None:
        """What workers have said, and how they are."""
        while self._tested:
            peer, found = self._tested.popleft()
            self._answer(found, peer=peer)
        site = self._site
        if site is None:
            for _ in self._pool.events(timeout_seconds=0.0, only=[]):
                pass
            return
        while self._files.answers:
            self._answer(self._files.answers.popleft())
        numbers = {id(worker): number for number, worker in self._workers.items()}
        for worker, message in site.events(timeout_seconds=0.0):
            number = numbers[id(worker)]
            if message is not None:
                self._answer(calls.Said(worker=number, message=message))
                if message["kind"] == "waiting":
                    waits = message["generation"] >= self._states[number].generation
                    self._note(number, waiting=waits)
                elif message["kind"] == "ended":
                    self._note(number, done=True)
            else:
                self._answer(calls.Said(worker=number, status=worker.status))
        if time.monotonic() - self._signed_at > SEEN_SECONDS:
            self._signed_at = time.monotonic()
            if self.leaving:
                self._answer(calls.Leaving())
            pids = {n: w.pid for n, w in self._workers.items() if w.pid is not None}
            seen = tuple(site.sightings())
            self._answer(
                calls.Seen(sightings=seen, pids=pids, memory_kills=site.memory_kills()),
            )


def _seen(hello: calls.Hello) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    """What of the run this host does not see; what it can be given; what its disk is known by."""
    found, lacks, disk = [], [], ""
    shared = bool(hello.cache_note[0]) and _is_there(*hello.cache_note)
    with suppress(OSError):
        disk = disk_of(Path(hello.run)) if hello.own_disks else ""
    if hello.own_disks and not (disk and os.access(hello.run, os.W_OK)):
        found.append(f"cannot write to {hello.run}")
    elif not _is_there(*hello.note) or not os.access(hello.run, os.W_OK):
        found.append(
            f"does not see {hello.run} (put --out on storage that all hosts share, or set "
            "checkpoint.where=local, which saves on each host's own disk)"
        )
    if hello.store and (problem := _store_problem(hello.store)):
        found.append(f"cannot save to the store: {problem}")
    for folder, digest in hello.folders.items():
        here = calls.folder_digest(Path(folder))
        if here == digest and (shared or prepared_damage(Path(folder)) is None):
            continue
        if is_cached(Path(folder)):
            lacks.append(folder)
        else:
            what = "holds something else" if here else "is not there"
            found.append(f"{folder} {what} (set SHOAL_CACHE to one path on all hosts)")
    return tuple(found), tuple(lacks), disk


_usable = set[str]()


def _store_problem(where: str) -> str:
    """Why workers of this host cannot save there; empty: they can, or could a while ago."""
    problem = problem_of(where)
    if problem is not None:
        return problem.what
    if where not in _usable:
        try:
            Objects(where).check()
        except OSError as error:
            return str(error)
        _usable.add(where)
    return ""


def _is_there(note: str, text: str) -> bool:
    """Whether this host sees a file of the coordinator's, if there is one to see."""
    try:
        return not note or Path(note).read_text(encoding="utf-8") == text
    except OSError:
        return False
