"""What is decided at a start: planned, timed where plans are close, by rule where given."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from shoal.config.load import load_recipe
from shoal.config.recipe import Recipe
from shoal.engine.decision import Decision, given_layout
from shoal.engine.prepare import Inputs, prepare_inputs
from shoal.environment import usable_cores
from shoal.errors import UserError, WorkerError
from shoal.launch import choose, local
from shoal.launch.choose import with_speedup
from shoal.launch.devices import on_devices
from shoal.launch.measuring import learn_from, measured_before
from shoal.launch.refuse import check, refuse_illegal
from shoal.launch.summary import last_words
from shoal.launch.trial import Trial
from shoal.layout import Layout
from shoal.observe.console import Console
from shoal.plan.calibrate import rates_of
from shoal.plan.from_recipe import config_of, workload_of
from shoal.plan.measurements import load_measurements, measurements_path
from shoal.plan.workload import Crew
from tiny import Bench, Run
from unit.models.tiny_models import SETTINGS

pytestmark = pytest.mark.timed  # machines and plans are timed, by workers that must be alone

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


def given(tmp_path: Path, bench: Bench, *overrides: str) -> tuple[Recipe, Inputs]:
    recipe = load_recipe(str(bench.recipe), [*OPEN, *overrides])
    return recipe, prepare_inputs(recipe, say=lambda text: None)


def trial_of(recipe: Recipe, inputs: Inputs, **more: float) -> Trial:
    """A trial on this machine, which a run has measured."""
    known = measured_before()
    assert known is not None
    config = config_of(recipe, vocabulary_size=inputs.vocabulary_size)
    workload = workload_of(recipe, config=config, precision="fp32")
    return Trial(recipe, inputs=inputs, measured=known, workload=workload, **more)


@pytest.fixture(scope="module")
def planned(bench: Bench) -> Run:
    """A run that chose for itself; the first on this machine measures it (some ten seconds)."""
    return bench.train(*OPEN)


def test_the_machine_is_measured_once_and_the_best_plans_are_timed(
    bench: Bench, planned: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = load_measurements(measurements_path())
    assert measured.is_short
    assert {each.threads for each in measured.conditions} >= {1}
    assert measured.start_seconds > 0
    plan = plan_of(planned)
    assert plan["reason"].startswith(("timed", "planned"))
    assert plan["measured"]["plans"][0]["predicted_step_seconds"] > 0
    local.train(bench.recipe, OPEN, out=bench.new_path(), console=True, pool=bench.pool)
    said = capsys.readouterr().out
    assert "plan: " in said and plan["reason"] in said
    assert "measuring" not in said and "timing" not in said


def test_a_run_says_how_much_faster_it_is_than_one_worker(planned: Run) -> None:
    """Whatever was chosen, and however far one worker was predicted to lie behind."""
    plan, summary = plan_of(planned), json.loads((planned.path / "summary.json").read_text())
    measured, crews = plan["measured"], {each["crew"] for each in plan["measured"]["plans"]}
    words = " ".join(last_words(planned.path, summary, recipe="tiny.yaml"))
    assert any(crew.startswith("1 worker") for crew in crews), crews
    if plan["layout"]["replicate"] > 1:
        assert measured["speedup"] > 0
        assert f"{measured['speedup']:.2f} x one worker" in words
    else:
        assert "one worker is" in words


def test_where_the_best_plan_is_too_slow_to_time_no_other_is_timed_instead(
    bench: Bench, tmp_path: Path, planned: Run
) -> None:
    """Or the run would take a worse plan, because that one could be timed."""
    recipe, inputs = given(tmp_path, bench)
    trial = trial_of(recipe, inputs, budget_seconds=1.0)
    first, *rest = trial._contenders(check(recipe))
    assert any(each.crew.count == 1 for each in (first, *rest)) and rest
    slow, quick = replace(first, pass_seconds=1.0), [replace(e, pass_seconds=0.01) for e in rest]
    assert trial._affordable([slow, *quick]) == []
    assert trial._affordable([replace(first, pass_seconds=0.01), *quick])


def test_one_worker_chosen_among_lone_ones_is_still_compared_with_replicas(
    bench: Bench, tmp_path: Path, planned: Run
) -> None:
    """Where only lone workers were close enough to be timed; it said that one was asked for."""
    recipe, inputs = given(tmp_path, bench)
    trial = trial_of(recipe, inputs)
    contenders = trial._contenders(check(recipe))
    lone = next(each for each in contenders if each.crew.count == 1)
    record = trial._record(lone, steps={lone: 1.0}, timed={lone: 0.5}, contenders=contenders)
    best = min(each.plan.step_seconds for each in contenders if each.crew.count > 1)
    assert record["why_one"] == f"one worker is {best:.2f} x the best of replicas"


def test_the_speed_up_is_timed_at_the_end_where_the_start_had_no_time(
    bench: Bench, tmp_path: Path, planned: Run
) -> None:
    recipe, inputs = given(tmp_path, bench)
    console, trial = Console(out=io.StringIO()), trial_of(recipe, inputs)
    pair = next(each for each in trial._contenders(check(recipe)) if each.crew.count == 2)
    kind = "threads" if pair.crew.workers == "threads" else "processes"
    layout, threads = pair.plan.candidate.layout, pair.crew.threads
    decision = Decision(layout, kind, threads, pair.micro, "float32", "planned", {"plans": []})
    found = with_speedup(recipe, decision, inputs=inputs, pool=bench.pool, console=console)
    assert 0.05 < found.measured["speedup"] < 20, "few samples, on a machine that may be busy"
    again = with_speedup(recipe, found, inputs=inputs, pool=bench.pool, console=console)
    assert again == found

    def failing(*_: object, **__: object) -> float:
        raise WorkerError("rank 0 was killed")

    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trial, "speedup", failing)
        console = Console(out=said)
        kept = with_speedup(recipe, decision, inputs=inputs, pool=bench.pool, console=console)
    assert kept == decision and "rank 0 was killed" in said.getvalue()
    given_one = replace(decision, measured={})
    same = with_speedup(recipe, given_one, inputs=inputs, pool=bench.pool, console=console)
    assert same == given_one


def test_a_run_says_what_was_foretold_of_it(planned: Run) -> None:
    """Memory is counted tensor by tensor: 15 % is what the planner promises (DESIGN 5.9)."""
    plan, summary = plan_of(planned), json.loads((planned.path / "summary.json").read_text())
    predicted, outcome = plan["predicted"], plan["outcome"]
    assert predicted["peak_memory_bytes"] == pytest.approx(outcome["peak_memory_bytes"], rel=0.15)
    error = predicted["step_seconds"] / outcome["step_seconds"] - 1
    assert summary["prediction_error"] == pytest.approx(error)
    assert all(0 < row["mfu"] < 1 for row in planned.rows if "loss" in row)


@pytest.mark.parametrize("kind, micro", [("processes", 2), ("processes", 8), ("threads", 8)])
def test_what_is_fixed_on_auto_stays_and_the_rest_is_planned(
    bench: Bench, planned: Run, kind: str, micro: int
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
    assert plan["predicted"]["step_seconds"] > 0


@pytest.mark.parametrize("first, then", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_machine_measured_for_one_format_plans_the_others(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, then: str
) -> None:
    """A run in another format was refused, and what is on auto never learned of the faster one."""
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    bench.train(*OPEN, f"precision.compute={first}")
    fixed = plan_of(bench.train(*OPEN[4:], f"precision.compute={then}"))
    assert fixed["predicted"]["step_seconds"] > 0
    free = plan_of(bench.train(*OPEN, "precision.compute=auto"))
    assert free["measured"]["format_ratio"] > 0
    known = load_measurements(measurements_path())
    rates = rates_of(known, Crew("processes", usable_cores(), 1))
    seconds = {n: rates.attention(precision=n, row=256, head_size=64) for n in ("fp32", "bf16")}
    assert min(seconds.values()) > 0, "attention was foretold to take no time"


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
        choose._honoured(recipe, taken)
    choose._honoured(load_recipe(str(bench.recipe), [*OPEN, "precision.compute=auto"]), taken)


def test_a_given_layout_is_foretold_on_a_known_machine(bench: Bench, planned: Run) -> None:
    run = bench.train("train.steps=4", "train.evaluate_every_steps=0", "checkpoint.every_steps=0")
    plan = plan_of(run)
    assert plan["reason"].startswith("as the recipe says")
    assert plan["predicted"]["peak_memory_bytes"] == pytest.approx(
        plan["outcome"]["peak_memory_bytes"], rel=0.15
    )


def test_runs_teach_the_planner_once_each(
    bench: Bench, planned: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = measurements_path().read_text()
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="run shoal plan --calibrate first, then give runs"):
        learn_from([planned.path])
    measurements_path().parent.mkdir()
    measurements_path().write_text(known)
    learn_from([planned.path])
    learned = learn_from([planned.path])
    assert [each.run for each in learned.runs] == [str(planned.path.resolve())]
    assert measured_before() == learned


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
    whole = planned_on(large(muon), config=LARGE, devices=8)
    assert whole.layout.replica_workers == 1 and whole.reason.endswith("it may not fit")


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


def test_devices_are_planned_from_the_hardware_table(tmp_path: Path, bench: Bench) -> None:
    """One process per device; the micro batch is the planner's; the peak that of the data sheet."""
    recipe, _ = given(tmp_path, bench)
    workload = workload_of(recipe, config=config_of(recipe), precision="bf16")
    decision = planned_on(recipe, config=config_of(recipe), devices=2)
    assert (decision.workers, decision.layout.replicate) == ("processes", 2)
    assert decision.reason.startswith("planned ") and decision.reason.endswith(" on H100-80")
    assert decision.predicted["step_seconds"] > 0
    whole = choose._with_figures(recipe, decision, workload=workload, formats=FORMATS)
    assert whole.peak_flops_per_second == pytest.approx(2 * 989.4e12)
    unknown = {**FORMATS, "device_name": "Brand X"}
    decision = planned_on(recipe, config=config_of(recipe), devices=2, name="Brand X")
    assert "Brand X is unknown" in decision.reason
    whole = choose._with_figures(recipe, decision, workload=workload, formats=unknown)
    assert whole.peak_flops_per_second is None
    assert whole.mfu(tokens=100, seconds=1.0) is None


def test_a_family_without_sizes_is_decided_by_rule(bench: Bench, tmp_path: Path) -> None:
    recipe, inputs = given(tmp_path, bench)
    tree = recipe.model_dump(mode="json")
    tree["model"] = {"kind": "config", "architecture": "stablelm", "hidden_size": 32}
    other = Recipe.model_validate(tree)
    console = Console(out=io.StringIO())
    decision = choose.choose(other, inputs=inputs, pool=bench.pool, console=console)
    assert decision.reason.startswith("as the recipe says")
    assert decision.flops_per_token is None
    assert decision.mfu(tokens=100, seconds=1.0) is None
    assert asdict(decision) == asdict(type(decision).from_json(decision.to_json()))
