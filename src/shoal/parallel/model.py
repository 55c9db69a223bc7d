"""Which model: its transformers configuration, and a small one of the same kind for probes."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import nn

from shoal.config.recipe import ConfiguredModel, ModelSection
from shoal.errors import ModelError
from shoal.legal import shrunk
from shoal.models import init
from shoal.models.dropout import apply_keyed
from shoal.models.huggingface import build_meta, config_from, read_config


@dataclass(frozen=True)
class ModelSettings:
    """What a model is built from; the same on every rank."""

    config: Any
    """The transformers configuration."""
    auto_class: str
    """Name of the transformers class that gives it its head."""
    seed: int
    dropout: str
    freeze: tuple[str, ...] = ()
    """Patterns of parameters that have no gradient."""


def model_config(
    chosen: ModelSection,
    *,
    vocabulary_size: int | None,
    directory: str | None,
    task_settings: dict[str, Any],
) -> Any:
    """The configuration that a recipe's model section names.

    `directory`: where a pretrained model lies. `task_settings`: keys that the task sets. Raises
    ModelError for keys or values that the configuration's class does not take.
    """
    if isinstance(chosen, ConfiguredModel):
        size = chosen.settings.get("vocab_size") or vocabulary_size
        settings = {**chosen.settings, **task_settings}
        return read_config(
            architecture=chosen.architecture, settings=settings, vocabulary_size=size
        )
    return read_config(architecture=None, settings=task_settings, path=directory)


def small_model(settings: ModelSettings) -> nn.Module:
    """A real model of the same kind, of few layers and little width, for probes.

    The configuration's own sizes where no rule makes them smaller.
    """
    tree = settings.config.to_dict()
    with suppress(ModelError):
        tree |= shrunk(tree)
    small = config_from(tree)
    small.use_cache = False
    model = build_meta(small, auto_class=settings.auto_class, dropout=settings.dropout)
    init.materialise(model, record=init.record(model), seed=settings.seed)
    if settings.dropout == "keyed":
        apply_keyed(model, seed=settings.seed, asked=small)
    return model
