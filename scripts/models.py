"""Holds every family of transformers against transformers, and writes docs/guide/models.md.

    python scripts/models.py [FAMILY ...]     without names: all, and the page is written

Each family's default configuration is made small and examined as a run's model is before its
workers start (parallel/oracle.py), for each task that its auto classes offer. Takes minutes.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from pages import ROOT, write_or_check

sys.path.insert(0, str(ROOT / "tests"))

from seq2seq import Seq2Seq
from shoal.environment import usable_cores
from shoal.errors import ShoalError
from shoal.models.huggingface import read_config, setting_of
from shoal.parallel.model import ModelSettings
from shoal.parallel.oracle import Verdict, examine
from shoal.tasks.kinds import create
from shoal.tasks.task import Task

PAGE = ROOT / "docs" / "guide" / "models.md"
TASKS = {
    "causal-lm": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "token-classification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "image-classification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    Seq2Seq.kind: modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}
LEARNED = {
    "token-classification": {"tags": ["O", "B-A", "I-A"]},
    "image-classification": {"classes": ["a", "b", "c"], "shape": [3, 32, 32]},
}
OPEN = {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "pad_token_id": 0}
"""Values for keys that a default configuration leaves open, though its model needs them."""

VOCABULARY = 64
SEQUENCE_TOKENS = 32

HEAD = f"""\
# Models: every family of transformers, held against transformers

Written by `scripts/models.py`, torch {torch.__version__}, transformers {transformers.__version__}.
Before a run starts, a small model of the same kind is built twice with the same weights: by
transformers, called with input_ids, attention_mask and labels as its users do, and by shoal. On
rows of unequal length, padded and packed, logits and loss must agree within rounding; and nothing
may see what comes after it, what pads it, or what else was computed. A model that fails is refused
with the reason, so this table is only the state of the default configurations.

- *right*: the largest difference, relative to the largest logit, and of the loss; in float64 where
  transformers computes the family in it. *packs*: documents may share a row (`data.packing`).
- *its own attention*: the family's code does not let its attention be replaced, so it runs as it
  is: padded rows only, no tensor or context axis.
- *with ... set*: keys that the family's default configuration leaves open, though its model needs
  them; published configurations give them.
- *sequence-to-sequence*: no task is shipped for encoder-decoders yet. They are held through the
  one of `tests/seq2seq.py`: the encoder reads a row, the decoder gives it from the second token on.
- *refused*: what a user is told, in short.

`make fuzz-models` trains every row of the first table, packed and padded, in each layout that is
legal for it and in several sizes of micro batches, beside one worker.
"""


@dataclass(frozen=True)
class Row:
    family: str
    task: str
    verdict: Verdict | None = None
    refused: str | None = None
    given: tuple[str, ...] = ()

    @property
    def is_right(self) -> bool:
        return self.verdict is not None and not self.verdict.problems

    def __str__(self) -> str:
        if self.verdict is None or self.verdict.problems:
            reason = self.refused or "; ".join(self.verdict.problems if self.verdict else ())
            reason = re.sub(r"\s+", " ", reason.splitlines()[0]).replace("|", "/")
            return f"| {self.family} | {self.task} | refused | | {reason[:160]} |"
        packs = "yes" if self.verdict.packs else "no" if self.task == "causal-lm" else ""
        notes = ", ".join(self.verdict.notes).replace("attention of its own", "its own attention")
        if self.given:
            notes += f"{', ' if notes else ''}with {', '.join(self.given)} set"
        figure = f"right, {self.verdict.difference:.0e}"
        return f"| {self.family} | {self.task} | {figure} | {packs} | {notes} |"


def task_of(kind: str) -> Task:
    """A task that has learned what it needs."""
    return Seq2Seq() if kind == Seq2Seq.kind else create(kind, settings=LEARNED.get(kind, {}))


def given_to(default: Any, *, whole: bool) -> dict[str, Any]:
    """Keys that a default configuration leaves open; nothing unless `whole`."""
    hidden, heads = (setting_of(default, key) for key in ("hidden_size", "num_attention_heads"))
    values = dict(OPEN)
    if isinstance(hidden, int) and isinstance(heads, int):
        values |= {"head_dim": hidden // heads, "num_key_value_heads": heads}
    tree = default.to_dict()
    return {key: value for key, value in values.items() if whole and tree.get(key, "") is None}


def settings_of(
    family: str, kind: str, *, vocabulary: int, whole: bool
) -> tuple[ModelSettings, tuple[str, ...]]:
    """The default configuration for a task, and the open keys that were given where `whole`.

    Raises ModelError, or whatever a class raises that refuses its own defaults.
    """
    task, default = task_of(kind), transformers.CONFIG_MAPPING[family]()
    given = given_to(default, whole=whole)
    settings = {**task.model_settings(), **given}
    if kind != "image-classification":
        settings["vocab_size"] = vocabulary
    config = read_config(architecture=family, settings=settings)
    return ModelSettings(config, task.auto_class, 0, "off"), tuple(given)


def is_for(family: str, kind: str) -> bool:
    """Not one of several modalities, which has no text of its own; two halves where asked."""
    try:
        default = transformers.CONFIG_MAPPING[family]()
    except Exception:  # it is told so
        return True
    if kind == Seq2Seq.kind and not default.is_encoder_decoder:
        return False
    return kind == "image-classification" or hasattr(default, "vocab_size")


def examined(family: str, kind: str) -> Row:
    """One family for one task; what the default configuration is told where neither is right."""
    told = []
    for whole in (False, True):
        try:
            settings, given = settings_of(family, kind, vocabulary=VOCABULARY, whole=whole)
            found = examine(
                settings, task=task_of(kind), packing=False, sequence_tokens=SEQUENCE_TOKENS
            )
            return Row(family, kind, verdict=found, given=given)
        except ShoalError as error:
            told.append(str(error))
        except Exception as error:  # a class that refuses its own defaults
            told.append(f"transformers: {type(error).__name__}: {error}")
    return Row(family, kind, refused=told[0])


def rows(names: list[str]) -> Iterator[Row]:
    """Of all families, or of those named; by as many processes as there are cores."""
    pairs = [
        (family, kind)
        for kind, table in TASKS.items()
        for family in sorted(table)
        if not names or family in names
    ]
    with ProcessPoolExecutor(usable_cores(), initializer=quietly) as processes:
        for row in processes.map(row_of, pairs):
            if row is not None:
                print(row, flush=True)
                yield row


def row_of(pair: tuple[str, str]) -> Row | None:
    """Of a family and a kind of task; None where they have nothing to do with each other."""
    return examined(*pair) if is_for(*pair) else None


def quietly() -> None:
    """What each process does first."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)


def page(found: list[Row]) -> str:
    """The text of the page."""
    right = {row.family for row in found if row.is_right}
    told = [row for row in found if not row.is_right]
    lines = [
        HEAD,
        f"{len(right)} families are right for at least one task; {len(told)} of {len(found)} "
        "combinations are refused.",
        "",
        "| family | task | logits and loss | packs | notes |",
        "| --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*lines, *(str(row) for row in found if row.is_right), "",
                      "| family | task | | | told |", "| --- | --- | --- | --- | --- |",
                      *map(str, told), ""])  # fmt: skip


def main() -> int:
    """Examine; write the page when nothing was left out."""
    names = [name for name in sys.argv[1:] if not name.startswith("-")]
    found = list(rows(names))
    return 0 if names else write_or_check({PAGE: page(found)}, script="models")


if __name__ == "__main__":
    sys.exit(main())
