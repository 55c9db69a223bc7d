"""What a recipe says of its data is what is prepared: validation in three ways, limits, lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForTokenClassification,
    BertConfig,
    BertForTokenClassification,
)

from shoal.config.load import load_recipe, resolve
from shoal.data.prepare import open_prepared
from shoal.data.stream import Evaluation, Stream
from shoal.data.tokenize import load_tokenizer
from shoal.engine.job import Inputs
from shoal.errors import DataError
from shoal.launch.pool import WorkerPool
from shoal.launch.prepare import prepare_inputs
from shoal.launch.score import score
from shoal.observe.console import Console
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


ORDER = ["B-loc", "O", "I-per", "B-per"]
"""As somebody else's model has them: shoal would sort them, O first."""


def tagger(folder: Path, *, labels: Sequence[str] | None = ORDER) -> Path:
    """The files of a tagging model that are read before it is."""
    folder.mkdir()
    named = {} if labels is None else {"id2label": {str(n): x for n, x in enumerate(labels)}}
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", **named}))
    words = {word: n for n, word in enumerate(["?", "Ada", "Lovelace", "sails", "Oslo"])}
    Tokenizer(WordLevel(words, unk_token="?")).save(str(folder / "tokenizer.json"))
    return folder


SENTENCES = "Ada B-per\nLovelace I-per\nsails O\n\nOslo B-loc\n\n"


def tagged_recipe(tmp_path: Path, held: str, model: Path) -> dict[str, Any]:
    (tmp_path / "train.conll").write_text(SENTENCES * 4)
    (tmp_path / "held.conll").write_text(held)
    return {
        "task": {"kind": "token-classification"},
        "model": {"path": str(model)},
        "data": {
            "source": str(tmp_path / "train.conll"),
            "packing": False,
            "validation": {"source": str(tmp_path / "held.conll")},
        },
        "train": {"steps": 1},
    }


def tagged(tmp_path: Path, held: str, model: Path, *, scored: bool) -> Inputs:
    recipe = resolve(tagged_recipe(tmp_path, held, model))
    return prepare_inputs(recipe, say=lambda line: None, scored=scored)


def gold(inputs: Inputs) -> list[str]:
    """The tags of the validation part, by the ids of its labels."""
    rows = Evaluation(inputs.data_directory, batch_samples=1).rows()
    names = inputs.task_settings["tags"]
    return sorted(names[label] for row in rows for label in row["labels"] if label >= 0)


@pytest.mark.parametrize("held", [SENTENCES, "Oslo B-loc\nsails O\n\n"], ids=["all", "fewer"])
@pytest.mark.parametrize("scored", [True, False])
def test_a_model_keeps_its_ids_of_tags(tmp_path: Path, held: str, scored: bool) -> None:
    inputs = tagged(tmp_path, held, tagger(tmp_path / "model"), scored=scored)
    assert inputs.task_settings == {"tags": ORDER}
    assert gold(inputs) == sorted(line.split()[1] for line in held.splitlines() if line)


def test_scores_are_those_of_transformers_whatever_the_order_of_its_tags(
    tmp_path: Path, pool: WorkerPool
) -> None:
    folder = tagger(tmp_path / "model")
    torch.manual_seed(0)
    names = dict(enumerate(ORDER))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = BertConfig(
        vocab_size=5, num_attention_heads=4, id2label=names,
        label2id={name: n for n, name in names.items()}, initializer_range=0.5, **sizes,
    )  # fmt: skip
    BertForTokenClassification(config).save_pretrained(folder)
    recipe = tagged_recipe(tmp_path, SENTENCES, folder)
    found = score(folder, recipe=recipe, overrides=(), console=Console(out=StringIO()), pool=pool)
    theirs = AutoModelForTokenClassification.from_pretrained(folder)
    loss = right = 0.0
    for words, tags in (([1, 2, 3], ["B-per", "I-per", "O"]), ([4], ["B-loc"])):
        labels = torch.tensor([[theirs.config.label2id[tag] for tag in tags]])
        output = theirs(input_ids=torch.tensor([words]), labels=labels)
        loss += float(output.loss.detach()) * len(words)
        right += int((output.logits.argmax(-1) == labels).sum())
    assert found["evaluation_loss"] == pytest.approx(loss / 4, rel=1e-5)
    assert (found["token_accuracy"], found["evaluation_targets"]) == (right / 4, 4)


def test_a_scored_model_may_know_more_tags_than_the_data(tmp_path: Path) -> None:
    model = tagger(tmp_path / "model", labels=["B-org", *ORDER, "I-org"])
    scored = tagged(tmp_path, SENTENCES, model, scored=True)
    assert scored.task_settings == {"tags": ["B-org", *ORDER, "I-org"]}
    assert gold(scored) == ["B-loc", "B-per", "I-per", "O"]
    trained = tagged(tmp_path, SENTENCES, model, scored=False)
    assert trained.task_settings == {"tags": ["O", "B-loc", "B-per", "I-per"]}, "a head of its own"


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (ORDER, "does not know the label 'B-org' of the data; its config.json names B-loc, O, I-p"),
        (None, "does not know the label 'O' of the data; its config.json names no labels"),
        (["O", "O"], "its config.json names no labels"),
        ([*ORDER, "B-org", "S-org"], "gives tags of BIOES, such as 'S-org'; expected BIO2"),
    ],
)
def test_tags_that_a_scored_model_does_not_know(
    tmp_path: Path, labels: list[str] | None, said: str
) -> None:
    with pytest.raises(DataError, match=said):
        tagged(tmp_path, "Oslo B-org\n\n", tagger(tmp_path / "m", labels=labels), scored=True)


def test_a_scored_model_keeps_its_ids_of_classes(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("L", (4, 4), 90 * (name == "dog") + number).save(
                tmp_path / "images" / name / f"{number}.png"
            )
    config = {"model_type": "vit", "id2label": {"0": "dog", "1": "fox", "2": "cat"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    recipe = {
        "task": {"kind": "image-classification"},
        "model": {"path": str(tmp_path)},
        "data": {"source": str(tmp_path / "images"), "packing": False,
                 "validation": {"fraction": 0.5}},
        "train": {"steps": 1},
    }  # fmt: skip
    inputs = prepare_inputs(resolve(recipe), say=lambda line: None, scored=True)
    assert inputs.task_settings["classes"] == ["dog", "fox", "cat"]
    rows = list(Evaluation(inputs.data_directory, batch_samples=1).rows())
    assert len(rows) == 4
    for row in rows:
        assert int(row["labels"]) == (0 if row["pixel_values"].max() >= 90 else 2)
    (tmp_path / "config.json").write_text(json.dumps({**config, "id2label": {"0": "dog"}}))
    with pytest.raises(DataError, match=r"image-classification: .* know the label 'cat'"):
        prepare_inputs(resolve(recipe), say=lambda line: None, scored=True)


def test_tags_that_are_read_otherwise_are_said(tmp_path: Path) -> None:
    path = tmp_path / "tags.conll"
    path.write_text("Ada B-per\nLovelace E-per\nsails O\n\nOslo S-loc\n\n" * 20)
    said: list[str] = []
    inputs = prepared(path, "task={kind: token-classification}", said=said)
    assert "tags (BIOES) are read as BIO2: E-per as I-per, S-loc as B-loc" in said
    assert inputs.task_settings == {"tags": ["O", "B-loc", "B-per", "I-per"]}
    words = load_tokenizer(str(inputs.tokenizer_directory)).encode("sails").tokens
    assert words == ["Ġsails"], "trained for words, each with the space before it"
