"""Readers of tables: JSON, JSON Lines, CSV, Parquet and Arrow files."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from shoal.data.columns import Record, Rows, named_classes, table_records
from shoal.data.files import PACKED, Errors, Report, ending_of, lines_of, opened, unpacked_bytes
from shoal.errors import DataError

_HALF = re.compile(r"\\u[dD][89a-fA-F]")
"""Half of a character outside the first 65,536 ones, escaped: JSON may hold one without the other,
which no encoding can write."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"the name {twice!r} stands twice in an object; rename one of them")
    return row


_JSON = json.JSONDecoder(object_pairs_hook=_once)


def _parsed(text: str, *, where: str, expected: str) -> Any:
    """JSON, half characters replaced. Raises DataError."""
    try:
        tree = _JSON.decode(text)
        if _HALF.search(text):
            whole = json.dumps(tree, ensure_ascii=False).encode("utf-16", "surrogatepass")
            tree = json.loads(whole.decode("utf-16", "replace"))
        return tree
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    except RecursionError:
        raise DataError(f"{where}: is nested too deeply to be read; expected {expected}") from None
    except ValueError as error:
        raise DataError(
            f"{where} is not JSON: {error}; got {text[:60]!r}. Expected {expected}"
        ) from error


def read_jsonl(
    path: Path, *, text_field: str | None = None, at: Report = lambda done: None
) -> Iterator[Record]:
    """One JSON object per line, with text or with `words` and `tags`."""

    def rows() -> Rows:
        for number, line in lines_of(path, at=at):
            if line.strip():
                where = f"{path}: line {number}"
                row = _parsed(line, where=where, expected="one object per line")
                yield where, _object(row, where=where)

    yield from table_records(rows(), text_field=text_field)


def _object(row: Any, *, where: str) -> Record:
    if not isinstance(row, dict):
        raise DataError(
            f'{where}: expected an object such as {{"text": "..."}}, got {str(row)[:60]!r}'
        )
    return row


def read_json(
    path: Path, *, text_field: str | None = None, at: Report = lambda done: None
) -> Iterator[Record]:
    """A list of objects, alone or as the only one in an object; or JSON Lines under this name."""
    if path.suffix.lower() in PACKED:
        unpacked_bytes(path)  # not more of them than memory may take
    lines = [line for _, line in lines_of(path, at=at)]
    if any(map(str.strip, lines[1:])) and _is_object(lines[0]):
        yield from read_jsonl(path, text_field=text_field, at=at)
        return
    expected = "a list of objects, or an object that holds one list of them"
    tree = _parsed("\n".join(lines), where=str(path), expected=expected)
    lists = [tree] if isinstance(tree, list) else []
    if isinstance(tree, dict):
        lists = [each for each in tree.values() if isinstance(each, list)]
        lists = [each for each in lists if each and isinstance(each[0], dict)]
    if len(lists) != 1:
        got = f"an object with {', '.join(tree)}" if isinstance(tree, dict) else repr(tree)
        raise DataError(f"{path}: expected {expected}; got {got[:100]}")
    places = ((f"{path}: entry {number}", row) for number, row in enumerate(lists[0], start=1))
    rows: Rows = ((where, _object(row, where=where)) for where, row in places)
    if lists[0] and isinstance(lists[0][0], dict) and "paragraphs" in lists[0][0]:
        rows = _questions(rows)
    yield from table_records(rows, text_field=text_field)


def _questions(articles: Rows) -> Rows:
    """A row of each question in articles of SQuAD's format. DataError for another shape."""
    for where, article in articles:
        for number, paragraph in enumerate(_list(article, "paragraphs", where=where), start=1):
            here = f"{where}, paragraph {number}"
            for question in _list(_object(paragraph, where=here), "qas", where=here):
                row = {"answers": [], **_object(question, where=here)}
                yield here, {**row, "context": paragraph.get("context")}


