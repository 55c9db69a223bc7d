"""How many replicas of how many threads serve a model fastest here: timed, not reckoned."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import xxhash

from shoal import __version__
from shoal.config.serve import ServeSection
from shoal.environment import cache_directory, usable_cores
from shoal.errors import UserError
from shoal.launch.pool import WorkerPool
from shoal.launch.serving import Fleet, check_memory
from shoal.launch.timings import machine_key
from shoal.serve.reading import kind_of
from shoal.serve.request import Event, Request, Sampling

_STREAMS = 8
_PROMPT, _MADE = 32, 12
"""Tokens of a request that is timed."""


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one way to use the cores."""

    replicas: int
    threads: int
    tokens_per_second: float

    def __str__(self) -> str:
        return (
            f"{self.replicas} x {self.threads} thread{'s'[: self.threads > 1]}: "
            f"{self.tokens_per_second:.0f} tokens/s"
        )


def settled(
    folder: Path, settings: ServeSection, *, pool: WorkerPool, phase: Callable[[str], None]
) -> ServeSection:
    """`settings` with numbers for `replicate` and `threads`.

    Where both are auto the ways that fit are timed with 8 streams at once, and what was found is
    kept for the next start; else the cores are divided. Raises what a replica that cannot start
    says.
    """
    cores = usable_cores()
    replicas, threads = settings.replicate, settings.threads
    if replicas == "auto" and threads == "auto" and kind_of(folder) == "generate":
        ways = _ways(folder, settings, cores)
        if len(ways) > 1:
            best = _best(folder, settings, ways, pool=pool, phase=phase)
            replicas, threads = best.replicas, best.threads
    if replicas == "auto":
        replicas = 1
    if threads == "auto":
        threads = max(1, cores // replicas)
    return settings.model_copy(update={"replicate": replicas, "threads": threads})


def _ways(folder: Path, settings: ServeSection, cores: int) -> list[tuple[int, int]]:
    """(replicas, threads) that use all cores and fit into the memory."""
    found = []
    for replicas in sorted({1, *(n for n in (2, cores // 4, cores // 2, cores) if n >= 1)}):
        if cores % replicas:
            continue
        try:
            check_memory(folder, settings, replicas=replicas)
        except UserError:
            break
        found.append((replicas, cores // replicas))
    return found


def _best(
    folder: Path,
    settings: ServeSection,
    ways: list[tuple[int, int]],
    *,
    pool: WorkerPool,
    phase: Callable[[str], None],
) -> Speed:
    path = _path(folder, settings, ways)
    speeds = _kept(path)
    told = "timed by an earlier start"
    if not speeds:
        told = f"timed with {_STREAMS} streams"
        for replicas, threads in ways:
            phase(f"timing {replicas} x {threads} thread(s)")
            update = {"replicate": replicas, "threads": threads}
            with Fleet(folder, settings.model_copy(update=update), pool) as fleet:
                fleet.wait_ready()
                _seconds(fleet)  # the first steps make the cache
                rate = _STREAMS * _MADE / _seconds(fleet)
            speeds.append(Speed(replicas, threads, rate))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([vars(each) for each in speeds]), encoding="utf-8")
    phase(f"{told}: " + "; ".join(map(str, speeds)))
    return max(speeds, key=lambda each: each.tokens_per_second)


def _seconds(fleet: Fleet) -> float:
    """Of answering some streams at once."""
    left, done = set(range(_STREAMS)), threading.Event()

    def told(event: Event) -> None:
        if event.finish is not None:
            left.discard(int(event.id))
            if not left:
                done.set()

    vocabulary = int(fleet.facts["vocabulary"])
    context = int(fleet.facts["context"])
    made = min(_MADE, context // 2)
    sampling = Sampling(max_tokens=made, temperature=0.0, ignore_end=True)
    began = time.monotonic()
    for number in range(_STREAMS):
        length = min(_PROMPT, context - made)
        prompt = tuple((number * 7919 + at * 104729) % vocabulary for at in range(length))
        fleet.submit(Request(id=str(number), prompt=prompt, sampling=sampling), told)
    while not done.wait(timeout=1.0):
        fleet.wait_ready()  # raises what a replica says that cannot go on
    return time.monotonic() - began


def _path(folder: Path, settings: ServeSection, ways: list[tuple[int, int]]) -> Path:
    """Where the speeds of this model on this machine are kept."""
    config = (folder / "config.json").read_text(encoding="utf-8")
    degrees = (settings.tensor, settings.sum_pieces)
    kind = (settings.precision, settings.weights, settings.exact, settings.device)
    key = [__version__, config, *kind, degrees, ways]
    name = xxhash.xxh3_64_hexdigest(json.dumps(key).encode())
    return cache_directory() / "timed" / f"{machine_key()}-serve-{name}.json"


def _kept(path: Path) -> list[Speed]:
    try:
        return [Speed(**each) for each in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, RecursionError):
        return []  # none, or a damaged file: timed anew
