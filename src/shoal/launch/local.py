"""Train on this machine: prepare, decide, start workers, show what they say, end cleanly."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from shoal.checkpoint.objects import is_url
from shoal.config.anchor import anchored
from shoal.config.load import load_recipe, override_texts, resolve, to_yaml
from shoal.config.locked import LOCKED, Difference, changed, differences
from shoal.config.recipe import Recipe
from shoal.engine.decision import Decision
from shoal.engine.job import Inputs, Instruments, Job
from shoal.environment import free_memory_bytes
from shoal.errors import ConfigError, Problem, RunError, Stopped
from shoal.launch.callbacks import Callbacks
from shoal.launch.choose import check_decision, choose
from shoal.launch.directory import (
    anything_to_resume,
    claim,
    hold,
    hold_if_free,
    is_run,
    open_run,
    write_whole,
)
from shoal.launch.examined import keys_are_known, refuse_wrong_model
from shoal.launch.measuring import wait_for_imports
from shoal.launch.memory import refuse_what_cannot_fit
from shoal.launch.object_store import look_at, newest_manifest
from shoal.launch.opening import say_opening
from shoal.launch.pictures import Pictures
from shoal.launch.pool import WorkerPool, pool_or_own
from shoal.launch.prepare import prepare_inputs, resumed_inputs
from shoal.launch.refuse import check, check_trackers
from shoal.launch.summary import check_ending, write_summary
from shoal.launch.supervise import run_workers
from shoal.observe.console import Console
from shoal.observe.events import RunFiles
from shoal.observe.trace import merge_parts

if TYPE_CHECKING:  # most runs are on one host
    from shoal.launch.over_hosts import OverHosts


@dataclass
class Result:
    """A run that ended: where it lies, and what summary.json says."""

    run: Path
    summary: dict[str, Any]

    @property
    def loss(self) -> float:
        """Loss of the last step; NaN where it was not finite."""
        loss = self.summary["final_loss"]
        return math.nan if loss is None else float(loss)


AnyRecipe = str | Path | Mapping[str, Any] | Recipe
Overrides = str | Mapping[str, Any] | Iterable[str]


def train(
    recipe: AnyRecipe,
    overrides: Overrides = (),
    *,
    out: str | Path | None = None,
    console: bool | None = None,
    pool: WorkerPool | None = None,
    go_on: bool = False,
    instruments: Instruments | None = None,
    story: list[dict[str, Any]] | None = None,
    callbacks: Callbacks | None = None,
    hosts: OverHosts | None = None,
) -> Result:
    """Train `recipe` (a shipped name, a YAML file, a dict or a Recipe) and return its result.

    `overrides`: {"parallel.replicate": 2} or ["parallel.replicate=2"]. `out`: the run directory,
    by default a new one below runs/. `go_on`: if `out` holds a run of this recipe, go on with it.
    `instruments`: what a rehearsal or a test attaches to the run;
    `story` collects every event with its time. `callbacks` hear of the run; an error in one is
    raised once everything is saved. `hosts`: train there instead of on this machine alone. Raises
    UserError for what is wrong with the recipe, Stopped after Ctrl-C or SIGTERM once everything is
    saved.
    """
    resolved = _resolved(recipe, overrides, hosts=hosts)
    holding = hold_if_free if hosts is not None and hosts.register is not None else hold
    if go_on and out is not None and not is_run(out) and is_url(resolved.checkpoint.where):
        with _console(resolved, wanted=console) as show:
            _begun_elsewhere(Path(out).expanduser(), resolved, say=show.phase)
    if go_on and out is not None and is_run(out):
        folder = open_run(out)
        with holding(folder):
            wanted = of_same_run(folder, resolved)
            return _resume(
                folder, wanted, console=console, pool=pool, callbacks=callbacks, hosts=hosts
            )
    run = claim(out, name=Path(recipe).stem if isinstance(recipe, str | Path) else "run")
    show = _console(resolved, wanted=console)
    with _unless_empty(run), holding(run), pool_or_own(pool) as workers, show:
        look_at(resolved, begins=True, say=show.phase)
        if hosts is not None:
            hosts.ask(console=show)
        show.phase(f"run directory {run}; preparing the data")
        inputs = _prepared(resolved, pool=workers, console=show)
        wait_for_imports(workers, console=show)
        choosing = choose if hosts is None else hosts.choose
        decision = choosing(resolved, inputs=inputs, pool=workers, console=show)
        _open(resolved, inputs, decision, console=show, hosts=hosts)
        job = Job(
            recipe=resolved,
            inputs=inputs,
            decision=decision,
            run=run,
            instruments=instruments or Instruments(),
        )
        return _run(job, pool=workers, console=show, story=story, callbacks=callbacks, hosts=hosts)


def _begun_elsewhere(run: Path, resolved: Recipe, *, say: Callable[[str], None]) -> None:
    """Let `run` hold the run that the recipe's store has saves of, if any: its host may be lost.

    Raises RunError; ConfigError where the saves are of another recipe.
    """
    look_at(resolved, begins=False, say=say)
    manifest = newest_manifest(run, resolved)
    if manifest is not None:
        refuse_changed(manifest.state["recipe"], resolved, source=resolved.checkpoint.where)
        write_whole(claim(run, name=run.name) / "config.yaml", to_yaml(resolved))


def dry_run(
    recipe: AnyRecipe,
    overrides: Overrides = (),
    *,
    pool: WorkerPool | None = None,
) -> Decision:
    """Say what `train` would train, and how; prepares the data and trains nothing.

    Raises what `train` raises before its workers start.
    """
    resolved = _resolved(recipe, overrides)
    with pool_or_own(pool) as workers, Console() as show:
        show.phase("preparing the data")
        inputs = _prepared(resolved, pool=workers, console=show)
        show.phase("choosing workers and micro batch")
        decision = choose(resolved, inputs=inputs, pool=workers, console=show)
        _open(resolved, inputs, decision, console=show)
    return decision


def plan_here(
    recipe: str, overrides: Iterable[str], *, pool: WorkerPool, console: Console
) -> Decision:
    """What a start on this machine would choose; nothing is trained or written but the cache."""
    resolved = _resolved(recipe, overrides)
    inputs = _prepared(resolved, pool=pool, console=console)
    return choose(resolved, inputs=inputs, pool=pool, console=console)


def _resolved(recipe: AnyRecipe, overrides: Overrides, *, hosts: OverHosts | None = None) -> Recipe:
    """The recipe with its overrides, refused here if it cannot run. Raises UserError."""
    resolved = resolve(recipe, overrides)
    if hosts is not None:
        resolved = resolve(recipe, [*override_texts(overrides), *hosts.overrides(resolved)])
    resolved = anchored(resolved)
    check(resolved)
    check_trackers(resolved.observe)
    return resolved


def _prepared(recipe: Recipe, *, pool: WorkerPool, console: Console) -> Inputs:
    """The inputs; a misspelt key of the model ends their preparation as soon as it can be told."""
    known = False

    def progress(phase: str, done: float) -> None:
        nonlocal known
        known = known or keys_are_known(recipe, pool=pool, console=console)
        console.progress(phase, done)

    return prepare_inputs(recipe, say=console.phase, progress=progress)


def _open(
    recipe: Recipe,
    inputs: Inputs,
    decision: Decision,
    *,
    console: Console,
    hosts: OverHosts | None = None,
) -> None:
    """Say what is trained. Raises ConfigError for what cannot fit into memory."""
    say_opening(recipe, inputs=inputs, decision=decision, console=console)
    free = free_memory_bytes() if hosts is None else hosts.memory_bytes
    refuse_what_cannot_fit(recipe, decision, free_bytes=free)


def _console(recipe: Recipe, *, wanted: bool | None) -> Console:
    shown = recipe.observe.console if wanted is None else wanted
    return Console() if shown else Console(out=io.StringIO())


def resume(
    run: str | Path,
    overrides: Overrides = (),
    *,
    console: bool | None = None,
    pool: WorkerPool | None = None,
    data_changed: bool = False,
    callbacks: Callbacks | None = None,
) -> Result:
    """Go on with a run from its newest good checkpoint, at any degree and kind of worker.

    An earlier `train.stop_after_steps` has done its part and counts no more, unless it is among
    `overrides`. `data_changed`: go on although the data holds something else than it did. Raises
    ConfigError for overrides that would make it another run, RunError for other data, tokenizer
    or model.
    """
    folder = open_run(run)
    with hold(folder):
        resolved = resumed_recipe(folder, override_texts(overrides))
        return _resume(
            folder,
            resolved,
            console=console,
            pool=pool,
            data_changed=data_changed,
            callbacks=callbacks,
        )


def _resume(
    folder: Path,
    resolved: Recipe,
    *,
    console: bool | None,
    pool: WorkerPool | None,
    data_changed: bool = False,
    callbacks: Callbacks | None = None,
    hosts: OverHosts | None = None,
) -> Result:
    check(resolved)
    check_trackers(resolved.observe)
    with pool_or_own(pool) as workers, _console(resolved, wanted=console) as show:
        look_at(resolved, begins=False, say=show.phase)
        if hosts is not None:
            hosts.ask(console=show)
        show.phase(f"resuming {folder}; preparing the data")
        new = announced(folder, resolved, console=show)
        inputs, other = resumed_inputs(
            folder, resolved, data_changed=data_changed, say=show.phase, progress=show.progress
        )
        wait_for_imports(workers, console=show)
        decision = decision_before(folder, resolved, new=new, say=show.line)
        if decision is None:
            choosing = choose if hosts is None else hosts.choose
            decision = choosing(resolved, inputs=inputs, pool=workers, console=show)
        else:  # transformers may be another one by now
            refuse_wrong_model(resolved, inputs=inputs, pool=workers, console=show)
        _open(resolved, inputs, decision, console=show, hosts=hosts)
        where = resolved.checkpoint.where
        elsewhere = is_url(where) or (hosts is not None and where == "local")  # which says it
        resume = elsewhere or anything_to_resume(folder, say=show.line)
        job = Job(recipe=resolved, inputs=inputs, decision=decision, run=folder, resume=resume)
        new = [*new, *other]
        return _run(job, pool=workers, console=show, new=new, callbacks=callbacks, hosts=hosts)


def announced(run: Path, wanted: Recipe, *, console: Console) -> list[Difference]:
    """Every key that differs from what `run` was last begun with, each said."""
    saved = load_recipe(str(run / "config.yaml"))
    found = differences(saved.model_dump(mode="json"), wanted.model_dump(mode="json"))
    for key, before, after in found:
        console.line(f"changed: {key} {json.dumps(before)} -> {json.dumps(after)}")
    return found


def resumed_recipe(run: Path, overrides: list[str]) -> Recipe:
    """The recipe to go on with. Raises ConfigError when a locked key is overridden."""
    keeps = any(text.startswith("train.stop_after_steps=") for text in overrides)
    more = overrides if keeps else ["train.stop_after_steps=null", *overrides]
    return of_same_run(run, load_recipe(str(run / "config.yaml"), more))


def of_same_run(run: Path, wanted: Recipe) -> Recipe:
    """`wanted`, if `run` may go on with it. Raises ConfigError for locked keys that differ."""
    saved = load_recipe(str(run / "config.yaml"))
    refuse_changed(saved.model_dump(mode="json"), wanted, source=f"the overrides of {run}")
    return wanted


def refuse_changed(saved: dict[str, Any], wanted: Recipe, *, source: str) -> None:
    """Raises ConfigError for locked keys that differ."""
    different = changed(saved, wanted.model_dump(mode="json"))
    if different:
        hint = f"a resumed run keeps {', '.join(LOCKED)}; start a new run for other values"
        raise ConfigError(
            [Problem(key, "cannot change in a run that goes on", hint) for key in different],
            source=source,
        )


_DECIDED = ("parallel", "launch", "precision", "train.micro_batch_samples")
"""Keys that bear on what is decided at the start."""


def decision_before(
    run: Path, recipe: Recipe, *, new: Iterable[Difference], say: Callable[[str], None]
) -> Decision | None:
    """What was decided for `run`, unless a changed key bears on it: same choices, same bits."""
    path = run / "plan.json"
    if any(key.startswith(_DECIDED) for key, _, _ in new) or not path.is_file():
        return None
    try:  # it may have been edited, or written by another version
        decision = msgspec.convert(json.loads(path.read_bytes()), type=Decision)
        check_decision(recipe, decision)
    except (OSError, ValueError, RecursionError, ConfigError, RuntimeError) as error:
        say(
            f"warning: {path} cannot be used ({str(error).splitlines()[-1].strip()}); deciding anew"
        )
        return None
    return decision


@contextmanager
def _unless_empty(run: Path) -> Iterator[None]:
    """A claimed folder in which nothing was begun goes again, so that its name is free."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            run.rmdir()  # refuses a folder with anything in it
        raise


