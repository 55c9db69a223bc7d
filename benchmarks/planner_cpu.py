"""The planner on this machine: 20 layouts of two models, predicted against measured.

    shoal plan --calibrate
    python benchmarks/planner_cpu.py [--out FOLDER] [--rounds 3] [--seconds 420] [--table]

Each layout trains a few steps in every round (bfloat16 fewer and smaller ones, in one round only,
since it may be emulated); the median over all without each run's first is held against the
prediction from the machine's measurements, and so is the live memory. `parallel: auto` takes part
in every round. The best of ten noisy medians is partly luck, so what it chose and all that came
within 10 % of the best meet again in a final, in turns; its step is held against the best there.
Results go to FOLDER/results.jsonl after each run, so that a call that stops (--seconds) is gone on
with by the next; --table only prints.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from pathlib import Path

from shoal.config.load import load_recipe
from shoal.launch import local
from shoal.launch.pool import WorkerPool
from shoal.layout import Layout
from shoal.observe.events import read_lines
from shoal.plan.calibrate import estimator_for, this_machine
from shoal.plan.from_recipe import config_of, workload_of
from shoal.plan.workload import FORMATS, Candidate, Crew

LARGER = [
    "model.hidden_size=512",
    "model.intermediate_size=1720",
    "model.num_attention_heads=8",
    "model.num_key_value_heads=8",
]
"""16.9M parameters, four times the quickstart's 4.2M."""

FINAL_ROUNDS = 4
NEAR = 1.10
"""Layouts within this factor of the best measured meet again in the final."""

# (replicas, kind of worker, threads of each, micro batch, number format)
LAYOUTS: dict[str, list[tuple[int, str, int, int, str]]] = {
    "quickstart": [
        (1, "processes", 1, 4, "float32"),
        (1, "processes", 2, 8, "float32"),
        (1, "processes", 2, 16, "float32"),
        (2, "threads", 1, 4, "float32"),
        (2, "threads", 1, 8, "float32"),
        (2, "processes", 1, 2, "float32"),
        (2, "processes", 1, 8, "float32"),
        (4, "processes", 1, 4, "float32"),
        (1, "processes", 2, 2, "bfloat16"),
        (2, "processes", 1, 2, "bfloat16"),
    ],
    "larger": [
        (1, "processes", 1, 4, "float32"),
        (1, "processes", 2, 4, "float32"),
        (1, "processes", 2, 8, "float32"),
        (2, "threads", 1, 2, "float32"),
        (2, "threads", 1, 4, "float32"),
        (2, "threads", 1, 8, "float32"),
        (2, "processes", 1, 4, "float32"),
        (4, "threads", 1, 2, "float32"),
        (1, "processes", 2, 1, "bfloat16"),
        (2, "threads", 1, 1, "bfloat16"),
    ],
}


def overrides_of(model: str, *, batch: int, steps: int) -> list[str]:
    """What every run of `model` has in common."""
    return [
        *(LARGER if model == "larger" else []),
        f"train.steps={steps}",
        f"train.global_batch_samples={batch}",
        "train.evaluate_every_steps=0",
        "checkpoint.every_steps=0",
        "task.prompts=[]",
        "observe.console=false",
    ]


def size_of(model: str, compute: str) -> tuple[int, int]:
    """(global batch, steps) of a layout: emulated formats get few tokens."""
    if compute == "float32":
        return 16, 5 if model == "quickstart" else 3
    return 4 if model == "quickstart" else 2, 3


def run(name: str, words: list[str], *, folder: Path, pool: WorkerPool) -> dict:
    """Train; the median step without the first, the peak, and what was decided."""
    out = folder / "runs" / f"{name}-{time.time_ns()}"
    local.train("quickstart", words, out=out, console=False, pool=pool)
    rows = [row for row in read_lines(out / "metrics.jsonl") if "loss" in row]
    plan = json.loads((out / "plan.json").read_text())
    return {
        "name": name,
        "steps": [row["step_seconds"] for row in rows[1:]],
        "peak_memory_bytes": rows[-1]["peak_memory_bytes"],
        "mfu": rows[-1]["mfu"],
        "run": str(out),
        "plan": plan,
    }


def words_of(name: str) -> list[str]:
    """Overrides of a layout, from its name."""
    model, replicate, kind, threads, micro, compute = name.split("-")
    batch, steps = size_of(model, compute)
    return [
        *overrides_of(model, batch=batch, steps=steps),
        f"parallel={{replicate: {replicate}}}",
        f"launch.workers={kind}",
        f"launch.threads_per_worker={threads}",
        f"train.micro_batch_samples={micro}",
        f"precision.compute={compute}",
    ]


def jobs() -> list[tuple[str, list[str]]]:
    """(name, overrides) of everything that is run, the automatic choices last."""
    found = []
    for model, layouts in LAYOUTS.items():
        for layout in layouts:
            name = "-".join([model, *map(str, layout)])
            found.append((name, words_of(name)))
    for model in LAYOUTS:
        batch, steps = size_of(model, "float32")
        found.append((f"{model}-auto", overrides_of(model, batch=batch, steps=steps)))
    return found


