"""Prepared files hold every token once, keep documents apart, and appear whole or not at all."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.data.prepare import Prepared, SourceSpec, open_prepared, prepare
from shoal.data.stream import Evaluation, Stream
from shoal.errors import DataError
from shoal.layout import Share
from shoal.tasks.causal_lm import CausalLM

END = 256


def as_bytes(records: list[dict[str, Any]]) -> list[dict[str, list[int]]]:
    return [{"input_ids": [*record["text"].encode(), END]} for record in records]


def as_tags(records: list[dict[str, Any]]) -> list[dict[str, list[int]]]:
    return [
        {"input_ids": [len(w) for w in r["words"]], "labels": [int(t) for t in r["tags"]]}
        for r in records
    ]


def prepare_texts(folder: Path, texts: list[str], **settings: Any) -> Prepared:
    path = folder / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    chosen: dict[str, Any] = {
        "sources": [SourceSpec(source=str(path))],
        "encode": as_bytes,
        "encode_key": "bytes",
        "sequence_tokens": 16,
        "packing": True,
        "validation_fraction": 0.2,
        "out": folder / "prepared",
    }
    return prepare(**{**chosen, **settings})


def documents_of(prepared: Prepared, part: str, **settings: Any) -> list[list[int]]:
    """Documents rebuilt from nothing but the batches, by their position_ids and document_ids."""
    batch = Evaluation(prepared, batch_samples=1, part=part, **settings)
    tokens: list[tuple[int, int, int]] = []
    for number in range(batch.num_batches(1)):
        one = batch.at(number, part=0, parts=1)
        for token, label, document in zip(
            one["input_ids"][0], one["labels"][0], one["document_ids"][0]
        ):
            if document >= 0:
                tokens.append((int(token), int(label), number))
    documents: list[list[int]] = [[]]
    for index, (token, label, _) in enumerate(tokens):
        documents[-1].append(token)
        following = tokens[index + 1][0] if index + 1 < len(tokens) else None
        if label == -100:
            documents.append([])
        elif following is None:
            documents[-1].append(label)
        else:
            assert label == following, "a label is the token that follows"
    return [document for document in documents if document]


@given(
    texts=st.lists(st.text("abc", min_size=1, max_size=60), min_size=2, max_size=12),
    length=st.integers(8, 24),
)
@settings(max_examples=40, deadline=None)
def test_packed_rows_hold_every_document_once_and_whole(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], length: int
) -> None:
    prepared = prepare_texts(tmp_path_factory.mktemp("p"), texts, sequence_tokens=length)
    rebuilt = documents_of(prepared, "train") + documents_of(prepared, "validation")
    # Each document ends with END, so an END without anything after is still told apart.
    expected = Counter((*text.encode(), END) for text in texts)
    assert Counter(map(tuple, rebuilt)) == expected


def test_positions_and_documents_of_a_packed_row(tmp_path: Path) -> None:
    prepared = prepare_texts(tmp_path, ["abcdef"] * 10, sequence_tokens=16)
    batch = Evaluation(prepared, batch_samples=1, part="train").at(1, part=0, parts=1)
    # Documents have 7 tokens, so the second row begins with the third token of document 2.
    assert batch["document_ids"][0].tolist() == [0] * 5 + [1] * 7 + [2] * 4
    assert batch["position_ids"][0].tolist() == [*range(5), *range(7), *range(4)]
    assert batch["input_ids"][0, 4] == END and batch["labels"][0, 4] == -100
    assert batch["labels"][0, 3] == END, "the end of a document is a target"
    assert batch["labels"][0, 15] == ord("e"), "the last target is the first token of row 2"
    kinds = {name: str(array.dtype) for name, array in batch.items()}
    assert kinds["document_ids"] == "int32"
    assert {kind for name, kind in kinds.items() if name != "document_ids"} == {"int64"}


def test_rows_that_are_not_packed(tmp_path: Path) -> None:
    texts = ["a" * 40, "bcd", "efghi", "j"]
    prepared = prepare_texts(tmp_path, texts, packing=False)
    assert prepared.description["parts"]["train"]["samples"] == 3
    for part in ("train", "validation"):
        listed = Evaluation(prepared, batch_samples=1, part=part)
        for number in range(listed.num_batches(1)):
            one = listed.at(number, part=0, parts=1)
            width = one["input_ids"].shape[1]
            assert width % 8 == 0 and width <= 16
            real = one["document_ids"][0] == 0
            ids, labels = one["input_ids"][0][real], one["labels"][0][real]
            assert np.array_equal(labels[:-1], ids[1:])
            cut = len(ids) == 16 and ids[0] == ord("a")
            assert labels[-1] == (ord("a") if cut else -100)
            assert np.all(one["document_ids"][0][~real] == -1)
            assert np.all(one["labels"][0][~real] == -100)


def test_rows_are_as_wide_as_the_longest_asked_for(tmp_path: Path) -> None:
    prepared = prepare_texts(tmp_path, ["a" * 30, "bc", "bc", "bc"] * 5, packing=False)
    stream = Stream(prepared, seed=0, global_batch_samples=4)
    widths = {stream.at(0, Share(i, i + 1))["input_ids"].shape[1] for i in range(4)}
    assert widths == {8, 16}
    assert stream.at(0, Share(0, 4))["input_ids"].shape[1] == 16


def test_tags_are_labels_as_given(tmp_path: Path) -> None:
    path = tmp_path / "tags.jsonl"
    rows = [{"words": ["a" * n, "bb"], "tags": [str(n % 3), "-100"]} for n in range(1, 31)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    for packing in (False, True):
        prepared = prepare_texts(
            tmp_path,
            ["unused"],
            sources=[SourceSpec(source=str(path))],
            encode=as_tags,
            encode_key="tags",
            packing=packing,
            sequence_tokens=8,
        )
        pairs: list[tuple[int, int]] = []
        for part in ("train", "validation"):
            listed = Evaluation(prepared, batch_samples=4, part=part)
            for number in range(listed.num_batches(1)):
                one = listed.at(number, part=0, parts=1)
                real = one["document_ids"] >= 0
                pairs += zip(one["input_ids"][real].tolist(), one["labels"][real].tolist())
        assert sorted(pairs) == sorted(p for n in range(1, 31) for p in [(n, n % 3), (2, -100)])
        counts = prepared.description["parts"]
        assert counts["train"]["targets"] + counts["validation"]["targets"] == 30


def test_the_unigram_baseline_against_the_definition(tmp_path: Path) -> None:
    prepared = prepare_texts(tmp_path, ["abca", "bcab", "cccc", "abab", "zzz"] * 4)
    targets = {part: [] for part in ("train", "validation")}
    for part, values in targets.items():
        for document in documents_of(prepared, part):
            values += document[1:]
    counts, size = Counter(targets["train"]), END + 1
    total = len(targets["train"]) + size
    expected = -sum(log((counts[t] + 1) / total) for t in targets["validation"])
    expected /= len(targets["validation"])
    whole = Evaluation(prepared, batch_samples=1)
    # Sums of some hundred float64 logarithms: far below 1e-12 relative.
    assert CausalLM().baseline(whole)["unigram_loss"] == pytest.approx(expected, rel=1e-12)
    assert prepared.description["parts"]["validation"]["targets"] == len(targets["validation"])
    # All samples: the same sum in another order. One sample: other targets, another figure.
    first = Evaluation(prepared, batch_samples=1, samples=1)
    labels = first.at(0, part=0, parts=1)["labels"]
    by_hand = [-log((counts[label] + 1) / total) for label in labels[labels >= 0].tolist()]
    wanted = sum(by_hand) / len(by_hand)
    assert CausalLM().baseline(first)["unigram_loss"] == pytest.approx(wanted, rel=1e-12)


def test_held_out_documents_do_not_depend_on_the_seed(tmp_path: Path) -> None:
    texts = [f"document number {n}" for n in range(30)]
    one = prepare_texts(tmp_path, texts, seed=1)
    two = prepare_texts(tmp_path, texts, seed=2)
    assert one.directory != two.directory
    held = [sorted(map(tuple, documents_of(each, "validation"))) for each in (one, two)]
    assert held[0] == held[1] and len(held[0]) == 6
    assert documents_of(one, "train") != documents_of(two, "train")


def test_second_call_reads_the_cache(tmp_path: Path) -> None:
    texts = ["some text", "more text"] * 5
    phases: list[tuple[str, float]] = []
    first = prepare_texts(tmp_path, texts, progress=lambda *what: phases.append(what))
    assert phases[-1] == ("tokenizing texts.jsonl", 1.0)

    def never(records: list[dict[str, Any]]) -> list[dict[str, list[int]]]:
        raise AssertionError("tokenized again")

    again = prepare_texts(tmp_path, texts, encode=never)
    assert again.directory == first.directory
    assert again.description == json.loads(json.dumps(first.description))
    assert prepare_texts(tmp_path, texts, encode_key="other").directory != first.directory
    assert prepare_texts(tmp_path, [*texts, "new"]).directory != first.directory


def test_a_shortened_file_is_named_and_prepared_again(tmp_path: Path) -> None:
    texts = ["some text", "more text"] * 5
    prepared = prepare_texts(tmp_path, texts)
    tokens = prepared.sources[0].directory / "train.input_ids"
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-4])
    with pytest.raises(DataError, match=rf"train.input_ids: expected {len(whole)} bytes, got"):
        open_prepared(prepared.directory)
    prepare_texts(tmp_path, texts)
    assert tokens.read_bytes() == whole
    with pytest.raises(DataError, match=r"expected prepared data with a description.json"):
        open_prepared(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["train.input_ids", "train.tokens.offsets", "train.rows", "validation.input_ids",
     "train.counts", "description.json"],
)  # fmt: skip
@pytest.mark.parametrize("how", ["flip", "zeros", "gone", "deep"])
def test_damaged_bytes_are_found_and_prepared_again(tmp_path: Path, name: str, how: str) -> None:
    """Of the right size, so that only a hash can tell."""
    texts = ["some text", "more text"] * 5
    path = prepare_texts(tmp_path, texts).sources[0].directory / name
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes({"flip": flipped, "deep": b"[" * 100_000}.get(how, bytes(len(whole))))
    said: list[str] = []
    prepare_texts(tmp_path, texts, progress=lambda phase, done: said.append(phase))
    assert said[0].startswith(f"prepared data is damaged and made again: {path}: "), said
    assert path.read_bytes() == whole
    said.clear()
    prepare_texts(tmp_path, texts, progress=lambda phase, done: said.append(phase))
    assert said == []


def test_a_damaged_mixture_is_described_again(tmp_path: Path) -> None:
    texts = ["some text", "more text"] * 5
    path = prepare_texts(tmp_path, texts).directory / "description.json"
    whole = path.read_text()
    path.write_text(whole.replace('"weight": 1.0', '"weight": 7.0'))
    said: list[str] = []
    prepare_texts(tmp_path, texts, progress=lambda phase, done: said.append(phase))
    assert said == [f"prepared data is damaged and made again: {path}: is not what was written"]
    assert path.read_text() == whole


def test_equal_texts_are_on_one_side(tmp_path: Path) -> None:
    texts = [f"text number {n % 50}" for n in range(200)]
    for fraction in (0.02, 0.1, 0.5):
        prepared = prepare_texts(tmp_path, texts, validation_fraction=fraction)
        train, held = (
            {tuple(each) for each in documents_of(prepared, part)}
            for part in ("train", "validation")
        )
        assert len(train) + len(held) == 50 and not train & held
        count = prepared.description["parts"]["validation"]["documents"]
        assert 0 < count <= 200 * fraction and count % 4 == 0


def test_equal_texts_do_not_lie_side_by_side(tmp_path: Path) -> None:
    prepared = prepare_texts(tmp_path, [chr(97 + n % 8) for n in range(400)])
    documents = documents_of(prepared, "train")
    beside = sum(one == two for one, two in pairwise(documents))
    # Of about 320 neighbours an eighth is equal by chance, with a deviation of 6.
    assert 15 < beside < 70


def test_validation_from_another_source(tmp_path: Path) -> None:
    (tmp_path / "held.jsonl").write_text('{"text": "held out"}\n{"text": "zebra {}"}')
    prepared = prepare_texts(
        tmp_path,
        [f"trained on {n}" for n in range(20)],
        validation_fraction=None,
        evaluated=[SourceSpec(source=str(tmp_path / "held.jsonl"))],
    )
    parts = prepared.description["parts"]
    assert parts["train"]["documents"] == 20 and parts["validation"]["documents"] == 2
    held = {bytes(each[:-1]).decode() for each in documents_of(prepared, "validation")}
    assert held == {"held out", "zebra {}"}
    assert len(documents_of(prepared, "train")) == 20
    assert Stream(prepared, seed=0, global_batch_samples=4).names == ["texts.jsonl"]
    # z and the braces are targets that training has none of, and still have a finite loss.
    scores = CausalLM().baseline(Evaluation(prepared, batch_samples=1))
    assert 0 < scores["unigram_loss"] < 10


def test_a_single_document_may_be_evaluated_on(tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("one")
    held = [SourceSpec(source=str(tmp_path / "held.txt"))]
    prepared = prepare_texts(tmp_path, ["one"], validation_fraction=None, evaluated=held)
    assert prepared.description["parts"]["validation"]["documents"] == 1


def test_every_record_has_a_sample(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected a sample of each record, got 1 of 3; the task"):
        prepare_texts(tmp_path, ["a", "b", "c"], encode=lambda records: as_bytes(records[:1]))


def test_data_of_another_version_is_refused_and_prepared_again(tmp_path: Path) -> None:
    texts = ["some text", "more text"] * 5
    prepared = prepare_texts(tmp_path, texts)
    path = prepared.sources[0].directory / "description.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps({**about, "format": 1}))
    with pytest.raises(DataError, match=r"another version of shoal \(format 1, expected 3\)"):
        open_prepared(prepared.directory)
    prepare_texts(tmp_path, texts)
    assert json.loads(path.read_text()) == about


def test_no_space_left_leaves_nothing_behind(tmp_path: Path) -> None:
    """A real failing write: the system refuses files above a size limit."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(DataError, match=r"cannot write there: .*set SHOAL_CACHE"):
            prepare_texts(tmp_path, ["x" * 1000] * 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "prepared").iterdir()) == []
    assert (
        prepare_texts(tmp_path, ["x" * 1000] * 10).description["parts"]["train"]["documents"] == 8
    )


