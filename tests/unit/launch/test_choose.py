"""What is decided at a start: timed where the recipe leaves it open, by rule where it does not."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from shoal.cli.main import app
from shoal.config.load import load_recipe
from shoal.config.recipe import Recipe
from shoal.engine.decision import Decision, given_layout
from shoal.engine.job import Inputs
from shoal.environment import usable_cores
from shoal.errors import ModelError
from shoal.launch import choose, local, timings, tune
from shoal.launch.candidates import Timed, best_of
from shoal.launch.choose import check_decision_respects_recipe
from shoal.launch.devices import on_devices
from shoal.launch.prepare import prepare_inputs
from shoal.launch.refuse import refuse_illegal
from shoal.launch.summary import last_words
from shoal.layout import Layout
from shoal.observe.console import Console
from shoal.plan.from_recipe import config_of, workload_of
from tiny import Bench, Run
from unit.models.tiny_models import SETTINGS

pytestmark = pytest.mark.timed  # setups are timed, by workers that must be alone

OPEN = (
    "parallel=auto",
    "train.micro_batch_samples=auto",
    "launch.workers=auto",
    "launch.threads_per_worker=auto",
    "train.steps=6",
    "train.evaluate_every_steps=0",
    "checkpoint.every_steps=0",
)


def plan_of(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.path / "plan.json").read_text())
    return found


def given(bench: Bench, *overrides: str) -> tuple[Recipe, Inputs]:
    recipe = load_recipe(str(bench.recipe), [*OPEN, *overrides])
    return recipe, prepare_inputs(recipe, say=lambda text: None)


def chosen(bench: Bench, *overrides: str) -> tuple[Decision, str]:
    """What a start would decide, and what it says meanwhile."""
    recipe, inputs = given(bench, *overrides)
    out = io.StringIO()
    console = Console(out=out)
    return choose.choose(recipe, inputs=inputs, pool=bench.pool, console=console), out.getvalue()


@pytest.fixture(scope="module")
def planned(bench: Bench) -> Run:
    """A run that chose for itself."""
    return bench.train(*OPEN)


def test_every_way_to_use_the_cores_is_timed_and_the_second_start_times_nothing(
    bench: Bench, planned: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, cores = plan_of(planned), usable_cores()
    rows = [Timed.from_json(row) for row in plan["measured"]["candidates"]]
    ways = {(row.setup.workers, row.setup.count) for row in rows}
    assert {("processes", 1)} <= ways
    if cores > 1:
        assert {("threads", cores), ("processes", cores)} <= ways
        assert any(row.is_one_core for row in rows), "the speed-up is told from it"
    best = best_of(rows)
    assert plan["predicted"]["step_seconds"] == best.step_seconds
    assert plan["reason"].startswith(f"{best.step_seconds:.3g} s a step (")
    assert "; timed in " in plan["reason"]
    local.train(bench.recipe, OPEN, out=bench.new_path(), console=True, pool=bench.pool)
    said = capsys.readouterr().out
    assert f"plan: {best.setup}, micro batch {best.micro}, float32: " in said
    assert "timed before on this machine" in said and "timing" not in said


def test_the_plan_without_a_cluster_is_the_table_of_what_was_timed(
    bench: Bench, planned: Run
) -> None:
    rows = [Timed.from_json(row) for row in plan_of(planned)["measured"]["candidates"]]
    done = CliRunner().invoke(app, ["plan", str(bench.recipe), *OPEN], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    chosen = next(line for line in done.output.splitlines() if line.strip().startswith("->"))
    assert str(best_of(rows).setup) in chosen
    assert all(f"{row.step_seconds:.3g}" in done.output for row in rows)
    assert f"shoal train {bench.recipe} parallel=auto" in done.output
    as_json = CliRunner().invoke(app, ["plan", str(bench.recipe), *OPEN, "--json"])
    tree = json.loads(as_json.stdout)
    assert [Timed.from_json(row).to_json() for row in tree["measured"]["candidates"]] == [
        row.to_json() for row in rows
    ]


def test_nothing_of_a_timing_is_written_but_the_cache(bench: Bench, tmp_path: Path) -> None:
    before = set(bench.folder.rglob("*"))
    chosen(bench, "train.global_batch_samples=8")
    assert set(bench.folder.rglob("*")) == before


def test_a_run_says_how_much_faster_it_is_than_one_core(planned: Run) -> None:
    plan, summary = plan_of(planned), json.loads((planned.path / "summary.json").read_text())
    words = " ".join(last_words(planned.path, summary, recipe="tiny.yaml"))
    rows = [Timed.from_json(row) for row in plan["measured"]["candidates"]]
    best = best_of(rows)
    others = [row for row in rows if row.is_one_core != best.is_one_core]
    beside = min(others, key=lambda row: row.step_seconds)
    factor = beside.step_seconds / best.step_seconds
    assert f"{factor:.2f} x as fast as {beside.setup} (timed in turns" in words


def test_a_damaged_cache_is_said_and_made_anew(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    chosen(bench)
    kept = next((tmp_path / "timed").iterdir())
    formats = next((tmp_path / "machines").iterdir())
    kept.write_text("{")
    formats.write_text("{}x")
    decision, said = chosen(bench)
    assert f"warning: {kept} is damaged" in said and "timing anew" in said
    assert f"warning: {formats} is damaged" in said
    assert "; timed in " in decision.reason
    assert "timed before" in chosen(bench)[0].reason
    whole = json.loads(formats.read_text())
    for odd in ({"devices": 0}, {**whole, "peaks": None}, {**whole, "compute": "float8"}, [whole]):
        formats.write_text(json.dumps(odd))
        assert f"warning: {formats} is damaged" in chosen(bench)[1]
        assert json.loads(formats.read_text()).keys() >= whole.keys(), "made anew"


def test_other_recipes_are_timed_apart_and_what_bears_on_no_time_is_not(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    chosen(bench)
    same = chosen(bench, "train.steps=7", "train.optimizer={kind: adamw, learning_rate: 1.0e-4}")
    assert "timed before" in same[0].reason
    assert "timed in" in chosen(bench, "train.global_batch_samples=8")[0].reason
    monkeypatch.setattr(timings, "version", lambda name: "9.9")
    assert "timed in" in chosen(bench)[0].reason


def test_without_tuning_all_cores_are_used_by_rule(bench: Bench) -> None:
    decision, said = chosen(bench, "launch.tune=false")
    cores = usable_cores()
    assert decision.setup.count * decision.setup.threads == cores
    assert cores == 1 or decision.workers == "threads"
    assert decision.reason.endswith("not timed (launch.tune is false)")
    assert "timing" not in said and not decision.measured


def test_what_cannot_be_timed_falls_back_to_all_cores(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers that die or never answer: the run begins all the same, with all cores."""
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    monkeypatch.setattr(tune, "_TARGET", "lame_worker:run")
    monkeypatch.setattr(tune, "TUNE_SECONDS", 1.0)
    decision, _ = chosen(bench)
    assert decision.setup.count * decision.setup.threads == usable_cores()
    assert decision.reason.endswith("not timed (no setup was ready within 1 s)")
    monkeypatch.setattr(timings, "free_memory_bytes", lambda: 1000)
    assert chosen(bench)[0].reason.endswith("beside one another)")


