"""The merged model as a Hugging Face folder, and the fingerprint by which a merge checks itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shoal.boxes import Box
from shoal.checkpoint.store import Reader
from shoal.config.recipe import Recipe
from shoal.data.special import SpecialTokens
from shoal.engine.folded import folded_weights
from shoal.engine.job import Inputs
from shoal.engine.opened import logged_and_opened
from shoal.engine.saving.parts import SavedKind
from shoal.engine.training import Training
from shoal.errors import RunError
from shoal.models import init
from shoal.models.adapter import Folded
from shoal.models.adapter_files import write_adapter
from shoal.models.export import export
from shoal.models.huggingface import (
    build_meta,
    config_from,
    fingerprint,
    fingerprint_sample,
    fingerprint_values,
)
from shoal.models.stored import InMemory, Weights
from shoal.tasks.kinds import create
from shoal.tasks.task import Task

_SAME_LOSS = 1e-5
"""Relative, in float32; measured below 1e-6."""


def fingerprint_of(training: Training) -> list[float]:
    """Logits that the model gives for a fixed row now, in float32.

    Of a model that was cut it is collective in each replica; raises PeersLost.
    """
    return fingerprint_values(training.passes.logits(fingerprint_sample(training.model))[0])


def is_complete(training: Training) -> bool:
    """Whether the run is done with this step."""
    ending = training.watch.ending
    return training.progress.step >= training.steps if ending is None else ending.is_success


def saves_read(training: Training) -> list[int]:
    """Steps whose saves `write_model` reads, if the run ends with this step."""
    if not (is_complete(training) and training.job.final_model):
        return []
    best, wanted = training.watch.best, training.job.recipe.checkpoint.model
    found = {best} if best is not None and wanted == "best" else set[int]()
    if training.replica.is_cut:
        found.add(training.progress.step)
    return sorted(found)


def write_model(training: Training, *, step: int, out: Path) -> None:
    """Export the weights of `step`: as they are now, or those of a save, as when they are cut.

    Adapters are folded in; beside `out`, `adapter` has them apart.
    """
    trained: Weights = InMemory(training.state.named("parameter"))
    if training.replica.is_cut or step != training.progress.step:
        training.store.wait_for(step)
        training.store.verify(step)
        trained = SavedWeights(training.store.open(step))
    task, config = training.task, training.model.config
    inputs = training.job.inputs
    folded = folded_weights(training.job.recipe, inputs, trained, task=task, config=config)
    if folded is not None:
        _write_apart(folded, inputs, task=task, out=out.parent / "adapter")
    export(
        tensors=folded or trained,
        config=training.model.config,
        auto_class=training.task.auto_class,
        tokenizer_directory=training.job.inputs.tokenizer_directory,
        special_tokens=_new_ids(training.job.inputs),
        generation=training.job.inputs.generation,
        files=training.task.files(),
        out=out,
        replace=True,
    )


def _new_ids(inputs: Inputs) -> dict[str, Any]:
    """Special tokens to write into the configurations: of a tokenizer that is not the model's."""
    own = inputs.tokenizer_directory in (None, inputs.model_directory)
    return {} if own or not inputs.special_tokens else SpecialTokens(**inputs.special_tokens).ids()


class SavedWeights:
    """The parameters in a checkpoint, whatever boxes they were saved in."""

    def __init__(self, reader: Reader) -> None:
        self._saved = SavedKind(reader, "parameter")  # the mean, where replicas saved their own
        self.shapes: dict[str, tuple[int, ...]] = {
            name: self._saved.shape(name) for name in self._saved.names
        }

    def tensor(self, name: str, *, box: Box | None = None) -> Tensor | None:
        """A weight, or a box of it; None for a name that was not saved."""
        return self._saved.read(name, box=box) if name in self.shapes else None


def _write_apart(folded: Folded, inputs: Inputs, *, task: Task, out: Path) -> None:
    name = inputs.model_directory or ""
    write_adapter(out, folded, base_name=name, auto_class=task.auto_class)