def write_beginning(job: Job, new: list[Difference]) -> None:
    """config.yaml and plan.json of a run that begins or goes on, and what has changed of it."""
    write_whole(job.run / "plan.json", json.dumps(job.decision.to_json(), indent=1) + "\n")
    write_whole(job.run / "config.yaml", to_yaml(job.recipe))
    files = RunFiles(job.run)
    for key, before, after in new:
        files.event("changed", {"key": key, "before": before, "after": after})
    links = job.decision.measured.get("links")
    if links is not None and not job.resume:
        files.event("links", links)
    files.close()
    new.clear()  # workers that start again begin nothing new


def _run(
    job: Job,
    *,
    pool: WorkerPool,
    console: Console,
    story: list[dict[str, Any]] | None = None,
    new: list[Difference] | None = None,
    callbacks: Callbacks | None = None,
    hosts: OverHosts | None = None,
) -> Result:
    """Train to the end; `new`: keys that changed since the run was last begun."""
    run, decision, new = job.run, job.decision, list(new or ())

    def begun() -> None:
        """Only now are the words of an earlier start out of date."""
        write_beginning(job, new)

    callbacks = callbacks or Callbacks(None)
    pictures = Pictures(run, job.recipe.task.kind)
    callbacks.evaluated = pictures.evaluated
    try:
        attempt = run_workers(
            job,
            pool=pool,
            console=console,
            begun=begun,
            story=story,
            callbacks=callbacks,
            sites=None if hosts is None else partial(hosts.sites, console=console),
        )
    finally:
        pictures.close()
    merge_parts(run)
    attempt.callbacks.check(advice=f"the run was saved; go on with: shoal resume {run}")
    if attempt.stopped is not None:
        raise Stopped(attempt.stopped)
    if attempt.done is None:
        raise RunError(f"{run}: the workers ended without finishing; resume the run to go on")
    console.phase(f"writing {run / 'summary.json'} and loss.png")
    fetched = {} if hosts is None else hosts.fetched
    summary = write_summary(
        run, done=attempt.done, decision=decision, fetched=fetched, say=console.line
    )
    check_ending(run, summary)
    return Result(run, summary)
