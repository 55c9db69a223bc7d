"""The kinds of tasks by name. Importable without torch."""

from __future__ import annotations

from typing import Any

from shoal.errors import ConfigError, Problem, nearest
from shoal.tasks.causal_lm import CausalLM
from shoal.tasks.outcome import Task
from shoal.tasks.token_classification import TokenClassification

KINDS: dict[str, type[CausalLM] | type[TokenClassification]] = {
    CausalLM.kind: CausalLM,
    TokenClassification.kind: TokenClassification,
}


def create(kind: str, *, settings: dict[str, Any] | None = None) -> Task:
    """The task of a kind, with what it learned from the data before (`Task.settings`).

    Raises ConfigError for an unknown kind.
    """
    if kind not in KINDS:
        raise ConfigError(
            [Problem("task.kind", f"expected a kind of task, got {kind!r}", nearest(kind, KINDS))]
        )
    return KINDS[kind](settings)
