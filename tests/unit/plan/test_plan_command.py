"""The commands: what they print, how they refuse, and how fast they start."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shoal.cli.main import app
from shoal.config.load import load_recipe
from shoal.errors import UserError


def run(*words: str) -> str:
    """Output of a command that succeeds; its error is raised as it is."""
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_plan_of_a_recipe(tmp_path: Path) -> None:
    """Only what shoal runs, and the command that runs it; another program may do more."""
    image = tmp_path / "plan.svg"
    text = run("plan", "quickstart", "--cluster", "8xA100", "--picture", str(image))
    assert "Plan: " in text and "Other families:" in text and "tokens/s, MFU" in text
    assert "predicted" in text and "One device is enough" in text and "CUDA context" in text
    assert "<svg" in image.read_text()
    data = json.loads(run("plan", "quickstart", "--cluster", "8xA100", "--json"))
    assert data["workers"] == 8 and data["plan"]["step_seconds"] > 0
    plans = [data["plan"], *data["runners_up"], *data["rejected"].values()]
    assert len(plans) > 3 and not any(each["not_yet"] for each in plans)
    diloco = run("plan", "quickstart", "--cluster", "2xA100", "--fix", "policy=diloco")
    assert "sync={kind: diloco, every_steps: 1}" in diloco
    server = run("plan", "quickstart", "--cluster", "2xA100", "--fix", "policy=server")
    assert "Not in shoal yet" not in server and "shoal train" in server


def test_what_shoal_cannot_run_yet_is_listed_apart() -> None:
    text = run("plan", "quickstart", "--cluster", "2x8xA100")
    plan, _, later = text.partition("Not in shoal yet, would be: ")
    assert "\n" not in later.strip()
    assert "context 2" not in plan
    said = run("simulate", "quickstart", "--cluster", "2x8xA100")
    plan, _, later = said.partition("Not in shoal yet, would be: ")
    assert "every-step" in plan and "diloco (every steps 100)" in plan and not later


def test_the_command_that_is_printed_runs_the_plan(tmp_path: Path) -> None:
    """Read back as a recipe it is the layout, level, recompute and micro batch of the plan."""
    words = ["quickstart", "seed=3", "--cluster", "8xA100"]
    fixed = ["--fix", "shard=4", "--fix", "tensor=2", "--fix", "level=gradients"]
    fixed += ["--fix", "recompute=full"]
    line = next(line for line in run("plan", *words, *fixed).splitlines() if "shoal train" in line)
    name, *overrides = shlex.split(line)[2:]
    recipe = load_recipe(name, overrides)
    assert (recipe.parallel.sharding.degree, recipe.parallel.sharding.level) == (4, "gradients")
    assert (recipe.parallel.tensor, recipe.parallel.replicate) == (2, 1)
    assert recipe.parallel.recompute == "full" and recipe.seed == 3
    assert isinstance(recipe.train.micro_batch_samples, int)


def test_an_override_with_spaces_is_quoted() -> None:
    muon = "train.optimizer={kind: muon, learning_rate: 0.02}"
    (line,) = (
        each
        for each in run("plan", "quickstart", muon, "--cluster", "2xA100").splitlines()
        if "shoal train" in each
    )
    assert muon in shlex.split(line)


@pytest.mark.parametrize("command", ["plan", "simulate"])
def test_several_machines_are_not_recommended(command: str, tmp_path: Path) -> None:
    """What would be, that it cannot run yet, and what runs on one of them today."""
    said = run(command, "quickstart", "--cluster", "2x8xA100")
    assert "Not in shoal yet: workers on other machines\nIt would be: " in said
    assert "Plan: " not in said
    today = said[said.index("Today, on one of them: ") :].splitlines()[1]
    degrees = load_recipe(*_recipe_and_overrides(today)).parallel
    assert (degrees.replicas or 1) * degrees.sharding.degree * (degrees.tensor or 1) == 8
    data = json.loads(run(command, "quickstart", "--cluster", "2x8xA100", "--json"))
    assert data["command"] is None and data["not_yet"] == ["workers on other machines"]
    large = large_model(tmp_path)
    assert "does not fit on one of these" in run(command, *large, "--cluster", "8x8xA100")


def test_a_whole_run_on_several_machines(tmp_path: Path) -> None:
    words = ["quickstart", "--cluster", "2xA100", "--tokens", "2B"]
    assert "\nPlan: " in run("plan", *words)
    large = run("plan", *large_model(tmp_path), "--cluster", "8x8xA100", "--tokens", "2B")
    assert "Not in shoal yet: workers on other machines\nIt would be: " in large
    assert "Plan: " not in large and "shoal train" not in large


def large_model(folder: Path) -> list[str]:
    """Arguments for a llama of 70B parameters, which no single node holds."""
    config = {"model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80}
    config |= {"num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 28672}
    path = folder / "config.json"
    path.write_text(json.dumps(config | {"vocab_size": 128256}))
    return ["--model", str(path), "--sequence", "4096", "--batch", "64"]


@pytest.mark.parametrize("command", ["plan", "simulate"])
def test_a_plan_says_how_to_run_it_and_how_far_to_trust_it(command: str) -> None:
    said = run(command, "quickstart", "seed=3", "--cluster", "8xA100")
    assert "half of 1,206 published runs lie within 13 %" in said
    assert "One device is enough: it takes" in said
    line = next(line for line in said.splitlines() if "shoal train" in line)
    assert load_recipe(*_recipe_and_overrides(line)).seed == 3
    data = json.loads(run(command, "quickstart", "seed=3", "--cluster", "8xA100", "--json"))
    assert data["command"] == line.strip()


def _recipe_and_overrides(line: str) -> tuple[str, list[str]]:
    name, *overrides = shlex.split(line)[2:]
    return name, overrides


def test_a_recipe_that_no_axis_may_cut_is_replicated() -> None:
    """Exact mode: the start refuses it with shard and tensor, so the plan never says so."""
    data = json.loads(
        run("plan", "quickstart", "train.exact=true", "--cluster", "8xA100", "--json")
    )
    assert data["plan"]["layout"]["replicate"] == 8


def test_overrides_and_fixed_choices() -> None:
    words = ["quickstart", "parallel.replicate=2", "--cluster", "8xA100", "--json"]
    data = json.loads(run("plan", *words, "--fix", "tensor=2", "--fix", "recompute=full"))
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
    data = json.loads(run("plan", *words, "--sequence", "1024", "--json"))
    assert data["plan"]["fits"]
    with pytest.raises(UserError, match="give --sequence"):
        run("plan", *words)
    path.write_text("[]")
    with pytest.raises(UserError, match="expected a JSON object"):
        run("plan", *words)
    for text in ("{", "[" * 100_000, "\x00"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"cannot be read as a config\.json"):
            run("plan", *words)


def test_a_whole_run() -> None:
    words = ["quickstart", "--cluster", "2x8xA100", "--tokens", "2B", "--goal", "devices"]
    text = run("plan", *words, "--deadline", "8h", "--budget", "200")
    assert "A run over 2B tokens (predicted):" in text and "->" in text and "$" in text
    assert "One device is enough" not in text, "it is what was chosen"
    fastest = run("plan", "quickstart", "--cluster", "8xA100", "--tokens", "2B")
    assert "One device is enough: the plan is 1 x as fast as it" in fastest
    data = json.loads(run("plan", *words, "--json"))
    assert [offer["workers"] for offer in data["offers"]] == [1, 2, 4, 8, 16]
    assert sum(offer["chosen"] for offer in data["offers"]) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("quickstart", "--tokens", "2B"), "--tokens needs --cluster, such as 8xH100"),
        (("--model", "x.json"), "--model needs --cluster"),
        (("quickstart", "--cluster", "A100", "--model", "x.json"), "give either a recipe"),
        (("--cluster", "A100"), "give either a recipe"),
        (("quickstart", "--cluster", "A100", "--precision", "fp7"), "did you mean"),
        (("quickstart", "--cluster", "A100", "--fix", "tensor=x"), "expected NAME=VALUE"),
        (
            ("quickstart", "--cluster", "A100", "--fix", "shard=3", "--fix", "expert=2"),
            "--fix: expert: 2 does not divide",
        ),
        (("quickstart", "--cluster", "A100", "--tokens", "2Q"), "--tokens or --deadline"),
        (("quickstart", "--cluster", "A100", "--tokens", "2B", "--goal", "joy"), "known: cost"),
    ],
)
def test_mistakes(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run("plan", *words)


def test_the_command_of_a_pipeline_is_its_plan() -> None:
    words = ["quickstart", "--cluster", "4xA100", "--fix", "pipeline=2", "--fix", "replicate=2"]
    schedule = ["--fix", "schedule=interleaved-1f1b", "--fix", "micro_batch_samples=1"]
    text = run("plan", *words, *schedule)
    line = next(line for line in text.splitlines() if "shoal train" in line)
    name, *overrides = shlex.split(line)[2:]
    given = load_recipe(name, overrides).parallel.pipelining
    assert (given.degree, given.schedule, given.stages) == (2, "interleaved-1f1b", 2)


def test_simulate(tmp_path: Path) -> None:
    out, image = tmp_path / "trace.json", tmp_path / "step.svg"
    words = ["quickstart", "--cluster", "8xA100", "--fix", "pipeline=4"]
    text = run("simulate", *words, "--trace", str(out), "--picture", str(image))
    assert "of the passes are bubbles" in text and "kept steps" in text
    assert json.loads(out.read_text())["traceEvents"]
    assert "<svg" in image.read_text()
    data = json.loads(run("simulate", *words, "--json", "--slow-share", "0.5"))
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
        "import shoal.plan.goodput, shoal.plan.picture, shoal.plan.explain, sys\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "print(spent)"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.0
    assert time.monotonic() - started < 20
