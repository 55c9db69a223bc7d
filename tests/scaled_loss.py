"""Training steps with a scaled loss, by the real workers of a layout.

`run` is what each worker of the pool does. The engine's own parts, but for the guard that keeps
float16 off a CPU: this machine has no GPU, and the arithmetic is the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from one_rank import built
from passing_on import newest
from shoal.engine import build as engine_build
from shoal.engine.decision import Decision, given_layout
from shoal.engine.job import Inputs, Job
from shoal.engine.membership.digest import digest_of
from shoal.engine.step import Votes
from shoal.engine.training import Training
from shoal.launch.local import resumed_recipe
from shoal.launch.pool import WorkerPool
from shoal.observe.events import read_lines
from shoal.parallel.precision import DTYPES, LossScale
from tiny import Run
from workers import run_workers


def steps_of(
    run: Run,
    overrides: tuple[str, ...],
    *,
    pool: WorkerPool,
    out: Path,
    compute: str,
    scale: float | None,
    poisoned: int | None = None,
    steps: int = 8,
) -> list[list[dict[str, Any]]]:
    """Per rank the rows of `steps` steps from the start of `run` under `overrides`.

    `scale`: of the loss, at first; None: it is not scaled. `poisoned`: a step for which the last
    rank's gradients are infinite.
    """
    recipe = resumed_recipe(run.path, list(overrides))
    layout = given_layout(recipe)
    out.mkdir()
    inputs = Inputs.from_json(newest(run).state["inputs"])
    decision = Decision(layout, "processes", 1, 2, "float32", "a test")
    payload = {
        **Job(recipe, run.path, inputs, decision).to_json(),
        "out": str(out),
        "compute": compute,
        "scale": scale,
        "poisoned": poisoned,
        "steps": steps,
    }
    run_workers(pool, "scaled_loss:run", payload, size=layout.workers)
    return [read_lines(out / f"rank-{rank}.jsonl") for rank in range(layout.workers)]


def run(payload: dict[str, Any], descriptor: int) -> int:
    """Entry point of one worker."""
    scale, rank = payload["scale"], payload["rank"]
    engine_build.check_compute = lambda name, *, device: DTYPES[payload["compute"]]
    scaled = None if scale is None else LossScale(scale, patience=3)
    engine_build.LossScale.of = classmethod(lambda cls, dtype: scaled)
    with (
        built(payload, descriptor) as training,
        open(Path(payload["out"]) / f"rank-{rank}.jsonl", "w") as file,
    ):
        last = rank == training.ranks.world.size - 1
        for step in range(payload["steps"]):
            row = one(training, step=step, poisoned=last and step == payload["poisoned"])
            file.write(json.dumps(row) + "\n")
    return 0


def one(training: Training, *, step: int, poisoned: bool) -> dict[str, Any]:
    """One step, as the loop of the engine does it; what it came to."""
    training.policy.before_step(step)
    share = training.share()
    if poisoned:
        training.step.poison = float("inf")
    batch = training.batches(step, share)
    counted = training.step.count(batch, votes=Votes())
    result = training.step.train(batch, share=share, counted=counted, step=step)
    outcome = training.update.apply(result)
    training.policy.after_step(step, targets=result.targets)
    return {
        "loss": result.loss,
        "norm": outcome.gradient_norm,
        "norms": result.norms,
        "applied": outcome.applied,
        "digest": digest_of(training.state),
        "facts": training.facts(),
        "scale": training.loss_scale.value if training.loss_scale else None,
    }
