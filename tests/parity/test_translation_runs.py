"""Translation as a run: any layout, straight and resumed, and the folder opened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from shoal.errors import DataError
from shoal.launch.summary import last_words
from shoal.prove.parity import prove
from tiny import Bench, Run, largest_difference, tales

MODEL = (
    "model={kind: config, architecture: t5, d_model: 32, d_kv: 8, d_ff: 64, num_layers: 1, "
    "num_decoder_layers: 1, num_heads: 4, dropout_rate: 0.1}"
)
SHORT = ("data.packing=false", "data.sequence_tokens=16", "data.evaluation_samples=12")


def write_pairs(path: Path) -> Path:
    """120 texts, and each with its words the other way round."""
    texts = [text for text in tales(seed=0, documents=200) if " " in text][:120]
    rows = [{"source": text, "target": " ".join(text.split()[::-1])} for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    path = write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")
    steps = ("train.steps=8", "train.evaluate_every_steps=8")
    return ("task.kind=translation", f"data.source={path}", MODEL, *SHORT, *steps)


@pytest.fixture(scope="module")
def one(bench: Bench, given: tuple[str, ...]) -> Run:
    return bench.run(*given)


def test_two_workers_are_one(bench: Bench, given: tuple[str, ...], one: Run) -> None:
    other = bench.run(
        *given, "parallel.replicate=2", "launch.workers=threads", "train.micro_batch_samples=2"
    )
    assert largest_difference(other.losses, one.losses) < 1e-5
    first, last = (run.evaluations[-1] for run in (one, other))
    for name in ("evaluation_loss", "shuffled_loss"):
        assert last[name] == pytest.approx(first[name], rel=1e-5), "whatever is in a batch"
    assert last["chrf"] == pytest.approx(first["chrf"], abs=2), "near ties may fall otherwise"


def test_the_end_has_the_baselines_beside(one: Run) -> None:
    summary = json.loads((one.path / "summary.json").read_text())
    assert set(summary["baseline"]) == {"copy_chrf", "memory_chrf"}
    assert 5 < summary["baseline"]["memory_chrf"] < 100
    words = "\n".join(last_words(one.path, summary, recipe="mine.yaml"))
    assert "with sources of other samples" in words and "translation memory is better" in words
    table = (one.path / "translations.html").read_text(encoding="utf-8")
    assert table.count("<tr>") == 7 and table.count("<td>") == 28


@pytest.mark.slow
def test_a_cut_model_writes_what_a_whole_one_does(
    bench: Bench, given: tuple[str, ...], one: Run
) -> None:
    other = bench.run(*given, "parallel={replicate: 1, shard: 2}")
    assert largest_difference(other.losses, one.losses) < 1e-5
    assert other.evaluations[-1]["chrf"] == pytest.approx(one.evaluations[-1]["chrf"], abs=2)


@pytest.mark.slow
def test_resumed_is_straight(bench: Bench, given: tuple[str, ...], one: Run) -> None:
    again = bench.train(*given, "train.stop_after_steps=4", "checkpoint.every_steps=4")
    bench.resume(again)
    assert again.losses == one.losses and again.weights == one.weights


@pytest.mark.slow
def test_a_layout_is_proven(bench: Bench, given: tuple[str, ...]) -> None:
    """transformers' own loss of the merged folder, a row at a time, among what is compared."""
    asked = [*given, "parallel.replicate=2", "model.dropout=off"]
    found = prove(bench.recipe, asked, out=bench.new_path(), pool=bench.pool, steps=2)
    assert found.proven, str(found)
    assert found.largest["opened"][0] < 1e-5


@pytest.mark.slow
def test_the_folder_writes_in_transformers_own_hands(one: Run) -> None:
    folder = one.path / "model"
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    read = tokenizer("The river finds seven apples.", return_tensors="pt")
    assert model.config.decoder_start_token_id == tokenizer.pad_token_id
    with torch.no_grad():
        written = model.generate(read.input_ids, max_new_tokens=8, do_sample=False)
    assert written.shape[0] == 1


def test_a_pair_without_a_translation_is_refused(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text('source,target\nGood morning.,Buenos dias.\nGood night.,""\n')
    with pytest.raises(DataError, match=r"text under 'source' and 'target', got source: 'Good nig"):
        bench.train("task.kind=translation", f"data.source={path}", MODEL, *SHORT)
