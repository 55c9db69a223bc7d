"""Which replica serves a request, and what becomes of it when that one is gone. No I/O of its own.

Every request is kept with what was made of it so far, so another replica can go on with it: answers
depend on prompt, settings and seed only, so it goes on with the same bits, and who waits for the
answer sees a pause.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import msgspec

from shoal.errors import ShoalError
from shoal.serve.request import Counters, Event, Request, Scored

Told = Callable[[Event], None]

_CHUNK = 32
"""Tokens by which beginnings of prompts are compared."""
_MOST_HELD = 4096
"""Beginnings that are remembered of each replica."""


class Busy(ShoalError):
    """The queue is full; `seconds`: when to ask again."""

    def __init__(self, seconds: int) -> None:
        super().__init__("too many requests are waiting; ask again later")
        self.seconds = seconds


@dataclass
class Pending:
    """A request that is not answered yet."""

    request: Request
    told: Told
    replica: int
    version: int | None = None
    """Of the model that answers it, once it was placed."""
    made: list[Scored] = field(default_factory=list)
    prompt_told: int = 0
    """Scores of the prompt that were told."""
    prompt_again: int = 0
    """Of these, which the replica that goes on tells again."""

    @property
    def tokens(self) -> int:
        """Still to be computed, at most."""
        return len(self.request.prompt) + self.request.sampling.max_tokens - len(self.made)


@dataclass
class Replica:
    """What is known of one replica."""

    version: int = 0
    """Of the model that it serves."""
    leaving: bool = False
    """It finishes what it has, and gets no new requests."""
    ready: bool = False
    heard_at: float = 0.0
    step_seconds: float = 0.1
    """Mean of late."""
    state: dict[str, Any] = field(default_factory=dict)
    held: OrderedDict[int, None] = field(default_factory=OrderedDict)
    """Hashes of beginnings that it computed: a hint of where to go, never what is believed."""


class Router:
    """All replicas and all requests. Not thread-safe: its owner has a lock."""

    def __init__(
        self,
        *,
        send: Callable[[int, dict[str, Any]], None],
        queue_requests: int,
        queue_tokens: int,
        max_running: int,
    ) -> None:
        """`send(replica, order)` hands an order over."""
        self._send = send
        self._most_requests, self._most_tokens = queue_requests, queue_tokens
        self._max_running = max_running
        self.replicas: dict[int, Replica] = {}
        self.pending: dict[str, Pending] = {}
        self.replays = 0
        self._before: Counter[str] = Counter()

    def submit(self, request: Request, told: Told) -> None:
        """Give a request to a replica; `told` hears of what becomes of it. Raises Busy."""
        if not self.has_room():
            raise Busy(self._drain_seconds())
        pending = Pending(request, told, -1)
        self.pending[request.id] = pending
        self._place(pending)

    def has_room(self) -> bool:
        """Whether another request may wait."""
        room = self._max_running * max(1, len(self.replicas))
        waiting = max(0, len(self.pending) - room)
        tokens = sum(each.tokens for each in self.pending.values()) if waiting else 0
        return waiting < self._most_requests and tokens <= self._most_tokens

    def _drain_seconds(self) -> int:
        """When a place in the queue will be free, by the rate of late."""
        rate = sum(
            each.state.get("running", 1) / max(each.step_seconds, 1e-3)
            for each in self.replicas.values()
        )
        tokens = sum(each.tokens for each in self.pending.values())
        return max(1, min(60, round(tokens / max(rate, 1.0) / max(1, len(self.pending)))))

    def _place(self, pending: Pending) -> None:
        chosen = self._choose(pending)
        pending.replica = chosen if chosen is not None else -1
        if chosen is None:
            return  # all are starting: it is placed when one is ready
        replica = self.replicas[chosen]
        pending.version = replica.version
        if self.load(chosen) == 1:
            replica.heard_at = time.monotonic()  # its silence counts from its first work on
        for key in _beginnings(pending.request):
            replica.held.pop(key, None)
            replica.held[key] = None
        while len(replica.held) > _MOST_HELD:
            replica.held.popitem(last=False)
        request = msgspec.structs.replace(
            pending.request, so_far=tuple(each.token for each in pending.made)
        )
        self._send(chosen, {"submit": msgspec.to_builtins(request)})

    def load(self, index: int) -> int:
        """Requests of replica `index`."""
        return sum(each.replica == index for each in self.pending.values())

    def _choose(self, pending: Pending) -> int | None:
        """Where most of its beginning was computed, unless that one has much more to do.

        One that was begun is finished by the same version of the model.
        """
        request = pending.request
        ready = [
            index
            for index, each in self.replicas.items()
            if each.ready
            and (not each.leaving if pending.version is None else each.version == pending.version)
        ]
        if not ready:
            return None
        loads = {index: self.load(index) for index in ready}
        fair = 2 * (sum(loads.values()) / len(ready)) + 1
        keys = _beginnings(request)
        best, most = None, 0
        for index in ready:
            held = self.replicas[index].held
            count = next((n for n, key in enumerate(keys) if key not in held), len(keys))
            if count > most and loads[index] <= fair:
                best, most = index, count
        return best if best is not None else min(ready, key=lambda index: (loads[index], index))

    def hear(self, index: int, message: dict[str, Any]) -> None:
        """What replica `index` said."""
        replica = self.replicas[index]
        replica.heard_at = time.monotonic()
        if "ready" in message:
            replica.ready, replica.state = True, {}
            for pending in [each for each in self.pending.values() if each.replica == -1]:
                self._place(pending)
            return
        replica.state = message.get("state", replica.state)
        seconds = replica.state.get("step_seconds", 0.0)
        if seconds:
            replica.step_seconds += 0.1 * (seconds - replica.step_seconds)
        for each in message.get("events", ()):
            self._event(index, msgspec.convert(each, Event))

    def _event(self, index: int, event: Event) -> None:
        pending = self.pending.get(event.id)
        if pending is None or pending.replica != index:
            return  # cancelled, or another replica goes on with it
        fresh = event.tokens[max(0, len(pending.made) - event.index) :]
        pending.made += fresh
        again = min(pending.prompt_again, len(event.prompt))
        pending.prompt_again -= again
        prompt = event.prompt[again:]
        pending.prompt_told += len(prompt)
        if event.finish is not None:
            del self.pending[event.id]
        first = len(pending.made) - len(fresh)
        pending.told(
            msgspec.structs.replace(event, tokens=tuple(fresh), index=first, prompt=prompt)
        )

    def counts(self) -> Counter[str]:
        """What engines count, over all replicas that there are and were: it never falls."""
        found = Counter(self._before)
        for each in self.replicas.values():
            found.update(_counted(each))
        return found

    def cancel(self, name: str) -> None:
        """Forget a request, here and where it is served."""
        pending = self.pending.pop(name, None)
        if pending is not None and pending.replica >= 0:
            self._send(pending.replica, {"cancel": name})

    def lost(self, index: int) -> None:
        """Replica `index` is gone: others go on with what it was doing."""
        gone = self.replicas[index]
        self._before.update(_counted(gone))
        self.replicas[index] = Replica(version=gone.version, leaving=gone.leaving)
        for pending in [each for each in self.pending.values() if each.replica == index]:
            self.replays += 1
            pending.prompt_again = pending.prompt_told
            self._place(pending)

    def remove(self, index: int) -> None:
        """Replica `index` has done its work, and another has its place."""
        self._before.update(_counted(self.replicas.pop(index)))

    def stuck(self, *, silence_seconds: float) -> list[int]:
        """Replicas that have work and say nothing for too long."""
        now = time.monotonic()
        return [
            index
            for index, each in self.replicas.items()
            if each.ready
            and self.load(index)
            and now - each.heard_at > max(silence_seconds, 15 * each.step_seconds)
        ]


_COUNTED = frozenset(each.name for each in fields(Counters))


def _counted(replica: Replica) -> dict[str, int]:
    return {key: value for key, value in replica.state.items() if key in _COUNTED}


def _beginnings(request: Request) -> list[int]:
    """A hash of each beginning of the prompt, shortest first."""
    key = hash(request.adapter)
    found = []
    for start in range(0, len(request.prompt) - _CHUNK + 1, _CHUNK):
        key = hash((key, request.prompt[start : start + _CHUNK]))
        found.append(key)
    return found