def test_too_little_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds 1 document.*at least 2, one of them to evaluate"):
        prepare_texts(tmp_path, ["alone"])


def test_ids_that_do_not_fit(tmp_path: Path) -> None:
    for ids in ([-1], [2**31]):
        with pytest.raises(DataError, match=r"input_ids must lie in 0..2147483647, got"):
            prepare_texts(
                tmp_path,
                ["a", "b"],
                encode=lambda records, ids=ids: [{"input_ids": ids} for _ in records],
                encode_key=str(ids),
            )
    with pytest.raises(DataError, match=r"input_ids and labels must be equally long.*got \[2, 1\]"):
        prepare_texts(
            tmp_path,
            ["a", "b"],
            encode=lambda records: [{"input_ids": [1, 2], "labels": [0]} for _ in records],
            encode_key="labels",
        )


def test_a_mixture_must_be_of_one_kind(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}')
    (tmp_path / "b.conll").write_text("a 1\n\nb 2\n")
    sources = [SourceSpec(source=str(tmp_path / name)) for name in ("a.jsonl", "b.conll")]

    def either(records: list[dict[str, Any]]) -> list[dict[str, list[int]]]:
        return as_tags(records) if "words" in records[0] else as_bytes(records)

    with pytest.raises(
        DataError, match=r"some sources of the mixture have labels of their own and some have"
    ):
        prepare_texts(tmp_path, ["unused"], sources=sources, encode=either, encode_key="either")


def test_the_same_source_twice_has_two_names(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}')
    sources = [SourceSpec(source=str(tmp_path / "a.jsonl"), weight=w) for w in (1.0, 3.0)]
    prepared = prepare_texts(tmp_path, ["unused"], sources=sources)
    assert [source.name for source in prepared.sources] == ["a.jsonl", "a.jsonl#2"]
    assert Stream(prepared, seed=0, global_batch_samples=8).state(1) == {
        "a.jsonl": 2,
        "a.jsonl#2": 6,
    }


def test_this_room_needs_no_torch() -> None:
    """The process that prepares data must stay free of torch, transformers and datasets."""
    program = (
        "import sys, shoal.cli.data, shoal.data.convert, shoal.data.prepare, shoal.data.stream\n"
        "import shoal.data.verify, shoal.data.tokenize\n"
        "print([n for n in ('torch', 'transformers', 'datasets') if n in sys.modules])"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == "[]"
