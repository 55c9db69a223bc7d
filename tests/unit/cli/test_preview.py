"""`shoal data preview`: the samples of a run's first step, token by token, targets marked."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shoal.cli.main import main
from shoal.config.load import load_recipe
from shoal.data.stream import Stream
from shoal.data.tokenize import load_tokenizer
from shoal.launch.prepare import prepare_inputs
from shoal.layout import Share
from tiny import Bench, shoal


def ask(capsys: pytest.CaptureFixture[str], *words: str | Path) -> list[str]:
    with pytest.raises(SystemExit) as end:
        main(["data", "preview", *map(str, words)])
    assert end.value.code in (0, None)
    return capsys.readouterr().out.splitlines()


def test_packed_rows_document_by_document(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    said = ask(capsys, bench.recipe)
    assert [line for line in said if line.startswith("sample")] == [
        f"sample {n} of tales.jsonl" for n in (1, 2, 3)
    ]
    inputs = prepare_inputs(load_recipe(str(bench.recipe)), say=lambda line: None)
    stream = Stream(inputs.data_directory, seed=3, global_batch_samples=16)
    batch = stream.at(0, Share(0, 3))
    tokenizer = load_tokenizer(str(inputs.tokenizer_directory))
    heads = [line for line in said if line.startswith("  document")]
    counts = [list(map(int, re.findall(r"(\d+) t", line))) for line in heads]
    assert len(heads) == sum(len(set(row[row >= 0].tolist())) for row in batch["document_ids"])
    assert sum(targets for _, targets in counts) == int((batch["labels"] >= 0).sum())
    texts = [line[4:] for line in said if line.startswith("    ")]
    for text, (tokens, targets) in zip(texts, counts, strict=True):
        assert tokens - targets == 1, "a document's first token is no target"
        assert "«" in text or not targets
    first = batch["document_ids"][0] == 0
    expected = tokenizer.decode(batch["input_ids"][0][first].tolist(), skip_special_tokens=False)
    shown = re.sub(r"[«»]|(?<!<)\|(?!>)", "", texts[0])
    assert shown.startswith(expected[:-8]) and expected[:9] in shown


def test_targets_are_coloured_on_a_terminal(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    said = "\n".join(ask(capsys, bench.recipe))
    assert "\x1b[32m" in said and "\x1b[0m" in said and "«" not in said


def test_as_many_as_asked_for_and_no_torch(bench: Bench) -> None:
    done = subprocess.run(
        shoal("data", "preview", bench.recipe, "--samples", "5"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert sum(line.startswith("sample") for line in done.stdout.splitlines()) == 5
    program = (
        "import sys\nfrom shoal.cli.main import main\n"
        f"try: main(['data', 'preview', {str(bench.recipe)!r}])\n"
        "except SystemExit: print([n for n in ('torch', 'transformers') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_tags_stand_beside_their_words(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tags.conll"
    path.write_text("Ada B-per\nsails O\n\x1b[31m O\n\n" * 40)
    task = ("task={kind: token-classification}", "data.packing=false", f"data.source={path}")
    said = ask(capsys, bench.recipe, *task)
    assert said[0] == "sample 1 of tags.conll"
    assert re.fullmatch(r"  document 0: \d+ tokens, 3 targets", said[1])
    assert "« Ada/B-per»" in said[2].replace("|", "") or "/B-per" in said[2]
    assert "\x1b" not in "".join(said), "what a terminal would obey is spelt out"


def test_images_have_sizes_and_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(8):
        path = tmp_path / "mine" / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((28, 28), number, dtype=np.uint8)).save(path)
    said = ask(capsys, "digits", f"data.source={tmp_path / 'mine'}", "--samples", "2")
    assert said[0] == "sample 1 of mine" and len(said) == 6
    assert re.fullmatch(r"  pixel_values: uint8 \[1, 28, 28\], from \d to \d", said[1])
    assert said[2] in ("  labels: cat", "  labels: dog")