def _list(row: Record, name: str, *, where: str) -> list[Any]:
    found = row.get(name)
    if not isinstance(found, list):
        raise DataError(
            f"{where}: expected a list under {name!r}, got {type(found).__name__}; articles have "
            "`paragraphs`, and these a `context` and `qas`"
        )
    return found


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def read_table(
    path: Path,
    *,
    text_field: str | None = None,
    at: Report = lambda done: None,
    errors: Errors = "strict",
) -> Iterator[Record]:
    """Comma or tab separated values; the first row names the columns."""
    csv.field_size_limit(sys.maxsize)  # 131,072 characters otherwise, which a document may exceed

    def rows() -> Rows:
        lines = (line + "\n" for _, line in lines_of(path, at=at, errors=errors))
        delimiter = "\t" if ending_of(path) == ".tsv" else ","
        table = csv.DictReader(lines, delimiter=delimiter, strict=True)
        read = 0
        try:
            _check_names(table.fieldnames or (), where=str(path))
            for row in table:
                read, where = table.line_num, f"{path}: line {table.line_num}"
                if None in row or None in row.values():
                    raise DataError(
                        f"{where}: expected {len(table.fieldnames or ())} columns as in the first "
                        "row; quote values that hold the separator"
                    )
                yield where, dict(row)
        except csv.Error as error:
            raise DataError(
                f"{path}: after line {max(read, 1)}: {error}; fix its quotes"
            ) from error

    yield from table_records(rows(), text_field=text_field)


def _check_names(names: Iterable[str], *, where: str) -> None:
    """Refuse two columns of one name: only one could be read."""
    named = [name for name in names if name]
    twice = sorted({name for name in named if named.count(name) > 1})
    if twice:
        raise DataError(
            f"{where}: the column {' and the column '.join(map(repr, twice))} is there more than "
            f"once, in {', '.join(named)[:200]}; rename or remove all but one"
        )


def read_parquet(
    path: Path, *, text_field: str | None = None, at: Report = lambda done: None
) -> Iterator[Record]:
    """A Parquet or Arrow table. Numbers of classes become their names, where the file has them."""
    import pyarrow

    kind = "Parquet" if ending_of(path) == ".parquet" else "Arrow"

    def rows() -> Rows:
        number = 0
        with opened(path) as (file, _):
            packed = path.suffix.lower() in PACKED
            source = (
                pyarrow.BufferReader(unpacked_bytes(path)) if packed else pyarrow.PythonFile(file)
            )
            try:
                schema, batches = _batches(source, kind=kind)
                _check_names(schema.names, where=str(path))
                named = named_classes(_features(schema.metadata))
                for batch in batches:
                    for row in batch.to_pylist():
                        number += 1
                        yield f"{path}: row {number}", named(row)
            except (pyarrow.ArrowException, ValueError, OSError) as error:
                raise DataError(
                    f"{path}: is not a {kind} file that can be read (after row {number}): {error}; "
                    "write it again"
                ) from error
        at(1.0)

    yield from table_records(rows(), text_field=text_field)


def _batches(source: Any, *, kind: str) -> tuple[Any, Iterator[Any]]:
    """The schema of a table, and its rows in batches."""
    import pyarrow

    if kind == "Parquet":
        from pyarrow.parquet import ParquetFile

        file = ParquetFile(source)
        return file.schema_arrow, file.iter_batches(batch_size=1000)
    try:  # as datasets writes them
        stream = pyarrow.ipc.open_stream(source)
        return stream.schema, iter(stream)
    except pyarrow.ArrowInvalid:
        source.seek(0)
        table = pyarrow.ipc.open_file(source)
        numbers = range(table.num_record_batches)
        return table.schema, (table.get_batch(number) for number in numbers)


def _features(metadata: Mapping[bytes, bytes] | None) -> Mapping[str, Any]:
    """What `datasets` notes of a table's columns; nothing where it did not write the table."""
    try:
        notes = json.loads((metadata or {}).get(b"huggingface", b"{}"))
        features = notes["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}
