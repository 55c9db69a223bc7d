"""Messages are found again in what is printed; what is not a message stays as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.language import is_english, speak, translated
from shoal.language.catalogue import Catalogue, read_po, width

PO = """\
# A comment.
msgid ""
msgstr ""
"Language: zh_CN\\n"

#: some/file.py
#, python-brace-format
msgid "{path}: expected \\"{wanted}\\", got {got}"
msgstr "{path}：期望“{wanted}”，实际为 {got}"

msgid "at least {ge}"
msgstr "至少 {ge}"

msgid "{count} problem{_1}{part}"
msgstr "{count} 个问题{part}"

msgid "in {source}"
msgstr "（{source}）"

msgid "the recipe"
msgstr "配方"

msgid "set it to {near}, "
"or leave it out"
msgstr "请设为 {near}，或去掉它"

msgid "perplexity: {was}{now} now"
msgstr "困惑度：{was}现在 {now}"

msgid "{before} before,"
msgstr "之前 {before}，"

msgid "{run} of {name}"
msgstr "{name} 的 {run}"

msgid "step"
msgstr "步"

msgid "not yet translated"
msgstr ""
"""


@pytest.fixture(scope="module")
def found() -> Catalogue:
    return Catalogue(read_po(PO))


def test_a_po_file() -> None:
    read = {entry.id: entry.text for entry in read_po(PO)}
    assert read['{path}: expected "{wanted}", got {got}'] == "{path}：期望“{wanted}”，实际为 {got}"
    assert read["set it to {near}, or leave it out"] == "请设为 {near}，或去掉它"
    assert "" not in read and len(read) == 11


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ('a.b: expected "at least 2", got 1', "a.b：期望“至少 2”，实际为 1"),
        ('a.b: expected "x or at least 2", got the recipe', "a.b：期望“x 或至少 2”，实际为配方"),
        ("1 problem:", "1 个问题："),
        ("2 problems in the recipe:", "2 个问题（配方）："),
        ("    set it to 3, or leave it out", "    请设为 3，或去掉它"),
        ("shoal: set it to 3, or leave it out", "shoal：请设为 3，或去掉它"),
        ("perplexity: 9 before, 4 now", "困惑度：之前 9，现在 4"),
        ("perplexity: 4 now", "困惑度：现在 4"),
        ("runs/1 of h1", "h1 的 runs/1"),
        ("at least 1; set it to 3, or leave it out", "至少 1；请设为 3，或去掉它"),
    ],
)
def test_what_is_found(found: Catalogue, said: str, wanted: str) -> None:
    assert found.text(said) == wanted


@pytest.mark.parametrize(
    "said",
    [
        "",
        "not yet translated",
        "a sentence of a model, which nobody has translated: it stays. Of course.",
        "the cat of my friend",  # too little of it is a message, and the rest is in words
        '{"step": 1, "the recipe": "in x"}',
        "a step",
        "x" * 5000,
    ],
)
def test_what_stays(found: Catalogue, said: str) -> None:
    assert found.text(said) == said


def test_columns_stay_in_line(found: Catalogue) -> None:
    lines = [found.text("step        the recipe  x"), found.text("other       something   x")]
    assert lines[0] == "步          配方        x"
    assert {width(line) for line in lines} == {25}


def test_english_reads_no_catalogue() -> None:
    speak("zh_CN")
    try:
        assert translated("unknown key") == "未知的键" and not is_english()
    finally:
        speak("en")
    assert translated("unknown key") == "unknown key" and is_english()


def test_one_more_catalogue(tmp_path: Path) -> None:
    (tmp_path / "more.po").write_text('msgid "a text of ours"\nmsgstr "我们的文字"\n')
    speak("zh_CN", more=tmp_path / "more.po")
    try:
        assert translated("a text of ours") == "我们的文字"
        assert translated("unknown key") == "未知的键"
    finally:
        speak("en")
