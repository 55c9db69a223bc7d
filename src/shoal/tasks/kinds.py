"""The kinds of tasks by name. Importable without torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from shoal.errors import ConfigError, Problem, nearest
from shoal.tasks.causal_lm import CausalLM
from shoal.tasks.chat import Chat
from shoal.tasks.image_classification import ImageClassification
from shoal.tasks.masked_lm import MaskedLM
from shoal.tasks.sequence_classification import SequenceClassification
from shoal.tasks.span_answering import SpanAnswering
from shoal.tasks.task import Task
from shoal.tasks.token_classification import TokenClassification

KINDS: dict[str, type[Task]] = {
    task.kind: task
    for task in (
        CausalLM,
        Chat,
        MaskedLM,
        SpanAnswering,
        SequenceClassification,
        TokenClassification,
        ImageClassification,
    )
}


def create(
    kind: str,
    *,
    settings: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | Iterable[tuple[str, Any]] = (),
) -> Task:
    """The task of a kind, with what it learned from the data before (`Task.learn`).

    `options`: the recipe's section `task`, or its keys and values.

    Raises ConfigError for an unknown kind.
    """
    if kind not in KINDS:
        raise ConfigError(
            [Problem("task.kind", f"expected a kind of task, got {kind!r}", nearest(kind, KINDS))]
        )
    return KINDS[kind](settings, options=dict(options))
