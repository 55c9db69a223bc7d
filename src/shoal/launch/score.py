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
from shoal.launch.local import AnyRecipe, Overrides, await_imports
from shoal.launch.pool import WorkerPool
from shoal.launch.prepare import prepare_inputs
from shoal.launch.supervise import run_workers
from shoal.layout import Layout
from shoal.observe.console import Console
from shoal.serve.reading import model_directory


def score(
    model: Path, *, recipe: AnyRecipe, overrides: Overrides, console: Console
) -> dict[str, Any]:
    """The task's metrics of `model` (a run or a model folder) on the recipe's validation part.

    Raises the errors of reading the model, the recipe and its data.
    """
    folder = model_directory(model)
    tree = resolve(recipe, overrides).model_dump(mode="json")
    tree["model"] = {"kind": "pretrained", "path": str(folder), "dropout": "off"}
    tree["data"]["tokenizer"] = {"kind": "model"}
    resolved = Recipe.model_validate(tree)
    with WorkerPool() as pool, tempfile.TemporaryDirectory(prefix="shoal-") as scratch:
        inputs = prepare_inputs(resolved, say=console.phase, progress=console.progress)
        await_imports(pool, console=console)
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
        run_workers(job, pool=pool, console=console)
        if not out.is_file():
            raise WorkerError("the scoring worker ended without scores")
        scores: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return scores
