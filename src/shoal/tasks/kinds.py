"""The kinds of tasks by name. Importable without torch."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import xxhash

from shoal.environment import python_path
from shoal.errors import ConfigError, Problem, nearest
from shoal.tasks.causal_lm import CausalLM
from shoal.tasks.chat import Chat
from shoal.tasks.distillation import Distillation
from shoal.tasks.image_classification import ImageClassification
from shoal.tasks.masked_lm import MaskedLM
from shoal.tasks.object_detection import ObjectDetection
from shoal.tasks.preference import Preference
from shoal.tasks.recommendation import Recommendation
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
        Translation,
        SpeechRecognition,
    )
}


def kind_of(kind: str) -> type[Task]:
    """The task of a kind, which is shoal's own, or the path of a class: `my_module:MyTask`.

    Raises ConfigError for an unknown kind, and for a path that leads to no task.
    """
    if kind in KINDS:
        return KINDS[kind]
    module, colon, name = kind.partition(":")
    if not colon:
        raise ConfigError(
            [Problem("task.kind", f"expected a kind of task, got {kind!r}", nearest(kind, KINDS))]
        )
    found = getattr(_imported(module, kind), name, None)
    if not (isinstance(found, type) and issubclass(found, Task)):
        what = f"{module} has no class {name}" if found is None else f"{kind} is no shoal Task"
        raise ConfigError([Problem("task.kind", what, "derive it from shoal.tasks.task.Task")])
    found.kind = kind  # a run says by it where its task comes from
    return found


def _imported(module: str, kind: str) -> ModuleType:
    """A module, from where the user lets Python look; never from the folder that one is in.

    A recipe from elsewhere may come with a file beside it. Raises ConfigError.
    """
    before, here = list(sys.path), {"", os.getcwd()} - set(python_path())
    sys.path[:] = [each for each in before if each not in here]
    try:
        return importlib.import_module(module)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        hint = "install it, or let PYTHONPATH name its folder; shoal looks nowhere else"
        raise ConfigError([Problem("task.kind", f"{kind!r}: {said}", hint)]) from error
    finally:
        sys.path[:] = before


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
