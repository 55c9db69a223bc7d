"""What a coordinator writes into the registry of its run: generations before they begin, and saves.

A thread of its own asks the store, which may take seconds to answer: meanwhile the coordinator goes
on, and its hosts hear of it.

The folder follows the registry: workers leave saves that nothing loads (checkpoint/folders.py), and
only a save that is committed gets the name of a checkpoint. Before a generation begins the folder
is put right once more, since the coordinator before this one may have died in between.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from shoal.checkpoint.files import Files
from shoal.checkpoint.folders import drop, publish, published_name, waiting_name, waiting_saves
from shoal.checkpoint.manifest import NAME
from shoal.errors import ShoalError
from shoal.launch.cluster import NotYet
from shoal.launch.registry.membership import Fenced, Membership, View
from shoal.launch.registry.records import Generation, Saved, Slot
from shoal.launch.registry.store import Unknown, Unreachable

_SAY_SECONDS = 5.0
_END_SECONDS = 20.0
"""How long the end of a run waits for its last save to be committed."""


@dataclass(frozen=True)
class _Waiting:
    """A save that workers have left."""

    generation: int
    step: int
    keep: int
    best: int | None

    @property
    def name(self) -> str:
        return waiting_name(self.step, generation=self.generation)


class Registered:
    """What one coordinator writes.

    `term`: the one in which it leads, None while it does not. `deposed`: who leads instead, as far
    as is known. `say`: told when the store is away for long, and is back. `executor`: what asks the
    store; a thread of its own by default.
    """

    def __init__(
        self,
        membership: Membership,
        *,
        term: Callable[[], int | None],
        deposed: Callable[[], str | None],
        run: Path,
        say: Callable[[str], None],
        executor: Executor | None = None,
    ) -> None:
        self._membership, self._term, self._deposed = membership, term, deposed
        self._folder, self._say = run / "checkpoints", say
        self._thread = executor or ThreadPoolExecutor(1, thread_name_prefix="registry")
        self._asked: tuple[str, ...] = ()
        self._answer: Future[None] | None = None
        self._saves: list[_Waiting] = []
        self._saving: Future[None] | None = None
        self._number = self._token = 0
        self._keep = 1 << 30  # until a save says it
        self._best: int | None = None
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

    def recover(self) -> None:
        """Put the folder right before anybody reads it. Raises Unreachable, Unknown."""
        view = self._membership.look()
        self._commit_what_is_left(view)
        self._put_right(self._membership.look())

    @property
    def number(self) -> int:
        """Of the generation announced last."""
        return self._number

    def saved(self, step: int, *, generation: int, keep: int, best: int | None) -> None:
        """Commit a save, in time: where the store is away it waits.

        `keep`, `best`: what stays of the earlier ones then (checkpoint/folders.py).
        """
        with self._lock:
            self._keep, self._best = keep, best
            self._saves.append(_Waiting(generation, step, keep, best))

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
        deadline = time.monotonic() + _END_SECONDS
        while self._saves and time.monotonic() < deadline:
            self.look()
            time.sleep(0.05)
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._saves:
            place = self._folder / self._saves[-1].name
            self._say(
                f"the registry does not answer: the last save is not committed, and the run goes "
                f"on from the one before it; it lies in {place}"
            )

    # --- in the thread

    def _announce(self, hosts: tuple[str, ...], meet: str) -> None:
        with _Watched(self):
            view, term = self._membership.look(), self._term()
            if term is None:
                raise Unreachable("this host's lease has ended, or is not renewed yet")
            if view.term == term:
                self._commit_what_is_left(view)
            last = view.generation
            number = (last.number if last else 0) + 1
            slots = tuple(Slot(host=host, worker=rank) for rank, host in enumerate(hosts))
            record = Generation(
                number=number,
                coordinator=self._membership.host.host,
                slots=slots,
                meet=meet,
                base=(last.number if last else 0, view.commit.step if view.commit else 0),
            )
            token = self._membership.announce(record, term=term, after=view.token)
            with self._lock:
                self._number, self._token = number, token
            # from here on nobody commits a save of an older generation
            self._put_right(self._membership.look())

    def _commit_what_is_left(self, view: View) -> None:
        """What the last generation saved whole counts, though who led it did not come to say so."""
        if view.generation is None:
            return
        number, least = view.generation.number, view.commit.standing if view.commit else (0, -1)
        left = [each for each in waiting_saves(self._folder) if each[0] == number and each > least]
        for generation, step in left[-1:]:
            record = self._record(_Waiting(generation, step, self._keep, self._best))
            with suppress(Fenced):
                if record is not None:
                    self._membership.commit(record, token=view.token)

    def _put_right(self, view: View) -> None:
        """Let the folder show the committed save, and nothing that can never be committed."""
        files, commit = Files(), view.commit
        if commit is not None:
            self._publish(_Waiting(commit.generation, commit.step, self._keep, self._best))
        number = view.generation.number if view.generation else 0
        for generation, step in waiting_saves(self._folder):
            if generation < number:
                name = waiting_name(step, generation=generation)
                self._say(f"a save that was never committed goes: {name}")
                with suppress(OSError):
                    drop(self._folder, name, files=files)

    def _commit(self) -> None:
        with _Watched(self):
            with self._lock:
                saved = self._saves[0]
                token, now = self._token, self._number
            record = self._record(saved)
            if saved.generation == now and record is not None:
                self._membership.commit(record, token=token)
                self._publish(saved)
            with self._lock:
                self._saves.pop(0)

    def _record(self, saved: _Waiting) -> Saved | None:
        """What is committed of it; None: another coordinator has dropped it, or given it a name."""
        try:
            manifest = (self._folder / saved.name / NAME).read_bytes()
        except FileNotFoundError:
            return None
        return Saved(
            generation=saved.generation,
            step=saved.step,
            place=published_name(saved.step),
            manifest=xxhash.xxh3_128_hexdigest(manifest),
        )

    def _publish(self, saved: _Waiting) -> None:
        """Give a committed save its name; one that has it already, or was given it, stays."""
        source, known = self._folder / saved.name, {"step": saved.step, "keep": saved.keep}
        kept = [] if saved.best is None else [saved.best]
        try:
            if source.is_dir():
                publish(self._folder, source, **known, kept=kept, files=Files())
        except FileNotFoundError:
            return  # another coordinator was faster
        except OSError as error:
            self._say(f"{source}: is committed, and cannot be given its name: {error.strerror}")


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
