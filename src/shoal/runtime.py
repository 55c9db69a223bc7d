"""Start and end of a worker: device, threads, seed, process group."""

from __future__ import annotations

import datetime
import os
import socket
import stat
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import torch
import torch.distributed as dist

from shoal.environment import address_towards, talk_over, torchrun_rendezvous
from shoal.errors import UserError


@dataclass(frozen=True)
class WorkerInfo:
    """Where a worker runs."""

    rank: int
    size: int
    device: torch.device
    threads: int


def choose_device(wanted: str, *, local_rank: int, key: str = "launch.device") -> torch.device:
    """`auto` is a CUDA device where there is one. Raises UserError when `cuda` is not there."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"{key}: expected a CUDA device, found none (torch "
            f"{torch.__version__}); use {key}=cpu, or install the CUDA build: "
            "TORCH=cuda make setup"
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


Around = Callable[[dist.Store, Callable[[], list[int]]], dist.Store]
"""Makes a store of a store, and of what tells the ranks of the group that is made just now."""


def start_process_group(
    *,
    rank: int,
    size: int,
    device: torch.device,
    meeting: str | MeetingPoint | None,
    timeout_seconds: float,
    around: Around | None = None,
    here: int | None = None,
) -> None:
    """Join the group of all worker processes.

    `meeting`: a place where nobody has met yet, one per attempt, or its URL (see MeetingPoint);
    None: the addresses torchrun gave in the environment. `around`: changes what ranks find there.
    `here`: how many of the ranks are on this host; None: all of them.
    """
    backend = _backend(device, size=size if here is None else here)
    timeout = datetime.timedelta(seconds=timeout_seconds)
    if dist.is_initialized():
        return  # a launcher has joined already
    if meeting is None:
        dist.init_process_group(backend, timeout=timeout)
        return
    place = meeting_point(meeting) if isinstance(meeting, str) else meeting
    talk_over(place.address)
    _making[:] = range(size)
    with _noting_connections():
        store = place.store(size)
        if around is not None:
            store = around(store, lambda: list(_making))
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=size,
            timeout=timeout,
        )


def _backend(device: torch.device, *, size: int) -> str:
    """NCCL where each of this host's ranks has a GPU of its own, which it insists on; else gloo.

    Ranks that share a GPU meet in the host's memory: slower, and all a proof needs.
    """
    if device.type == "cpu":
        return "gloo"
    started = torchrun_rendezvous()
    here = started.local_world_size if started else size
    return "gloo" if here > torch.cuda.device_count() else "cpu:gloo,cuda:nccl"


_inner: list[dist.ProcessGroup] = []
"""Groups made within the group of all, which have connections of their own."""
_making: list[int] = []
"""The ranks of the group that is made just now."""
_connections: set[tuple[int, int]] = set()
"""Descriptor and inode of every connection that the groups have made."""
_held: list[socket.socket] = []
"""Connections of the generation, once it is broken: they stay open until a moment after it."""
_HELD_SECONDS = 2.0
_LOOK_SECONDS = 0.25
_stuck: list[dist.ProcessGroup] = []
"""Groups in which a thread of gloo waits for ever: to take them apart is to wait for it."""
_open = threading.Lock()
"""Held while `_connections` or the generation that they belong to changes."""
_generation: int | None = None


@contextmanager
def _noting_connections() -> Iterator[None]:
    before = set(_connected_sockets())
    try:
        yield
    finally:
        made = set(_connected_sockets()) - before
        with _open:
            _connections.update(made)


def _connected_sockets() -> Iterator[tuple[int, int]]:
    """Descriptor and inode of this process's network connections."""
    for name in os.listdir("/dev/fd"):
        with suppress(OSError):  # closed meanwhile, or not connected
            found = os.fstat(int(name))
            if stat.S_ISSOCK(found.st_mode):
                with socket.socket(fileno=os.dup(int(name))) as copy:
                    if copy.family in (socket.AF_INET, socket.AF_INET6) and copy.getpeername():
                        yield int(name), found.st_ino


def _end_connections(how: int) -> list[socket.socket]:
    """End every connection of the groups, and give those that were open.

    gloo (torch 2.13) closes them only once nothing refers to a group any more; models that were
    cut, FSDP2's caches and kept exceptions do.
    """
    ended = []
    for descriptor, inode in set(_connected_sockets()) & _connections:
        with suppress(OSError):
            copy = socket.socket(fileno=os.dup(descriptor))
            if os.fstat(copy.fileno()).st_ino != inode:  # another has the number by now
                copy.close()
                continue
            ended.append(copy)
            copy.shutdown(how)
    return ended


def _close(sockets: list[socket.socket]) -> None:
    time.sleep(_HELD_SECONDS)
    for each in sockets:
        each.close()


def now_in(generation: int | None) -> None:
    """The groups that are made from now on belong to `generation`."""
    global _generation
    with _open:
        _generation = generation


def break_generation(number: int) -> None:
    """Wake whoever waits in a collective of this generation, from another thread: it has failed.

    A host that is switched off closes nothing, so its peers would wait for gloo's time-out. The
    connections end for reading alone and stay open for a moment, as a write that fails is one that
    gloo may forget (see `wait_for`): ours, and those of peers that are told a moment later.
    """
    with _open:
        if _generation == number:
            _held.extend(_end_connections(socket.SHUT_RD))


def complete(call: Callable[..., Any], *given: Any, group: dist.ProcessGroup | None) -> None:
    """Do a collective of torch, which takes what is `given`. Raises as `wait_for`."""
    if dist.get_backend(group) == "gloo":
        _wait_for_gloo(call(*given, group=group, async_op=True))
    else:
        call(*given, group=group)