def merge_adapter(reader: Reader, *, out: Path) -> None:
    """Write the adapter of a checkpoint in peft's format. Raises RunError where it has none."""
    inputs = Inputs.from_json(reader.state["inputs"])
    recipe = Recipe.model_validate(reader.state["recipe"])
    task = create(recipe.task.kind, settings=inputs.task_settings)
    config = config_from(reader.state["model_config"])
    folded = folded_weights(recipe, inputs, SavedWeights(reader), task=task, config=config)
    if folded is None:
        raise RunError(f"{reader.folder}: it was trained without an adapter; leave out --adapter")
    _write_apart(folded, inputs, task=task, out=out)


def merge(reader: Reader, *, out: Path, limit_bytes: int | None = None) -> float | None:
    """Write the one full model that a checkpoint holds; returns the largest fingerprint difference.

    `limit_bytes`: most bytes of tensors in memory at once, for a model that is larger than that.
    Such a model cannot be run, so its logits are not compared: None. Nor are those of a mean of
    replicas that were saved within a round of local-sgd.
    Raises RunError when the merged model does not give the logits noted when it was saved,
    ModelError when it cannot be merged within the limit.
    """
    if "own_loop" in reader.state:
        raise RunError(
            f"{reader.folder}: was saved by a loop of your own, of a model that only your script "
            "can build; fleet.load reads it there, and fleet.state_dict() gives it whole"
        )
    inputs = Inputs.from_json(reader.state["inputs"])
    recipe = Recipe.model_validate(reader.state["recipe"])
    task = create(recipe.task.kind, settings=inputs.task_settings)
    config = config_from(reader.state["model_config"])
    model = build_meta(config, auto_class=task.auto_class, dropout="off")
    saved = SavedWeights(reader)
    weights = folded_weights(recipe, inputs, saved, task=task, config=config) or saved
    difference = None
    logits, where = reader.state["fingerprint"], str(reader.folder)
    if limit_bytes is None and logits:
        init.materialise(model, record=init.record(model), seed=0, source=weights)
        difference = check_fingerprint(model, logits, where=where)
    export(
        tensors=weights,
        config=model.config,
        auto_class=task.auto_class,
        tokenizer_directory=inputs.tokenizer_directory,
        special_tokens=_new_ids(inputs),
        generation=inputs.generation,
        files=task.files(),
        out=out,
        limit_bytes=limit_bytes,
    )
    return difference


def opened_by_transformers(reader: Reader, *, out: Path) -> str | None:
    """How the merged folder's loss, by plain transformers, compares with what the run logged.

    In words; None where the run logged nothing to compare with. Raises RunError when they differ.
    """
    inputs = Inputs.from_json(reader.state["inputs"])
    step = int(reader.state["progress"]["step"])
    shapes = SavedWeights(reader).shapes
    found = logged_and_opened(
        out,
        run=reader.run,
        step=step,
        recipe=Recipe.model_validate(reader.state["recipe"]),
        inputs=inputs,
        num_parameters=sum(math.prod(shape) for shape in shapes.values()),
    )
    if found is None:
        return None
    logged, opened = found
    apart = abs(logged - opened) / max(abs(logged), 1e-6)
    if not apart <= _SAME_LOSS:
        raise RunError(
            f"{out}: opened by transformers it gives an evaluation loss of {opened:.6g}, where the "
            f"run logged {logged:.6g} at step {step}. Do not use it, and report this"
        )
    return f"gives the evaluation loss that the run logged: {opened:.6g} (difference {apart:.1e})"


def check_fingerprint(model: nn.Module, saved: list[float], *, where: str) -> float:
    """Largest difference between the logits saved and those of `model`. Raises RunError."""
    found, wanted = torch.tensor(fingerprint(model)), torch.tensor(saved)
    if found.shape != wanted.shape:
        raise RunError(
            f"{where}: expected {wanted.numel()} logits, the model gives {found.numel()}"
        )
    difference = float((found - wanted).abs().max())
    # float32 on the same weights: only the order of sums may differ (another thread count)
    if not difference <= 1e-3 * max(1.0, float(wanted.abs().max())):
        raise RunError(
            f"{where}: the merged model is not the one that was saved: its logits differ by up to "
            f"{difference:.3g}. Merge another checkpoint, and report this"
        )
    return difference
