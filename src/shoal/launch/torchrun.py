"""Join as one worker under torchrun: the same command, with RANK and WORLD_SIZE in the environment.

Rank 0 claims the run, prepares the data, decides, prints and writes; the others wait for its word.
On several machines the run directory and the cache must be on storage that all of them see.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shoal.comm.group import ProcessGroup
from shoal.comm.messages import broadcast_json
from shoal.config.anchor import anchored
from shoal.config.load import load_recipe, to_yaml
from shoal.config.recipe import Recipe
from shoal.engine.decision import given_layout
from shoal.engine.job import Job
from shoal.engine.measure import measured_formats
from shoal.engine.membership.agree import check_same_program
from shoal.engine.prepare import prepare_inputs
from shoal.engine.worker import WorkerArguments, run_worker
from shoal.environment import Rendezvous, usable_cores
from shoal.errors import ConfigError, Problem, RunError, UserError
from shoal.launch.attempt import Attempt
from shoal.launch.choose import decide_joined
from shoal.launch.directory import claim, hold, write_whole
from shoal.launch.opening import opening
from shoal.launch.refuse import check_trackers
from shoal.launch.summary import last_words, write_summary
from shoal.observe.console import Console
from shoal.observe.events import Report
from shoal.runtime import choose_device, start_process_group, stop_process_group

_TIMEOUT_SECONDS = 1800.0


def join(recipe: str, overrides: Sequence[str], *, out: Path | None, seat: Rendezvous) -> int:
    """Train as the worker that `seat` names; returns the exit status of this process."""
    resolved = _recipe(recipe, overrides, size=seat.world_size)
    device = choose_device(resolved.launch.device, local_rank=seat.local_rank)
    start_process_group(
        rank=seat.rank,
        size=seat.world_size,
        device=device,
        store=None,
        timeout_seconds=_TIMEOUT_SECONDS,
    )
    signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        return _join(resolved, seat=seat, name=Path(recipe).stem, out=out)
    finally:
        stop_process_group()


def _recipe(recipe: str, overrides: Sequence[str], *, size: int) -> Recipe:
    resolved = load_recipe(recipe, overrides)
    wanted, inside = resolved.parallel.replicas, given_layout(resolved).replica_workers
    problems = []
    if size % inside:
        what = f"one replica takes {inside} workers, torchrun started {size}"
        problems.append(Problem("parallel", what, f"start a multiple of {inside}"))
    elif wanted is not None and wanted * inside != size:
        what = f"the recipe says {wanted} replicas, torchrun started {size} workers"
        if inside > 1:
            what += f" ({inside} each)"
        problems.append(Problem("parallel.replicate", what, f"set it to {size // inside}"))
    if resolved.launch.workers == "threads":
        hint = "leave launch.workers out, or run without torchrun"
        problems.append(Problem("launch.workers", "workers of torchrun are processes", hint))
    if problems:
        raise ConfigError(problems)
    parallel = [f"parallel.replicate={size // inside}", "launch.workers=processes"]
    return anchored(load_recipe(recipe, [*overrides, *parallel]))


def _join(recipe: Recipe, *, seat: Rendezvous, name: str, out: Path | None) -> int:
    with Console() as console:
        return _shown(recipe, seat=seat, name=name, out=out, console=console)


def _shown(
    recipe: Recipe, *, seat: Rendezvous, name: str, out: Path | None, console: Console
) -> int:
    payload: dict[str, Any] = {}
    try:
        check_same_program(ProcessGroup(), recipe=recipe.model_dump(mode="json"), parameters=0)
    except RunError as error:
        if seat.rank == 0:
            raise
        return error.exit_status  # rank 0 says it for all
    if seat.rank == 0:
        try:
            payload = _prepare(recipe, seat=seat, name=name, out=out, console=console)
        except UserError as error:
            print(f"shoal: {error}", file=sys.stderr)
            payload = {"status": error.exit_status}
    payload = broadcast_json(ProcessGroup(), payload)
    if "status" in payload:
        return int(payload["status"])
    job = Job.from_json(payload)
    arguments = WorkerArguments(seat.rank, seat.world_size, seat.local_rank)
    if seat.rank != 0:
        with open(os.devnull, "wb") as nowhere:
            return run_worker(job, arguments=arguments, report=Report(nowhere.fileno()))
    console.steps = recipe.train.steps
    with hold(job.run):
        return _lead(job, arguments=arguments, console=console, recipe=name)


def _prepare(
    recipe: Recipe, *, seat: Rendezvous, name: str, out: Path | None, console: Console
) -> dict[str, Any]:
    """What rank 0 does for all: the same as the parent of shoal's own workers."""
    check_trackers(recipe.observe)
    run = claim(out, name=name)
    console.phase(f"run directory {run}; preparing the data")
    inputs = prepare_inputs(recipe, say=console.phase, progress=console.progress)
    formats = measured_formats(recipe.launch.device)
    cores = usable_cores() // seat.local_world_size
    decision = decide_joined(recipe, inputs=inputs, cores_per_worker=max(1, cores), formats=formats)
    console.phase(f"plan: {decision}")
    for line in opening(recipe, inputs=inputs, decision=decision):
        console.line(line)
    write_whole(run / "config.yaml", to_yaml(recipe))
    write_whole(run / "plan.json", json.dumps(decision.to_json(), indent=1) + "\n")
    return Job(recipe=recipe, run=run, inputs=inputs, decision=decision).to_json()


def _lead(job: Job, *, arguments: WorkerArguments, console: Console, recipe: str) -> int:
    """Train as rank 0, showing what it reports; then write the summary."""
    read, write = os.pipe()
    attempt = Attempt(console)

    def show() -> None:
        with open(read, encoding="utf-8") as lines:
            for line in lines:
                attempt.hear(json.loads(line))

    listener = threading.Thread(target=show, name="reports")
    listener.start()
    try:
        status = run_worker(job, arguments=arguments, report=Report(write))
    finally:
        os.close(write)
        listener.join()
        console.close()
    for error in attempt.errors:
        print(f"shoal: {error['text']}\n{error.get('trace', '')}".rstrip(), file=sys.stderr)
    if attempt.stopped is not None:
        print(f"shoal: {attempt.stopped}", file=sys.stderr)
    if attempt.done is not None:
        summary = write_summary(job.run, done=attempt.done, decision=job.decision)
        print("\n".join(last_words(job.run, summary, recipe=recipe)))
    return status
