"""Which model: its transformers configuration, and what else it is built from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shoal.config.recipe import ConfiguredModel, ModelSection
from shoal.models.adapter import AdapterSettings
from shoal.models.huggingface import read_config
from shoal.models.on_grid import GridSettings
from shoal.models.pretrained import folder_config


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
    adapter: AdapterSettings | None = None
    """Trained instead of the weights."""
    balance: str = "sequence"
    """Over what the balance loss of experts is taken, where the configuration asks for one."""
    grid: GridSettings | None = None
    """Layers compute with weights that are rounded so."""


def model_config(
    chosen: ModelSection,
    *,
    vocabulary_size: int | None,
    directory: str | None,
    task_settings: dict[str, Any],
    auto_class: str,
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
    assert directory is not None, "prepared: a pretrained model lies somewhere"
    return folder_config(directory, auto_class=auto_class, settings=task_settings)
