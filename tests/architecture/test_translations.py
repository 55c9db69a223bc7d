"""The catalogues of translations: current, whole, and found again in what the sources would say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import catalogue
from shoal.language.catalogue import BEFORE, Catalogue, Entry, entries, holes

PLACES = [pytest.param(s, p, id=s.name) for s, p in catalogue.CATALOGUES.items()]


@pytest.mark.parametrize(("sources", "path"), PLACES)
def test_every_text_is_translated(sources: Path, path: Path) -> None:
    made, lacking = catalogue.merged(sources, path.read_text(encoding="utf-8"))
    assert not lacking, f"no translation in {path.name}: {lacking}"
    assert path.read_text(encoding="utf-8") == made, "run python scripts/catalogue.py"


@pytest.mark.parametrize(("sources", "path"), PLACES)
def test_a_translation_holds_what_its_message_holds(sources: Path, path: Path) -> None:
    wrong = [
        entry
        for entry in entries(path)
        if sorted({each for each in holes(entry.id) if each[0] != "_"})
        != sorted(set(holes(entry.text)))
    ]
    assert not wrong


def _filled(entry: Entry, text: str) -> str:
    """`text` with a value for each placeholder of the entry: words such as a clause has where two
    stand side by side."""
    names = list(dict.fromkeys(holes(entry.id)))
    values = {name: f"K{number}" for number, name in enumerate(names)}
    for first, second in re.findall(r"\{(\w+)\}(?=\{(\w+)\})", entry.id):
        if first.rstrip("0123456789") in BEFORE:
            values[first] += " "
        else:
            values[second] = f"; {values[second]}"
    values |= {name: "s" for name in names if name[0] == "_"}
    text = text.replace("{{", "\0").replace("}}", "\1")
    return re.sub(r"\{(\w+)\}", lambda hole: values[hole[1]], text).translate({0: "{", 1: "}"})


@pytest.mark.parametrize(("sources", "path"), PLACES)
def test_a_message_is_found_again_whatever_it_holds(sources: Path, path: Path) -> None:
    """Every message with values put in: none hides another, and all values arrive in order."""
    found, wrong = Catalogue(entries(path)), []
    for entry in entries(path):
        said = found.text(_filled(entry, entry.id))
        wanted = _filled(entry, entry.text)
        if _bare(said) != _bare(wanted):
            wrong.append((_filled(entry, entry.id), said, wanted))
    assert not wrong, wrong


def _bare(text: str) -> str:
    """Without what joins texts: marks at the ends, and spaces that Chinese has not."""
    return re.sub(r"[ ；;]", "", text.strip(" ,;:.，；：。"))


def test_translations_are_chinese() -> None:
    """But for those few that are names and commands."""
    for _, path in catalogue.CATALOGUES.items():
        plain = [e for e in entries(path) if not re.search("[一-鿿]", e.text)]
        assert len(plain) < 20, plain


def test_a_new_text_is_lacking(tmp_path: Path) -> None:
    """What the script reads out of a source, and that it says so."""
    (tmp_path / "some.py").write_text(
        '"""Not this."""\n'
        "def f(name, count):\n"
        '    assert name, "not this either"\n'
        "    what = f\"{name}: expected a file{'s' if count > 1 else ''}, \"\n"
        '    what += f"got {count:,}\\nsay something else"\n'
        '    raise UserError(what + (f" in {name}" if name else ""))\n'
    )
    made, lacking = catalogue.merged(tmp_path, "")
    assert lacking == [
        "{name}: expected a file{_1}, got {count}",
        "say something else",
        "in {name}",
    ]
    assert 'msgid "say something else"\nmsgstr ""' in made
    known = made.replace('else"\nmsgstr ""', 'else"\nmsgstr "说点别的"')
    assert catalogue.merged(tmp_path, known)[1] == [lacking[0], lacking[2]]
