"""README: its map is current, both languages give the same commands, and every command runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from shoal.cli.main import main
from shoal.launch import pool as pools
from shoal.launch.pool import WorkerPool
from tiny import Bench

ROOT = Path(__file__).resolve().parents[2]
README, CHINESE = (ROOT / name for name in ("README.md", "README.zh.md"))

SMALL = [
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.num_hidden_layers=2",
    "data.sequence_tokens=32",
    "data.evaluation_samples=8",
    "data.tokenizer.vocabulary_size=300",
    "train.steps=2",
    "train.global_batch_samples=8",
    "task.sample_tokens=2",
    "observe.console=false",
]
"""The quickstart, small enough to run in a test."""

TAGGING = [
    "model={kind: config, architecture: bert, hidden_size: 32, intermediate_size: 64, "
    "num_hidden_layers: 1, num_attention_heads: 2, max_position_embeddings: 64}",
    "data.source=tags.conll",
    "data.sequence_tokens=32",
    "data.tokenizer.vocabulary_size=300",
    "train.epochs=1",
    "train.global_batch_samples=8",
    "train.schedule.warmup_steps=1",
    "observe.console=false",
]


def blocks(path: Path, language: str) -> list[str]:
    """Fenced blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


def commands(path: Path) -> list[str]:
    """Lines of the shell blocks, without their comments."""
    lines = [
        line.partition("  #")[0].strip()
        for block in blocks(path, "sh")
        for line in block.splitlines()
    ]
    return [line for line in lines if line]


def test_map_is_current() -> None:
    check = [sys.executable, str(ROOT / "scripts" / "readme.py"), "--check"]
    found = subprocess.run(check, capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stdout + found.stderr


def test_both_languages_give_the_same_commands() -> None:
    assert commands(README) == commands(CHINESE)
    assert blocks(README, "python") == blocks(CHINESE, "python")


def test_documents_that_are_linked_exist() -> None:
    for path in (README, CHINESE, ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
            assert (ROOT / target).exists(), f"{path.name} links to {target}, which is not there"


@pytest.mark.parametrize("path", [README, CHINESE], ids=["english", "chinese"])
def test_the_folders_of_the_tests_are_named(path: Path) -> None:
    line = re.search(r"`tests/`\W+(.*?)[)）]", path.read_text(encoding="utf-8"))
    assert line is not None
    holds = [each for each in (ROOT / "tests").iterdir() if any(each.glob("**/test_*.py"))]
    assert sorted(re.findall(r"\w+", line[1])) == sorted(each.name for each in holds)


@pytest.fixture
def workplace(
    bench: Bench, pool: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder with a user's text and tags, where commands take workers from the shared server."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pools, "WorkerPool", lambda: nullcontext(pool))
    sentence = "Ada B-person\nlives O\nin O\nParis B-place\n. O\n\n"
    (tmp_path / "tags.conll").write_text(sentence.replace(" ", "\t") * 60, encoding="utf-8")
    stories = "\n\n\n".join(
        f"Story {n}. " + "The lamp keeper counts apples. " * 8 for n in range(80)
    )
    (tmp_path / "YOUR.txt").write_text(stories, encoding="utf-8")
    return tmp_path


def run(command: str, bench: Bench) -> int:
    """Run one documented command, made small; its exit status."""
    words = shlex.split(command)
    assert words[0] == "shoal", command
    small = [*SMALL] if "data.source=YOUR.txt" in words else [*SMALL, f"data.source={bench.corpus}"]
    if words[1:3] == ["train", "ner"]:
        words += TAGGING
    elif words[1:3] == ["train", "quickstart"] or words[1] in ("evaluate", "parity"):
        words += small
    elif words[1] == "rehearse":
        words += [*small, "train.steps=21", "train.evaluate_every_steps=0"]
    with pytest.raises(SystemExit) as ended:
        main(words[1:])
    return int(ended.value.code or 0)


@pytest.mark.timeout(300)
def test_every_command_runs(workplace: Path, bench: Bench) -> None:
    documented = [line for line in commands(README) if not line.startswith("make ")]
    assert len(documented) >= 10
    for command in documented:
        assert run(command, bench) == 0, command
    assert (workplace / "merged" / "model.safetensors").is_file()


def test_python_example_runs(
    workplace: Path, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = blocks(README, "python")
    assert example.count('"quickstart"') == 1
    small = example.replace('"quickstart"', repr(str(bench.recipe)))
    exec(compile(small, "README.md", "exec"), {})
    printed = re.search(r"^(\d+\.\d+) (\d+\.\d+)$", capsys.readouterr().out, re.MULTILINE)
    assert printed is not None, "the example prints a loss and a speed"
    assert 0 < float(printed[1]) < 10 and float(printed[2]) > 0
    assert (workplace / "runs" / "two" / "summary.json").is_file()


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in commands(README):
        if command.startswith("make "):
            assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE), command
