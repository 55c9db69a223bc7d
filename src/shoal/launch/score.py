"""Score a run or a model folder on a recipe's validation part, in one worker."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from shoal.config.load import resolve
from shoal.config.recipe import Recipe
from shoal.engine.decision import Decision
from shoal.engine.job import Job
from shoal.environment import usable_cores
from shoal.errors import WorkerError
from shoal.launch.examined import refuse_wrong_model
from shoal.launch.local import AnyRecipe, Overrides
from shoal.launch.pool import WorkerPool, pool_or_own
from shoal.launch.prepare import prepare_inputs
from shoal.launch.supervise import run_workers
from shoal.layout import Layout
from shoal.observe.console import Console
from shoal.serve.reading import model_directory


def score(
    model: Path,
    *,
    recipe: AnyRecipe,
    overrides: Overrides,
    console: Console,
    pool: WorkerPool | None = None,
) -> dict[str, Any]:
    """The task's metrics of `model` (a run or a model folder) on the recipe's validation part.

    By the ids that the model gives its labels: raises DataError for one that it does not know.
    Raises the errors of reading the model, the recipe and its data.
    """
    folder = model_directory(model)
    tree = resolve(recipe, overrides).model_dump(mode="json")
    tree["model"] = {"kind": "pretrained", "path": str(folder), "dropout": "off"}
    tree["data"]["tokenizer"] = {"kind": "model"}
    tree["checkpoint"]["where"] = "shared"  # nothing is saved
    tree["train"]["quantise"] = None  # the weights as the folder has them
    resolved = Recipe.model_validate(tree)
    with pool_or_own(pool) as workers, tempfile.TemporaryDirectory(prefix="shoal-") as scratch:
        say, progress = console.phase, console.progress
        inputs = prepare_inputs(resolved, say=say, progress=progress, scored=True)
        refuse_wrong_model(resolved, inputs=inputs, pool=workers, console=console)
        console.phase(f"scoring {folder} on {inputs.validation_samples:,} samples at most")
        decision = Decision(
            Layout(),
            "processes",
            usable_cores(),
            min(8, resolved.train.global_batch_samples),
            "float32",
            "one worker scores",
        )
        out = Path(scratch) / "scores.json"
        job = Job(resolved, Path(scratch), inputs, decision, score=str(out))
        run_workers(job, pool=workers, console=console)
        if not out.is_file():
            raise WorkerError("the scoring worker ended without scores")
        scores: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return scores
