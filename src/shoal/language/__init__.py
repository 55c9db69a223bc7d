"""In which language the commands speak to a person. English, unless `speak` says otherwise.

The rooms write English; what is printed goes through `translated` where it leaves the program, and
nowhere else: files, JSON, events and metrics are the same in every language.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

LANGUAGES = ("en", "zh_CN")

_translate: Callable[[str], str] | None = None


def speak(language: str, *, more: Path | None = None) -> None:
    """Choose the language of this process; `more` is one more catalogue (a .po file)."""
    global _translate
    _translate = None if language == "en" else _of(language, more)


@lru_cache(maxsize=4)
def _of(language: str, more: Path | None) -> Callable[[str], str]:
    from shoal.language.catalogue import Catalogue, entries  # not read for English

    found = entries(Path(__file__).with_name(f"{language}.po"))
    return Catalogue([*found, *(entries(more) if more is not None else [])]).text


def is_english() -> bool:
    """Whether `translated` leaves everything as it is."""
    return _translate is None


def translated(text: str) -> str:
    """`text` in the language chosen; what no catalogue has stays English."""
    return text if _translate is None else _translate(text)
