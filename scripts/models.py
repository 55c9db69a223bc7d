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
from dataclasses import dataclass

import torch
import transformers
from transformers.models.auto import modeling_auto

from pages import ROOT, write_or_check
from shoal.errors import ShoalError
from shoal.models.huggingface import read_config
from shoal.parallel.model import ModelSettings
from shoal.parallel.oracle import Verdict, examine
from shoal.tasks.kinds import create

PAGE = ROOT / "docs" / "guide" / "models.md"
TASKS = {
    "causal-lm": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "token-classification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "image-classification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
}
LEARNED = {
    "causal-lm": {},
    "token-classification": {"tags": ["O", "B-A", "I-A"]},
    "image-classification": {"classes": ["a", "b", "c"], "shape": [3, 32, 32]},
}
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
- *refused*: what a user is told, in short.
"""


@dataclass(frozen=True)
class Row:
    family: str
    task: str
    verdict: Verdict | None = None
    refused: str | None = None

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
        figure = f"right, {self.verdict.difference:.0e}"
        return f"| {self.family} | {self.task} | {figure} | {packs} | {notes} |"


def examined(family: str, kind: str) -> Row | None:
    """One family for one task; None for what has no text of its own (several modalities)."""
    task = create(kind, settings=LEARNED[kind])
    settings = {"vocab_size": VOCABULARY} if kind != "image-classification" else {}
    settings |= task.model_settings()
    try:
        default = transformers.CONFIG_MAPPING[family]()
        if kind != "image-classification" and not hasattr(default, "vocab_size"):
            return None
        config = read_config(architecture=family, settings=settings)
        found = examine(
            ModelSettings(config, task.auto_class, 0, "off"),
            task=task,
            packing=False,
            sequence_tokens=SEQUENCE_TOKENS,
        )
    except ShoalError as error:
        return Row(family, kind, refused=str(error))
    except Exception as error:  # a class that refuses its own defaults
        return Row(family, kind, refused=f"transformers: {type(error).__name__}: {error}")
    return Row(family, kind, verdict=found)


def rows(names: list[str]) -> Iterator[Row]:
    """Of all families, or of those named."""
    for kind, table in TASKS.items():
        for family in sorted(table):
            if names and family not in names:
                continue
            row = examined(family, kind)
            if row is not None:
                print(row, flush=True)
                yield row


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
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    names = [name for name in sys.argv[1:] if not name.startswith("-")]
    found = list(rows(names))
    return 0 if names else write_or_check({PAGE: page(found)}, script="models")


if __name__ == "__main__":
    sys.exit(main())
