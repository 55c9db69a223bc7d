"""The commands: what they print, how they refuse, and how fast they start."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_plan_calibrate import MEASURED
from typer.testing import CliRunner

from shoal.cli import plan, simulate
from shoal.errors import UserError
from shoal.plan.measurements import measurements_path, save_measurements


def run(app, *words: str) -> str:
    """Output of a command that succeeds; its error is raised as it is."""
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_plan_of_a_recipe(tmp_path: Path) -> None:
    image = tmp_path / "plan.svg"
    text = run(plan.app, "quickstart", "--cluster", "8xA100", "--picture", str(image))
    assert "Plan: " in text and "Rejected:" in text and "tokens/s" in text
    assert image.read_text().startswith("<svg")
    data = json.loads(run(plan.app, "quickstart", "--cluster", "8xA100", "--json"))
    assert data["workers"] == 8 and data["plan"]["step_seconds"] > 0
    words = ["quickstart", "--cluster", "2xA100", "--fix", "pipeline=2"]
    assert "Not to be run today: pipeline is not there yet, got 2" in run(plan.app, *words)
    assert json.loads(run(plan.app, *words, "--software", "fsdp", "--json"))["not_yet"] == []


def test_overrides_and_fixed_choices() -> None:
    words = ["quickstart", "parallel.replicate=2", "--cluster", "8xA100", "--json"]
    data = json.loads(run(plan.app, *words, "--fix", "tensor=2", "--fix", "recompute=full"))
    assert data["plan"]["layout"]["replicate"] == 2
    assert data["plan"]["layout"]["tensor"] == 2
    assert data["plan"]["recompute"] == "full"


def test_a_model_without_recipe(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps(
            {
                "model_type": "gpt2",
                "n_embd": 768,
                "n_layer": 12,
                "n_head": 12,
                "n_positions": 1024,
                "vocab_size": 50257,
            }
        )
    )
    words = ["--model", str(path), "--cluster", "4xA100", "--batch", "64"]
    data = json.loads(run(plan.app, *words, "--sequence", "1024", "--json"))
    assert data["plan"]["fits"]
    with pytest.raises(UserError, match="give --sequence"):
        run(plan.app, *words)
    path.write_text("[]")
    with pytest.raises(UserError, match="expected a JSON object"):
        run(plan.app, *words)
    path.write_text("{")
    with pytest.raises(UserError, match=r"cannot be read as a config\.json"):
        run(plan.app, *words)


def test_a_whole_run() -> None:
    words = ["quickstart", "--cluster", "2x8xA100", "--tokens", "2B", "--goal", "devices"]
    text = run(plan.app, *words, "--deadline", "8h", "--budget", "200")
    assert "A run over 2B tokens:" in text and "->" in text and "$" in text
    data = json.loads(run(plan.app, *words, "--json"))
    assert [offer["workers"] for offer in data["offers"]] == [1, 2, 4, 8, 16]
    assert sum(offer["chosen"] for offer in data["offers"]) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give either a recipe"),
        (("--cluster", "A100"), "give either a recipe"),
        (("quickstart", "--precision", "fp7"), "did you mean"),
        (("quickstart", "--software", "megatrn"), "did you mean 'megatron'"),
        (("quickstart", "--cluster", "A100", "--fix", "tensor=x"), "expected NAME=VALUE"),
        (("quickstart", "--cluster", "A100", "--tokens", "2Q"), "--tokens or --deadline"),
        (("quickstart", "--cluster", "A100", "--tokens", "2B", "--goal", "joy"), "known: cost"),
    ],
)
def test_mistakes(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(plan.app, "for", *words)


def test_simulate(tmp_path: Path) -> None:
    out, image = tmp_path / "trace.json", tmp_path / "step.svg"
    words = ["quickstart", "--cluster", "8xA100", "--fix", "pipeline=4"]
    text = run(simulate.app, *words, "--trace", str(out), "--picture", str(image))
    assert "of the passes are bubbles" in text and "kept steps" in text
    assert json.loads(out.read_text())["traceEvents"]
    assert image.read_text().startswith("<svg")
    data = json.loads(run(simulate.app, *words, "--json", "--slow-share", "0.5"))
    assert data["waiting_factor"]["every-step"] > 1.4
    assert 0.9 < data["goodput"] <= 1


@pytest.mark.timed
def test_planning_needs_no_torch_and_starts_fast() -> None:
    """Importing the commands takes 0.1 s of processor time; 1 s leaves room for a busy machine."""
    code = (
        "import time; t = time.process_time()\n"
        "from shoal.cli import plan, simulate\n"
        "spent = time.process_time() - t\n"
        "import shoal.plan.search, shoal.plan.simulate\n"
        "import shoal.plan.goodput, shoal.plan.calibrate, shoal.plan.explain, sys\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "print(spent)"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.0
    assert time.monotonic() - started < 20


def test_this_machine_is_planned_from_its_measurements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Crews instead of layouts; bf16 was not timed there, so fp32 is planned."""
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="run shoal plan --calibrate"):
        run(plan.app, "quickstart")
    save_measurements(MEASURED, measurements_path())
    text = run(plan.app, "quickstart")
    assert "in fp32, on two cores, " in text
    assert "Plan: " in text and " threads x 1 thread; micro batch " in text
    data = json.loads(run(plan.app, "quickstart", "--json", "--fix", "micro_batch_samples=2"))
    assert data["plan"]["crew"]["count"] in (1, 2)
    assert data["plan"]["micro_batch_samples"] == 2
    assert "A run over 1M tokens:" in run(plan.app, "quickstart", "--tokens", "1M")
    assert "of the passes are bubbles" in run(simulate.app, "quickstart")


def test_calibrating_with_runs_says_what_was_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    save_measurements(MEASURED, measurements_path())
    runs = []
    for number in range(2):
        runs.append(tmp_path / f"run-{number}")
        runs[-1].mkdir()
        content = {"predicted": {"step_seconds": 1.0}, "outcome": {"step_seconds": 1.1}}
        (runs[-1] / "plan.json").write_text(json.dumps(content))
    text = run(plan.app, "--calibrate", *map(str, runs))
    assert "learned from 2 runs: time x 1.066" in text  # 1.1 to the two thirds
    data = json.loads(run(plan.app, "--calibrate", str(runs[0]), "--json"))
    assert len(data["runs"]) == 2
    with pytest.raises(UserError, match=r"plan\.json: no prediction and measurement"):
        run(plan.app, "--calibrate", str(tmp_path))
