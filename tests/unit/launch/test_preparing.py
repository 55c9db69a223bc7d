"""What a recipe says of its data is what is prepared: validation in three ways, limits, lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoal.config.load import load_recipe
from shoal.data.prepare import open_prepared
from shoal.data.stream import Evaluation, Stream
from shoal.data.tokenize import load_tokenizer
from shoal.engine.job import Inputs
from shoal.errors import DataError
from shoal.launch.prepare import prepare_inputs
from tiny import RECIPE, tales


def write(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


def prepared(source: Path, *overrides: str, said: list[str] | None = None) -> Inputs:
    recipe = source.parent / "recipe.yaml"
    recipe.write_text(RECIPE.format(source=source))
    heard: list[str] = [] if said is None else said
    return prepare_inputs(
        load_recipe(str(recipe), ["data.packing=false", *overrides]), say=heard.append
    )


def held_out(inputs: Inputs) -> set[str]:
    tokenizer = load_tokenizer(str(inputs.tokenizer_directory))
    rows = Evaluation(inputs.data_directory, batch_samples=1).rows()
    return {tokenizer.decode(row["input_ids"].tolist()) for row in rows}


def test_validation_from_a_file_of_another_format(tmp_path: Path) -> None:
    source = write(tmp_path / "train.jsonl", tales(seed=0, documents=50))
    (tmp_path / "held.csv").write_text("id,text\n1,gulls wait\n2,the tide is out\n")
    inputs = prepared(source, f"data.validation.source={tmp_path / 'held.csv'}")
    assert (inputs.train_samples, inputs.validation_samples) == (50, 2)
    assert held_out(inputs) == {"gulls wait", "the tide is out"}


def test_a_split_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    write(folder / "train-0.jsonl", tales(seed=0, documents=30))
    write(folder / "train-1.jsonl", tales(seed=1, documents=20))
    write(folder / "dev-0.jsonl", ["gulls wait"])
    write(folder / "test-0.jsonl", ["never read"])
    inputs = prepared(folder, "data.validation.split=dev")
    assert (inputs.train_samples, inputs.validation_samples) == (50, 1)
    assert held_out(inputs) == {"gulls wait"}
    with pytest.raises(DataError, match=r"split 'validation'; expected one called .*, got dev, te"):
        prepared(folder, "data.validation.split=validation")
    said: list[str] = []
    prepared(folder, said=said)
    assert f"all of {folder} is one source, with its dev and test files; data.validat" in str(said)


def test_splits_of_a_mixture_are_evaluated_side_by_side(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name / "train.jsonl", tales(seed=0, documents=20))
        write(tmp_path / name / "dev.jsonl", [f"held of {name}"])
    sources = ", ".join(f"{{source: {tmp_path / name}}}" for name in ("a", "b"))
    inputs = prepared(tmp_path / "a", f"data.source=[{sources}]", "data.validation.split=dev")
    assert held_out(inputs) == {"held of a", "held of b"}
    assert inputs.train_samples == 40 and inputs.counts["documents"] == 40


def test_a_limit_takes_the_first_samples(tmp_path: Path) -> None:
    texts = [f"{text} {number}" for number, text in enumerate(tales(seed=0, documents=90))]
    whole, part = write(tmp_path / "a.jsonl", texts), write(tmp_path / "b.jsonl", texts[:40])
    limited = prepared(whole, "data.max_samples=40")
    assert limited.train_samples + limited.validation_samples == 40
    assert limited.validation_samples == 4, "a fraction of those that are used"
    alone = prepared(part)
    assert held_out(limited) == held_out(alone)
    one, two = (
        [Stream(each.data_directory, seed=3, global_batch_samples=8).ids(0).tolist(),
         open_prepared(each.data_directory).description["content"]]
        for each in (limited, alone)
    )  # fmt: skip
    assert one == two
    assert prepared(whole).train_samples > limited.train_samples


def test_tags_that_are_read_otherwise_are_said(tmp_path: Path) -> None:
    path = tmp_path / "tags.conll"
    path.write_text("Ada B-per\nLovelace E-per\nsails O\n\nOslo S-loc\n\n" * 20)
    said: list[str] = []
    inputs = prepared(path, "task={kind: token-classification}", said=said)
    assert "tags (BIOES) are read as BIO2: E-per as I-per, S-loc as B-loc" in said
    assert inputs.task_settings == {"tags": ["O", "B-loc", "B-per", "I-per"]}
    words = load_tokenizer(str(inputs.tokenizer_directory)).encode("sails").tokens
    assert words == ["Ġsails"], "trained for words, each with the space before it"
