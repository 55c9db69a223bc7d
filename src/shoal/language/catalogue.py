"""A catalogue of translations: read from a .po file, found again in what is printed.

The sources write whole English sentences; a message of the catalogue is one line of such a text,
with a placeholder for each thing that was put in. `Catalogue.text` finds the message to which a
printed line belongs, and says it in the other language with the same things put in. They stay as
they are unless they are messages themselves, as the hint inside a problem is.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path


@dataclass(frozen=True)
class Entry:
    """A message and its translation."""

    id: str
    text: str


def entries(path: Path) -> list[Entry]:
    """The entries of a .po file."""
    return read_po(path.read_text(encoding="utf-8"))


def read_po(text: str) -> list[Entry]:
    """The entries of the text of a .po file, without its head."""
    found, part = [], {"msgid": "", "msgstr": ""}
    now = "msgid"
    for line in [*text.splitlines(), "msgid"]:
        word, _, rest = line.partition(" ")
        if word == "msgid":
            if part["msgid"]:
                found.append(Entry(_plain(part["msgid"]), _plain(part["msgstr"])))
            part = {"msgid": rest[1:-1], "msgstr": ""}
            now = word
        elif word == "msgstr":
            part[word], now = rest[1:-1], word
        elif line.startswith('"'):
            part[now] += line[1:-1]
    return found


def _plain(text: str) -> str:
    """Without the backslashes of a .po file."""
    if "\\" not in text:
        return text
    return re.sub(r"\\(.)", lambda found: {"n": "\n", "t": "\t"}.get(found[1], found[1]), text)


_HOLE = re.compile(r"\{(\w+)\}")
_WORD = re.compile(r"[A-Za-z]{2,}")


_BALANCED = r"(?:\([^()]*\)|[^()])"
"""What a placeholder holds rather than a part of something in brackets."""
_FIGURES = {"seconds", "count", "threads", "steps", "step"}
"""Placeholders for numbers: no list of anything."""
_CLAUSE = r"(?:[,;(/]|  | \(| [a-z]{2})"
"""How a clause begins that stands directly behind another placeholder."""
_LABEL = re.compile(r"[A-Za-z-][\w. /-]*: ")
_FIRST = 4
"""What it weighs that a message's first word is known."""
_GAP = re.compile("(?<=[一-鿿，。；：（）、]) +(?=[一-鿿，。；：（）、])")
"""Spaces that Chinese has not."""
_FEW = 2
"""Words of a message that may be a part of any sentence: what is put in must not be words, too."""
_WORDS = re.compile(r"(?<![A-Za-z])[a-z]+ [a-z]{2,}")
BEFORE = {"was", "earlier", "beside", "most", "what"}
"""Placeholders for a clause before the next, such as "3.1 before, "; else a clause is behind."""


def holes(text: str) -> list[str]:
    """Names of the placeholders of a message."""
    return _HOLE.findall(text.replace("{{", "").replace("}}", ""))


class _Message:
    """A message with placeholders; its pattern is made when it is first needed."""

    def __init__(self, entry: Entry) -> None:
        self.parts = _HOLE.split(entry.id.replace("{{", "\0").replace("}}", "\1"))
        self.parts = [part.replace("\0", "{").replace("\1", "}") for part in self.parts]
        self.weight = sum(map(len, self.parts[::2])) + (_FIRST if self.parts[0] else 0)
        self._text = entry.text
        self.is_row = "  " in entry.id
        self._patterns: dict[bool, re.Pattern[str]] = {}
        words = sum(len(_WORD.findall(part)) for part in self.parts[::2])
        self.is_short = words <= _FEW and not _LABEL.fullmatch(self.parts[0])

    def words(self) -> list[str]:
        """Words that every line of this message holds whole."""
        found = []
        for number, part in enumerate(self.parts[::2]):
            last = 2 * number == len(self.parts) - 1
            for word in _WORD.finditer(part):
                if last or word.end() < len(part):
                    found.append(word[0])
        return found

    def match(self, line: str, *, strictly: bool) -> dict[str, str] | None:
        """What the placeholders hold in `line`; None where it is no line of this message.

        `strictly`: they hold whole brackets, and the first no beginning of another sentence.
        """
        if strictly not in self._patterns:
            self._patterns[strictly] = re.compile(self._regex(strictly=strictly))
        found = self._patterns[strictly].fullmatch(line)
        return None if found is None else found.groupdict()

    def _regex(self, *, strictly: bool) -> str:
        """Of two placeholders side by side one is a clause: see `BEFORE`."""
        made: list[str] = []
        seen: set[str] = set()
        clause = False
        any_ = _BALANCED if strictly else "."
        for number, part in enumerate(self.parts):
            if number % 2 == 0:
                made.append(re.escape(part))
                continue
            is_beside = self.parts[number + 1] == "" and number + 2 < len(self.parts)
            name = part.rstrip("0123456789")
            if part in seen:
                made.append(f"(?P={part})")
            elif part[0] == "_":
                made.append(f"(?P<{part}>[a-z]*)")
            elif is_beside and name in BEFORE:
                made.append(f"(?P<{part}>(?:.* )?)")
            else:
                inside = any_
                bracketed = self.parts[number - 1].endswith(("(", ": "))
                if strictly and ((self.is_short and not bracketed) or name in _FIGURES):
                    inside = f"(?:(?![;:,.] ){any_})"
                elif strictly and number == 1 and not self.parts[0]:
                    inside = f"(?:(?![;:] ){any_})"
                held = f"(?:{_CLAUSE}{inside}*?)?" if clause else f"{inside}*?"
                if self.is_row and not clause:
                    held = f" *[^ ]{inside}*?"
                made.append(f"(?P<{part}>{held})")
            clause = is_beside and part[0] != "_" and name not in BEFORE
            seen.add(part)
        return "".join(made)

    def say(self, held: dict[str, str]) -> str:
        """The translation, with what the placeholders hold."""
        text = self._text.replace("{{", "\0").replace("}}", "\1")
        text = _HOLE.sub(lambda hole: held[hole[1]], text)
        text = _GAP.sub("", text).replace("？。", "？").replace(" （", "（")
        return text.replace("\0", "{").replace("\1", "}")


