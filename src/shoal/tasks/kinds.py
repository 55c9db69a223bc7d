"""The kinds of tasks by name. Importable without torch."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from shoal.config.tasks import installed_tasks
from shoal.errors import ConfigError, Problem, nearest
from shoal.tasks.causal_lm import CausalLM
from shoal.tasks.chat import Chat
from shoal.tasks.distillation import Distillation
from shoal.tasks.embedding import Embedding
from shoal.tasks.grpo import GRPO
from shoal.tasks.image_classification import ImageClassification
from shoal.tasks.imports import imported
from shoal.tasks.masked_lm import MaskedLM
from shoal.tasks.object_detection import ObjectDetection
from shoal.tasks.preference import Preference
from shoal.tasks.recommendation import Recommendation
from shoal.tasks.reinforcement import Reinforcement
from shoal.tasks.sequence_classification import SequenceClassification
from shoal.tasks.span_answering import SpanAnswering
from shoal.tasks.speech_recognition import SpeechRecognition
from shoal.tasks.task import Task
from shoal.tasks.token_classification import TokenClassification
from shoal.tasks.translation import Translation

KINDS: dict[str, type[Task]] = {
    task.kind: task
    for task in (
        CausalLM,
        Chat,
        MaskedLM,
        Preference,
        Distillation,
        SequenceClassification,
        TokenClassification,
        SpanAnswering,
        ImageClassification,
        ObjectDetection,
        Recommendation,
        Reinforcement,
        GRPO,
        Embedding,
        Translation,
        SpeechRecognition,
    )
}


def kind_of(kind: str) -> type[Task]:
    """The task of a kind: shoal's own, an installed package's by the name it is listed under (entry
    points of the group `shoal.tasks`), or the path of a class, `my_module:MyTask`.

    Raises ConfigError for an unknown kind, and for a path that leads to no task.
    """
    if kind in KINDS:
        return KINDS[kind]
    module, colon, name = _path_of(kind).partition(":")
    found = None
    if colon:
        found = getattr(imported(module, named=kind, key="task.kind"), name, None)
    if not (isinstance(found, type) and issubclass(found, Task)):
        what = f"{kind} is no shoal Task"
        if found is None:
            what = f"{module} has no class {name}"
        raise ConfigError([Problem("task.kind", what, "derive it from shoal.tasks.task.Task")])
    found.kind = kind  # a run says by it where its task comes from
    return found


def _path_of(kind: str) -> str:
    """The import path of a task that is not shoal's. Raises ConfigError."""
    if ":" in kind:
        return kind
    installed = installed_tasks()
    paths = installed.get(kind, [])
    if len(paths) == 1:
        return paths[0]
    what, hint = f"expected a kind of task, got {kind!r}", nearest(kind, [*KINDS, *installed])
    if paths:
        what = f"{len(paths)} installed packages list a task {kind!r}: {', '.join(paths)}"
        hint = "name the one that is meant by its path, or uninstall the other"
    raise ConfigError([Problem("task.kind", what, hint)])


def code_of(kind: str) -> str:
    """A kind, and of a task of one's own what its module says: what was made by it is out of date
    once that changes."""
    if kind in KINDS:
        return kind
    path = inspect.getsourcefile(kind_of(kind))
    text = Path(path).read_bytes() if path else b""
    return f"{kind} {xxhash.xxh3_64_hexdigest(text)}"


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
    return kind_of(kind)(settings, options=dict(options))
