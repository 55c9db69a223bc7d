"""A slower link between replicas, to try one: relays with a rate and a delay under gloo's sockets.

gloo finds its peers through a store, where each rank leaves its address. A rank that reads the
address of one in another replica gets that of a relay instead, a socket of its own process, which
passes every byte on to the real one: in order, each way at most so many bytes a second, and so many
seconds later. Nothing in the training knows of it, and nothing is reckoned: what takes longer takes
longer. The form of the addresses is that of torch 2.13's gloo (IPv4, on loopback).

Of two ranks, gloo lets the one with the greater address connect (transport/tcp/pair.cc compares
ports as they lie in memory). Relays must not change who that is, or both would wait: the higher
rank is shown a port that is smaller than any of its own, and the lower one the greatest there is,
which it never connects to.
"""

from __future__ import annotations

import datetime
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist

from shoal.config.link import Link
from shoal.errors import WorkerError
from shoal.runtime import Around

_PIECE_BYTES = 16384
_LOOPBACK = socket.inet_aton("127.0.0.1")
_FAMILY = struct.pack("=H", socket.AF_INET)


_SMALL_PORTS = [number << 8 for number in range(0x7F, 0x03, -1)]
"""Below those that systems hand out, whichever of their two bytes comes first."""
_GREATEST_PORT = 0xFFFF


class Bucket:
    """When bytes may go: at most `rate` of them a second, however many ask. For several threads."""

    def __init__(self, rate: float) -> None:
        self.rate, self._free_at, self._lock = rate, 0.0, threading.Lock()

    def take(self, count: int) -> float:
        """The time (monotonic) at which the last of `count` bytes has gone."""
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + count / self.rate
            return self._free_at


class Relay:
    """A listening socket that passes one connection on to `port` of this machine."""

    def __init__(self, port: int, *, link: Link, ways: tuple[Bucket, Bucket]) -> None:
        self._target, self._link, self._buckets = port, link, ways
        self._listener = _listen()
        self._listener.settimeout(600.0)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._run, name="link", daemon=True).start()

    def _run(self) -> None:
        with suppress(OSError):
            with self._listener:
                near, _ = self._listener.accept()
            with near, socket.create_connection(("127.0.0.1", self._target)) as far:
                for each in (near, far):
                    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                works = [
                    *_ways(near, far, bucket=self._buckets[0], delay=self._link.delay_seconds),
                    *_ways(far, near, bucket=self._buckets[1], delay=self._link.delay_seconds),
                ]
                threads = [threading.Thread(target=w, name="link", daemon=True) for w in works]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()


def _listen() -> socket.socket:
    """A socket that listens at a small port. Raises WorkerError when all are taken."""
    for port in _SMALL_PORTS:
        with suppress(OSError):
            return socket.create_server(("127.0.0.1", port), reuse_port=False)
    raise WorkerError(f"launch.link: none of {len(_SMALL_PORTS)} ports for relays is free")


def _ways(
    source: socket.socket, sink: socket.socket, *, bucket: Bucket, delay: float
) -> tuple[Callable[[], None], Callable[[], None]]:
    """What reads, and what writes when the time has come. What is on its way is bounded by what the
    link holds, so a sender waits as it would for a real one."""
    holds = max(4, int(2 * delay * bucket.rate / _PIECE_BYTES))
    waiting: queue.Queue[tuple[float, bytes]] = queue.Queue(holds)

    def read() -> None:
        data = b"-"
        while data:
            try:
                data = source.recv(_PIECE_BYTES)
            except OSError:
                data = b""
            waiting.put((bucket.take(len(data)) + delay, data))

    def write() -> None:
        data, broken = b"-", False
        while data:
            at, data = waiting.get()
            time.sleep(max(0.0, at - time.monotonic()) if not broken else 0.0)
            try:
                sink.sendall(data)
            except OSError:
                broken = True
            if broken or not data:  # an end that goes takes the other with it
                for each in (source, sink):
                    with suppress(OSError):
                        each.shutdown(socket.SHUT_RDWR)

    return read, write


