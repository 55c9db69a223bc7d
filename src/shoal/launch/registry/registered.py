"""What a coordinator writes into the registry of its run: generations before they begin, and saves.

A thread of its own asks the store, which may take seconds to answer: meanwhile the coordinator goes
on, and its hosts hear of it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from shoal.checkpoint.manifest import NAME
from shoal.errors import ShoalError
from shoal.launch.cluster import NotYet
from shoal.launch.registry.membership import Fenced, Membership
from shoal.launch.registry.records import Generation, Saved, Slot
from shoal.launch.registry.store import Unknown, Unreachable

_SAY_SECONDS = 5.0


class Registered:
    """What one coordinator writes.

    `term`: the one in which it leads, None while it does not. `deposed`: who leads instead, as far
    as is known. `say`: told when the store is away for long, and is back.
    """

    def __init__(
        self,
        membership: Membership,
        *,
        term: Callable[[], int | None],
        deposed: Callable[[], str | None],
        run: Path,
        say: Callable[[str], None],
    ) -> None:
        self._membership, self._term, self._deposed = membership, term, deposed
        self._run, self._say = run, say
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="registry")
        self._asked: tuple[str, ...] = ()
        self._answer: Future[None] | None = None
        self._saves: list[tuple[int, int, str]] = []
        self._saving: Future[None] | None = None
        self._number = self._token = 0
        self._lock = threading.Lock()
        self._away_since: float | None = None
        self._said = False

    def announce(self, hosts: Sequence[str], *, meet: str) -> None:
        """Make a generation of workers on `hosts` (in rank order) the one that counts.

        Raises NotYet until that is so: then call again. Raises Fenced where another coordinator
        counts by now.
        """
        asked = tuple(hosts)
        if self._answer is None:
            self._asked = asked
            self._answer = self._thread.submit(self._announce, asked, meet)
        if not self._answer.done():
            raise NotYet("the registry has not answered yet")
        answer, self._answer = self._answer, None
        try:
            answer.result()
        except (Unreachable, Unknown) as error:
            raise NotYet(str(error)) from None
        if asked != self._asked:  # others are there by now
            raise NotYet("another generation was announced")

    def saved(self, step: int, *, place: str) -> None:
        """Commit a save, in time: where the store is away it waits."""
        with self._lock:
            self._saves.append((self._number, step, place))

    def look(self) -> None:
        """Go on with what waits. Raises Fenced where another coordinator counts by now."""
        other = self._deposed()
        if other is not None:
            raise Fenced(f"{other} coordinates by now")
        if self._saving is not None and self._saving.done():
            saving, self._saving = self._saving, None
            try:
                saving.result()
            except (Unreachable, Unknown):
                pass  # it waits
        with self._lock:
            waits = bool(self._saves)
        if waits and self._saving is None:
            self._saving = self._thread.submit(self._commit)
        away = self._away_since
        if away is not None and not self._said and time.monotonic() - away > _SAY_SECONDS:
            self._said = True
            self._say("the registry does not answer: training goes on, saves wait to be committed")
        if away is None and self._said:
            self._said = False
            self._say("the registry answers again")

    def close(self) -> None:
        """Nothing follows."""
        deadline = time.monotonic() + 5.0
        while self._saves and time.monotonic() < deadline:
            self.look()
            time.sleep(0.05)
        self._thread.shutdown(wait=False, cancel_futures=True)

    # --- in the thread

    def _announce(self, hosts: tuple[str, ...], meet: str) -> None:
        with _Watched(self):
            view, term = self._membership.look(), self._term()
            if term is None:
                raise Unreachable("this host's lease has ended, or is not renewed yet")
            last = view.generation
            number = (last.number if last else 0) + 1
            step = view.commit.step if view.commit else 0
            slots = tuple(Slot(host=host, worker=rank) for rank, host in enumerate(hosts))
            record = Generation(
                number=number,
                coordinator=self._membership.host.host,
                slots=slots,
                meet=meet,
                base=(last.number if last else 0, step),
            )
            token = self._membership.announce(record, term=term, after=view.token)
            with self._lock:
                self._number, self._token = number, token

    def _commit(self) -> None:
        with _Watched(self):
            with self._lock:
                number, step, place = self._saves[0]
                token, now = self._token, self._number
            manifest = self._run / "checkpoints" / place / NAME
            if number == now and manifest.is_file():  # of an older one, or pruned: no longer needed
                digest = xxhash.xxh3_128_hexdigest(manifest.read_bytes())
                saved = Saved(generation=number, step=step, place=place, manifest=digest)
                self._membership.commit(saved, token=token)
            with self._lock:
                self._saves.pop(0)


class _Watched:
    """Notes since when the store does not answer."""

    def __init__(self, registered: Registered) -> None:
        self._registered = registered

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, Unreachable | Unknown):
            since = self._registered._away_since
            self._registered._away_since = since or time.monotonic()
        elif error is None or isinstance(error, Fenced | ShoalError):
            self._registered._away_since = None
