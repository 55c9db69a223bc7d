"""What a parameter server costs and saves: pushes and pulls, a slow worker, threads without locks.

python benchmarks/servers.py transport [--mebibytes 64]
python benchmarks/servers.py slow [--pairs 5] [--steps 30]
python benchmarks/servers.py hogwild [--pairs 5] [--steps 15]

transport: seconds of a push with its acknowledgement, with and without the log, and of a pull.
slow: replica 0's speed while replica 1 takes four times as long a step, against its speed beside an
equal one, under the asynchronous server and under every-step; alternating. hogwild: tokens per
second of two threads against one, and of two processes of one thread that know nothing of each
other (what this machine gives two busy cores).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch

from shoal.comm.keys import Keys
from shoal.comm.requests import Caller
from shoal.config.load import resolve
from shoal.engine.job import Instruments
from shoal.launch import local
from shoal.launch.pool import WorkerPool
from shoal.observe.events import read_lines
from shoal.sync.server import messages
from shoal.sync.server.process import address_file

SERVER = "shoal.sync.server.process:run"
ASYNCHRONOUS = {"kind": "server", "consistency": {"kind": "asynchronous"}}
SMALL: dict[str, Any] = {
    "train.evaluate_every_steps": 0,
    "checkpoint.every_steps": 0,
    "task.prompts": [],
    "launch.threads_per_worker": 1,
    "train.micro_batch_samples": 8,
    "train.global_batch_samples": 16,
}


def rows_of(pool: WorkerPool, out: Path, overrides: dict[str, Any], **more: Any) -> list[Any]:
    """The steps of a run but for the first three."""
    local.train("quickstart", overrides, out=out, console=False, pool=pool, **more)
    rows = read_lines(out / "metrics.jsonl")
    return [row for row in rows if "loss" in row][3:]


def speed(rows: list[Any]) -> float:
    """Tokens per second of the median step."""
    return statistics.median(row["tokens_per_second"] for row in rows)


# --- transport


def transport(mebibytes: int) -> None:
    """Push and pull a vector of so many MiB."""
    numel = mebibytes << 18
    print(f"| {mebibytes} MiB | seconds | GB/s |\n| --- | ---: | ---: |")
    with tempfile.TemporaryDirectory(dir=".") as text:
        folder = Path(text)
        (folder / "servers").mkdir(mode=0o700)
        keys = Keys.make(folder / "servers" / "keys")
        for durable in (False, True):
            how = {"sync": {**ASYNCHRONOUS, "durable": durable}, "train.optimizer.kind": "sgd"}
            recipe = resolve("quickstart", how)
            with WorkerPool() as pool:
                place = address_file(folder / "servers", int(durable))
                payload = {"recipe": recipe.model_dump(mode="json"), "run": str(folder)}
                payload |= {"servers": str(folder / "servers"), "replicas": 1, "begins": True}
                worker = pool.start(SERVER, {**payload, "server": int(durable)})
                while not place.is_file():
                    time.sleep(0.1)
                _time_calls(place, keys, numel=numel, durable=durable)
                pool.kill([worker])


def _time_calls(place: Path, keys: Keys, *, numel: int, durable: bool) -> None:
    caller, values = Caller(place, keys=keys, name="server"), torch.randn(numel)
    me = {"position": 0, "replica": 0, "life": 1}

    def ask(request: Any, *tensors: torch.Tensor) -> None:
        caller.ask(msgspec.msgpack.encode(request), list(tensors))

    regions = (messages.Region(0, numel, 0.0),)
    ask(messages.Hello(**me, numel=numel, regions=regions))
    ask(messages.Fill(**me, clocks={0: 0}, version=0, facts={}), values)
    clocks = iter(range(100))

    def push() -> None:
        ask(messages.Push(**me, clock=next(clocks), version=0, weight=1.0, rate=1.0), values)

    calls: dict[str, Callable[[], None]] = {"push": push, "pull": lambda: ask(messages.Pull(**me))}
    for name, call in calls.items():
        if name == "pull" and durable:
            continue
        call()
        times = []
        for _ in range(5):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        seconds = statistics.median(times)
        what = f"{name}, on the disk first (fdatasync)" if durable else name
        print(f"| {what} | {seconds:.3f} | {4e-9 * numel / seconds:.2f} |")
    caller.close()


# --- a slow worker


def slow(pairs: int, steps: int) -> None:
    """Replica 0's speed beside an equal and beside a slow replica 1."""
    ways = {
        "asynchronous server": {
            "sync": {"kind": "server", "consistency": {"kind": "asynchronous"}}
        },
        "every-step": {"sync": {"kind": "every-step"}},
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as text, WorkerPool() as pool:
        for number in range(pairs):
            for name, way in ways.items():
                common = {**SMALL, **way, "train.steps": steps}
                common |= {"parallel.replicate": 2, "launch.workers": "processes"}
                even = rows_of(pool, Path(text) / f"{name}-{number}-even", common)
                step = statistics.median(row["compute_seconds"] for row in even)
                fault = {"kind": "slow", "rank": 1, "step": 1, "argument": str(3 * step)}
                planned = Instruments(planned_faults=({**fault, "number": 0},))
                out = Path(text) / f"{name}-{number}-slow"
                uneven = rows_of(pool, out, common, instruments=planned)
                found[name].append(speed(uneven) / speed(even))
    print("| replica 0 beside one that takes 4 x | share of its speed | of each pair |")
    print("| --- | ---: | --- |")
    for name, ratios in found.items():
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"| {name} | {statistics.median(ratios):.2f} | {each} |")


# --- hogwild


def hogwild(pairs: int, steps: int) -> None:
    """Tokens per second of two threads together against one, and what the machine gives."""
    base = {**SMALL, "sync": {"kind": "hogwild"}, "train.steps": steps}
    threads, machine = [], []
    with tempfile.TemporaryDirectory() as text, WorkerPool() as pool, WorkerPool() as other:
        for number in range(pairs):
            folder = Path(text) / str(number)
            one = speed(rows_of(pool, folder / "one", {**base, "parallel.replicate": 1}))
            two = {**base, "parallel.replicate": 2, "launch.workers": "threads"}
            threads.append(2 * speed(rows_of(pool, folder / "two", two)) / one)
            machine.append(sum(_at_once(pool, other, folder, base)) / one)
    for name, ratios in (("2 hogwild threads", threads), ("2 runs at once", machine)):
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"| {name} / 1 thread | {statistics.median(ratios):.2f} | {each} |")


def _at_once(pool: WorkerPool, other: WorkerPool, folder: Path, base: Any) -> list[float]:
    """Speeds of two runs of one worker at the same time, each on half a batch."""
    speeds: list[float] = []

    def body(name: str, pool: WorkerPool) -> None:
        how = {**base, "parallel.replicate": 1, "train.global_batch_samples": 8}
        speeds.append(speed(rows_of(pool, folder / name, how)))

    runs = [threading.Thread(target=body, args=pair) for pair in (("a", pool), ("b", other))]
    for each in runs:
        each.start()
    for each in runs:
        each.join()
    return speeds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("transport", "slow", "hogwild"))
    parser.add_argument("--mebibytes", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    if given.what == "transport":
        transport(given.mebibytes)
    elif given.what == "slow":
        slow(given.pairs, given.steps)
    else:
        hogwild(given.pairs, given.steps)


if __name__ == "__main__":
    main()
