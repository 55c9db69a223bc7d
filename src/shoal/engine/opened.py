"""An exported folder as others open it: the loss that plain transformers gives on a run's rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shoal.config.recipe import Recipe
from shoal.data.stream import Evaluation
from shoal.engine.job import Inputs
from shoal.models.huggingface import open_folder
from shoal.observe.events import read_lines
from shoal.parallel.oracle import documents_of
from shoal.tasks.kinds import create
from shoal.tasks.task import Task

MOST_FLOPS = 3e12
"""Of one comparison: what a slow core does in two minutes."""


@torch.no_grad()
def loss_of_rows(
    folder: Path, *, task: Task, rows: Iterable[Mapping[str, Any]], evaluated: bool = False
) -> float:
    """Mean loss over the targets of `rows` (as the data gives them), in float32.

    `evaluated`: over what an evaluation counts.

    transformers' own model with eager attention, called with input_ids, attention_mask and labels
    of one document at a time: no packing, no padding, none of shoal's code in the forward.
    """
    model = open_folder(folder, auto_class=task.auto_class)
    total, targets = 0.0, 0
    for row in rows:
        for sample in _documents({name: _tensor(each) for name, each in row.items()}):
            call = task.user_call(sample)
            call = {n: e.float() if e.is_floating_point() else e for n, e in call.items()}
            loss, count = task.user_losses(model(**call), sample, evaluated=evaluated)
            total, targets = total + loss, targets + count
    return total / max(1, targets)


def _tensor(array: Any) -> torch.Tensor:
    """Indices as transformers takes them; bytes of images stay bytes."""
    tensor = torch.as_tensor(array)
    return tensor.long() if tensor.dtype == torch.int32 else tensor


def _documents(row: Mapping[str, torch.Tensor]) -> Iterable[dict[str, torch.Tensor]]:
    """Batches of one document each; of one sample, where it is no row of tokens."""
    batch = {name: each[None] for name, each in row.items()}
    if "document_ids" not in row:
        yield batch
        return
    for _, _, alone in documents_of(batch):
        yield alone


def logged_and_opened(
    folder: Path, *, run: Path, step: int, recipe: Recipe, inputs: Inputs, num_parameters: int
) -> tuple[float, float] | None:
    """(evaluation loss that `run` logged at `step`, what transformers gives for `folder`).

    None where nothing was evaluated at that step in float32, where the data is gone, where
    transformers has no such loss, or where it would take too long.
    """
    logged = None
    for row in read_lines(run / "metrics.jsonl"):
        if row.get("step") == step and isinstance(row.get("evaluation_loss"), float):
            logged = row["evaluation_loss"]
    data = Path(inputs.data_directory)
    if logged is None or recipe.precision.compute not in ("auto", "float32") or not data.is_dir():
        return None
    task = create(recipe.task.kind, settings=inputs.task_settings, options=recipe.task)
    if task.examined() is not task:
        return None
    scored = Evaluation(data, batch_samples=1, samples=recipe.data.evaluation_samples)
    tokens = len(scored) * recipe.data.sequence_tokens
    if 2.0 * num_parameters * tokens > MOST_FLOPS:
        return None
    rows = (_drawn(row, task=task) for row in scored.rows())
    return logged, loss_of_rows(folder, task=task, rows=rows, evaluated=True)


def _drawn(row: Mapping[str, Any], *, task: Task) -> dict[str, Any]:
    """A sample as it was scored."""
    batch = task.drawn({name: np.asarray(each)[None] for name, each in row.items()}, seed=0)
    return {name: each[0] for name, each in batch.items()}
