"""JSON, compressed files, Arrow tables, and what is odd inside: read alike, replaced or refused."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from shoal.data import files
from shoal.data.sources import locate, read_records
from shoal.errors import DataError

ROWS = [{"text": f'row {n}, "quoted"\nand a second line', "kind": str(n % 3)} for n in range(40)]


def zst(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def records(path: Path, **settings: Any) -> list[dict[str, Any]]:
    return list(read_records(str(path), **settings))


def as_csv(folder: Path, *, delimiter: str = ",") -> bytes:
    path = folder / "table"
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ["text", "kind"], delimiter=delimiter)
        table.writeheader()
        table.writerows(ROWS)
    return path.read_bytes()


def as_parquet(folder: Path) -> bytes:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "table")
    return (folder / "table").read_bytes()


def as_arrow(folder: Path, *, stream: bool) -> bytes:
    table = pyarrow.Table.from_pylist(ROWS)
    new = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with new(str(folder / "table"), table.schema) as writer:
        writer.write_table(table)
    return (folder / "table").read_bytes()


def every_form(folder: Path) -> dict[str, bytes]:
    lines = "\n".join(json.dumps(row) for row in ROWS).encode()
    return {
        "rows.jsonl": lines,
        "rows.ndjson": lines + b"\r\n",
        "rows.json": json.dumps(ROWS).encode(),
        "indented.json": json.dumps(ROWS, indent=2).encode(),
        "held.json": json.dumps({"version": "1.0", "tags": ["a"], "data": ROWS}).encode(),
        "lines.json": lines,
        "rows.csv": as_csv(folder),
        "rows.tsv": as_csv(folder, delimiter="\t"),
        "rows.parquet": as_parquet(folder),
        "stream.arrow": as_arrow(folder, stream=True),
        "file.arrow": as_arrow(folder, stream=False),
    }


def test_every_form_plain_and_compressed_gives_the_same_records(tmp_path: Path) -> None:
    for name, content in every_form(tmp_path).items():
        for ending, pack in (("", bytes), (".gz", gzip.compress), (".zst", zst)):
            path = tmp_path / (name + ending)
            path.write_bytes(pack(content))
            done: list[float] = []
            assert records(path, at=done.append) == ROWS, path.name
            assert done == sorted(done) and done[-1] == 1.0


def test_compressed_text_and_tags(tmp_path: Path) -> None:
    for name, content in {"a.txt": "\ufeffone\r\n\r\n\r\ntwo", "a.md": "one\n\n\ntwo"}.items():
        for ending, pack in ((".gz", gzip.compress), (".zst", zst)):
            path = tmp_path / (name + ending)
            path.write_bytes(pack(content.encode()))
            assert records(path) == [{"text": "one"}, {"text": "two"}]
    path = tmp_path / "TAGS.CONLL.GZ"
    path.write_bytes(gzip.compress(b"Ada B-PER\n"))
    assert records(path) == [{"words": ["Ada"], "tags": ["B-PER"]}]


@pytest.mark.parametrize(("ending", "pack"), [(".gz", gzip.compress), (".zst", zst)])
def test_a_damaged_or_shortened_archive_is_named(tmp_path: Path, ending: str, pack: Any) -> None:
    import numpy as np

    noise = np.random.default_rng(0).integers(97, 123, size=200_000, dtype=np.uint8).tobytes()
    whole = pack(b"\n\n\n".join(noise[at : at + 1000] for at in range(0, len(noise), 1000)))
    path = tmp_path / f"a.txt{ending}"
    for damaged in (whole[: len(whole) // 2], whole[:-2], b"this is not packed at all", whole[:5]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.txt\.\w+: (is damaged|cannot be unpacked)"):
            records(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="is empty; expected text"):
        records(path)
    path.write_bytes(pack(b""))
    with pytest.raises(DataError, match="is empty; expected text"):
        records(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", r"entry 1: expected an object such as .*, got '1'"),
        ('{"a": 1, "b": {"c": 2}}', r"expected a list of objects, or .*; got an object with a, b"),
        ('{"a": [{"text": "x"}], "b": [{"text": "y"}]}', r"holds one list of them; got an object"),
        ('"text"', r"expected a list of objects, or an object that holds one list of them; got"),
        ('[\n{"text": "a"},\n]', r"rows.json is not JSON: .*line 2 column|line 3 column"),
        ('[{"text": "a"}, {"text": null}]', r"entry 2: expected text in 'text', got null; remove"),
    ],
)
def test_json_of_another_shape(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        records(path)


def test_half_characters_are_replaced(tmp_path: Path) -> None:
    """json.loads takes them; nothing can write them. Python's own replacement is the oracle."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "cut \\ud83d"}\n{"text": "\\uDE00 whole \\ud83d\\ude00 \\u00e9"}\n')
    assert [row["text"] for row in records(path)] == ["cut \ufffd", "\ufffd whole \U0001f600 é"]
    path.write_text('{"words": ["a\\ud83d", "b"], "tags": ["O", "\\udc00"]}')
    assert records(path) == [{"words": ["a\ufffd", "b"], "tags": ["O", "\ufffd"]}]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_odd_json_is_refused_with_its_place(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    deep = '{"text": "a", "b": ' + "[" * 100_000 + "]" * 100_000 + "}"
    path.write_text(deep)
    with pytest.raises(DataError, match=rf"{name}.*: is nested too deeply to be read; expected"):
        records(path)
    path.write_text('{"text": "a", "n": ' + "9" * 5000 + "}")
    with pytest.raises(DataError, match=rf"{name}.*Exceeds the limit"):
        records(path)
    path.write_text('{"text": "a", "text": "b"}')
    with pytest.raises(DataError, match=rf"{name}.*: the name 'text' stands twice in an object"):
        records(path)


def test_a_null_text_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": null}\n')
    with pytest.raises(DataError, match=r"line 3: expected text in 'text', got null; remove it"):
        records(path)
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"text": "a"}, {"text": None}]), tmp_path / "rows.parquet"
    )
    with pytest.raises(DataError, match=r"rows.parquet: row 2: expected text in 'text', got null"):
        records(tmp_path / "rows.parquet")