class LinkedStore(dist.Store):
    """`inner`, in which the addresses of ranks of other replicas are those of relays.

    `ranks`: gives those of the group that is made just now, by their numbers in the whole;
    `replica_of`: the replica of each.
    """

    def __init__(
        self,
        inner: dist.Store,
        *,
        rank: int,
        link: Link,
        ranks: Callable[[], list[int]],
        replica_of: Callable[[int], int],
    ) -> None:
        super().__init__()
        self._inner, self._rank, self._link = inner, rank, link
        self._ranks, self._replica_of = ranks, replica_of
        self._ways: dict[int, tuple[Bucket, Bucket]] = {}
        self.num_linked = 0
        """Addresses of ranks of other replicas that were read."""

    def get(self, key: str) -> bytes:
        value: bytes = self._inner.get(key)
        place = key.rpartition("/")[2]
        at = value.find(_LOOPBACK)
        if not place.isdigit() or at < 4 or value[at - 4 : at - 2] != _FAMILY:
            return value  # not an address
        other = self._ranks()[int(place)]
        if self._replica_of(other) == self._replica_of(self._rank):
            return value
        self.num_linked += 1
        (port,) = struct.unpack("!H", value[at - 2 : at])
        shown = _GREATEST_PORT if other > self._rank else self._relay(other, port=port)
        return value[: at - 2] + struct.pack("!H", shown) + value[at:]

    def _relay(self, other: int, *, port: int) -> int:
        """The port of a new relay to rank `other`; all to one rank share its rate."""
        rate = self._link.bytes_per_second
        ways = self._ways.setdefault(other, (Bucket(rate), Bucket(rate)))
        return Relay(port, link=self._link, ways=ways).port

    # what else gloo and torch ask of a store

    def set(self, key: str, value: Any) -> None:
        self._inner.set(key, value)

    def add(self, key: str, amount: int) -> int:
        return int(self._inner.add(key, amount))

    def compare_set(self, key: str, expected: Any, desired: Any) -> Any:
        return self._inner.compare_set(key, expected, desired)

    def check(self, keys: list[str]) -> bool:
        return bool(self._inner.check(keys))

    def wait(self, keys: list[str], timeout: datetime.timedelta | None = None) -> None:
        self._inner.wait(keys) if timeout is None else self._inner.wait(keys, timeout)

    def delete_key(self, key: str) -> bool:
        return bool(self._inner.delete_key(key))

    def num_keys(self) -> int:
        return int(self._inner.num_keys())

    def has_extended_api(self) -> bool:
        return False

    def set_timeout(self, timeout: datetime.timedelta) -> None:
        self._inner.set_timeout(timeout)


class SlowLink:
    """What a worker puts under each generation's groups. Replicas are `workers` ranks each."""

    def __init__(self, link: Link, *, workers: int) -> None:
        self._link, self._workers = link, workers
        self._store: LinkedStore | None = None

    def around(self, rank: int) -> Around:
        """For `start_process_group`, as `rank`."""

        def around(store: dist.Store, ranks: Callable[[], list[int]]) -> dist.Store:
            workers = self._workers
            self._store = LinkedStore(
                store, rank=rank, link=self._link, ranks=ranks, replica_of=lambda r: r // workers
            )
            return self._store

        return around

    def check(self, size: int) -> None:
        """Raises WorkerError where `size` ranks have met and no address was found."""
        if size > self._workers and not (self._store and self._store.num_linked):
            raise WorkerError(
                f"launch.link: gloo of torch {torch.__version__} leaves its addresses in another "
                "form than 2.13's, so no link can be put between replicas; set launch.link=null"
            )


def link_of(text: str | None, *, workers: int) -> SlowLink | None:
    """The link that a recipe asks for, if any."""
    return None if text is None else SlowLink(Link.parse(text), workers=workers)
