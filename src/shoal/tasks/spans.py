"""Entity spans of BIO tags the CoNLL way, and precision, recall and F1 over them."""

from __future__ import annotations

from collections.abc import Sequence

Span = tuple[str, int, int]
"""Type, first position, position after the last."""


def spans_of(tags: Sequence[str]) -> list[Span]:
    """Spans of one sentence, as the CoNLL-2000 evaluation script reads them.

    `B-X` opens a span. `I-X` continues a span of X, and opens one where none of X is open (an I-
    without its B-). Anything else is outside.
    """
    spans: list[Span] = []
    kind, start = "", 0
    for position, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        continues = prefix == "I" and name == kind
        if kind and not continues:
            spans.append((kind, start, position))
            kind = ""
        if prefix in ("B", "I") and name and not continues:
            kind, start = name, position
    return spans


def precision_recall_f1(*, correct: float, predicted: float, gold: float) -> tuple[float, ...]:
    """(precision, recall, F1) of counts of spans; 0 where a count is empty."""
    precision = correct / predicted if predicted else 0.0
    recall = correct / gold if gold else 0.0
    total = precision + recall
    return precision, recall, 2 * precision * recall / total if total else 0.0
