"""Hints for a key that is not there: a near name, the same key elsewhere, another tool's name."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib import resources

from shoal.config.schema import keys
from shoal.config.yaml_text import parse
from shoal.errors import nearest


@cache
def other_names() -> dict[str, str]:
    """What other tools call a key -> the key, or a sentence."""
    text = resources.files("shoal.config").joinpath("other_names.yaml").read_text("utf-8")
    return {word: ours for ours, words in parse(text).items() for word in words.split()}


def suggestion(where: str, *, known: Iterable[str]) -> str:
    """What to write instead of the unknown key `where`, whose section has the keys `known`."""
    known, (section, _, word) = set(known), where.rpartition(".")
    if where in keys():
        return f"only with {section}.kind={' or '.join(keys()[where])}"
    elsewhere = [key for key in keys() if key.rpartition(".")[2] == word and word != "kind"]
    elsewhere = [key for key in elsewhere if not keys()[key]] or elsewhere  # of no kind first
    near = [key for key in elsewhere if key.partition(".")[0] == where.partition(".")[0]]
    elsewhere = near or elsewhere  # of the same section first
    ours = other_names().get(word.lower().replace("-", "_"))
    if ours is not None:
        elsewhere = [ours]
    if not elsewhere:
        return nearest(word, known)
    if " " in elsewhere[0]:
        return elsewhere[0]
    here = [key for key in elsewhere if key.partition("=")[0].rpartition(".")[2] in known]
    names = [key.rpartition(".")[2] for key in here] or elsewhere
    return f"did you mean {' or '.join(map(repr, names))}?"
