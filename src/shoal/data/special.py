"""The special tokens of a text model: read from the files of its folder, never guessed by name.

Looked for in this order: tokenizer_config.json (names of tokens), generation_config.json and
config.json (ids). What is found first closes documents; generation ends at every end token found.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from shoal.errors import DataError

GENERATION = "generation_config.json"
_KINDS = ("eos", "bos", "pad")
_LARGEST_BYTES = 1 << 24


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of special tokens; empty or None where no file names one."""

    end: tuple[int, ...] = ()
    """At which a text ends; the first closes documents."""
    begin: int | None = None
    pad: int | None = None
    said_by: str | None = None
    """The file that names the first end token."""
    text: str | None = None
    """Of that token."""

    @property
    def closing(self) -> int | None:
        """The token after each document."""
        return self.end[0] if self.end else None

    def ids(self) -> dict[str, Any]:
        """As the configurations of a model have them; padding only where it is known."""
        end: Any = list(self.end) if len(self.end) > 1 else self.closing
        padding = {} if self.pad is None else {"pad_token_id": self.pad}
        return {"eos_token_id": end, "bos_token_id": self.begin, **padding}


def special_tokens(tokenizer: Tokenizer, folder: Path | str) -> SpecialTokens:
    """Those of the tokenizer in `folder`, which may be a model's.

    Raises DataError for a file that is no JSON object, and for a name that is no token.
    """
    found: dict[str, list[int]] = {kind: [] for kind in _KINDS}
    said_by = None
    for kind, ids, file in _named(tokenizer, Path(folder)):
        if kind == "eos" and said_by is None and ids:
            said_by = file
        found[kind] += [each for each in ids if each not in found[kind]]
    first = {kind: next(iter(ids), None) for kind, ids in found.items()}
    text = None if first["eos"] is None else tokenizer.id_to_token(first["eos"])
    return SpecialTokens(tuple(found["eos"]), first["bos"], first["pad"], said_by, text)


def _named(tokenizer: Tokenizer, folder: Path) -> Iterator[tuple[str, list[int], str]]:
    """(kind, ids, file) in the order of trust."""
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    about = read_object(folder / "tokenizer_config.json")
    for kind in _KINDS:
        name = about.get(f"{kind}_token")
        name = name.get("content") if isinstance(name, dict) else name
        if not isinstance(name, str):
            continue
        token = tokenizer.token_to_id(name)
        if token is None:
            raise DataError(
                f"{folder / 'tokenizer_config.json'}: its {kind}_token {name!r} is no token of "
                "tokenizer.json beside it\n    use the files that belong together"
            )
        yield kind, [token], "tokenizer_config.json"
    for file in (GENERATION, "config.json"):
        content = read_object(folder / file)
        text = content.get("text_config")
        content = {**content, **(text if isinstance(text, dict) else {})}
        for kind in _KINDS:
            value = content.get(f"{kind}_token_id")
            ids = value if isinstance(value, list) else [value]
            yield kind, [n for n in ids if type(n) is int and 0 <= n < size], file


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model's folder; empty where there is no file. DataError."""
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > _LARGEST_BYTES:
            raise ValueError(f"it is larger than {_LARGEST_BYTES} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"expected an object, got {type(content).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: no valid JSON object: {error}\n    fetch it again") from None
    return content
