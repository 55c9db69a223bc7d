"""Starts: how soon the first step comes, beside torchrun; and how well a fresh one chooses.

    python benchmarks/start.py [--rounds 5] [--workers 2 4]
    python benchmarks/start.py --fresh 6 [--busy] [--goal 20]

The first runs `shoal train quickstart` with data already prepared, by shoal's fork server and under
torchrun, interleaved; the clock stops when rank 0 announces the first step.

--fresh starts with an empty cache of timings (prepared data are kept) that many times: seconds to
the first loss line, what was chosen, and the step of every candidate, and of the chosen setup with
half and twice its micro batch, trained afterwards in turns (ROUNDS of STEPS steps each; the median
of the ratios within a turn). --busy keeps one core busy.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shoal.config.load import load_recipe
from shoal.engine.decision import WorkerSetup
from shoal.environment import cache_directory
from shoal.launch import local
from shoal.launch.candidates import micro_batches_of
from shoal.launch.pool import WorkerPool
from shoal.observe.events import read_lines

SHOAL = Path(sys.executable).parent / "shoal"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0"}
ROUNDS, STEPS = 5, 6
WITHIN = 1.05
SHORT = ["train.evaluate_every_steps=0", "checkpoint.every_steps=0", "task.prompts=[]"]


def seconds_to_line(command: list[str], text: str, *, environment: dict[str, str]) -> float:
    """Start `command`, stop the clock at the line with `text`, end it."""
    began = time.perf_counter()
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if text in line:
            found = time.perf_counter() - began
            end(process)
            return found
    raise SystemExit(f"{' '.join(command)} never said {text!r}:\n{''.join(seen)}")


def end(process: subprocess.Popen[str]) -> None:
    """End a launcher and its workers; torchrun's are in sessions of their own, so it ends them."""
    process.terminate()
    try:
        process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def beside_torchrun(*, rounds: int, workers: list[int]) -> None:
    """Medians of command to first step, and of the pairwise ratios."""
    print(
        "| workers | shoal, s | torchrun, s | ratio | goal |\n| ---: | ---: | ---: | ---: | --- |"
    )
    with tempfile.TemporaryDirectory() as folder:
        for count in workers:
            pairs = []
            for number in range(-1, rounds):
                words = ["train", "quickstart", f"parallel.replicate={count}"]
                words += ["launch.workers=processes", "launch.tune=false", *SHORT]
                out = Path(folder) / f"{count}-{number}"
                launcher = [sys.executable, "-m", "torch.distributed.run"]
                launcher += ["--nproc-per-node", str(count), "--no-python", str(SHOAL)]
                own, other = (
                    seconds_to_line(
                        [*start, *words, "--out", f"{out}-{name}"],
                        "the first step",
                        environment=ENVIRONMENT,
                    )
                    for name, start in (("own", [str(SHOAL)]), ("torchrun", launcher))
                )
                print(f"{count} workers: {own:.2f} s, {other:.2f} s", file=sys.stderr, flush=True)
                if number >= 0:
                    pairs.append((own, other))
            ratio = statistics.median(a / b for a, b in pairs)
            own, other = (statistics.median(column) for column in zip(*pairs))
            print(f"| {count} | {own:.2f} | {other:.2f} | {ratio:.2f} | <= 0.6 |", flush=True)


@contextmanager
def busy_core(wanted: bool) -> Iterator[None]:
    """One process that computes beside us."""
    if not wanted:
        yield
        return
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        other.kill()
        other.wait()


def fresh_cache(folder: Path) -> Path:
    """A cache with the prepared data of the user's, and nothing that was timed."""
    folder.mkdir(parents=True)
    for kept in ("packages", "tokenizers", "prepared"):
        if (cache_directory() / kept).is_dir():
            shutil.copytree(cache_directory() / kept, folder / kept, symlinks=True)
    return folder


def step_seconds(candidate: dict, *, compute: str, out: Path, pool: WorkerPool) -> float:
    """Median step of a short run of one candidate, without its first."""
    setup = candidate["setup"]
    words = [
        *SHORT,
        f"train.steps={STEPS}",
        f"parallel={{replicate: {setup['count']}}}",
        f"launch.workers={setup['workers']}",
        f"launch.threads_per_worker={setup['threads']}",
        f"train.micro_batch_samples={candidate['micro']}",
        f"precision.compute={compute}",
    ]
    local.train("quickstart", words, out=out, console=False, pool=pool)
    rows = [row for row in read_lines(out / "metrics.jsonl") if "loss" in row]
    return statistics.median(row["step_seconds"] for row in rows[1:])


def name_of(candidate: dict) -> str:
    return f"{WorkerSetup(**candidate['setup'])}, micro batch {candidate['micro']}"


def choices(*, fresh: int, busy: bool, goal: float) -> None:
    """How soon fresh starts come to their first loss, and how far the choice is from the best."""
    print(f"{fresh} fresh starts{', one core busy beside' if busy else ''}")
    good, recipe = 0, load_recipe("quickstart")
    row_tokens = recipe.data.sequence_tokens
    with tempfile.TemporaryDirectory() as scratch, WorkerPool() as pool, busy_core(busy):
        folder = Path(scratch)
        for number in range(fresh):
            cache = fresh_cache(folder / f"cache-{number}")
            environment = {**ENVIRONMENT, "SHOAL_CACHE": str(cache)}
            out = folder / f"start-{number}"
            command = [str(SHOAL), "train", "quickstart", "--out", str(out)]
            seconds = seconds_to_line(command, "step 0: loss", environment=environment)
            plan = json.loads((out / "plan.json").read_text())
            rows = plan["measured"].get("candidates", [])
            setup = {
                "workers": plan["workers"],
                "count": plan["layout"]["replicate"],
                "threads": plan["threads_per_worker"],
            }
            chosen = {"setup": setup, "micro": plan["micro_batch_samples"]}
            near = [
                {"setup": setup, "micro": micro}
                for micro in micro_batches_of(recipe, count=setup["count"], row_tokens=row_tokens)
                if micro in (2 * chosen["micro"], chosen["micro"] // 2)
            ]
            every = {name_of(row): row for row in [chosen, *rows, *near]}
            ratios: dict[str, list[float]] = {name: [] for name in every}
            base = []
            for turn in range(ROUNDS):
                spent = {
                    name: step_seconds(
                        row,
                        compute=plan["compute"],
                        out=folder / f"{number}-{turn}-{at}",
                        pool=pool,
                    )
                    for at, (name, row) in enumerate(every.items())
                }
                base.append(spent[name_of(chosen)])
                for name, value in spent.items():
                    ratios[name].append(value / spent[name_of(chosen)])
            middle = {name: statistics.median(values) for name, values in ratios.items()}
            behind = 1 / min(middle.values())
            good += behind <= WITHIN
            print(
                f"start {number + 1}: first loss after {seconds:.1f} s (goal {goal:.0f}); "
                f"{plan['reason']}\n  chosen {name_of(chosen)}: {statistics.median(base):.3g} s a "
                f"step, {behind - 1:+.1%} against the best",
                flush=True,
            )
            for name, value in sorted(middle.items(), key=lambda item: item[1]):
                print(f"    {value:5.3f}  {name}", flush=True)
    print(f"within {WITHIN - 1:.0%} of the best: {good} of {fresh}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--fresh", type=int, default=0)
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--goal", type=float, default=20.0)
    given = parser.parse_args()
    if given.fresh:
        choices(fresh=given.fresh, busy=given.busy, goal=given.goal)
    else:
        beside_torchrun(rounds=given.rounds, workers=given.workers)


if __name__ == "__main__":
    main()