def test_a_recipe_that_no_worker_can_build_is_told_before_it_starts(bench: Bench) -> None:
    _, said = chosen(bench, "train.freeze=[nonsense]")
    assert "warning: a setup could not be timed: " in said and "nonsense" in said


def test_a_model_that_transformers_cannot_run_is_refused_before_it_starts(bench: Bench) -> None:
    with pytest.raises(ModelError, match=r"transformers cannot run it on its rows.*nonsense"):
        chosen(bench, "model.hidden_act=nonsense")


def test_a_run_says_what_was_predicted_of_it(planned: Run) -> None:
    """Memory is counted tensor by tensor: 15 % is what the planner promises."""
    plan, summary = plan_of(planned), json.loads((planned.path / "summary.json").read_text())
    predicted, outcome = plan["predicted"], plan["outcome"]
    assert predicted["peak_memory_bytes"] == pytest.approx(outcome["peak_memory_bytes"], rel=0.15)
    error = predicted["step_seconds"] / outcome["step_seconds"] - 1
    assert summary["prediction_error"] == pytest.approx(error)
    assert all(0 < row["mfu"] < 1 for row in planned.rows if "loss" in row)


@pytest.mark.parametrize("kind, micro", [("processes", 2), ("processes", 8), ("threads", 8)])
def test_what_is_fixed_on_auto_stays_and_the_rest_is_chosen(
    bench: Bench, kind: str, micro: int
) -> None:
    run = bench.train(
        *OPEN,
        "parallel={auto: true, replicate: 2}",
        f"launch.workers={kind}",
        "launch.threads_per_worker=1",
        f"train.micro_batch_samples={micro}",
    )
    plan = plan_of(run)
    assert (plan["layout"]["replicate"], plan["workers"]) == (2, kind)
    assert (plan["micro_batch_samples"], plan["threads_per_worker"]) == (micro, 1)


