"""The same content gives the same samples in the same order, whatever the files are called or how
they are written; other order in, same order out."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from shoal.config.load import load_recipe
from shoal.config.recipe import Recipe
from shoal.data.stream import Evaluation, Stream
from shoal.data.tokenize import load_tokenizer
from shoal.engine.job import Inputs
from shoal.launch.prepare import prepare_inputs
from shoal.layout import Share
from tiny import RECIPE, tales

TEXTS = [
    f"{text}\nsecond line {n}" if n % 3 else text
    for n, text in enumerate(tales(seed=1, documents=90))
]
LINES = "\n\n\n".join(TEXTS)
"""Two blank lines between documents."""


def recipe_of(folder: Path, source: Path | str, *overrides: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(source=source))
    return load_recipe(str(path), overrides)


def read(inputs: Inputs) -> dict[str, Any]:
    """All that a run sees of its data: tokenizer, training batches, evaluation batches."""
    stream = Stream(inputs.data_directory, seed=3, global_batch_samples=16)
    evaluation = Evaluation(inputs.data_directory, batch_samples=4)
    batches = [stream.at(step, Share(0, 16)) for step in range(3)]
    batches += [evaluation.at(n, part=0, parts=1) for n in range(evaluation.num_batches(1))]
    tokenizer = Path(inputs.tokenizer_directory or "") / "tokenizer.json"
    return {
        "tokenizer": tokenizer.read_bytes() if inputs.tokenizer_directory else b"",
        "batches": [{name: array.tolist() for name, array in batch.items()} for batch in batches],
        "content": stream.prepared.description["content"],
    }


def prepared(folder: Path, source: Path | str, *overrides: str) -> dict[str, Any]:
    return read(prepare_inputs(recipe_of(folder, source, *overrides), say=lambda line: None))


def write_csv(path: Path, column: str) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\r\n")
        table.writerow(["id", column])
        table.writerows([n, text] for n, text in enumerate(TEXTS))


def write_jsonl(path: Path, column: str = "text", *, ends: str = "\n") -> None:
    rows = [{column: text.replace("\n", ends), "id": n} for n, text in enumerate(TEXTS)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def write_parquet(path: Path) -> None:
    rows = [{"id": n, "text": text} for n, text in enumerate(TEXTS)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


FORMS: dict[str, Callable[[Path], Any]] = {
    "lf.txt": lambda path: path.write_bytes(LINES.encode()),
    "crlf.txt": lambda path: path.write_bytes(LINES.replace("\n", "\r\n").encode()),
    "bom.txt": lambda path: path.write_bytes(b"\xef\xbb\xbf" + LINES.encode() + b"\n"),
    "packed.txt.gz": lambda path: path.write_bytes(gzip.compress(LINES.encode())),
    "text.jsonl": write_jsonl,
    "windows.jsonl": lambda path: write_jsonl(path, ends="\r\n"),
    "body.jsonl": lambda path: write_jsonl(path, "body"),
    "column.csv": lambda path: path.write_bytes(b"") or write_csv(path, "text"),
    "rows.parquet": write_parquet,
    "list.json": lambda path: path.write_text(json.dumps([{"text": text} for text in TEXTS])),
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("expected")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_CACHE", str(folder / "cache"))
        FORMS["lf.txt"](folder / "lf.txt")
        return prepared(folder, folder / "lf.txt")


@pytest.mark.parametrize("name", list(FORMS))
def test_every_form_of_the_same_texts(tmp_path: Path, expected: dict[str, Any], name: str) -> None:
    FORMS[name](tmp_path / name)
    column = ["data.text_field=body"] if name.startswith("body") else []
    assert prepared(tmp_path, tmp_path / name, *column) == expected


@pytest.mark.parametrize("names", [("a", "b"), ("z", "b")])
def test_files_of_a_folder_by_any_name(
    tmp_path: Path, expected: dict[str, Any], names: tuple[str, str]
) -> None:
    """More text than the tokenizer is trained on would do for it too: test_tokenize.py."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, part in zip(names, (TEXTS[:31], TEXTS[31:])):
        (folder / f"{name}.txt").write_text("\n\n\n".join(part))
    assert prepared(tmp_path, folder) == expected


def test_other_content_is_another_order(tmp_path: Path, expected: dict[str, Any]) -> None:
    (tmp_path / "lf.txt").write_text(LINES.replace("river", "rivers"))
    found = prepared(tmp_path, tmp_path / "lf.txt")
    assert found["content"] != expected["content"]
    assert found["batches"] != expected["batches"]


def test_the_validation_part_does_not_depend_on_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "lf.txt").write_text(LINES)
    held = []
    for size in (300, 400):
        vocabulary = f"data.tokenizer.vocabulary_size={size}"
        recipe = recipe_of(tmp_path, tmp_path / "lf.txt", vocabulary, "data.packing=false")
        inputs = prepare_inputs(recipe, say=lambda line: None)
        tokenizer = load_tokenizer(inputs.tokenizer_directory or "")
        rows = Evaluation(inputs.data_directory, batch_samples=1).rows()
        held.append({tokenizer.decode(row["input_ids"][:8].tolist())[:6] for row in rows})
    assert held[0] == held[1] and len(held[0]) > 3


def test_images_by_their_pixels_and_class(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    pixels = [draw.integers(0, 256, size=(4, 4), dtype=np.uint8) for _ in range(12)]

    def write(folder: Path, names: list[str], *, classes: tuple[str, str]) -> Path:
        for number, (name, array) in enumerate(zip(names, pixels)):
            path = folder / classes[number % 2] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
        return folder

    common = ("task={kind: image-classification}", "data.packing=false", "data.tokenizer.kind=auto")
    names = [f"{n:02}.png" for n in range(12)]
    one = prepared(tmp_path, write(tmp_path / "one", names, classes=("cat", "dog")), *common)
    two = prepared(tmp_path, write(tmp_path / "two", names[::-1], classes=("cat", "dog")), *common)
    other = prepared(tmp_path, write(tmp_path / "x", names, classes=("dog", "cat")), *common)
    assert one == two
    assert one != other, "the class is content"
