"""Speech recognition as a run: any layout, straight and resumed, the folder opened, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from shoal.data.audio import read_wave
from shoal.errors import DataError
from shoal.launch.summary import last_words
from shoal.prove.parity import prove
from sounds import write_recordings, write_wave, write_whisper
from tiny import Bench, Run, largest_difference


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("speech")
    table, model = write_recordings(folder / "data"), write_whisper(folder / "whisper")
    task = ("task={kind: speech-recognition, longest_seconds: 1}", f"model={{path: {model}}}")
    steps = ("train.steps=8", "train.evaluate_every_steps=8", "train.global_batch_samples=8")
    data = ("data.packing=false", "data.evaluation_samples=8", "data.tokenizer.kind=model")
    return (*task, f"data.source={table}", *data, *steps, "data.sequence_tokens=16")


@pytest.fixture(scope="module")
def one(bench: Bench, given: tuple[str, ...]) -> Run:
    return bench.run(*given)


def test_two_workers_are_one(bench: Bench, given: tuple[str, ...], one: Run) -> None:
    other = bench.run(
        *given, "parallel.replicate=2", "launch.workers=threads", "train.micro_batch_samples=2"
    )
    assert largest_difference(other.losses, one.losses) < 1e-5
    first, last = (run.evaluations[-1] for run in (one, other))
    assert last["evaluation_loss"] == pytest.approx(first["evaluation_loss"], rel=1e-5)
    assert last["evaluation_words"] == first["evaluation_words"] > 0


def test_the_end_says_what_was_heard(one: Run) -> None:
    summary = json.loads((one.path / "summary.json").read_text())
    words = "\n".join(last_words(one.path, summary, recipe="mine.yaml"))
    assert "word error rate: " in words and " % before (in windows of 1 s" in words
    assert "<td>said</td>" in (one.path / "misheard.html").read_text(encoding="utf-8")
    config = json.loads((one.path / "model/config.json").read_text())
    about = json.loads((one.path / "model/preprocessor_config.json").read_text())
    assert config["max_source_positions"] == 50 and about["chunk_length"] == 1


@pytest.mark.slow
def test_a_cut_model_writes_what_a_whole_one_does(
    bench: Bench, given: tuple[str, ...], one: Run
) -> None:
    other = bench.run(*given, "parallel={replicate: 1, shard: 2}")
    assert largest_difference(other.losses, one.losses) < 1e-5
    assert other.evaluations[-1]["word_error_rate"] == pytest.approx(
        one.evaluations[-1]["word_error_rate"], abs=0.1
    ), "near ties may fall otherwise"


@pytest.mark.slow
def test_resumed_is_straight(bench: Bench, given: tuple[str, ...], one: Run) -> None:
    again = bench.train(*given, "train.stop_after_steps=4", "checkpoint.every_steps=4")
    bench.resume(again)
    assert again.losses == one.losses and again.weights == one.weights


@pytest.mark.slow
def test_a_layout_is_proven(bench: Bench, given: tuple[str, ...]) -> None:
    """transformers' own loss of the merged folder, a recording at a time, among the figures."""
    asked = [*given, "parallel.replicate=2"]
    found = prove(bench.recipe, asked, out=bench.new_path(), pool=bench.pool, steps=2)
    assert found.proven, str(found)
    assert found.largest["opened"][0] < 1e-5


@pytest.mark.slow
def test_tones_are_learned(bench: Bench, given: tuple[str, ...], tmp_path: Path) -> None:
    """And the folder, with transformers' own extractor, writes what was said."""
    rate = ("train.optimizer.learning_rate=3e-3", "train.schedule.warmup_steps=20")
    more = (f"data.source={write_recordings(tmp_path, count=500)}", "data.evaluation_samples=40")
    steps = ("train.steps=400", "train.evaluate_every_steps=400", "train.global_batch_samples=16")
    run = bench.run(*given, *more, *steps, *rate)
    first, last = run.evaluations[0], run.evaluations[-1]
    assert last["word_error_rate"] < 0.3 < first["word_error_rate"]
    folder = run.path / "model"
    model = transformers.WhisperForConditionalGeneration.from_pretrained(folder)
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in (tmp_path / "words.jsonl").read_text().splitlines()]
    right = 0
    for row in rows[1:60:3]:  # at 16 kHz
        sound, rate_of_sound = read_wave(tmp_path / row["audio"])
        heard = extractor(sound, sampling_rate=rate_of_sound, return_tensors="pt").input_features
        ids = tokenizer("").input_ids[:-1]
        with torch.no_grad():
            while len(ids) < 12 and ids[-1] != tokenizer.eos_token_id:
                logits = model(heard, decoder_input_ids=torch.tensor([ids])).logits
                ids.append(int(logits[0, -1].argmax()))
        right += tokenizer.decode(ids, skip_special_tokens=True).strip() == row["text"]
    assert right > 10, f"{right} of 20"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"audio": "clips/0.wav", "text": "..."}, "expected the words of a recording"),
        ({"audio": "clips/0.wav", "text": None}, "expected text in 'text', got null"),
        ({"audio": "clips/0.wav", "words": "one"}, "expected sound|a single text column"),
        (
            {"audio": "clips/none.wav", "text": "one"},
            "expected sound under 'audio', got 'clips/none.wav'",
        ),
        ({"audio": "../clips/0.wav", "text": "one"}, "under 'audio', got '../clips/0.wav'"),
        ({"audio": "broken.wav", "text": "one"}, "broken.wav: expected a .wav file of plain PCM"),
        ({"audio": "long.wav", "text": "one"}, "all 1 recordings are longer than 1 s"),
        ({"text": "one"}, "expected sound under 'audio'"),
    ],
    ids=str,
)
def test_bad_recordings_are_named(
    bench: Bench, given: tuple[str, ...], tmp_path: Path, row: dict[str, str], reason: str
) -> None:
    folder = tmp_path / "data"
    write_wave(folder / "clips/0.wav", np.arange(4000), rate=16000)
    write_wave(tmp_path / "clips/0.wav", np.arange(4000), rate=16000)  # out of its folder
    write_wave(folder / "long.wav", np.arange(40000), rate=16000)
    (folder / "broken.wav").write_bytes(b"RIFF of nothing")
    (folder / "words.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=reason):
        bench.train(*given, f"data.source={folder}")


def test_a_model_that_does_not_listen_is_refused(bench: Bench, given: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match=r"the model reads 2 s of sound, but.*is 3"):
        bench.train(*given, "task.longest_seconds=3")
    other = ("model={kind: config, architecture: llama}", "data.tokenizer.kind=train")
    with pytest.raises(DataError, match=r"tokenizer puts nothing around words, where Whisper's"):
        bench.train(*given, *other)
