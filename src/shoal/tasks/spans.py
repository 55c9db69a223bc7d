"""Entity spans of BIO tags the CoNLL way, and precision, recall and F1 over them.

Tags come in several schemes. They are all read as BIO2: B-X opens an entity, I-X continues it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from shoal.errors import DataError

Span = tuple[str, int, int]
"""Type, first position, position after the last."""

_OPENS, _GOES_ON, _CLOSES = frozenset("BSU"), frozenset("IMEL"), frozenset("SUEL")
"""Prefixes: of an entity's first word, of the others, and of those after which it is over (BIOES:
S alone, E last, which BILOU calls U and L; BMES has M for I)."""
_PREFIXES = _OPENS | _GOES_ON


def split_tag(tag: str, *, reversed_: bool = False) -> tuple[str, str]:
    """Prefix and type of a tag, ("", "") of one that has no such prefix; reversed: `PER-B`."""
    first, dash, last = tag.rpartition("-") if reversed_ else tag.partition("-")
    prefix, kind = (last, first) if reversed_ else (first, last)
    return (prefix, kind) if dash and kind and prefix in _PREFIXES else ("", "")


def is_reversed(tags: Iterable[str]) -> bool | None:
    """Whether prefixes stand behind their types; None: the tags are plain classes without any.

    Raises DataError where some tags have a prefix and others have none.
    """
    named = sorted({*tags} - {"O"})
    ahead = [tag for tag in named if split_tag(tag)[0]]
    if len(ahead) == len(named):
        return False
    if all(split_tag(tag, reversed_=True)[0] for tag in named):
        return True
    if not ahead:
        return None
    odd = next(tag for tag in named if tag not in ahead)
    raise DataError(
        f"token-classification: the tag {odd!r} has no prefix, but {ahead[0]!r} has one; expected "
        "O and B-X, I-X (or those of BIOES, BILOU or IOB1), or plain classes without any prefix"
    )


def as_bio2(tag: str, *, after: str, reversed_: bool = False) -> str:
    """A tag of any scheme in BIO2, by the tag before it (O at the start of a sentence)."""
    prefix, kind = split_tag(tag, reversed_=reversed_)
    last, before = split_tag(after, reversed_=reversed_)
    if not prefix:
        return tag
    opens = prefix in _OPENS or before != kind or last in _CLOSES
    return f"{'B' if opens else 'I'}-{kind}"


def scheme_of(tags: Iterable[str], *, reversed_: bool) -> str:
    """What people call the scheme of tags that have prefixes."""
    found = {split_tag(tag, reversed_=reversed_)[0] for tag in tags}
    name = "BILOU" if found & set("LU") else "BIOES" if found & set("ESM") else "IOB1"
    return f"{name}, prefixes behind" if reversed_ else name


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
