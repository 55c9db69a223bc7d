"""Join as one worker under torchrun: the same command, with RANK and WORLD_SIZE in the environment.

Rank 0 claims the run, prepares the data, decides, prints and writes; the others wait for its word.
On several machines the run directory and the cache must be on storage that all of them see.
"""

from __future__ import annotations

import faulthandler
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from shoal.checkpoint.objects import is_url
from shoal.comm.group import ProcessGroup
from shoal.comm.messages import broadcast_json, gather_json
from shoal.config.anchor import anchored
from shoal.config.load import load_recipe
from shoal.config.locked import Difference
from shoal.config.recipe import Recipe
from shoal.engine.decision import Decision, given_layout
from shoal.engine.examine import check_keys, verdict_of
from shoal.engine.job import Inputs, Job
from shoal.engine.measure import measured_formats
from shoal.engine.membership.agree import check_same_program
from shoal.engine.worker import WorkerArguments, run_worker
from shoal.environment import Rendezvous, usable_cores
from shoal.errors import ConfigError, Problem, RunError, UserError
from shoal.language import translated
from shoal.launch.attempt import Attempt
from shoal.launch.choose import decide_joined
from shoal.launch.directory import anything_to_resume, claim, hold, is_run, open_run
from shoal.launch.examined import refuse_by
from shoal.launch.local import (
    announced,
    decision_before,
    of_same_run,
    resumed_recipe,
    write_beginning,
)
from shoal.launch.object_store import look_at, placed, problem_of
from shoal.launch.opening import say_opening
from shoal.launch.prepare import prepare_inputs, resumed_inputs
from shoal.launch.refuse import check_trackers
from shoal.launch.summary import check_ending, last_words, write_summary
from shoal.launch.worker import make_writes
from shoal.observe.console import Console
from shoal.observe.events import Report
from shoal.observe.visible import visible
from shoal.runtime import choose_device, start_process_group, stop_process_group
from shoal.sync.kinds import KINDS

_TIMEOUT_SECONDS = 1800.0
_Prepared = tuple[Job, list[Difference]]
"""What rank 0 has prepared for all, and the keys that changed since the run was last begun."""


def join(
    recipe: str,
    overrides: Sequence[str],
    *,
    out: Path | None,
    rendezvous: Rendezvous,
    go_on: bool = False,
) -> int:
    """Train as the worker that `rendezvous` names; returns the exit status of this process.

    `go_on`: if `out` holds a run of this recipe, go on with it. Raises ConfigError for a recipe
    that does not go with the number of workers.
    """
    resolved = _recipe(recipe, overrides, size=rendezvous.world_size)
    if go_on and out is not None and is_run(out):
        folder = open_run(out)
        return _joined_again(folder, of_same_run(folder, resolved), rendezvous=rendezvous)
    name = Path(recipe).stem

    def prepare(console: Console, cores: int) -> _Prepared:
        check_keys(resolved)
        look_at(resolved, begins=True, say=console.phase)
        run = claim(out, name=name)
        console.phase(f"run directory {run}")
        inputs = prepare_inputs(resolved, say=console.phase, progress=console.progress)
        job = _job(resolved, run, inputs=inputs, cores=cores, console=console)
        return _placed(job, begins=True, console=console), []

    return _joined(resolved, prepare, rendezvous=rendezvous, name=name)


def join_resume(
    run: Path, overrides: Sequence[str], *, rendezvous: Rendezvous, data_changed: bool = False
) -> int:
    """Go on with `run` as the worker that `rendezvous` names; returns this process's exit status.

    As many replicas as torchrun has started go on, whatever the run had before. `data_changed`: as
    in local.py. Raises RunError for what is no run, ConfigError for overrides that would make it
    another run.
    """
    folder = open_run(run)
    inside = given_layout(resumed_recipe(folder, list(overrides))).replica_workers
    given = [text for text in overrides if text.startswith("parallel.replicate=")]
    wanted = [*overrides, *_as_started(rendezvous.world_size, inside=inside, given=bool(given))]
    resolved = resumed_recipe(folder, wanted)
    _check_size(resolved, size=rendezvous.world_size)
    return _joined_again(folder, resolved, rendezvous=rendezvous, data_changed=data_changed)


def _joined_again(
    folder: Path, resolved: Recipe, *, rendezvous: Rendezvous, data_changed: bool = False
) -> int:
    """Go on with a run; `resolved`: as which it goes on."""

    def prepare(console: Console, cores: int) -> _Prepared:
        say = console.phase
        say(f"resuming {folder}")
        look_at(resolved, begins=False, say=say)
        new = announced(folder, resolved, console=console)
        inputs, other = resumed_inputs(
            folder, resolved, data_changed=data_changed, say=say, progress=console.progress
        )
        before = decision_before(folder, resolved, new=new, say=console.line)
        if before is not None and before.layout.workers != rendezvous.world_size:
            before = None
        job = _job(resolved, folder, inputs=inputs, cores=cores, console=console, decision=before)
        return _placed(job, begins=False, console=console), [*new, *other]

    return _joined(resolved, prepare, rendezvous=rendezvous, name=str(folder / "config.yaml"))


def _placed(job: Job, *, begins: bool, console: Console) -> Job:
    """The job with the save that it goes on from, if any."""
    if is_url(job.recipe.checkpoint.where):
        return placed(job, begins=begins, say=console.line)
    return replace(job, resume=not begins and anything_to_resume(job.run, say=console.line))


def _as_started(size: int, *, inside: int, given: bool) -> list[str]:
    """Overrides for the workers that are there, unless the degree was `given`."""
    degree = [] if given or size % inside else [f"parallel.replicate={size // inside}"]
    return [*degree, "launch.workers=processes"]


