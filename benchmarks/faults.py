"""The fault matrix: real faults in a 2-process run, one row each, beside torchrun + DDP + DCP.

    python benchmarks/faults.py [--only NAME ...] [--repeats 20] [--recipe quickstart]

Every repeat is a fault of its own in a run of the recipe; what it cost is read from the run
(prove/rehearse.py) and compared with a clean run of the same length. Rows go to
docs/evidence/faults.json and docs/evidence/faults.md, where rows measured earlier stay, so that it
can be run in pieces.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from shoal.checkpoint.store import Store
from shoal.errors import CheckpointError
from shoal.launch import local
from shoal.launch.pool import WorkerPool
from shoal.observe.events import read_lines
from shoal.prove.rehearse import Fault, Rehearsal, rehearse

ROOT = Path(__file__).resolve().parent.parent
TWO = ("parallel.replicate=2", "launch.workers=processes", "precision.compute=float32")
QUIET = ("train.evaluate_every_steps=0", "task.prompts=[]")
Row = dict[str, Any]


class Bench:
    """One fork server, one scratch folder, one clean run for every set of overrides."""

    def __init__(self, recipe: str, *, scratch: Path, pool: WorkerPool, torchft: Path) -> None:
        self.recipe, self.scratch, self.pool = recipe, scratch, pool
        self.torchft = torchft
        self._clean: dict[tuple[str, ...], Path] = {}
        self._number = 0

    def folder(self) -> Path:
        self._number += 1
        path = self.scratch / f"run-{self._number:03d}"
        path.mkdir()
        return path

    def clean(self, overrides: tuple[str, ...]) -> Path:
        """The run without faults."""
        if overrides not in self._clean:
            run = self.folder() / "clean"
            local.train(self.recipe, overrides, out=run, console=False, pool=self.pool)
            self._clean[overrides] = run
        return self._clean[overrides]

    def rehearse(self, faults: list[str], *overrides: str) -> Rehearsal:
        """The run with `faults`."""
        out = self.folder()
        found = rehearse(
            self.recipe,
            overrides,
            faults=[Fault.parse(text) for text in faults],
            out=out,
            pool=self.pool,
            clean=self.clean(overrides),
        )
        print(found, file=sys.stderr, flush=True)
        shutil.rmtree(found.run / "checkpoints", ignore_errors=True)
        return found


def row_of(found: list[Rehearsal], *, of: str) -> Row:
    """One line of the matrix."""
    seen = [one for rehearsal in found for one in rehearsal.faults if one.fault.startswith(of)]
    detect = [one.detection_seconds for one in seen if one.detection_seconds is not None]
    recover = [one.recovery_seconds for one in seen if one.recovery_seconds is not None]
    losses = [r.largest_loss_difference for r in found if r.largest_loss_difference is not None]
    return {
        "repeats": len(seen),
        "fired": sum(one.fired for one in seen),
        "noticed": sum(one.noticed_as is not None for one in seen),
        "detection_seconds": _spread(detect),
        "recovery_seconds": _spread(recover),
        "committed_steps_lost": sum(r.committed_steps_lost for r in found),
        "steps_redone": sum(r.steps_redone for r in found),
        "samples_wrong": sum(len(r.sample_problems) for r in found),
        "largest_loss_difference": max(losses, default=None),
        "same_digits": all(r.same_digits for r in found),
        "same_weights": all(r.same_weights for r in found),
        "culprit_named": sum(one.culprit_named for one in seen),
        "ended": sorted({r.ended for r in found}),
    }


def _spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {
        "median": statistics.median(values),
        "p95": float(np.quantile(values, 0.95)),
        "worst": max(values),
    }


def many(kind: str, *, repeats: int, argument: str = "", saves: bool = False) -> list[str]:
    """`repeats` faults in one run, two steps apart (ten where they must meet a save)."""
    gap = 5 if saves else 2
    suffix = f":{argument}" if argument else ""
    return [f"{kind}:{n % 2}@{gap * (n + 1)}{suffix}" for n in range(repeats)]


def kills(phase: str) -> Callable[[Bench, int], Row]:
    """kill -9 in one phase, again and again in one run; ranks in turn."""

    def run(bench: Bench, repeats: int) -> Row:
        saves = phase == "save"
        gap = 5 if saves else 2
        length = (
            f"train.steps={gap * repeats + 3}",
            f"checkpoint.every_steps={5 if saves else 10}",
        )
        faults = many("kill", repeats=repeats, argument=phase, saves=saves)
        return row_of([bench.rehearse(faults, *TWO, *QUIET, *length)], of="kill")

    return run


def single(
    kind: str,
    *,
    argument: str = "",
    step: int = 12,
    steps: int = 15,
    overrides: tuple[str, ...] = TWO,
    ranks: int = 2,
    most: int = 3,
) -> Callable[[Bench, int], Row]:
    """One fault a run, a few runs."""

    def run(bench: Bench, repeats: int) -> Row:
        length = (f"train.steps={steps}", "checkpoint.every_steps=5")
        suffix = f":{argument}" if argument else ""
        found = [
            bench.rehearse([f"{kind}:{n % ranks}@{step}{suffix}"], *overrides, *QUIET, *length)
            for n in range(min(repeats, most))
        ]
        return row_of(found, of=kind)

    return run


def stuck(kind: str) -> Callable[[Bench, int], Row]:
    """A worker that stops, or spins, again and again in one run."""

    def run(bench: Bench, repeats: int) -> Row:
        count = min(repeats, 8)
        faults = [f"{kind}:{n % 2}@{4 * (n + 1)}" for n in range(count)]
        length = (f"train.steps={4 * count + 3}", "checkpoint.every_steps=10")
        return row_of([bench.rehearse(faults, *TWO, *QUIET, *length)], of=kind)

    return run


def damaged(bench: Bench, repeats: int) -> Row:
    """One bit flipped in each file of a checkpoint, at random places: found, and the older used."""
    run = bench.clean((*TWO, *QUIET, "train.steps=15", "checkpoint.every_steps=5"))
    store = Store(run / "checkpoints")
    newest = store.steps()[-1]
    draw, tries, found, fallen_back = random.Random(0), 0, 0, 0
    for path in sorted(store.path(newest).iterdir()):
        for _ in range(repeats):
            whole = path.read_bytes()
            place, bit = draw.randrange(len(whole)), draw.randrange(8)
            with open(path, "r+b") as file:
                file.seek(place)
                file.write(bytes([whole[place] ^ (1 << bit)]))
            tries += 1
            try:
                store.verify(newest)
            except CheckpointError:
                found += 1
            fallen_back += store.newest_good(on_bad=lambda step, why: None) < newest
            path.write_bytes(whole)
    assert store.newest_good(on_bad=lambda step, why: None) == newest, "as it was"
    return {"repeats": tries, "fired": tries, "noticed": found, "culprit_named": fallen_back}


def goodput(every_seconds: float, *, minutes: float) -> Callable[[Bench, int], Row]:
    """A stranger kills a worker every so often; useful step time over wall time."""

    def run(bench: Bench, repeats: int) -> Row:
        out = bench.folder() / "run"
        story: list[dict[str, Any]] = []
        over = threading.Event()
        killed: list[float] = []

        def stranger() -> None:
            draw = random.Random(1)
            while not over.wait(every_seconds):
                pids = [w.pid for w in bench.pool.workers.values() if w.status is None and w.pid]
                if pids:
                    os.kill(draw.choice(pids), signal.SIGKILL)
                    killed.append(time.monotonic())

        thread = threading.Thread(target=stranger)
        thread.start()
        limit = f"launch.time_limit_seconds={minutes * 60}"
        words = (*TWO, *QUIET, "train.steps=100000", "train.schedule.kind=constant", limit)
        began = time.monotonic()
        try:
            local.train(bench.recipe, words, out=out, console=False, pool=bench.pool, story=story)
        except BaseException as error:
            print(type(error).__name__, error, file=sys.stderr)
        finally:
            over.set()
            thread.join()
        events = read_lines(out / "events.jsonl")
        rows = [row for row in read_lines(out / "metrics.jsonl") if "loss" in row]
        first = next(e["monotonic"] for e in story if e["event"] == "started")
        wall = time.monotonic() - first
        useful = sum(row["step_seconds"] for row in rows)
        return {
            "repeats": len(killed),
            "fired": len(killed),
            "noticed": sum(1 for e in events if e["event"] == "lost"),
            "goodput": useful / wall,
            "committed_steps": len(rows),
            "steps_redone": sum(e.get("rows", 0) for e in events if e["event"] == "redone"),
            "wall_seconds": time.monotonic() - began,
        }

    return run


def torchrun(fault: str) -> Callable[[Bench, int], Row]:
    """The same fault under torchrun + DDP + DCP (benchmarks/baseline_faults.py)."""

    def run(bench: Bench, repeats: int) -> Row:
        script = Path(__file__).with_name("baseline_faults.py")
        command = [sys.executable, str(script), fault, "--repeats", str(min(repeats, 5))]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(done.stderr[-3000:])
        row: Row = json.loads(done.stdout.splitlines()[-1])
        return row

    return run


def torchft(bench: Bench, repeats: int) -> Row:
    """kill -9 under torchft, in an environment that has it (benchmarks/baseline_torchft.py)."""
    script = Path(__file__).with_name("baseline_torchft.py")
    command = [str(bench.torchft), str(script), "--repeats", str(min(repeats, 5))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(done.stderr[-3000:])
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


ELASTIC = (
    "parallel.replicate={min: 1, max: 2}",
    "launch.workers=processes",
    "precision.compute=float32",
)
FOUR = ("parallel.replicate=4", "launch.workers=processes", "precision.compute=float32")
ROWS: dict[str, Callable[[Bench, int], Row]] = {
    "kill -9 in forward": kills("forward"),
    "kill -9 in backward": kills("backward"),
    "kill -9 inside the reduction": kills("reducing"),
    "kill -9 between reduction and step": kills("apply"),
    "kill -9 during a save": kills("save"),
    "exit 0 before its time": single("exit"),
    "an error in one worker": single("raise"),
    "kill -9, degree may shrink": single("kill", overrides=ELASTIC),
    "kill -9 of the only worker": single(
        "kill", overrides=("parallel.replicate=1", "precision.compute=float32"), ranks=1
    ),
    "SIGSTOP": stuck("stop"),
    "busy loop": stuck("spin"),
    "slow worker": single("slow", argument="1.2", step=4, most=2),
    "NaN gradient": single("nan"),
    "huge gradient": single("spike", step=14),
    "flipped bit, parameter, 2 replicas": single("flip-parameter"),
    "flipped bit, optimizer, 2 replicas": single("flip-optimizer"),
    "flipped bit, parameter, 4 replicas": single(
        "flip-parameter", argument="700/30", overrides=FOUR, ranks=4
    ),
    "flipped bit in each checkpoint file": damaged,
    "disk full for one save": single("disk-full", step=10, ranks=1),
    "out of memory": single("out-of-memory"),
    "SIGTERM, then resume": single("sigterm"),
    "killed every 60 s, 10 minutes": goodput(60, minutes=10),
    "killed every 20 s, 10 minutes": goodput(20, minutes=10),
    "torchrun: kill -9 in forward": torchrun("kill"),
    "torchft: kill -9 in forward": torchft,
    "torchrun: SIGSTOP (time-out 10 s)": torchrun("stop"),
    "torchrun: flipped bit, parameter": torchrun("flip"),
}


NOBODY = ("disk full for one save", "SIGTERM, then resume")
"""Rows in which no rank is at fault."""


def markdown(rows: dict[str, Row]) -> str:
    """docs/evidence/faults.md."""
    lines = [
        "# What was done to runs, and what they survived",
        "",
        "Written by `python benchmarks/faults.py`; each row says on which day and commit. Two "
        "processes of the quickstart in float32 unless said otherwise. Seconds are median / p95 / "
        "worst. Detection: from the fault to the notice; recovery: from the notice to the next "
        "committed step, which holds one step's own time. Losses are beside the clean run. Of two "
        "replicas that differ nobody knows which is right: none is named, the last save decides.",
        "",
        "| fault | noticed | detection | recovery | committed steps lost | done again | "
        "samples wrong | losses | weights | culprit named | when |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        cells = [
            name,
            f"{row['noticed']} of {row['repeats']}",
            _times(row.get("detection_seconds")),
            _times(row.get("recovery_seconds")),
            _cell(row.get("committed_steps_lost")),
            _cell(row.get("steps_redone")),
            _cell(row.get("samples_wrong")),
            _losses(row),
            {True: "same bits", False: "other bits"}.get(row.get("same_weights"), ""),
            _named(name, row),
            f"{row['measured']} ({row['commit']})",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Rows that are tests, done for real at every `make test` or `make test-all`:", ""]
    lines += ["| fault | what happens | test |", "| --- | --- | --- |"]
    lines += [f"| {fault} | {what} | `{where}` |" for fault, what, where in TESTED]
    return "\n".join(lines) + "\n"


TESTED = (
    (
        "the whole job killed",
        "resumed from the newest save; same digits, same weights",
        "tests/fault/test_killing.py",
    ),
    (
        "the command or its fork server killed",
        "no worker outlives it",
        "tests/fault/test_killing.py",
    ),
    (
        "kill, disk full or I/O error at each operation of a save, foreground and background",
        "a checkpoint can be loaded after every one",
        "tests/fault/test_saving.py, test_saving_in_background.py",
    ),
    (
        "any byte flipped, a file cut, missing, swapped or a link; a slow or read-only disk",
        "named; the older checkpoint is used",
        "tests/fault/test_damaged.py",
    ),
    (
        "both replicas die within one step",
        "back to the newest save; same digits",
        "tests/fault/test_rehearsing.py",
    ),
    (
        "the same step fails again and again",
        "given up after `launch.retries`, with the reason",
        "tests/fault/test_rehearsing.py",
    ),
    (
        "a second job in the run directory",
        "refused at once, naming the process",
        "tests/unit/launch/test_directory.py",
    ),
    (
        "a rank with another recipe or code",
        "refused by all ranks, with the difference",
        "tests/unit/launch/test_torchrun.py, tests/unit/engine/test_agree.py",
    ),
    (
        "a port in use, a stale store",
        "cannot happen on one machine: ranks meet at a new file for every generation",
        "tests/security/test_sockets.py",
    ),
    (
        "garbage, a pickle, 4 GB announced on a socket",
        "refused; training goes on",
        "tests/unit/comm/test_channel.py, tests/security/test_sockets.py",
    ),
)
"""(fault, what happens, tests) of rows that need no figures."""


def _times(spread: dict[str, float] | None) -> str:
    if spread is None:
        return ""
    return " / ".join(f"{spread[key]:.2f}" for key in ("median", "p95", "worst")) + " s"


def _cell(value: Any) -> str:
    return "" if value is None else str(value)


def _losses(row: Row) -> str:
    if "goodput" in row:
        return f"goodput {row['goodput']:.1%}"
    if row.get("same_digits"):
        return "identical"
    difference = row.get("largest_loss_difference")
    note = row.get("note", "")
    return (f"{difference:.1e}" if difference is not None else "") + note


def _named(name: str, row: Row) -> str:
    if name in NOBODY or "culprit_named" not in row:
        return ""
    return f"{row['culprit_named']} of {row['repeats']}"


def asks_for(name: str, *, word: str) -> bool:
    """Whether a word of --only asks for this row: a whole name asks for no other."""
    return word == name or (word in name and word not in ROWS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", nargs="*", help="Rows whose name is, or holds, one of these words."
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument(
        "--torchft", type=Path, default=Path(sys.executable), help="A Python that has torchft."
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "evidence")
    given = parser.parse_args()
    path = given.out / "faults.json"
    known: dict[str, Row] = json.loads(path.read_text()) if path.is_file() else {}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    with tempfile.TemporaryDirectory() as folder, WorkerPool() as pool:
        bench = Bench(given.recipe, scratch=Path(folder), pool=pool, torchft=given.torchft)
        for name, measure in ROWS.items():
            if given.only and not any(asks_for(name, word=word) for word in given.only):
                continue
            row = measure(bench, given.repeats)
            known[name] = {**row, "measured": date.today().isoformat(), "commit": commit}
            ordered = {name: known[name] for name in ROWS if name in known}
            path.write_text(json.dumps(ordered, indent=1) + "\n")
            (given.out / "faults.md").write_text(markdown(ordered))
            print(f"{name}: {json.dumps(row)}", flush=True)


if __name__ == "__main__":
    main()