@pytest.mark.parametrize(
    "given_by, message",
    [
        ("train.micro_batch_samples=8", "train.micro_batch_samples: the recipe says 8, the plan"),
        ("launch.threads_per_worker=3", "launch.threads_per_worker: the recipe says 3"),
        ("launch.workers=threads", "launch.workers: the recipe says threads"),
        ("precision.compute=bfloat16", "precision.compute: the recipe says bfloat16"),
        ("parallel={auto: true, replicate: 4}", "parallel.replicate: the recipe says 4"),
        ("parallel={auto: true, shard: 2}", "parallel.shard: the recipe says 2"),
        (
            "parallel={auto: true, shard: {degree: 4, level: gradients}}",
            "parallel.shard.level: the recipe says gradients, the plan took optimizer",
        ),
        ("parallel={auto: true, recompute: full}", "parallel.recompute: the recipe says full"),
    ],
)
def test_a_plan_that_ignores_a_key_is_an_error_of_ours(
    bench: Bench, given_by: str, message: str
) -> None:
    recipe = load_recipe(str(bench.recipe), [*OPEN, "precision.compute=auto", given_by])
    layout = Layout(shard=4) if "degree: 4" in given_by else Layout(replicate=2)
    taken = Decision(layout, "processes", 1, 2, "float32", "planned")
    taken = replace(taken, shard_level="optimizer", recompute="none")
    with pytest.raises(RuntimeError, match=message):
        check_decision_respects_recipe(recipe, taken)
    check_decision_respects_recipe(
        load_recipe(str(bench.recipe), [*OPEN, "precision.compute=auto"]), taken
    )


def test_the_memory_of_a_given_layout_is_predicted(bench: Bench) -> None:
    run = bench.train("train.steps=4", "train.evaluate_every_steps=0", "checkpoint.every_steps=0")
    plan = plan_of(run)
    assert (
        plan["reason"].startswith("as the recipe says") and "step_seconds" not in plan["predicted"]
    )
    assert plan["predicted"]["peak_memory_bytes"] == pytest.approx(
        plan["outcome"]["peak_memory_bytes"], rel=0.15
    )


FORMATS = {
    "devices": 2,
    "device_name": "NVIDIA H100 80GB HBM3",
    "format_ratio": 12.0,
    "compute": "bfloat16",
    "peaks": {"float32": 5e13, "bfloat16": 6e14},
}


