"""Tables with named columns become records: which column is the text, which are words and tags.

And what a record holds, as a hash that is the same in every format, file name and encoding.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import xxhash

from shoal.data.conversations import content_of_messages, conversation_of, plain_ends
from shoal.errors import DataError, nearest

Record = dict[str, Any]
Rows = Iterator[tuple[str, Record]]
"""Rows of a table, each with its place."""

_PAIRS = (("words", "tags"), ("tokens", "tags"), ("tokens", "ner_tags"), ("words", "ner_tags"))

_QUESTION = {"question", "context", "answers"}
"""Columns of questions on a text, as SQuAD has them."""


def content_hash(record: Record) -> int:
    """64-bit hash of the text of a record, its words or its image; of all of it where it has none.

    A reader whose records belong together in groups gives what names the group: `kept_together`.

    Records of equal hash are never in different parts of the data, whatever else they hold.
    """
    match record:
        case {"kept_together": str(together)}:
            content = together.encode("utf-8", "surrogatepass")
        case {"text": str(text)}:
            content = text.encode("utf-8", "surrogatepass")
        case {"messages": [*_]}:
            content = content_of_messages(record)
        case {"words": [*words]}:
            content = "\x1f".join(words).encode("utf-8", "surrogatepass")
        case {"image": image}:
            content = str(image.shape).encode() + image.tobytes()
        case _:
            content = json.dumps(record, sort_keys=True, default=str).encode()
    return xxhash.xxh3_64_intdigest(content)


def table_records(
    rows: Iterable[tuple[str, Record]], *, text_field: str | None
) -> Iterator[Record]:
    """Records from rows with named columns, each with its place (`FILE: line 3`).

    Columns are looked for in the first row; ends of lines in texts become `\\n`.
    Raises DataError for a missing column, naming those that are there, and for a missing text.
    """
    for where, row in rows:
        pair = next((p for p in _PAIRS if p[0] in row and p[1] in row), None)
        if pair is not None and text_field is None:
            yield _tagged(row, pair=pair, where=where)
            continue
        if text_field is None and row.keys() >= _QUESTION:
            if not isinstance(row["context"], str):
                raise DataError(f"{where}: {_no_text(row, text_field='context')}")
            # as it is: answers are found by counting its characters
            yield {**{k: v for k, v in row.items() if k != "context"}, "text": row["context"]}
            continue
        if text_field is None and "text" not in row and row.keys() >= {"source", "target"}:
            yield row
            continue
        if text_field is None and (conversation := conversation_of(row, where=where)):
            yield conversation
            continue
        text_field = text_field or _text_column(row, where=where)
        text = row.get(text_field)
        if not isinstance(text, str):
            raise DataError(f"{where}: {_no_text(row, text_field=text_field)}")
        if text.strip():
            yield {**row, "text": plain_ends(text)}


def named_classes(features: Mapping[str, Any]) -> Callable[[Record], Record]:
    """What puts names of classes in place of their numbers, by the notes of `datasets`."""
    names = {column: found for column, note in features.items() if (found := _names_in(note))}

    def named(row: Record) -> Record:
        return {**row, **{column: _named(row.get(column), names[column]) for column in names}}

    return named


def _names_in(note: Any) -> list[str]:
    """Names of the classes of a column, or of what its lists hold."""
    if isinstance(note, list) and len(note) == 1:
        return _names_in(note[0])
    if not isinstance(note, dict):
        return []
    if note.get("_type") == "ClassLabel":
        return [str(name) for name in note.get("names") or []]
    return _names_in(note.get("feature"))


def _named(value: Any, names: list[str]) -> Any:
    if isinstance(value, list):
        return [_named(each, names) for each in value]
    return names[value] if type(value) is int and 0 <= value < len(names) else value


def _tagged(row: Record, *, pair: tuple[str, str], where: str) -> Record:
    words, tags = row[pair[0]], row[pair[1]]
    if not isinstance(words, list) or not isinstance(tags, list) or len(words) != len(tags):
        raise DataError(f"{where}: expected lists of equal length in {pair[0]!r} and {pair[1]!r}")
    text = {"text": plain_ends(row["text"])} if isinstance(row.get("text"), str) else {}
    return {**text, "words": [str(word) for word in words], "tags": [str(tag) for tag in tags]}


def _no_text(row: Record, *, text_field: str) -> str:
    if text_field not in row:
        known = f"columns: {_shown(row)}; {nearest(text_field, row)} Set data.text_field"
        return f"expected text in {text_field!r}, got no such column; {known}"
    if row[text_field] is None:
        hint = 'remove it, or write "" there: documents without text are left out'
        return f"expected text in {text_field!r}, got null; {hint}"
    got = type(row[text_field]).__name__
    return f"expected text in {text_field!r}, got {got}; set data.text_field to a column of text"


def _text_column(row: Record, *, where: str) -> str:
    if "text" in row:
        return "text"
    columns = [name for name, value in row.items() if isinstance(value, str)]
    if len(columns) != 1:
        raise DataError(
            f"{where}: expected a column `text` or a single text column, got "
            f"{_shown(row) or 'none'}; set data.text_field to one of them"
        )
    return columns[0]


def _shown(row: Record) -> str:
    """Names of columns, cut: a table without a header has its first text for a name."""
    return ", ".join(name if len(name) <= 40 else f"{name[:40]}..." for name in row)