def measure(folder: Path, *, rounds: int, seconds: float) -> None:
    """Run what has no result yet, round by round, until `seconds` are over."""
    began = time.monotonic()
    done = Counter(row["name"] for row in read_lines(folder / "results.jsonl"))
    with WorkerPool() as pool:
        for number in range(rounds):
            for name, words in jobs():
                if done[name] > number or (number and "bfloat16" in name):
                    continue
                if time.monotonic() - began > seconds:
                    print(f"stopped after {seconds:.0f} s; call again to go on")
                    return
                note(run(name, words, folder=folder, pool=pool), folder / "results.jsonl")
                done[name] += 1
        for number in range(FINAL_ROUNDS):
            for model in LAYOUTS:
                finalists = finalists_of(model, pooled(folder))
                for name in finalists[:: 1 if number % 2 else -1]:
                    if time.monotonic() - began > seconds:
                        print(f"stopped after {seconds:.0f} s; call again to go on")
                        return
                    if sum(row["name"] == name for row in final_rows(folder)) > number:
                        continue
                    result = run(name, words_of(name), folder=folder, pool=pool)
                    note(result, folder / "final.jsonl")


def note(result: dict, path: Path) -> None:
    """Keep the result of a run, and show it."""
    with open(path, "a") as file:
        file.write(json.dumps(result) + "\n")
    print(f"{result['name']}: {statistics.median(result['steps']):.3f} s a step", flush=True)


def final_rows(folder: Path) -> list[dict]:
    """Runs of the final so far."""
    path = folder / "final.jsonl"
    return read_lines(path) if path.is_file() else []


def finalists_of(model: str, results: dict[str, dict]) -> list[str]:
    """What was chosen automatically, and every layout near the best measured."""
    tried = {
        name: row["step_seconds"]
        for name, row in results.items()
        if name.startswith(model) and name.endswith("float32")
    }
    near = [name for name, value in tried.items() if value <= NEAR * min(tried.values())]
    chosen = results[f"{model}-auto"]["layout"]
    return [chosen, *(name for name in sorted(near) if name != chosen)]


def pooled(folder: Path) -> dict[str, dict]:
    """Per layout the newest result, with the median step over all its rounds.

    What was chosen automatically counts for its layout too, where that is in the table.
    """
    steps: dict[str, list[float]] = {}
    found: dict[str, dict] = {}
    for row in read_lines(folder / "results.jsonl"):
        plan = row["plan"]
        chosen = (
            f"{row['name'].split('-')[0]}-{plan['layout']['replicate']}-{plan['workers']}-"
            f"{plan['threads_per_worker']}-{plan['micro_batch_samples']}-{plan['compute']}"
        )
        for name in {row["name"], chosen}:
            steps.setdefault(name, []).extend(row["steps"])
        found[row["name"]] = {**row, "layout": chosen}
    return {
        name: {**row, "step_seconds": statistics.median(steps[name])} for name, row in found.items()
    }


def predict(name: str) -> tuple[float, float]:
    """(seconds, bytes) of a step by the machine's measurements."""
    model, replicate, kind, threads, micro, compute = name.split("-")
    batch, steps = size_of(model, compute)
    recipe = load_recipe("quickstart", overrides_of(model, batch=batch, steps=steps))
    workload = workload_of(recipe, config=config_of(recipe), precision=FORMATS[compute])
    crew = Crew(kind, int(replicate), int(threads))
    estimator = estimator_for(this_machine(), crew, workload=workload)
    layout = Layout(replicate=int(replicate))
    found = estimator.predict(Candidate(layout=layout, micro_batch_samples=int(micro)))
    return found.step_seconds, found.peak.live


def table(folder: Path) -> None:
    """Predicted against measured, and the automatic choice against the best."""
    results = pooled(folder)
    errors, memory_errors = [], []
    print("| layout | measured s | predicted s | error | peak MB | predicted MB | error | mfu |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, row in results.items():
        if name.endswith("auto"):
            continue
        seconds, num_bytes = predict(name)
        errors.append(seconds / row["step_seconds"] - 1)
        memory_errors.append(num_bytes / row["peak_memory_bytes"] - 1)
        print(
            f"| {name} | {row['step_seconds']:.3f} | {seconds:.3f} | {errors[-1]:+.1%} "
            f"| {row['peak_memory_bytes'] / 1e6:.1f} | {num_bytes / 1e6:.1f} "
            f"| {memory_errors[-1]:+.1%} | {row['mfu']:.1%} |"
        )
    for what, found in (("step time", errors), ("peak memory", memory_errors)):
        absolute = sorted(abs(error) for error in found)
        if absolute:
            print(
                f"{what}: {len(found)} layouts, median error {statistics.median(absolute):.1%}, "
                f"worst {absolute[-1]:.1%}"
            )
    for model in LAYOUTS:
        if f"{model}-auto" in results:
            print(final_of(model, results=results, folder=folder))


def final_of(model: str, *, results: dict[str, dict], folder: Path) -> str:
    """What the final says of the automatic choice: medians of the ratios within each turn."""
    turns: dict[str, list[float]] = {}
    for other in final_rows(folder):
        if other["name"].startswith(model):
            turns.setdefault(other["name"], []).append(statistics.median(other["steps"]))
    row = results[f"{model}-auto"]
    chosen = row["layout"]
    if chosen not in turns:
        return f"{model}: no final yet"
    lines = []
    for name, theirs in turns.items():
        ratios = sorted(a / b for a, b in zip(turns[chosen], theirs, strict=False))
        spread = f"{ratios[0]:.3f} to {ratios[-1]:.3f}"
        text = f"its step against {name}'s: {statistics.median(ratios):.3f} ({spread})"
        lines.append((statistics.median(ratios), f"  {text}; {statistics.median(theirs):.3f} s"))
    lines.sort(reverse=True)
    worst = lines[0][0] - 1
    first = f"{model}: auto chose {chosen} ({row['plan']['reason']}), {worst:+.1%} against the best"
    return "\n".join([first, *(text for _, text in lines)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/planner_cpu"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=420.0)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if not given.table:
        measure(given.out, rounds=given.rounds, seconds=given.seconds)
    table(given.out)


if __name__ == "__main__":
    main()
