"""`shoal compare`: the runs of its table are those that train makes, and a slow link is one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoal.errors import ConfigError
from shoal.prove.compare import Choice, compare
from tiny import Bench

HOW = ("parallel.replicate=2", "launch.workers=processes", "train.steps=8")
HOW = (*HOW, "train.evaluate_every_steps=4")
DILOCO = "{kind: diloco, every_steps: 4, codec: {kind: int8}}"


def test_the_table_says_what_the_runs_say(bench: Bench, tmp_path: Path) -> None:
    choices = [Choice.of_sync("every-step"), Choice.of_sync(DILOCO)]
    found = compare(bench.recipe, HOW, choices=choices, out=tmp_path, pool=bench.pool)
    assert found.choices == ["every-step", "diloco H=4 codec=int8"]
    first, second = found.outcomes
    for outcome, how in ((first, HOW), (second, (*HOW, f"sync={DILOCO}"))):
        run = bench.run(*how)
        steps = [row for row in run.rows if "loss" in row]
        assert [row[2] for row in outcome.curve] == [
            row["evaluation_loss"] for row in run.evaluations
        ]
        assert outcome.loss == run.evaluations[-1]["evaluation_loss"]
        # what JSON of hashes takes depends on its digits
        assert abs(outcome.sent_bytes - sum(row["sent_bytes"] for row in steps)) < 2000
        assert len(outcome.curve) == 3 and outcome.curve[0][0] == 0
    assert first.tokens == bench.run(*HOW).rows[-2]["tokens"]
    assert second.tokens == pytest.approx(first.tokens, rel=0.1)
    assert (first.staleness, second.staleness) == (0, 4)
    assert second.sent_bytes < 0.1 * first.sent_bytes
    lines = str(found).splitlines()
    assert lines[1].startswith("every-step ") and "100.00%" in lines[1]
    assert f"{second.loss:.4f}" in lines[2] and "1 seed" in lines[3]
    assert json.loads((tmp_path / "compare.json").read_text())["runs"][1]["name"] == second.name
    assert (tmp_path / "compare.png").read_bytes()[:4] == b"\x89PNG"


def test_a_slow_link_takes_its_time_and_changes_no_digit(bench: Bench) -> None:
    """Each all-reduce of n bytes sends n on the link each way, which has 4 MB a second."""
    run = bench.run(*HOW, 'launch.link="32Mbit/s,2ms"')
    clean = bench.run(*HOW)
    assert run.digits == clean.digits
    rows = [row for row in run.rows if "loss" in row]
    sent = sum(row["sent_bytes"] for row in rows)
    assert sum(row["step_seconds"] for row in rows) > sent / 4e6 + 8 * 3 * 0.002


@pytest.mark.slow
def test_only_what_crosses_between_replicas_is_slow(bench: Bench) -> None:
    how = ("train.steps=4", "train.evaluate_every_steps=0", "train.micro_batch_samples=4")
    how = (*how, "launch.workers=processes", "parallel={replicate: 2, tensor: 2}")
    slow = bench.run(*how, 'launch.link="200kbit/s"', "sync={kind: local-sgd, every_steps: end}")
    rows = [row for row in slow.rows if "loss" in row]
    inside = sum(row["sent_bytes"] for row in rows[:-1])
    assert sum(row["step_seconds"] for row in rows[:-1]) < 0.5 * inside / 25e3
    assert rows[-1]["step_seconds"] > 0.5 * 50_000 / 25e3, "a rank's half of the parameters"


@pytest.mark.parametrize(
    ("syncs", "said"),
    [
        (["diloco"], "expected two different choices or more"),
        (["diloco", "diloco"], "expected two different choices or more"),
        (["diloco", "dilco"], "did you mean 'diloco'"),
    ],
)
def test_what_cannot_be_compared(bench: Bench, tmp_path: Path, syncs: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        choices = [Choice.of_sync(text) for text in syncs]
        compare(bench.recipe, HOW, choices=choices, out=tmp_path, pool=bench.pool)
    assert not list(tmp_path.iterdir()), "before anything is trained"


def test_layouts_by_their_degrees() -> None:
    assert Choice.of_layout("replicate=2,tensor=2").overrides == (
        "parallel.replicate=2",
        "parallel.tensor=2",
    )
    with pytest.raises(ConfigError, match="cannot read 'two'"):
        Choice.of_layout("two")


@pytest.mark.slow
def test_the_command(bench: Bench, tmp_path: Path) -> None:
    words = (
        "compare",
        bench.recipe,
        *HOW[2:],
        "--layout",
        "replicate=1",
        "--layout",
        "replicate=2",
    )
    done = bench.command(*map(str, words), "--seeds", "2", "--out", str(tmp_path / "c"))
    assert done.returncode == 0, done.stderr
    assert "2 seeds" in done.stdout and (tmp_path / "c" / "compare.png").is_file()
    again = bench.command(*map(str, words), "--out", str(tmp_path / "c"))
    assert again.returncode != 0 and "exists and is not empty" in again.stderr
