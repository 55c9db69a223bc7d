"""The merged model as a Hugging Face folder, and the fingerprint by which a merge checks itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shoal.checkpoint.store import Reader
from shoal.config.recipe import Recipe
from shoal.engine.prepare import Inputs
from shoal.errors import RunError
from shoal.models import init
from shoal.models.anatomy import canonical_parameters
from shoal.models.export import export
from shoal.models.huggingface import (
    build_meta,
    config_from,
    fingerprint,
    fingerprint_sample,
    fingerprint_values,
)
from shoal.tasks.kinds import create

if TYPE_CHECKING:
    from shoal.engine.build import Training


def fingerprint_of(training: Training) -> list[float]:
    """Logits that the model gives for a fixed row now, in float32.

    Of a model that was cut it is collective in each replica; raises PeersLost.
    """
    replica = training.replica
    if not replica.is_cut:
        return fingerprint(replica.model)
    replica.model.eval()
    try:
        logits = replica.logits(fingerprint_sample(replica.model))[0]
    finally:
        replica.model.train()
    return fingerprint_values(logits if logits.dim() == 1 else logits[-1])


def write_model(training: Training, *, out: Path) -> None:
    """Export the weights as they are now; of a model that was cut, those of the save just made."""
    tensors = training.state.named("parameter")
    if training.replica.is_cut:
        reader = training.store.open(training.progress.step)
        tensors = {name: reader.read(name) for name in reader.names()}
    export(
        tensors=tensors,
        config=training.model.config,
        auto_class=training.task.auto_class,
        tokenizer_directory=training.job.inputs.tokenizer_directory,
        out=out,
        replace=True,
    )


class _ReaderSource:
    def __init__(self, reader: Reader) -> None:
        self._reader, self._names = reader, set(reader.names())

    def tensor(self, name: str, *, box: Any = None) -> Tensor | None:
        return self._reader.read(name) if name in self._names else None


def merge(reader: Reader, *, out: Path) -> float:
    """Write the one full model that a checkpoint holds; returns the largest fingerprint difference.

    Raises RunError when the merged model does not give the logits noted when it was saved.
    """
    inputs = Inputs.from_json(reader.state["inputs"])
    recipe = Recipe.model_validate(reader.state["recipe"])
    task = create(recipe.task.kind, settings=inputs.task_settings)
    config = config_from(reader.state["model_config"])
    model = build_meta(config, auto_class=task.auto_class, dropout="off")
    init.materialise(model, record=init.record(model), seed=0, source=_ReaderSource(reader))
    difference = check_fingerprint(model, reader.state["fingerprint"], where=str(reader.folder))
    named = {name: p.detach() for name, p in canonical_parameters(model).items()}
    export(
        tensors=named,
        config=model.config,
        auto_class=task.auto_class,
        tokenizer_directory=inputs.tokenizer_directory,
        out=out,
    )
    return difference


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
