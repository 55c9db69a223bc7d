"""A server's record, for the page: serving.json, serving.jsonl, events.jsonl, workers.json.

A row a second while anything is done, one in ten seconds else. Nothing of what was asked or
answered is in it, only counts and times. What cannot be written (a full disk) ends no server.

serving.jsonl, of the time since the row before:
    at, seconds                      when (seconds since 1970), and how long the row is about
    requests, refused                that came; of these, told to come again (429)
    answered, failed, left           that ended: in full; by an error; since nobody waits any more
    prompt_tokens, made_tokens       computed, and made
    asked_tokens, held_tokens        of prompts; of these, found in the cache
    first_token_seconds, answer_seconds   {"median", "p95"} of requests, null where there was none
and as they are now:
    running, waiting                 requests
    replays, restarts                since the server began: requests that another replica went on
                                     with, replicas that were started again
    replicas                         of each rank, running, waiting, cache (0 to 1, or null)
"""

from __future__ import annotations

import json
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from shoal.errors import RunError
from shoal.launch.directory import hold, is_run, write_whole
from shoal.launch.lanes import write_lanes
from shoal.launch.serving import Fleet, Seen
from shoal.observe.events import JsonLines, happening

ROWS, ABOUT = "serving.jsonl", "serving.json"
EVERY_SECONDS = 1.0
QUIET_SECONDS = 10.0
MOST_BYTES = 32 << 20
"""Of the rows, about a day of work; then they begin anew, and those before are kept beside."""
_SILENT_SECONDS, _SILENT_STEPS = 2.0, 15
_SUMS = {
    "prompt_tokens": "prompt_tokens",
    "made_tokens": "made_tokens",
    "asked_tokens": "prefix_queries",
    "held_tokens": "prefix_hits",
}


@contextmanager
def held_record(folder: str | None) -> Iterator[Path | None]:
    """The folder of a record, made where it is not there, and nobody else's meanwhile.

    Raises RunError for a folder that holds anything else, or that another server writes to.
    """
    if folder is None:
        yield None
        return
    path = Path(folder).expanduser()
    others = [] if (path / ABOUT).is_file() or not path.is_dir() else list(path.iterdir())
    if is_run(path) or any(each.name != ".lock" for each in others):
        raise RunError(
            f"serve.record: {path}: expected a new or empty folder, or a server's record, found "
            f"{'a run' if is_run(path) else 'other files'}; choose another one"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"serve.record: {path}: cannot be made: {error.strerror}") from None
    with ExitStack() as held:
        try:
            held.enter_context(hold(path))
        except RunError:
            raise RunError(
                f"serve.record: {path}: another server writes to it; choose another folder"
            ) from None
        yield path


class Record:
    """Looks at a fleet once a second and writes. A context manager: leaving it ends that."""

    def __init__(
        self, folder: Path, fleet: Fleet, *, about: Mapping[str, Any], say: Callable[[str], None]
    ) -> None:
        """`about`: what is served, where, by how many; plain data."""
        self._folder, self._fleet, self._about, self._say = folder, fleet, dict(about), say
        self._counts = self._counted()
        self._looked = time.monotonic()
        self._cannot = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="record", daemon=True)

    def __enter__(self) -> Record:
        self._try(self._begin)
        self._fleet.happened = self._happened
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self._fleet.happened = lambda name, fields: None
        self._try(lambda: self.look(last=True))
        self._happened("finished", {"text": "the server ended"})

    def look(self, *, last: bool = False) -> None:
        """Write how the replicas are, and a row if there is anything to say. Raises OSError."""
        seen = self._fleet.seen()
        write_lanes(self._folder, [] if last else [_lane(*each) for each in seen.items()])
        now, counts = time.monotonic(), self._counted()
        passed = now - self._looked
        work = counts != self._counts or any(each.requests for each in seen.values())
        if not (work or last or passed >= QUIET_SECONDS):
            return
        first, ended = self._fleet.lately.take()
        since = {key: value - self._counts[key] for key, value in counts.items()}
        self._looked, self._counts = now, counts
        row = {
            "at": round(time.time(), 3),
            "seconds": round(passed, 3),
            **since,
            **_ends([how for _, how in ended]),
            "first_token_seconds": _times(first),
            "answer_seconds": _times([each for each, _ in ended]),
            "running": sum(each.state.get("running", 0) for each in seen.values()),
            "waiting": sum(each.state.get("waiting", 0) for each in seen.values()),
            "replays": self._fleet.replays,
            "restarts": self._fleet.restarts,
            "replicas": [self._replica(*each) for each in seen.items()],
        }
        path = self._folder / ROWS
        if path.is_file() and path.stat().st_size > MOST_BYTES:
            os.replace(path, self._folder / "serving-before.jsonl")
        rows = JsonLines(path)
        rows.append(row)
        rows.close()

    def _begin(self) -> None:
        write_whole(self._folder / ABOUT, json.dumps(self._about, indent=1) + "\n")
        text = f"serving {self._about['model']} at {self._about['address']}"
        self._happened("started", {"text": text})

    def _happened(self, name: str, fields: dict[str, Any]) -> None:
        def write() -> None:
            events = JsonLines(self._folder / "events.jsonl")
            events.append(happening(name, fields))
            events.close()

        self._try(write)

    def _look_on(self) -> None:
        while not self._end.wait(EVERY_SECONDS):
            self._try(self.look)

    def _try(self, write: Callable[[], None]) -> None:
        """What cannot be written is said once, and tried again with the next row."""
        try:
            write()
            self._cannot = False
        except OSError as error:
            if not self._cannot:
                self._say(f"{self._folder}: not written: {error.strerror}; the server goes on")
            self._cannot = True

    def _counted(self) -> dict[str, int]:
        counts, lately = self._fleet.counts(), self._fleet.lately
        told = {"requests": lately.came, "refused": lately.refused}
        return told | {key: counts.get(name, 0) for key, name in _SUMS.items()}

    def _replica(self, rank: int, one: Seen) -> dict[str, Any]:
        blocks = self._fleet.facts.get("blocks", 0)
        free = one.state.get("free_blocks", blocks)
        return {
            "rank": rank,
            "running": one.state.get("running", 0),
            "waiting": one.state.get("waiting", 0),
            "cache": round(1 - free / blocks, 4) if blocks else None,
        }


def _lane(rank: int, one: Seen) -> dict[str, Any]:
    """As launch/lanes.py has it: what a replica does now."""
    state = "computes" if one.requests else "waits"
    if not one.ready:
        state = "starts"
    elif one.requests and one.silent_seconds > max(
        _SILENT_SECONDS, _SILENT_STEPS * one.step_seconds
    ):
        state = "silent"
    silent = round(one.silent_seconds, 2) if one.requests else 0.0
    work = {"phase": "requests", "step": one.requests} if one.requests else {}
    return {"rank": rank, "state": state, "waits_for": [], "silent_seconds": silent, **work}


def _ends(how: Sequence[str]) -> dict[str, int]:
    failed, left = how.count("error"), how.count("abort")
    return {"answered": len(how) - failed - left, "failed": failed, "left": left}


def _times(seconds: Sequence[float]) -> dict[str, float] | None:
    """The median, and what 95 of 100 stay within: the value at place ceil(0.95 n) of n."""
    if not seconds:
        return None
    ordered = sorted(seconds)
    at = -(-95 * len(ordered) // 100) - 1
    return {"median": round(statistics.median(ordered), 6), "p95": round(ordered[at], 6)}
