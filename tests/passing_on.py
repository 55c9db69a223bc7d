"""A checkpoint loaded and saved again by the real workers of another layout, without a step.

`run` is what each worker of the pool does, with the engine's own parts: build the model as the
recipe says, cut it, load the boxes of this rank, save them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from one_rank import built
from shoal.checkpoint.store import Reader, Store
from shoal.engine.decision import Decision, given_layout
from shoal.engine.job import Inputs, Job
from shoal.engine.saving.parts import load, random_state
from shoal.engine.saving.saver import Saver
from shoal.launch.local import resumed_recipe
from shoal.launch.pool import WorkerPool
from tiny import Run
from workers import run_workers

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
    inputs = Inputs.from_json(source.state["inputs"])
    payload = {
        **Job(recipe, run.path, inputs, decision, resume=True).to_json(),
        "source": str(source.folder.parent),
        "step": source.step,
        "out": str(out),
    }
    run_workers(pool, "passing_on:run", payload, size=layout.workers)
    Store(out).verify(source.step)
    return Store(out).open(source.step)


def run(payload: dict[str, Any], descriptor: int) -> int:
    """Entry point of one worker."""
    with built(payload, descriptor) as training:
        reader = Store(Path(payload["source"])).open(payload["step"])
        group, layout = training.ranks.world, training.ranks.layout
        shapes = training.replica.shapes
        load(reader, training.state, shapes=shapes, group=group, layout=layout)
        Saver(Store(Path(payload["out"])), keep=1).save(
            training.state,
            group=group,
            layout=layout,
            step=reader.step,
            facts=lambda: reader.state,
            own={"random_state": random_state()},
            last=True,
        )
    return 0