_OURS = str.maketrans({",": "，", ";": "；", ":": "：", ".": "。"})
_OURS_ALONE = set(",;:.")
_THEIRS = " ,;:.，；：。"


def _core(text: str) -> tuple[str, str, str]:
    """A text without the marks and spaces around it, between these."""
    bare = text.lstrip(" \t\n#,;:.")
    if not bare:
        return "", text, ""
    core = bare.rstrip(" \t\n,;:")
    if core.endswith(".") and not core.endswith(".."):
        core = core[:-1]
    at = len(text) - len(bare)
    return text[:at], core, bare[len(core) :]


class Catalogue:
    """Every message of one or more files, indexed by a word of each."""

    def __init__(self, given: Sequence[Entry]) -> None:
        self._whole: dict[str, str] = {}
        self._by_word: dict[str, list[_Message]] = {}
        self._loose: list[_Message] = []
        holed = []
        for entry in [*given, *_without_hints(given)]:
            if not entry.text:
                continue
            bare = Entry(_core(entry.id)[1], entry.text.strip(_THEIRS))
            if _HOLE.search(bare.id.replace("{{", "")):
                holed.append(_Message(bare))
            else:
                plain, text = (
                    each.replace("{{", "{").replace("}}", "}") for each in (bare.id, bare.text)
                )
                self._whole[plain] = text
        self._index(holed)
        self.line = lru_cache(maxsize=2048)(self._line)

    def _index(self, holed: list[_Message]) -> None:
        """Under the rarest of its words each, so that a line is tried against few."""
        common: dict[str, int] = {}
        held = [(message, message.words()) for message in holed]
        for _, words in held:
            for word in words:
                common[word] = common.get(word, 0) + 1
        self._rows = [message for message in holed if message.is_row]
        for message, words in held:
            if words:
                rarest = min(words, key=lambda word: common[word])
                self._by_word.setdefault(rarest, []).append(message)
            else:
                self._loose.append(message)

    def text(self, text: str) -> str:
        """A text of one or more lines."""
        return "\n".join(self.line(line) for line in text.split("\n"))

    def _line(self, line: str) -> str:
        if len(line) > _LONGEST or not _WORD.search(line):
            return line
        lead, bare, trail = _core(line)
        if "  " in bare and bare not in self._whole:
            found = self._row(bare)
            return self._columns(line) if found is None else f"{lead}{found}{trail}"
        found = self._found(line, depth=0)
        return line if found is None else found

    def _row(self, text: str) -> str | None:
        """Of a line whose message has columns itself."""
        for message in self._rows:
            held = message.match(text, strictly=True)
            if held is not None:
                return message.say({n: self._inner(part, depth=0) for n, part in held.items()})
        return None

    def _columns(self, line: str) -> str:
        """Of a row of a table: each cell on its own, as far apart as it was."""
        cells = re.split(r"( {2,})", line)
        for number in range(0, len(cells), 2):
            cell = cells[number]
            found = self._found(cell, depth=1) if cell else None
            if found is not None and number + 1 < len(cells):
                gap = len(cells[number + 1]) + width(cell) - width(found)
                cells[number + 1] = " " * max(2, gap)
            cells[number] = cell if found is None else found
        return "".join(cells)

    def _found(self, text: str, *, depth: int) -> str | None:
        """The translation of a text; None where there is none."""
        lead, core, trail = _core(text)
        found = self._bare(core, depth=depth)
        if found is None:
            return None
        return f"{_mark(lead)}{found}{_mark(trail)}"

    def _bare(self, text: str, *, depth: int) -> str | None:
        if text in self._whole:
            return self._whole[text]
        if depth > _DEEPEST or not _WORD.search(text):
            return None
        found = self._as_one(text, depth=depth, strictly=True)
        if found is not None:
            return found
        if text[0] == "(" and text[-1] == ")":
            found = self._bare(text[1:-1], depth=depth + 1)
            return None if found is None else f"（{found}）"
        found = self._parts(text, depth=depth)
        return self._as_one(text, depth=depth, strictly=False) if found is None else found

    def _as_one(self, text: str, *, depth: int, strictly: bool) -> str | None:
        """Of a text that is one message."""
        message, held = self._best(text, strictly=strictly)
        if message is None:
            return None
        return message.say({name: self._inner(part, depth=depth) for name, part in held.items()})

    def _best(self, text: str, *, strictly: bool) -> tuple[_Message | None, dict[str, str]]:
        """The message of most characters that the text is a line of."""
        tried = [*self._loose]
        for word in set(_WORD.findall(text)):
            tried += self._by_word.get(word, ())
        tried.sort(key=lambda message: -message.weight)
        for message in tried:
            found = message.match(text, strictly=strictly)
            if found is not None and (not message.is_short or self._fits(found)):
                return message, found
        return None, {}

    def _fits(self, held: dict[str, str]) -> bool:
        """Whether nothing was put in that is in words and no message."""
        return all(
            not _WORDS.search(part) or self._inner(part, depth=_DEEPEST - 1) != part
            for part in held.values()
        )

    def _inner(self, part: str, *, depth: int) -> str:
        """What a placeholder holds: translated where it is a message, never where it is a word."""
        if " " not in part.strip():
            return part
        found = self._found(part, depth=depth + 1)
        if found is None:
            found = self._list(part, depth=depth)
        return part if found is None else found

    def _list(self, part: str, *, depth: int) -> str | None:
        """Of `this or that`, where each is a message or one word."""
        for word, ours in ((" or ", " 或 "), (" and ", " 和 ")):
            each = [piece.strip() for piece in part.split(word)]
            if len(each) > 1:
                found = [self._found(piece, depth=depth + 1) for piece in each]
                if all(new is not None or " " not in old for old, new in zip(each, found)):
                    return ours.join(old if new is None else new for old, new in zip(each, found))
        return None

    def _parts(self, text: str, *, depth: int) -> str | None:
        """Of a text put together from messages: the longest that begins it, then the rest."""
        marks = list(_MARK.finditer(text))[:_MOST_MARKS]
        if not marks:
            return None
        first = marks[0]
        before, behind = text[: first.start()], text[first.end() :]
        if first[0] == ": " and " " not in before:  # a path, a key: and what is wrong
            rest = self._known(behind, depth=depth)
            if rest is not None:
                return f"{before}：{rest}"
        for mark in reversed(marks):
            head = self._known(text[: mark.start()], depth=depth)
            if head is not None:
                rest = self._rest(text[mark.end() :], depth=depth)
                return f"{head}{_mark(mark[0])}{rest}"
        rest = self._found(behind, depth=depth + 1)
        return None if rest is None else f"{before}{_mark(first[0])}{rest}"

    def _rest(self, text: str, *, depth: int) -> str:
        found = self._found(text, depth=depth + 1)
        return text if found is None else found

    def _known(self, text: str, *, depth: int) -> str | None:
        """A text that is one message whole, of two words at least."""
        core = _core(text)[1]
        if " " not in core:
            return None
        if core in self._whole:
            return self._whole[core]
        return self._as_one(core, depth=depth, strictly=True)


def _without_hints(given: Sequence[Entry]) -> Iterator[Entry]:
    """Messages with a hint at their end as they are where there is none to give."""
    for entry in given:
        if entry.id.endswith("; {nearest}"):
            yield Entry(entry.id[:-11], re.sub("[；，]{nearest}$", "", entry.text))


def _mark(text: str) -> str:
    """The marks between two texts, as Chinese has them: spaces behind them go."""
    return text.translate(_OURS).strip(" ") if text.strip(" ") in _OURS_ALONE else text


def width(text: str) -> int:
    """Columns of a terminal that a text takes."""
    return sum(2 if unicodedata.east_asian_width(each) in "WF" else 1 for each in text)


_MARK = re.compile(r"[;:,.] | (?=\()| = ")
_LONGEST = 4000
_DEEPEST = 6
_MOST_MARKS = 24
