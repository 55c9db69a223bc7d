"""A run goes on with the data, tokenizer and model it was trained on, by content, or says no."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from shoal.checkpoint.manifest import Manifest
from shoal.cli import api
from shoal.cli.main import main
from shoal.errors import ConfigError, RunError
from shoal.launch import local
from shoal.observe.events import read_lines
from tiny import Bench, Run, tales, write_corpus

LENGTH = ("train.steps=12", "train.evaluate_every_steps=0", "checkpoint.every_steps=5")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "own.jsonl")


def paused(bench: Bench, corpus: Path, *more: str) -> Run:
    return bench.train(*LENGTH, f"data.source={corpus}", "train.stop_after_steps=7", *more)


def grow(corpus: Path) -> None:
    more = "".join(json.dumps({"text": text}) + "\n" for text in tales(seed=9, documents=80))
    corpus.write_text(corpus.read_text() + more)


def content(run: Run) -> dict[str, str]:
    """The hashes that the newest checkpoint holds."""
    newest = max((run.path / "checkpoints").glob("step-*"))
    return Manifest.read(newest).state["inputs"]["content"]


def test_data_that_has_grown_is_refused_with_both_ways_on(bench: Bench, corpus: Path) -> None:
    run = paused(bench, corpus)
    before = {path: path.read_bytes() for path in run.path.glob("*.*")}
    grow(corpus)
    with pytest.raises(RunError, match=r"its data is not what step 7 was trained on") as refused:
        bench.resume(run)
    said = str(refused.value)
    assert f"shoal resume {run.path} --data-changed" in said and f"shoal merge {run.path}" in said
    assert {path: path.read_bytes() for path in run.path.glob("*.*")} == before
    assert len(run.losses) == 7


def test_the_way_that_begins_a_new_run_is_one(
    bench: Bench, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands are taken from the message, as a person would."""
    run = paused(bench, corpus)
    grow(corpus)
    with pytest.raises(RunError) as refused:
        bench.resume(run)
    lines = [line.strip() for line in str(refused.value).splitlines()]
    merge, train = (
        next(x for x in lines if x.startswith(f"shoal {w}")) for w in ("merge", "train")
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(merge)[1:])
    assert ended.value.code == 0
    _, _, recipe, *overrides = shlex.split(train)
    kept = {"temperature": 0.6, "top_p": 0.9, "do_sample": True}  # as published models have them
    (tmp_path / "MODEL" / "generation_config.json").write_text(json.dumps(kept))
    new = local.train(
        recipe,
        [*overrides, "train.steps=2", "train.stop_after_steps=null"],
        out=tmp_path / "new",
        pool=bench.pool,
        console=False,
    )
    # it begins where the other was: far below the 5.7 of random weights
    assert Run(new.run).losses[0] < run.losses[0] - 0.2
    api.merge(new.run, tmp_path / "again")
    for folder in (new.run / "model", tmp_path / "again"):
        written = json.loads((folder / "generation_config.json").read_text())
        assert written.items() >= kept.items()


