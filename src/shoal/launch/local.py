"""Train on this machine: prepare, decide, start workers, show what they say, end cleanly."""

from __future__ import annotations

import json
import signal
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from shoal.config.load import load_recipe, to_yaml
from shoal.config.recipe import Recipe
from shoal.engine.decision import Decision
from shoal.engine.prepare import Inputs, prepare_inputs
from shoal.errors import RunError, ShoalError, Stopped, UserError, WorkerError
from shoal.launch.choose import choose
from shoal.launch.directory import claim, open_run
from shoal.launch.pool import Worker, WorkerPool
from shoal.launch.summary import write_summary
from shoal.observe.console import Console

TARGET = "shoal.engine.worker:run"


@dataclass
class Result:
    """A run that ended: where it lies, and what summary.json says."""

    run: Path
    summary: dict[str, Any]

    @property
    def loss(self) -> float:
        """Loss of the last step."""
        return float(self.summary["final_loss"])


@dataclass
class _Attempt:
    """The workers of one start, and what they have said."""

    workers: list[Worker]
    console: Console
    done: dict[str, Any] | None = None
    errors: list[dict[str, Any]] = field(default_factory=list)
    stopped: str | None = None

    def hear(self, worker: Worker, message: dict[str, Any]) -> None:
        """Show or keep one message."""
        kind = message["kind"]
        if kind == "row":
            self.console.row(message["row"])
        elif kind == "event":
            self.console.event(message["name"], message["fields"])
        elif kind == "phase":
            self.console.phase(message["text"])
        elif kind == "error":
            self.errors.append(message)
        elif kind == "stopped":
            self.stopped = message["text"]
        elif kind == "done":
            self.done = message

    def failure(self) -> ShoalError | None:
        """The error that best explains the end: a cause before those it brought about."""
        for error in self.errors:
            if error["user"]:
                return UserError(error["text"])
        causes = [e for e in self.errors if e.get("cause")] or self.errors
        dead = [w for w in self.workers if w.status is not None and w.status < 0]
        if dead:
            names = ", ".join(str(w.name) for w in dead)
            what = signal.Signals(-dead[0].status).name if dead[0].status else ""
            return WorkerError(f"worker {names} was killed ({what}); resume the run to go on")
        if causes:
            first = causes[0]
            return WorkerError(f"worker {first['rank']}: {first['text']}\n{first['trace']}")
        if any(w.status not in (0, 75) for w in self.workers):
            return WorkerError("a worker ended without a word; its output above may say why")
        return None


def train(
    recipe: str | Path | Recipe,
    overrides: Mapping[str, Any] | Iterable[str] = (),
    *,
    out: str | Path | None = None,
    console: bool | None = None,
    pool: WorkerPool | None = None,
    fault: str | None = None,
) -> Result:
    """Train `recipe` (a shipped name or a YAML file) and return its result.

    `overrides`: {"parallel.replicate": 2} or ["parallel.replicate=2"]. `out`: the run directory,
    by default a new one below runs/. `fault`: plant a mistake (engine/step.py), to show what it
    does. Raises UserError for what is wrong with the recipe, Stopped
    after Ctrl-C or SIGTERM once everything is saved.
    """
    resolved = recipe if isinstance(recipe, Recipe) else load_recipe(str(recipe), _texts(overrides))
    run = claim(out, name="run" if isinstance(recipe, Recipe) else Path(str(recipe)).stem)
    show = Console() if (resolved.observe.console if console is None else console) else _silent()
    with _pool(pool) as workers:
        show.phase(f"run directory {run}")
        inputs = prepare_inputs(resolved, say=show.phase)
        decision = choose(resolved, inputs=inputs, pool=workers, console=show)
        (run / "config.yaml").write_text(to_yaml(resolved), encoding="utf-8")
        job = _Start(recipe=resolved, inputs=inputs, decision=decision, run=run, fault=fault)
        return _run(job, pool=workers, console=show)


