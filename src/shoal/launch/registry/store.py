"""What a registry is kept in: keys with revisions, transactions and leases; here, in memory.

The model is etcd's (https://etcd.io/docs/v3.4/learning/api/): one counter of revisions, two of its
values beside each key (when it was created, when it last changed), transactions that compare these
and then write, and leases that take their keys with them when nobody renews them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from shoal.errors import ShoalError


class Unreachable(ShoalError):
    """Nobody answered a read, or a request that has no effect. Says who was asked."""


class Unknown(ShoalError):
    """A change was sent and no answer came: it may have been made, may yet be, or never."""


@dataclass(frozen=True)
class Entry:
    """A value, and the revisions at which its key was created and last changed."""

    value: bytes
    created: int
    changed: int


@dataclass(frozen=True)
class Compare:
    """A condition of a change: the key's revision `what` is `revision`; 0: there is no such key."""

    key: str
    what: Literal["created", "changed"]
    revision: int


class Store(Protocol):
    """Implemented by `Memory` and by etcd.Etcd. Keys are those below one prefix, without it."""

    def read(self) -> dict[str, Entry]:
        """Every key, as of one moment that is not before the call. Raises Unreachable."""

    def change(
        self,
        put: Mapping[str, bytes],
        *,
        when: Sequence[Compare] = (),
        delete: Sequence[str] = (),
        lease: int | None = None,
    ) -> int | None:
        """Write all at once if all conditions hold; the revision, or None where one did not.

        With a `lease` what is put goes when it ends. Raises Unknown; LookupError for a lease that
        has ended.
        """

    def grant(self, seconds: int) -> int:
        """A new lease. Raises Unreachable."""

    def keep(self, lease: int) -> bool:
        """Renew it; False: it has ended. Raises Unreachable."""

    def revoke(self, lease: int) -> None:
        """End it, and what was put with it. Raises Unreachable."""


@dataclass
class _Lease:
    seconds: int
    ends: float


class Memory:
    """A store of this process: for one machine, and for hosts that ask its supervisor.

    It ends with the process, which on one machine is also the end of the run's supervision.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._entries: dict[str, Entry] = {}
        self._leases: dict[int, _Lease] = {}
        self._held: dict[str, int] = {}
        self._revision = 0

    def read(self) -> dict[str, Entry]:
        with self._lock:
            self._expire()
            return dict(self._entries)

    def change(
        self,
        put: Mapping[str, bytes],
        *,
        when: Sequence[Compare] = (),
        delete: Sequence[str] = (),
        lease: int | None = None,
    ) -> int | None:
        with self._lock:
            self._expire()
            if not all(self._holds(each) for each in when):
                return None
            if lease is not None and lease not in self._leases:
                raise LookupError(f"lease {lease} has ended")
            self._revision += 1
            for key in delete:
                self._forget(key)
            for key, value in put.items():
                known = self._entries.get(key)
                created = self._revision if known is None else known.created
                self._entries[key] = Entry(value, created, self._revision)
                self._held.pop(key, None)
                if lease is not None:
                    self._held[key] = lease
            return self._revision

    def grant(self, seconds: int) -> int:
        with self._lock:
            number = max(self._leases, default=0) + 1 + self._revision
            self._leases[number] = _Lease(seconds, self._clock() + seconds)
            self._revision += 1  # so that no number is given twice
            return number

    def keep(self, lease: int) -> bool:
        with self._lock:
            self._expire()
            found = self._leases.get(lease)
            if found is not None:
                found.ends = self._clock() + found.seconds
            return found is not None

    def revoke(self, lease: int) -> None:
        with self._lock:
            self._end(lease)

    def _holds(self, condition: Compare) -> bool:
        entry = self._entries.get(condition.key)
        found = 0 if entry is None else getattr(entry, condition.what)
        return bool(found == condition.revision)

    def _expire(self) -> None:
        now = self._clock()
        for lease in [number for number, each in self._leases.items() if each.ends <= now]:
            self._end(lease)

    def _end(self, lease: int) -> None:
        self._leases.pop(lease, None)
        keys = [key for key, holder in self._held.items() if holder == lease]
        if keys:
            self._revision += 1
        for key in keys:
            self._forget(key)

    def _forget(self, key: str) -> None:
        self._entries.pop(key, None)
        self._held.pop(key, None)
