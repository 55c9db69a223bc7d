"""Tables with named columns become records: which column is the text, which are words and tags."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from shoal.errors import DataError, nearest

Record = dict[str, Any]

_PAIRS = (("words", "tags"), ("tokens", "tags"), ("tokens", "ner_tags"), ("words", "ner_tags"))


def table_records(
    rows: Iterable[Record], *, where: str, text_field: str | None
) -> Iterator[Record]:
    """Records from rows with named columns; columns are looked for in the first row.

    Raises DataError for a missing column, naming those that are there.
    """
    for number, row in enumerate(rows, start=1):
        pair = next((p for p in _PAIRS if p[0] in row and p[1] in row), None)
        if pair is not None and text_field is None:
            yield _tagged(row, pair=pair, where=f"{where}: record {number}")
            continue
        text_field = text_field or _text_column(row, where=where)
        text = row.get(text_field)
        if not isinstance(text, str):
            got = "no such column" if text_field not in row else f"{type(text).__name__}"
            raise DataError(
                f"{where}: record {number}: expected text in {text_field!r}, got {got}; columns: "
                f"{', '.join(row)}; {nearest(text_field, row)} Set data.text_field"
            )
        if text.strip():
            yield {**row, "text": text}


def _tagged(row: Record, *, pair: tuple[str, str], where: str) -> Record:
    words, tags = row[pair[0]], row[pair[1]]
    if not isinstance(words, list) or not isinstance(tags, list) or len(words) != len(tags):
        raise DataError(f"{where}: expected lists of equal length in {pair[0]!r} and {pair[1]!r}")
    return {"words": [str(word) for word in words], "tags": [str(tag) for tag in tags]}


def _text_column(row: Record, *, where: str) -> str:
    if "text" in row:
        return "text"
    columns = [name for name, value in row.items() if isinstance(value, str)]
    if len(columns) != 1:
        raise DataError(
            f"{where}: expected a column `text` or a single text column, got "
            f"{', '.join(row) or 'none'}; set data.text_field to one of them"
        )
    return columns[0]