def test_a_long_cell_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f'id,text\n1,"{"word " * 40_000}"\n')
    assert records(path) == [{"id": "1", "text": "word " * 40_000}]


def test_a_quote_that_never_closes_is_named_where_it_opens(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('text\na\nb\n"c\n' + "word " * 60_000 + "\nend\n")
    with pytest.raises(DataError, match=r"rows.csv: after line 3: unexpected end of data; fix its"):
        records(path)


@pytest.mark.parametrize("name", ["a.json.gz", "a.txt.gz", "a.parquet.gz", "a.json.zst"])
def test_what_unpacks_beyond_memory_is_refused(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LARGEST_BYTES", 2**20)
    path = tmp_path / name
    path.write_bytes((zst if name.endswith("zst") else gzip.compress)(b"a" * 2**21))
    with pytest.raises(DataError, match=r"unpacks to more than 1 GiB|line 1 is longer than 1 GiB"):
        records(path)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,id,text,id\na,1,b,2\n")
    with pytest.raises(
        DataError,
        match=r"the column 'id' and the column 'text' is there more than once, in text, i",
    ):
        records(path)
    path.write_text("text,,\na,,\n")
    assert records(path)[0]["text"] == "a", "columns without a name are no names"
    table = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows.parquet: the column 'text' is there more than once"):
        records(tmp_path / "rows.parquet")


def test_a_first_row_that_is_no_header_is_not_shown_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"{'long text ' * 30},x\na,b\n")
    with pytest.raises(DataError, match=r"got (long text ){4}\.\.\., x; set data.text_field"):
        records(path)


def test_text_and_tagged_words_beside_each_other(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "Ada!", "tokens": ["Ada", "!"], "ner_tags": ["B-PER", "O"]}')
    assert records(path) == [{"text": "Ada!", "words": ["Ada", "!"], "tags": ["B-PER", "O"]}]
    path.write_text('{"text": "Ada!", "tokens": ["Ada", "!"]}')
    assert records(path) == [{"text": "Ada!", "tokens": ["Ada", "!"]}]


def test_numbers_of_classes_become_names_as_datasets_has_them(tmp_path: Path) -> None:
    names = ["O", "B-PER", "I-PER"]
    features = datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("string")),
            "ner_tags": datasets.List(datasets.ClassLabel(names=names)),
        }
    )
    rows = {"tokens": [["Ada", "Lovelace", "!"]], "ner_tags": [[1, 2, 0]]}
    table = datasets.Dataset.from_dict(rows, features=features)
    expected = [{"words": ["Ada", "Lovelace", "!"], "tags": ["B-PER", "I-PER", "O"]}]
    table.to_parquet(tmp_path / "rows.parquet")
    assert records(tmp_path / "rows.parquet") == expected
    table.save_to_disk(tmp_path / "saved")
    assert records(tmp_path / "saved") == expected
    labelled = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    texts = {"text": ["a", "b", "c"], "label": [1, 0, -1]}
    datasets.Dataset.from_dict(texts, features=labelled).to_parquet(tmp_path / "texts.parquet")
    assert [row["label"] for row in records(tmp_path / "texts.parquet")] == ["good", "bad", -1]


def test_what_is_not_read_in_a_folder_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    said: list[str] = []
    locate(str(folder), announce=said.append)
    assert said == []
    (folder / "b.pdf").write_text("%PDF")
    (folder / "notes.json").write_text("{}")
    (folder / "more").mkdir()
    (folder / ".hidden").write_text("")
    located = locate(str(folder), announce=said.append)
    assert said == [f"not read in {folder}: b.pdf, more/, notes.json"]
    assert [path.name for path in located.paths] == ["a.txt"]
    for number in range(4):
        (folder / f"c{number}.doc").write_text("")
    locate(str(folder), announce=said.append)
    assert said[-1].endswith(": b.pdf, c0.doc, c1.doc, c2.doc, c3.doc and 2 more")


def test_a_folder_of_json_alone_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"text": "a"}]')
    assert records(tmp_path) == [{"text": "a"}]


def test_splits_of_a_folder(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-0", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}))
    said: list[str] = []
    assert len(locate(str(tmp_path), announce=said.append).paths) == 4
    assert said == [
        f"all of {tmp_path} is one source, with its test and validation files; "
        "data.validation={split: validation} keeps them apart"
    ]
    assert [row["text"][:7] for row in records(tmp_path, split="train")] == ["train-0"] * 2
    assert records(tmp_path, split="validation") == [{"text": "validation-0"}]
    with pytest.raises(
        DataError, match=r"no file in .* is of the split 'dev'; expected one called"
    ):
        records(tmp_path, split="dev")
    with pytest.raises(
        DataError, match=r"test.jsonl is a single file; expected a folder or a data"
    ):
        records(tmp_path / "test.jsonl", split="test")
    nested = tmp_path / "nested"
    for name in ("train", "dev"):
        (nested / name).mkdir(parents=True)
        (nested / name / "a.txt").write_text(name)
    assert records(nested, split="dev") == [{"text": "dev"}]


def test_no_more_records_than_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS))
    assert records(path, most=7) == ROWS[:7]
    assert records(path, most=1000) == ROWS