def wait_for(work: dist.Work, *, group: dist.ProcessGroup | None) -> None:
    """Wait until a collective is over.

    Raises RuntimeError when it failed, or when its group did and it takes no notice: what gloo
    (torch 2.13, transport/tcp/pair.cc) sends or receives just when a connection ends is in none of
    the lists whose waiters it wakes. Then the group is kept for good.
    """
    if dist.get_backend(group) == "gloo":
        _wait_for_gloo(work)
    else:
        work.wait()


def _wait_for_gloo(work: dist.Work) -> None:
    ended = False
    while True:
        began = time.monotonic()
        try:
            work.wait(datetime.timedelta(seconds=_LOOK_SECONDS))
            return
        except RuntimeError:
            if time.monotonic() - began < _LOOK_SECONDS:
                raise
        if ended:
            _stuck.extend(_groups())
            raise RuntimeError("gloo: a connection ended, and what went over it was forgotten")
        ended = _has_ended()


def _has_ended() -> bool:
    """Whether gloo has closed a connection of the groups, as it does when one fails."""
    with _open:
        return not all(_is_open(*each) for each in _connections)


def _is_open(descriptor: int, inode: int) -> bool:
    with suppress(OSError):
        return os.fstat(descriptor).st_ino == inode
    return False


def _groups() -> list[dist.ProcessGroup]:
    found = [*_inner, dist.group.WORLD if dist.is_initialized() else None]
    return [each for each in found if each is not None]


def new_group(ranks: list[int]) -> dist.ProcessGroup:
    """A group of some of the ranks; every rank of the group of all calls it."""
    _making[:] = ranks
    with _noting_connections():
        made: dist.ProcessGroup = dist.new_group(ranks)
    if dist.get_rank() in ranks:
        _inner.append(made)
    return made


def stop_process_group(*, at_once: bool = False) -> None:
    """Leave the group, if any, and all groups within it.

    `at_once` breaks its connections, so that nobody waits for us.
    """
    if not dist.is_initialized():
        return
    if at_once:
        for group in _groups():
            group.abort()
    with _open:
        held = _held.copy()
        if at_once and not held:
            held = _end_connections(socket.SHUT_RDWR)
        _held.clear()
        _connections.clear()
    _inner.clear()
    dist.destroy_process_group()
    if held:
        threading.Thread(target=_close, args=(held,), name="closes", daemon=True).start()


class MeetingPoint(ABC):
    """Where ranks of a generation find one another; nobody has met there before.

    `address`: of this host, as the others reach it.
    """

    address: str
    pause_seconds = 0.002

    @abstractmethod
    def arrive(self, rank: int) -> None:
        """Note that `rank` is here."""

    @abstractmethod
    def arrived(self) -> int:
        """How many ranks have arrived."""

    @abstractmethod
    def store(self, size: int) -> dist.Store:
        """What `size` ranks leave their addresses in."""

    def wait_for_arrivals(self, *, rank: int, size: int, give_up: Callable[[], bool]) -> bool:
        """Note this rank's arrival and wait for all `size`; False once `give_up()`.

        Joining a group blocks until every rank is there, and cannot be called off; so ranks meet
        here first, where one that never comes does not hold the others.
        """
        self.arrive(rank)
        while self.arrived() < size:
            if give_up():
                return False
            time.sleep(self.pause_seconds)
        return True


@dataclass(frozen=True)
class MeetingFile(MeetingPoint):
    """A file that does not exist yet: it leaves no listening socket and no stale addresses."""

    path: Path
    address = "127.0.0.1"

    def arrive(self, rank: int) -> None:
        Path(f"{self.path}.arrived-{rank}").touch()

    def arrived(self) -> int:
        return sum(1 for _ in self.path.parent.glob(f"{self.path.name}.arrived-*"))

    def store(self, size: int) -> dist.Store:
        return dist.FileStore(str(self.path), size)


class MeetingServer(MeetingPoint):
    """A store that listens for one generation, on a host that all reach (comm/meeting_place.py)."""

    pause_seconds = 0.02

    def __init__(self, host: str, port: int) -> None:
        """Raises RuntimeError (torch's) where nobody listens within ten seconds."""
        self.address = address_towards(host)
        patience = datetime.timedelta(seconds=10)
        with _noting_connections():
            self._store = dist.TCPStore(
                host, port, is_master=False, wait_for_workers=False, timeout=patience
            )

    def arrive(self, rank: int) -> None:
        self._store.add("arrived", 1)

    def arrived(self) -> int:
        return int(self._store.add("arrived", 0))

    def store(self, size: int) -> dist.Store:
        return self._store


def meeting_point(url: str) -> MeetingPoint:
    """The point that a URL names. Raises ValueError for other URLs."""
    parts = urlsplit(url)
    if parts.scheme == "file" and not parts.netloc and parts.path.startswith("/"):
        return MeetingFile(Path(unquote(parts.path)))
    if parts.scheme == "tcp" and parts.hostname and parts.port:
        return MeetingServer(parts.hostname, parts.port)
    raise ValueError(f"meeting: expected file:///... or tcp://ADDRESS:PORT, got {url!r}")


def start_worker(worker: WorkerInfo, *, seed: int, exact: bool = False) -> None:
    """Threads and global seed of this worker; called in every thread that computes.

    `exact`: a GPU computes the same bits each time, or refuses (torch names the operation).
    """
    torch.set_num_threads(worker.threads)
    torch.manual_seed(seed)  # nothing that matters draws from it; see models/init.py
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, in convolutions too
    if exact and worker.device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS may not
        torch.use_deterministic_algorithms(True)
