"""Samples of any fields survive the files, stacking, filling and trimming, value for value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.data.batch import fill_rows, micro_batches, stack
from shoal.data.prepare import Prepared, SourceSpec, prepare
from shoal.data.stream import Evaluation, Stream
from shoal.errors import DataError
from shoal.fields import TOKENS, Field, Fields
from shoal.layout import Share

FIELDS: Fields = {
    "image": Field("uint8", (2, 3)),
    "sound": Field("float32", (4, None), sequence="frames"),
    "source": Field("int64", (None,), sequence="source"),
    "score": Field("float32", (), fill=-1.0),
    "labels": Field("int64", (), fill=-100),
}


def sample_of(number: int) -> dict[str, Any]:
    """A sample that can be told from all others by any of its fields."""
    frames = np.arange(4 * (number % 5 + 1), dtype=np.float32).reshape(4, -1) + number
    return {
        "image": np.full((2, 3), number, dtype=np.uint8),
        "sound": frames,
        "source": [number + 1] * (number % 7 + 1),
        "score": number / 8,
        "labels": number % 3,
    }


def prepared_of(folder: Path, *, count: int, fields: Fields = FIELDS, **more: Any) -> Prepared:
    path = folder / "numbers.jsonl"
    path.write_text("\n".join(f'{{"text": "{n}"}}' for n in range(count)), encoding="utf-8")
    chosen = {
        "encode": lambda records: [sample_of(int(each["text"])) for each in records],
        "encode_key": "numbers",
        "sequence_tokens": 8,
        "packing": False,
        "validation_fraction": 0.3,
        "out": folder / "prepared",
    }
    return prepare(sources=[SourceSpec(source=str(path))], fields=fields, **{**chosen, **more})


def test_every_field_of_every_sample_is_read_as_it_was_stored(tmp_path: Path) -> None:
    prepared = prepared_of(tmp_path, count=40)
    seen = set()
    for part in ("train", "validation"):
        for row in Evaluation(prepared, batch_samples=1, part=part).rows():
            number = int(row["image"][0, 0])
            seen.add(number)
            for name, value in sample_of(number).items():
                assert np.array_equal(row[name], np.asarray(value, dtype=row[name].dtype)), name
    assert seen == set(range(40))


def test_a_batch_is_padded_with_each_fields_own_fill(tmp_path: Path) -> None:
    prepared = prepared_of(tmp_path, count=40)
    batch = Stream(prepared, seed=0, global_batch_samples=16).at(0, Share(0, 16))
    assert {name: str(batch[name].dtype) for name in FIELDS} == {
        name: field.dtype for name, field in FIELDS.items()
    }
    assert batch["image"].shape == (16, 2, 3) and batch["sound"].shape == (16, 4, 8)
    assert batch["source"].shape == (16, 8) and batch["score"].shape == (16,)
    for row in range(16):
        number = int(batch["image"][row, 0, 0])
        wanted = sample_of(number)
        length = number % 5 + 1
        assert np.array_equal(batch["sound"][row, :, :length], wanted["sound"])
        assert not batch["sound"][row, :, length:].any()
        assert batch["source"][row].tolist() == wanted["source"] + [0] * (7 - number % 7)
        assert batch["score"][row] == wanted["score"] and batch["labels"][row] == number % 3


def test_rows_that_only_fill_a_batch_hold_fill(tmp_path: Path) -> None:
    evaluation = Evaluation(prepared_of(tmp_path, count=10), batch_samples=5)
    batch = evaluation.at(0, part=0, parts=1)
    assert batch["sample_ids"].tolist() == [0, 1, 2, -1, -1]
    assert batch["labels"][3:].tolist() == [-100, -100] and batch["score"][4] == -1.0
    assert not batch["image"][3:].any() and batch["image"].shape == (5, 2, 3)
    with pytest.raises(KeyError):
        fill_rows({**batch, "unknown": batch["labels"]}, FIELDS, count=6)


def test_counts_of_labels_are_kept_for_baselines(tmp_path: Path) -> None:
    evaluation = Evaluation(prepared_of(tmp_path, count=40), batch_samples=4)
    counts = evaluation.training_counts() + np.bincount([r["labels"] for r in evaluation.rows()])
    assert counts.tolist() == [14, 13, 13]


def rows_by_hand(batch: dict[str, torch.Tensor], size: int) -> list[dict[str, torch.Tensor]]:
    """What micro batches of tokens were before fields: by document ids, at least 8, in eights."""
    parts = []
    for start in range(0, len(batch["input_ids"]), size):
        part = {name: tensor[start : start + size] for name, tensor in batch.items()}
        longest = int((part["document_ids"] >= 0).sum(dim=1).max())
        length = min(part["input_ids"].shape[1], max(8, -(-longest // 8) * 8))
        parts.append({n: t[:, :length] if t.dim() == 2 else t for n, t in part.items()})
    return parts


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=9),
    size=st.integers(1, 4),
    zeros=st.booleans(),
)
def test_micro_batches_of_tokens_are_cut_as_ever(
    lengths: list[int], size: int, zeros: bool
) -> None:
    """Also where tokens are 0 and labels are ignored, as at the end of a document."""
    rows = [
        {
            "input_ids": np.zeros(n) if zeros else np.arange(1, n + 1),
            "labels": np.full(n, -100),
            "position_ids": np.arange(n),
            "document_ids": np.zeros(n),
        }
        for n in lengths
    ]
    arrays = stack(rows, TOKENS, lengths={})
    arrays["sample_ids"] = np.arange(len(rows))
    batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
    found = micro_batches(batch, TOKENS, rows=size)
    assert [start for _, start in found] == list(range(0, len(rows), size))
    for (part, _), wanted in zip(found, rows_by_hand(batch, size), strict=True):
        assert part.keys() == wanted.keys()
        assert all(torch.equal(part[name], wanted[name]) for name in part)


def test_each_sequence_is_cut_to_what_it_holds(tmp_path: Path) -> None:
    batch = Stream(prepared_of(tmp_path, count=40), seed=0, global_batch_samples=12)
    whole = batch.at(0, Share(0, 12))
    for part, start in micro_batches(whole, FIELDS, rows=3, multiple=1):
        numbers = part["image"][:, 0, 0].astype(int)
        assert part["sound"].shape == (3, 4, max(numbers % 5) + 1)
        assert part["source"].shape == (3, max(numbers % 7) + 1)
        assert np.array_equal(part["score"], whole["score"][start : start + 3])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "image",
            np.zeros((3, 2), dtype=np.uint8),
            r"image: expected the shape \(2, 3\).*\(3, 2\)",
        ),
        ("image", np.full((2, 3), 256), r"image must lie in 0..255, got 256..256"),
        ("score", float("nan"), r"score must lie in .*, got nan..nan"),
        ("labels", -101, r"labels must lie in -100..2147483647, got -101..-101"),
    ],
)
def test_values_that_do_not_fit_a_field(
    tmp_path: Path, name: str, value: Any, message: str
) -> None:
    def encode(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**sample_of(int(each["text"])), name: value} for each in records]

    with pytest.raises(DataError, match=message):
        prepared_of(tmp_path, count=4, encode=encode, encode_key=name)


def test_samples_that_are_not_what_the_task_says(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"with the fields image, sound.*got image, score"):
        prepared_of(
            tmp_path,
            count=4,
            encode=lambda records: [{"image": np.zeros((2, 3)), "score": 1.0} for _ in records],
        )
    with pytest.raises(ValueError, match="only rows of tokens can be packed"):
        prepared_of(tmp_path, count=4, packing=True)


@pytest.mark.parametrize(("dims", "sequence"), [((None, None), "a"), ((None,), None), ((3,), "a")])
def test_fields_name_the_sequence_of_their_one_ragged_dim(
    dims: tuple[int | None, ...], sequence: str | None
) -> None:
    with pytest.raises(ValueError, match="expected one None with the name of its sequence"):
        Field("int64", dims, sequence=sequence)
