"""A checkpoint loaded and saved again by the real workers of another layout, without a step.

`run` is what each worker of the pool does, with the engine's own parts: build the model as the
recipe says, cut it, load the boxes of this rank, save them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from shoal.checkpoint.store import Reader, Store
from shoal.comm.group import ProcessGroup
from shoal.engine.build import build
from shoal.engine.decision import Decision, given_layout
from shoal.engine.ranks import meet
from shoal.engine.saving import load, random_state, save
from shoal.engine.worker import job_from
from shoal.launch.local import resumed_recipe
from shoal.launch.pool import WorkerPool
from shoal.observe.events import Report
from shoal.runtime import Place, start_process_group, start_worker, stop_process_group
from strategies import run_workers
from tiny import Run

KINDS = ("parameter", "exp_avg", "exp_avg_sq")


def newest(run: Run) -> Reader:
    """The last checkpoint of a run."""
    store = Store(run.path / "checkpoints")
    return store.open(store.newest_good(on_bad=lambda step, why: None))


def pass_on(run: Run, source: Reader, overrides: tuple[str, ...], *, pool: WorkerPool) -> Reader:
    """What the workers of `run` under `overrides` make of `source`."""
    recipe = resumed_recipe(run.path, list(overrides))
    layout = given_layout(recipe)
    decision = Decision(layout, "processes", 1, 1, "float32", "a test")
    out = source.folder.parent / f"passed-on-{len(list(source.folder.parent.iterdir()))}"
    out.mkdir()
    payload = {
        "recipe": recipe.model_dump(mode="json"),
        "run": str(run.path),
        "inputs": source.state["inputs"],
        "decision": decision.to_json(),
        "resume": True,
        "source": str(source.folder.parent),
        "step": source.step,
        "out": str(out),
    }
    run_workers(pool, "passing_on:run", payload, size=layout.workers)
    Store(out).verify(source.step)
    return Store(out).open(source.step)


def run(payload: dict[str, Any], descriptor: int) -> int:
    """Entry point of one worker."""
    job, rank, out = job_from(payload), payload["rank"], Path(payload["out"])
    layout = job.decision.layout
    place = Place(rank, layout.workers, torch.device("cpu"), 1)
    start_worker(place, seed=job.recipe.seed)
    if layout.workers > 1:
        start_process_group(
            rank=rank,
            size=layout.workers,
            device=place.device,
            store=out / ".meeting",
            timeout_seconds=60,
        )
    group = ProcessGroup()
    group.reopen()
    try:
        ranks = meet(group, layout=layout, device=place.device)
        training = build(job, ranks=ranks, place=place, report=Report(descriptor))
        reader = Store(Path(payload["source"])).open(payload["step"])
        load(reader, training.state, group=ranks.world)
        save(
            Store(out),
            training.state,
            group=ranks.world,
            step=reader.step,
            facts=reader.state,
            keep=1,
            random_state=random_state(),
        )
    finally:
        stop_process_group()
    return 0
