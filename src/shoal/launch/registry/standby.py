"""Coordinators of one run stand by on several hosts: the registry says which of them leads.

A thread keeps the lease and asks again and again; the process itself leads, or waits. When the one
that leads ends the run in order it asks the others to stop; when it falls silent another leads.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from shoal.errors import RunError, ShoalError, Stopped, WorkerError
from shoal.launch.registry.membership import (
    RENEW_SECONDS,
    Fenced,
    Membership,
    Refused,
    View,
)
from shoal.launch.registry.records import Ask, Spec
from shoal.launch.registry.store import Unknown, Unreachable

ASK_SECONDS = 0.5
_HEARD_SECONDS = 4 * ASK_SECONDS
_SAY_SECONDS = 3.0
PATIENCE_SECONDS = 60.0
T = TypeVar("T")


class Candidate:
    """One of the coordinators of a run. A context manager: within it the lease is kept."""

    def __init__(
        self,
        membership: Membership,
        spec: Spec,
        *,
        say: Callable[[str], None],
        patience_seconds: float = PATIENCE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`patience_seconds`: how long a registry may be away that has never answered."""
        self._clock = clock
        self._membership, self._spec, self._say = membership, spec, say
        self._patience_seconds = patience_seconds
        self.view: View | None = None
        """What the registry held when it was last asked."""
        self.term: int | None = None
        """Of this process, while it leads."""
        self._refused: Refused | None = None
        self._away: str | None = None
        self._old: frozenset[str] | None = None
        self._enrolled, self._renewed_at = False, 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)

    def __enter__(self) -> Candidate:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(timeout=10)
        with contextlib.suppress(Unreachable, Unknown):
            self._membership.leave()

    def lead(self, work: Callable[[int], T]) -> T:
        """Wait for the turn, then `work(term)`; again where that ends with Fenced.

        Raises Stopped when another coordinator has ended the run, RunError for a registry that
        refuses this host, or that never answers.
        """
        said_at = time.monotonic()
        for waited in self._turns():
            if self.term is None:
                if waited and time.monotonic() - said_at > _SAY_SECONDS:
                    said_at = time.monotonic()
                    self._say(self._away or f"standing by: {self._leader} coordinates")
                continue
            try:
                with self._ending():
                    self._say(f"this process leads (term {self.term})")
                    return work(self.term)
            except (Fenced, WorkerError) as error:
                if isinstance(error, WorkerError) and not self._is_cut_off:
                    raise
                self._say(f"no longer the coordinator: {error}")
                self.term = None
        raise AssertionError("turns do not end")

    @property
    def _is_cut_off(self) -> bool:
        """Whether others may lead by now: then no host of the run listens to this process."""
        return self._away is not None or self.deposed() is not None

    def deposed(self) -> str | None:
        """Who leads instead of this process, as the registry said last."""
        view = self.view
        other = None if view is None else view.coordinator
        return other if other not in (None, self._membership.host.host) else None

    @property
    def _leader(self) -> str:
        return (self.view.coordinator if self.view else None) or "nobody yet"

    def _turns(self) -> Iterator[bool]:
        """Again and again; raises what ends the wait."""
        waited, began = False, time.monotonic()
        while True:
            if self._refused is not None:
                raise RunError(str(self._refused))
            if self.view is None and time.monotonic() - began > self._patience_seconds:
                raise RunError(
                    f"--etcd: no answer for {self._patience_seconds:.0f} s: {self._away}\n"
                    "    expected the addresses of servers that run; is it http or https there?"
                )
            if self._stopped():
                raise Stopped("the run was ended by the coordinator that led it")
            yield waited
            waited = True
            time.sleep(0.1)

    def _stopped(self) -> bool:
        view = self.view
        if view is None or self._old is None or self.term is not None:
            return False
        return any(ask.what == "stop" for n, ask in view.asks.items() if n not in self._old)

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        """Whatever ends the work, but for another coordinator, ends the run for all."""
        try:
            yield
        except Fenced:
            raise
        except BaseException as error:
            if not (isinstance(error, WorkerError) and self._is_cut_off):
                self._tell_others()
            raise
        else:
            self._tell_others()

    def _tell_others(self) -> None:
        if self.term is None:
            return
        with contextlib.suppress(ShoalError):
            if self._membership.look().term != self.term:
                return  # the run is another's by now
            number = self._membership.ask(Ask(what="stop"))
            time.sleep(_HEARD_SECONDS)
            self._membership.answered(number, term=self.term)

    # --- in the thread

    def _run(self) -> None:
        while not self._ended.is_set() and self._refused is None:
            self.turn()
            self._ended.wait(ASK_SECONDS)

    def turn(self) -> None:
        """Ask once: every ASK_SECONDS, by the thread."""
        try:
            if not self._enrolled:
                self._membership.enrol(self._spec)
                self._enrolled, self._renewed_at = True, self._clock()
            if self._clock() - self._renewed_at > RENEW_SECONDS:
                self._enrolled, self._renewed_at = self._membership.keep(), self._clock()
            self._look()
            self._away = None
        except Refused as error:
            self._refused = error
        except (Unreachable, Unknown, Fenced) as error:
            self._away = f"the registry does not answer: {error}"

    def _look(self) -> None:
        view = self._membership.look()
        if self._old is None:
            self._old = frozenset(view.asks)
        mine = self._membership.host.host
        term = view.term if view.coordinator == mine else None
        if view.coordinator is None:
            term = self._membership.lead()
        self.view = view
        self.term = term