def planned_on(
    recipe: Recipe, *, config: Mapping[str, Any], devices: int, name: str = FORMATS["device_name"]
) -> Decision:
    layout = given_layout(recipe)
    formats = {**FORMATS, "devices": devices, "device_name": name}
    room = replace(layout, replicate=recipe.parallel.replicas or devices // layout.replica_workers)
    return on_devices(
        recipe,
        choose._by_rule(recipe, layout=room, cores=devices, formats=formats),
        workload=workload_of(recipe, config=config, precision="bf16"),
        layout=room,
        devices=devices,
        device_name=name,
    )


LARGE = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
"""Llama 3 8B: with float32 weights, gradients and moments 128 GB, more than any device has."""


def large(*overrides: str) -> Recipe:
    words = ["parallel=auto", "train.global_batch_samples=64", "data.sequence_tokens=4096"]
    return load_recipe("quickstart", [*words, *overrides])


def test_a_model_that_no_device_holds_is_cut(bench: Bench) -> None:
    """Of 8 devices, within the axes that can run, and such that it fits by prediction."""
    decision = planned_on(large(), config=LARGE, devices=8)
    layout = decision.layout
    assert layout.workers == 8 and layout.shard * layout.tensor >= 2
    assert (layout.context, layout.pipeline, layout.expert) == (1, 1, 1)
    assert decision.predicted["peak_memory_bytes"] < 80e9
    assert decision.reason.endswith("on H100-80; whole replicas do not fit")
    assert decision.shard_level in ("parameters", "gradients", "optimizer")
    assert Decision.from_json(json.loads(json.dumps(decision.to_json()))) == decision


def test_what_the_recipe_gives_stays(bench: Bench) -> None:
    """A given axis, level or recompute is never changed by the plan."""
    given_tensor = planned_on(large("parallel.tensor=2"), config=LARGE, devices=8)
    assert given_tensor.layout.tensor == 2 and given_tensor.layout.workers == 8
    level = "parallel.shard={degree: 4, level: optimizer}"
    given_level = planned_on(large(level), config=LARGE, devices=8)
    assert (given_level.layout.shard, given_level.shard_level) == (4, "optimizer")
    full = planned_on(large("parallel.recompute=full"), config=LARGE, devices=8)
    assert full.recompute == "full"
    framework = planned_on(large("model.dropout=framework"), config=LARGE, devices=8)
    assert framework.layout.tensor == 1
    muon = "train.optimizer={kind: muon, learning_rate: 0.02, adamw_learning_rate: 3.0e-3}"
    assert planned_on(large(muon), config=LARGE, devices=8).layout.workers == 8


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "phi3"])
@pytest.mark.parametrize("devices", [1, 3, 4, 6])
def test_what_is_chosen_is_legal(family: str, devices: int) -> None:
    """The rules that refuse a recipe before it starts have nothing against a planned one."""
    config = {**SETTINGS[family], "model_type": family, "vocab_size": 4096}
    recipe = load_recipe("quickstart", ["parallel=auto", "train.global_batch_samples=48"])
    decision = planned_on(recipe, config=config, devices=devices)
    assert decision.layout.workers == devices
    assert (
        48 // decision.layout.replicate // decision.layout.shard % (decision.micro_batch_samples)
        == 0
    )
    refuse_illegal(recipe, decision.layout, config=config)


def test_devices_are_planned_from_the_hardware_table(bench: Bench) -> None:
    """One process per device; the micro batch is the planner's; the peak that of the data sheet."""
    recipe, _ = given(bench)
    workload = workload_of(recipe, config=config_of(recipe), precision="bf16")
    decision = planned_on(recipe, config=config_of(recipe), devices=2)
    assert (decision.workers, decision.layout.replicate) == ("processes", 2)
    assert decision.reason.startswith("predicted ") and decision.reason.endswith(" on H100-80")
    assert decision.predicted["step_seconds"] > 0
    whole = choose._with_figures(recipe, decision, workload=workload, formats=FORMATS)
    assert whole.peak_flops_per_second == pytest.approx(2 * 989.4e12)
    unknown = {**FORMATS, "device_name": "Brand X"}
    decision = planned_on(recipe, config=config_of(recipe), devices=2, name="Brand X")
    assert "Brand X is unknown" in decision.reason
    whole = choose._with_figures(recipe, decision, workload=workload, formats=unknown)
    assert whole.peak_flops_per_second is None
    assert whole.mfu(tokens=100, seconds=1.0) is None


def test_a_family_without_sizes_is_decided_by_rule(bench: Bench) -> None:
    recipe, inputs = given(bench, "launch.tune=false")
    tree = recipe.model_dump(mode="json")
    tree["model"] = {"kind": "config", "architecture": "stablelm", "hidden_size": 32}
    other = Recipe.model_validate(tree)
    console = Console(out=io.StringIO())
    decision = choose.choose(other, inputs=inputs, pool=bench.pool, console=console)
    assert decision.reason.startswith("by rule")
    assert decision.flops_per_token is None
    assert decision.mfu(tokens=100, seconds=1.0) is None
    assert asdict(decision) == asdict(type(decision).from_json(decision.to_json()))
