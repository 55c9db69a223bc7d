"""File formats: each reader turns one file into records and names the line that is wrong.

A record is `{"text": str}` (plus the other columns of a table), `{"words": [...], "tags": [...]}`
or `{"image": uint8 [C, H, W], "label": str}` (data/images.py). Documents without any text are left
out.

Formats: .txt .md (plain text), .jsonl (one object per line), .json (a list of objects), .csv .tsv
(first row names the columns), .parquet, .arrow, .conll (a word and its tag per line, blank line
between sentences). A .txt whose lines are all `word<TAB>tag` is read as .conll. Each may be
compressed, with .gz or .zst behind its ending.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from shoal.data.audio import read_prompts
from shoal.data.columns import Record
from shoal.data.corpora import once, read_opinions, read_people_daily, read_reviews
from shoal.data.files import Report, ending_of, lines_of
from shoal.data.help_pages import read_help_pages, read_translated_help
from shoal.data.images import read_coco, read_image, read_pixels
from shoal.data.interactions import read_interactions
from shoal.data.questions import FAQ, FAQ_HELD_OUT, HELP, HELP_HELD_OUT
from shoal.data.scenes import SCENES, SCENES_HELD_OUT
from shoal.data.tables import read_json, read_jsonl, read_parquet, read_table
from shoal.errors import DataError

Reader = Callable[..., Iterator[Record]]

PIECE_CHARACTERS = 2000
"""A plain text file is cut at the first blank line after this many characters: about 500 tokens,
so that a document fills some rows, and a single novel still has documents to hold out."""

_REPORT_EVERY = 1000


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


def read_chat(
    path: Path, *, text_field: str | None = None, at: Report = lambda done: None
) -> Iterator[Record]:
    """Conversations of the chitchat package: a turn per line, speakers A and B; and as messages,
    in which B is the assistant.

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
        lines: list[str] = []
        messages: list[Record] = []
        for turn in turns:
            said = " ".join(" ".join(message["text"].split()) for message in turn)
            begins = turn[0]["sender"] == first
            lines.append(f"{'A' if begins else 'B'}: {said}")
            messages.append({"role": "user" if begins else "assistant", "content": said})
        while messages[-1]["role"] == "user":
            messages.pop()
        about = {"shape": "dialogues", "where": f"{path.name}: conversation {number + 1}"}
        yield {"text": "\n".join(lines), "messages": messages, **about}


def read_tagged_once(
    path: Path, *, text_field: str | None = None, at: Report = lambda done: None
) -> Iterator[Record]:
    """As `read_tagged`, without the sentences that stood there before."""
    yield from once(read_tagged(path, at=at))


FORMATS: dict[str, Reader] = {
    ".txt": read_text_file,
    ".md": read_plain,
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".csv": read_table,
    ".tsv": read_table,
    ".parquet": read_parquet,
    ".arrow": read_parquet,
    ".conll": read_tagged,
    ".png": read_image,
    ".jpg": read_image,
    ".jpeg": read_image,
    ".inter": read_interactions,
}
"""Reader by file ending."""

READERS: dict[str, Reader] = {
    "chat": read_chat,
    "tagged": read_tagged,
    "tagged-once": read_tagged_once,
    "opinions": read_opinions,
    "reviews": read_reviews,
    "people-daily": read_people_daily,
    "pixels": read_pixels,
    "interactions": read_interactions,
    "scenes": SCENES,
    "scenes-held-out": SCENES_HELD_OUT,
    "help-pages": read_help_pages,
    "translated-help": read_translated_help,
    "help-questions": HELP,
    "help-questions-held-out": HELP_HELD_OUT,
    "faq": FAQ,
    "faq-held-out": FAQ_HELD_OUT,
    "prompts": read_prompts,
}
"""Reader by its name in the registry."""


def can_read(path: Path) -> bool:
    """Whether there is a reader for a file's ending."""
    return ending_of(path) in FORMATS


def reader_of(path: Path) -> Reader:
    """The reader for a file's ending. Raises DataError with the endings that are known."""
    if not can_read(path):
        raise DataError(
            f"{path}: no reader for files ending in {ending_of(path) or 'nothing'!r}; expected one "
            f"of {', '.join(sorted(FORMATS))}, each also with .gz or .zst behind it"
        )
    return read_coco if path.name.endswith(".coco.json") else FORMATS[ending_of(path)]