def resume(
    run: str | Path,
    overrides: Mapping[str, Any] | Iterable[str] = (),
    *,
    console: bool | None = None,
    pool: WorkerPool | None = None,
) -> Result:
    """Go on with a run from its newest good checkpoint, at any degree and kind of worker."""
    folder = open_run(run)
    resolved = load_recipe(str(folder / "config.yaml"), _texts(overrides))
    show = Console() if (resolved.observe.console if console is None else console) else _silent()
    with _pool(pool) as workers:
        show.phase(f"resuming {folder}")
        inputs = prepare_inputs(resolved, say=show.phase)
        decision = choose(resolved, inputs=inputs, pool=workers, console=show)
        job = _Start(recipe=resolved, inputs=inputs, decision=decision, run=folder, resume=True)
        return _run(job, pool=workers, console=show)


def _texts(overrides: Mapping[str, Any] | Iterable[str]) -> list[str]:
    if isinstance(overrides, Mapping):
        return [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
    return list(overrides)


def _silent() -> Console:
    import io

    return Console(out=io.StringIO())


@contextmanager
def _pool(given: WorkerPool | None) -> Iterator[WorkerPool]:
    if given is not None:
        yield given
        return
    with WorkerPool() as own:
        yield own


@dataclass(frozen=True)
class _Start:
    """What a start of the workers is made of."""

    recipe: Recipe
    inputs: Inputs
    decision: Decision
    run: Path
    resume: bool = False
    fault: str | None = None


def _run(job: _Start, *, pool: WorkerPool, console: Console) -> Result:
    run, inputs, decision = job.run, job.inputs, job.decision
    console.phase(f"plan: {decision}")
    (run / "plan.json").write_text(json.dumps(decision.to_json(), indent=1) + "\n", "utf-8")
    payload = {
        "recipe": job.recipe.model_dump(mode="json"),
        "run": str(run.resolve()),  # workers have the fork server's working directory
        "inputs": inputs.to_json(),
        "decision": decision.to_json(),
        "resume": job.resume,
        "fault": job.fault,
    }
    attempt = run_workers(payload, decision=decision, pool=pool, console=console)
    if attempt.stopped is not None:
        raise Stopped(attempt.stopped)
    if attempt.done is None:
        raise RunError(f"{run}: the workers ended without finishing; resume the run to go on")
    summary = write_summary(run, done=attempt.done, decision=decision, inputs=inputs)
    return Result(run, summary)


def run_workers(
    payload: dict[str, Any], *, decision: Decision, pool: WorkerPool, console: Console
) -> _Attempt:
    """Start the workers of `decision` and wait for their end. Raises the error that ended them.

    SIGINT and SIGTERM ask the workers to save and stop; a second one ends them at once.
    """
    threads = decision.workers == "threads"
    size = 1 if threads else decision.layout.workers
    with tempfile.TemporaryDirectory(prefix="shoal-") as folder, _signals() as asked:
        store = str(Path(folder) / "store")
        workers = [
            pool.start(TARGET, {**payload, "rank": rank, "size": size, "store": store})
            for rank in range(size)
        ]
        attempt = _Attempt(workers, console)
        console.steps = payload["recipe"]["train"].get("steps")
        try:
            _watch(attempt, pool=pool, asked=asked)
        finally:
            pool.kill([w for w in workers if w.status is None])
    failure = attempt.failure()
    if failure is not None and attempt.done is None and attempt.stopped is None:
        raise failure
    return attempt


def _watch(attempt: _Attempt, *, pool: WorkerPool, asked: list[int]) -> None:
    """Hear the workers until all have ended; when one fails, the rest are ended after a moment."""
    passed_on = 0
    deadline = None
    while any(worker.status is None for worker in attempt.workers):
        for worker, message in pool.events(timeout_seconds=0.2):
            if message is not None:
                attempt.hear(worker, message)
            elif worker in attempt.workers and worker.status not in (0, 75):
                deadline = deadline or time.monotonic() + 1.0
        if len(asked) > passed_on:
            passed_on = len(asked)
            if passed_on > 1:
                raise Stopped("stopped at once, without saving; the last checkpoint stands")
            attempt.console.phase("asked to stop: saving after this step (again: stop at once)")
            for worker in attempt.workers:
                pool.signal(worker, signal.SIGTERM)
        if deadline is not None and time.monotonic() > deadline:
            return


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them (in the main thread only)."""
    asked: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        asked.append(number)

    before: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    except ValueError:  # not the main thread: the caller owns the signals
        pass
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
