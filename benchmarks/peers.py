"""shoal beside its peers: the same model, batch and 2 processes, interleaved runs, median ratios.

    python benchmarks/peers.py [--pairs 7] [--steps 8] [--only NAME ...]

Each contender is a whole command, started anew each round; a step's time is the median over a
run's steps without the first two. Ratios above 1 mean that shoal is faster. The interval is the
central 90 % of the pairwise ratios' bootstrapped median.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
WORKERS = 2
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "GOMP_SPINCOUNT": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}

BATCH = "train.global_batch_samples=16"  # 4,096 tokens, two micro batches of 8 on two workers


def quickstart_rows(steps: int) -> tuple[np.ndarray, dict]:
    """The first `steps` global batches of the quickstart, and its model's configuration."""
    from shoal.config.load import load_recipe
    from shoal.data.stream import Stream
    from shoal.launch.prepare import prepare_inputs
    from shoal.layout import Share

    recipe = load_recipe("quickstart", [BATCH])
    inputs = prepare_inputs(recipe, say=lambda text: None)
    batch = recipe.train.global_batch_samples
    stream = Stream(Path(inputs.data_directory), seed=0, global_batch_samples=batch)
    rows = [stream.at(step, Share(0, batch))["input_ids"] for step in range(steps)]
    settings = {**recipe.model.settings, "vocab_size": inputs.vocabulary_size}
    return np.stack(rows), settings


def shoal_command(out: Path, steps: int, *overrides: str) -> list[str]:
    """The quickstart without evaluation and saving in the middle."""
    return [
        str(Path(sys.executable).parent / "shoal"),
        "train",
        "quickstart",
        f"train.steps={steps}",
        "train.evaluate_every_steps=0",
        "checkpoint.every_steps=0",
        "task.prompts=[]",
        BATCH,
        *overrides,
        "--out",
        str(out),
    ]


def torchrun(script: str, *arguments: str) -> list[str]:
    """A script of this folder under torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(WORKERS)]
    return [*launcher, str(HERE / script), *arguments]


def run(command: list[str], *, out: Path | None) -> dict[str, float]:
    """Run to the end; median step seconds, and seconds from the command to the first step."""
    began = time.perf_counter()
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    first, seconds = None, []
    assert process.stdout is not None
    for line in process.stdout:
        is_step = line.startswith(('{"step"', "step"))
        if is_step and first is None and "evaluation" not in line:
            first = time.perf_counter() - began
        if line.startswith('{"step"'):
            seconds.append(json.loads(line)["seconds"])
    error = process.stderr.read() if process.stderr else ""
    if process.wait() != 0:
        if out is not None or len(seconds) < 3:
            raise SystemExit(f"{' '.join(command)} failed:\n{error[-3000:]}")
        print("a peer crashed at its end, after its steps were timed; counted", file=sys.stderr)
    if out is not None:
        rows = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
        seconds = [row["step_seconds"] for row in rows if "loss" in row]
    return {"step": statistics.median(seconds[2:]), "first": first or float("nan")}


def interval(ratios: list[float], *, share: float = 0.9) -> tuple[float, float]:
    """Central `share` of the bootstrapped median."""
    draws = np.random.default_rng(0).choice(ratios, size=(4000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def contenders(scratch: Path, *, steps: int, micro: int) -> dict:
    """Name -> function of the round that gives (command, run directory)."""
    tokens, config = quickstart_rows(steps)
    path = scratch / "tokens.npy"
    np.save(path, tokens)
    common = ["--tokens", str(path), "--config", json.dumps(config), "--micro", str(micro)]
    two = [f"parallel.replicate={WORKERS}", f"train.micro_batch_samples={micro}"]
    full = "precision.compute=float32"

    def shoal(name: str, *overrides: str):
        def make(number: int):
            out = scratch / f"{name}-{number}"
            return shoal_command(out, steps, *overrides), out

        return make

    return {
        "ddp": lambda _: (torchrun("baseline_ddp.py", *common), None),
        "trainer": lambda _: (
            torchrun("baseline_trainer.py", *common, "--workers", str(WORKERS)),
            None,
        ),
        "shoal-processes": shoal("processes", *two, full, "launch.workers=processes"),
        "shoal-threads": shoal("threads", *two, full, "launch.workers=threads"),
        "shoal-auto": shoal("auto", full),
        "shoal-processes-bf16": shoal("pbf16", *two, "launch.workers=processes"),
        "shoal-threads-bf16": shoal("tbf16", *two, "launch.workers=threads"),
    }


PAIRS = [
    ("shoal-processes", "ddp", 0.98),
    ("shoal-auto", "ddp", 1.05),
    ("shoal-processes", "trainer", 1.05),
    ("shoal-threads", "shoal-processes", None),
    ("shoal-processes-bf16", "ddp", 1.35),
    ("shoal-threads-bf16", "ddp", 1.5),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--micro", type=int, default=8)
    parser.add_argument("--only", nargs="*")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        makers = contenders(Path(folder), steps=given.steps, micro=given.micro)
        names = [name for name in makers if not given.only or name in given.only]
        found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for number in range(-1, given.pairs):  # the first round warms caches and is not counted
            for name in names if number % 2 else reversed(names):
                command, out = makers[name](number)
                result = run(command, out=out)
                print(
                    f"round {number}: {name}: {result['step'] * 1000:.0f} ms a step, first after "
                    f"{result['first']:.1f} s",
                    file=sys.stderr,
                    flush=True,
                )
                if number >= 0:
                    found[name].append(result)
    print("| pair | median ratio | 90 % interval | goal |\n| --- | ---: | --- | ---: |")
    for ours, theirs, goal in PAIRS:
        if ours in found and theirs in found:
            ratios = [b["step"] / a["step"] for a, b in zip(found[ours], found[theirs])]
            low, high = interval(ratios)
            aim = "stated" if goal is None else f">= {goal}"
            print(
                f"| {ours} / {theirs} | {statistics.median(ratios):.3f} "
                f"| {low:.3f} to {high:.3f} | {aim} |"
            )
    for theirs in ("ddp", "trainer"):
        if "shoal-processes" in found and theirs in found:
            ratios = [
                a["first"] / b["first"] for a, b in zip(found["shoal-processes"], found[theirs])
            ]
            middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
            print(
                f"| command to end of first step: shoal-processes / {theirs} "
                f"| {middle:.3f} | {low:.3f} to {high:.3f} | (benchmarks/start.py) |"
            )


if __name__ == "__main__":
    main()
