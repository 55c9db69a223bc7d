"""Saves of a run in an object store, before workers start: whether it can be used, who counts."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from shoal.checkpoint.manifest import Manifest
from shoal.checkpoint.objects import EXCLUSIVE, ONE_PROCESS, PACKAGES, Objects, StoreError, is_url
from shoal.config.load import load_recipe
from shoal.config.recipe import Recipe
from shoal.engine.job import Job
from shoal.errors import ConfigError, Problem, RunError
from shoal.launch.directory import anything_to_resume, has_checkpoint, open_run
from shoal.observe.lasting import Lasting

if TYPE_CHECKING:
    from shoal.checkpoint.remote import ObjectStore
    from shoal.checkpoint.store import Reader, Store

_SAY_SECONDS = 3.0
T = TypeVar("T")
Say = Callable[[str], None]


def store_of(where: str) -> ObjectStore:
    """The saves at a URL."""
    from shoal.checkpoint.remote import ObjectStore  # imports torch

    return ObjectStore(Objects(where))


def problem_of(where: str) -> Problem | None:
    """Why no run can save there, as far as can be told without asking it."""
    if not is_url(where):
        return None
    protocol, key = where.partition("://")[0], "checkpoint.where"
    known = sorted(EXCLUSIVE.keys() - set(ONE_PROCESS))
    if protocol not in known:
        what = (
            f"{protocol}:// cannot create an object only if there is none, as far as shoal knows: "
            "of two runs both could count"
        )
        if protocol in ONE_PROCESS:
            what = f"{protocol}:// is seen by one process only, and workers are others"
        return Problem(key, what, "use " + ", ".join(f"{each}://" for each in known))
    package = PACKAGES.get(protocol)
    if package is not None and find_spec(package) is None:
        return Problem(key, f"{protocol}:// needs {package}", f"pip install {package}")
    return None


def look_at(recipe: Recipe, *, begins: bool, say: Say) -> None:
    """Whether the store can be used, as far as this recipe has one. Raises RunError.

    `begins`: and has no run's saves yet.
    """
    where = recipe.checkpoint.where
    if is_url(where):
        store = store_of(where)
        asked(store.objects.check, doing=f"looking whether {where} can be used", say=say)
        if begins and (steps := asked(store.steps, doing=f"listing {where}", say=None)):
            raise RunError(
                f"{where}: has saves of a run already (to step {steps[-1]}); go on with it by "
                "--go-on, or choose another checkpoint.where"
            )


def asked(
    call: Callable[[], T], *, doing: str, say: Say | None, patience_seconds: float = 0.0
) -> T:
    """What the store answers, with a line now and then. Raises RunError for what it refuses.

    `patience_seconds`: how long it is asked again where it does not answer.
    """
    found, errors = list[T](), list[Exception]()

    def ask() -> None:
        until = time.monotonic() + patience_seconds
        while not found and not errors:
            try:
                found.append(call())
            except Exception as error:
                away = isinstance(error, StoreError) and error.away
                if away and time.monotonic() < until:
                    time.sleep(0.5)
                else:
                    errors.append(error)

    thread = threading.Thread(target=ask, name="store", daemon=True)
    began = said = time.monotonic()
    if say is not None:
        say(doing)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
        now = time.monotonic()
        if say is not None and now - said > _SAY_SECONDS:
            said = now
            say(f"{doing}: no answer for {now - began:.0f} s")
    for error in errors:
        if isinstance(error, StoreError):
            raise RunError(
                f"{error}\n    see to it that checkpoint.where names a bucket that is there, and "
                "that this host reaches it with the rights to read, write, list and remove"
            ) from None
        raise error
    return found[0]


def placed(job: Job, *, begins: bool = False, say: Say) -> Job:
    """The job as workers may start with it: what it goes on from, and as which start.

    From now on what an earlier start still saves counts no more. `begins`: the run is a new one.
    Raises RunError.
    """
    where = job.recipe.checkpoint.where
    if not is_url(where):
        return replace(job, resume=has_checkpoint(job.run))
    store = store_of(where)
    me = f"process {os.getpid()} of {socket.gethostname()}"
    step = asked(
        lambda: store.claim(by=me, begins=begins, on_bad=say),
        doing=f"asking {where} what there is to go on from",
        say=None if begins else say,
        patience_seconds=store.away_seconds,
    )
    if step is None and not begins and anything_to_resume(job.run, say=say):
        raise RunError(
            f"{where}: has no save of this run, though it has saved some\n    set checkpoint.where "
            "to where they are, or begin anew with another --out"
        )
    return replace(job, resume=step is not None, start=store.start)


def newest_manifest(run: Path, recipe: Recipe) -> Manifest | None:
    """Of the newest save of a run, wherever its saves are. Raises RunError."""
    where = recipe.checkpoint.where
    if not is_url(where):
        return Manifest.newest(run / "checkpoints")
    return asked(store_of(where).newest_manifest, doing=f"reading from {where}", say=None)


def saves_of(run: Path) -> Store:
    """The saves of a run, wherever they are. Raises RunError, ConfigError."""
    from shoal.checkpoint.store import Store

    where = load_recipe(str(open_run(run) / "config.yaml")).checkpoint.where
    return store_of(where) if is_url(where) else Store(run / "checkpoints")


def reader_of(source: str, *, say: Say) -> Reader:
    """Of the newest good save of a run or a store, or of the one that `source` names.

    `say`: told of what is passed over, and how far the copying from a store is. Raises RunError,
    CheckpointError.
    """
    from shoal.checkpoint.store import Store

    above, _, name = source.rstrip("/").rpartition("/")
    match = re.fullmatch(r"step-(\d+)(\.s\d+)?", name)
    if is_url(source):
        if (problem := problem_of(source)) is not None:
            raise RunError(f"{source}: {problem.what}\n    {problem.hint}")
        store: Store = store_of(above if match else source)
    else:
        store = Store(Path(source).parent) if match else saves_of(Path(source))
    lasting = Lasting(say)
    if store.place != str(store.folder):
        lasting.begin(f"reading from {store.place}")
    store.tell = lasting.at
    try:
        if match:
            store.verify(step := int(match[1]))
        else:
            step = store.newest_good(on_bad=lambda at, why: say(f"passing over step {at}: {why}"))
        reader = store.open(step)
    except StoreError as error:
        raise RunError(str(error)) from None
    if not match and not is_url(source):
        reader.run = Path(source)
    return reader


def refuse_one_store(recipe: Recipe) -> None:
    """For what trains several runs: each would need a store of its own. Raises ConfigError."""
    if is_url(recipe.checkpoint.where):
        what = "several runs are trained here, and a store has the saves of one"
        raise ConfigError([Problem("checkpoint.where", what, "set checkpoint.where=shared")])