def _joined(
    recipe: Recipe,
    prepare: Callable[[Console, int], _Prepared],
    *,
    rendezvous: Rendezvous,
    name: str,
) -> int:
    """Meet the others, let rank 0 prepare for all, and train."""
    if recipe.launch.link is not None:
        what = "another launcher's workers have met by themselves: no link can be put between them"
        raise ConfigError([Problem("launch.link", what, "set it to null, or start shoal alone")])
    # a launcher's warning must not end a worker: as elsewhere it tells what every thread does
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
    device = choose_device(recipe.launch.device, local_rank=rendezvous.local_rank)
    start_process_group(
        rank=rendezvous.rank,
        size=rendezvous.world_size,
        device=device,
        meeting=None,
        timeout_seconds=_TIMEOUT_SECONDS,
    )
    signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        return _meet_and_train(recipe, prepare, rendezvous=rendezvous, name=name)
    finally:
        stop_process_group()


def _meet_and_train(
    recipe: Recipe,
    prepare: Callable[[Console, int], _Prepared],
    *,
    rendezvous: Rendezvous,
    name: str,
) -> int:
    first, new, payload = rendezvous.rank == 0, list[Difference](), dict[str, Any]()
    try:
        check_same_program(ProcessGroup(), recipe=recipe.model_dump(mode="json"), parameters=0)
    except RunError as error:
        if first:
            raise
        return error.exit_status  # rank 0 says it for all
    cores = gather_json(ProcessGroup(), max(1, usable_cores() // rendezvous.local_world_size))
    with ExitStack() as held:
        console = held.enter_context(Console() if first else Console(out=io.StringIO()))
        if first:
            try:
                job, new = prepare(console, min(cores))
                held.enter_context(hold(job.run))
                payload = job.to_json()
            except UserError as error:
                print(visible(translated(f"shoal: {error}")), file=sys.stderr)
                payload = {"status": error.exit_status}
        payload = broadcast_json(ProcessGroup(), payload)
        if "status" in payload:
            return int(payload["status"])
        job = Job.from_json(payload)
        arguments = WorkerArguments(rendezvous.rank, rendezvous.world_size, rendezvous.local_rank)
        console.steps = recipe.train.steps or console.steps
        attempt = Attempt(console, partial(write_beginning, job, new))
        status = _heard(job, arguments=arguments, attempt=attempt)
        console.close()
        for said in attempt.errors:
            trace = said.get("trace", "") if said.get("cause") else ""
            text = visible(translated(f"shoal: worker {rendezvous.rank}: {said['text']}"))
            print(f"{text}\n{trace}".rstrip(), file=sys.stderr)
        if attempt.stopped is not None and first:
            print(visible(translated(f"shoal: {attempt.stopped}")), file=sys.stderr)
        if attempt.done is not None:
            done, decision = attempt.done, job.decision
            summary = write_summary(job.run, done=done, decision=decision, say=print)
            check_ending(job.run, summary)
            print(translated("\n".join(last_words(job.run, summary, recipe=name))))
    return status


def _heard(job: Job, *, arguments: WorkerArguments, attempt: Attempt) -> int:
    """Train as this worker, while `attempt` hears what it reports; its exit status."""
    read, write = os.pipe()

    def hear() -> None:
        with open(read, encoding="utf-8") as lines:
            for line in lines:
                attempt.hear(json.loads(line))

    listener = threading.Thread(target=hear, name="reports")
    listener.start()
    try:
        return run_worker(job, arguments=arguments, report=Report(write), make_writes=make_writes)
    finally:
        os.close(write)
        listener.join()


def _recipe(recipe: str, overrides: Sequence[str], *, size: int) -> Recipe:
    """The recipe for the workers that are there. Raises ConfigError where they do not fit it."""
    resolved = load_recipe(recipe, overrides)
    _check_size(resolved, size=size)
    inside = given_layout(resolved).replica_workers
    return anchored(
        load_recipe(recipe, [*overrides, *_as_started(size, inside=inside, given=False)])
    )


def _check_size(resolved: Recipe, *, size: int) -> None:
    """Raises ConfigError where `size` workers do not fit the recipe."""
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
    if KINDS[resolved.sync.kind].apart:
        what = f"{resolved.sync.kind} needs processes beside the workers, which torchrun does not "
        hint = "run without torchrun, or set sync.kind to every-step"
        problems.append(Problem("sync.kind", what + "start", hint))
    if resolved.launch.workers == "threads":
        hint = "leave launch.workers out, or run without torchrun"
        problems.append(Problem("launch.workers", "workers of torchrun are processes", hint))
    if (problem := problem_of(resolved.checkpoint.where)) is not None:
        problems.append(problem)
    if resolved.checkpoint.where == "local":
        what = "torchrun's workers save on storage that all of them see"
        problems.append(Problem("checkpoint.where", what, "start it by shoal launch hosts"))
    if problems:
        raise ConfigError(problems)


def _job(
    recipe: Recipe,
    run: Path,
    *,
    inputs: Inputs,
    cores: int,
    console: Console,
    decision: Decision | None = None,
) -> Job:
    """What rank 0 prepares for all; `decision`: what was decided before, if it still fits.

    `cores`: those of a worker, on the host that has fewest.
    """
    check_trackers(recipe.observe)
    if decision is None:
        formats = measured_formats(recipe.launch.device)
        decision = decide_joined(recipe, inputs=inputs, cores_per_worker=cores, formats=formats)
    refuse_by(lambda: verdict_of(recipe, inputs=inputs).to_json(), recipe, inputs=inputs)
    say_opening(recipe, inputs=inputs, decision=decision, console=console)
    return Job(recipe=recipe, run=run, inputs=inputs, decision=decision)