def test_data_that_has_changed_keeps_tokenizer_and_model(
    bench: Bench, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = paused(bench, corpus)
    saved = content(run)
    grow(corpus)
    local.resume(run.path, data_changed=True, console=True, pool=bench.pool)
    assert [row["step"] for row in run.rows if "loss" in row] == list(range(1, 13))
    assert content(run)["tokenizer"] == saved["tokenizer"]
    assert content(run)["data"] != saved["data"]
    assert max(run.losses[7:]) < run.losses[0], "it goes on from what was learned"
    assert "changed: content of data; tokenizer and model stay" in capsys.readouterr().out
    changed = [row for row in read_lines(run.path / "events.jsonl") if row["event"] == "changed"]
    assert {"key": "content of data", "before": saved["data"]}.items() <= changed[-1].items()
    bench.resume(run)  # what it goes on with now is what the newest save says


def test_only_its_content_decides(bench: Bench, corpus: Path) -> None:
    """Touched, copied away and back: the same bytes are the same data."""
    run = paused(bench, corpus)
    text = corpus.read_bytes()
    corpus.unlink()
    corpus.write_bytes(text)
    bench.resume(run)
    assert len(run.losses) == 12


def test_a_tokenizer_of_ones_own_that_was_edited(
    bench: Bench, corpus: Path, tmp_path: Path
) -> None:
    first = paused(bench, corpus)
    folder = tmp_path / "tokenizer"
    inputs = Manifest.read(max((first.path / "checkpoints").glob("step-*"))).state["inputs"]
    shutil.copytree(inputs["tokenizer_directory"], folder)
    run = paused(bench, corpus, f"data.tokenizer={{kind: folder, path: {folder}}}")
    tree = json.loads((folder / "tokenizer.json").read_text())
    tree["model"]["merges"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    for data_changed in (False, True):  # no word makes another tokenizer the same
        with pytest.raises(RunError, match="its tokenizer is not what step 7 was trained on"):
            local.resume(run.path, data_changed=data_changed, console=False, pool=bench.pool)


def test_another_model_in_the_folder(bench: Bench, corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(bench.run(*LENGTH).path / "model", folder)
    run = paused(bench, corpus, f"model.path={folder}", "data.tokenizer.kind=model")
    weights = load_file(folder / "model.safetensors")
    name = next(iter(weights))
    weights[name] = weights[name] + 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match="its model folder is not what step 7 was trained on"):
        bench.resume(run)


def test_a_tokenizer_that_is_gone_cannot_be_kept(
    bench: Bench, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    run = paused(bench, corpus)
    shutil.rmtree(tmp_path / "cache")
    grow(corpus)
    with pytest.raises(
        RunError, match=r"the tokenizer that .* was trained with is gone from there"
    ):
        local.resume(run.path, data_changed=True, console=False, pool=bench.pool)


def test_a_checkpoint_of_an_older_version_still_loads(
    bench: Bench, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = paused(bench, corpus)
    for folder in (run.path / "checkpoints").glob("step-*"):
        manifest = Manifest.read(folder)
        del manifest.state["inputs"]["content"]
        (folder / "manifest.json").write_bytes(manifest.to_bytes())
    local.resume(run.path, console=True, pool=bench.pool)
    assert "step 7 was saved by an older version, without hashes" in capsys.readouterr().out
    assert run.losses == bench.train(*LENGTH, f"data.source={corpus}").losses


@pytest.mark.slow
@pytest.mark.parametrize(
    "where", ["from the beginning", pytest.param("from a save", marks=pytest.mark.slow)]
)
def test_the_same_line_starts_and_goes_on(bench: Bench, where: str) -> None:
    run, line = Run(bench.new_path()), ("train", bench.recipe, *LENGTH, "--go-on", "--out")
    stop = () if where == "from the beginning" else ("train.stop_after_steps=7",)
    first = bench.command(*line, run.path, *stop)
    assert first.returncode == 0, first.stderr
    again = bench.command(*line, run.path)
    assert again.returncode == 0, again.stderr
    assert [row["step"] for row in run.rows if "loss" in row] == list(range(1, 13))
    assert run.digits == bench.run(*LENGTH).digits and run.events.count("started") == 1
    other = bench.command(*line, run.path, "seed=4")
    assert other.returncode == 2 and "seed: cannot change in a run that goes on" in other.stderr


def test_going_on_needs_to_know_where(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "quickstart", "--go-on"])
    assert ended.value.code == 2
    assert "--go-on: expected the run's directory; give it by --out" in capsys.readouterr().err


def test_another_recipe_under_the_same_line(bench: Bench, tmp_path: Path) -> None:
    run = bench.run(*LENGTH)
    recipe = tmp_path / "other.yaml"
    recipe.write_text(
        bench.recipe.read_text().replace("num_hidden_layers: 2", "num_hidden_layers: 3")
    )
    with pytest.raises(ConfigError, match=r"model.num_hidden_layers: cannot change"):
        local.train(recipe, LENGTH, out=run.path, go_on=True, console=False, pool=bench.pool)
