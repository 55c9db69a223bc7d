"""Start and end of a worker: device, threads, seed, process group."""

from __future__ import annotations

import datetime
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch
import torch.distributed as dist

from shoal.environment import talk_over_loopback, torchrun_rendezvous
from shoal.errors import UserError


@dataclass(frozen=True)
class WorkerInfo:
    """Where a worker runs."""

    rank: int
    size: int
    device: torch.device
    threads: int


def choose_device(wanted: str, *, local_rank: int) -> torch.device:
    """`auto` is a CUDA device where there is one. Raises UserError when `cuda` is not there."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "launch.device: expected a CUDA device, found none (torch "
            f"{torch.__version__}); use launch.device=cpu, or install the CUDA build: "
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
    meeting: str | None,
    timeout_seconds: float,
    around: Around | None = None,
) -> None:
    """Join the group of all worker processes.

    `meeting`: the URL of a place where nobody has met yet, one per attempt (see MeetingPoint);
    None: the addresses torchrun gave in the environment. `around`: changes what ranks find there.
    """
    backend = _backend(device, size=size)
    timeout = datetime.timedelta(seconds=timeout_seconds)
    if dist.is_initialized():
        return  # a launcher has joined already
    if meeting is None:
        dist.init_process_group(backend, timeout=timeout)
        return
    talk_over_loopback()
    _making[:] = range(size)
    store: dist.Store = dist.FileStore(str(MeetingPoint.of(meeting).path), size)
    if around is not None:
        store = around(store, lambda: list(_making))
    with _noting_connections():
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


@contextmanager
def _noting_connections() -> Iterator[None]:
    before = set(_connected_sockets())
    try:
        yield
    finally:
        _connections.update(set(_connected_sockets()) - before)


def _connected_sockets() -> Iterator[tuple[int, int]]:
    """Descriptor and inode of this process's network connections."""
    for name in os.listdir("/dev/fd"):
        with suppress(OSError):  # closed meanwhile, or not connected
            found = os.fstat(int(name))
            if stat.S_ISSOCK(found.st_mode):
                with socket.socket(fileno=os.dup(int(name))) as copy:
                    if copy.family in (socket.AF_INET, socket.AF_INET6) and copy.getpeername():
                        yield int(name), found.st_ino


def _break_connections() -> None:
    """End every connection of the groups, so that whoever waits for this rank notices.

    gloo (torch 2.13) closes them only once nothing refers to a group any more; models that were
    cut, FSDP2's caches and kept exceptions do.
    """
    for descriptor, inode in set(_connected_sockets()) & _connections:
        with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as copy:
            if os.fstat(descriptor).st_ino == inode:
                copy.shutdown(socket.SHUT_RDWR)


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
    if at_once and dist.group.WORLD is not None:
        for group in (*_inner, dist.group.WORLD):
            group.abort()
        _break_connections()
    _inner.clear()
    _connections.clear()
    dist.destroy_process_group()


@dataclass(frozen=True)
class MeetingPoint:
    """Where ranks of a generation find one another: a file that does not exist yet.

    A file leaves no listening socket and no stale addresses behind.
    """

    path: Path

    @classmethod
    def of(cls, url: str) -> MeetingPoint:
        """The point that a URL names. Raises ValueError for any but file:///..."""
        parts = urlsplit(url)
        if parts.scheme != "file" or parts.netloc or not parts.path.startswith("/"):
            raise ValueError(f"meeting: expected file:///..., got {url!r}")
        return cls(Path(unquote(parts.path)))

    def wait_for_arrivals(self, *, rank: int, size: int, give_up: Callable[[], bool]) -> bool:
        """Note this rank's arrival and wait for all `size`; False once `give_up()`.

        Joining a group blocks until every rank is there, and cannot be called off; so ranks meet
        here first, where one that never comes does not hold the others.
        """
        Path(f"{self.path}.arrived-{rank}").touch()
        while sum(1 for _ in self.path.parent.glob(f"{self.path.name}.arrived-*")) < size:
            if give_up():
                return False
            time.sleep(0.002)
        return True


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
