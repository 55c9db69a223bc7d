"""The live page: training beside an open page, and how soon rows are on the screen.

    python benchmarks/page.py cost [--pairs 7] [--steps 60] [--recipe quickstart]
    python benchmarks/page.py screen [--rows 20]

`cost` trains a recipe with and without a page that a browser has open, in turns, and prints the
median ratio of the step's median; on a machine whose cores all train, the browser and the server
take their share of them, so the third way, `server`, has a page server whose stream a program
reads, without a browser. Beside the ratio it prints how much of one core each took, which other
work on the machine changes little. `screen` appends rows to a run that was written by hand and
waits for each in Chromium; then opens a run of 100,000 rows.
"""

from __future__ import annotations

import argparse
import http.client
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from shoal.launch import local
from shoal.launch.pool import WorkerPool
from shoal.launch.site import process_state
from shoal.observe.events import read_lines

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "page"), str(TESTS / "fault")]

from processes import family  # noqa: E402
from shoal_page import PageServer, Screen, served  # noqa: E402

from made_runs import MadeRun  # noqa: E402 (lies with the tests)

WAYS = ("alone", "server", "browser")


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser."""
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield running
        running.close()


@contextmanager
def beside(way: str, runs: Path, shares: dict[str, list[float]]) -> Iterator[None]:
    """What watches the runs in `runs` while one is trained; its shares of a core are added."""
    if way == "alone":
        yield
        return
    with served(runs) as server:
        if way == "server":
            with _listening(server), _counted([server.web.process.pid], shares[way]):
                yield
            return
        with chromium() as browser:
            window = Screen(browser, server)
            window.open("run")  # which is about to begin
            pids = [pid for pid in family(os.getpid()) if "chrom" in _name(pid)]
            with _counted([server.web.process.pid, *pids], shares[way]):
                yield
            shown = window.page.locator("body").get_attribute("data-step")
            window.close(errors=True)
            assert shown is not None and int(shown) > 1, "the page has shown nothing"


def _name(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text()
    return ""


@contextmanager
def _counted(pids: list[int], shares: list[float]) -> Iterator[None]:
    def seconds() -> float:
        return sum(process_state(pid)[1] or 0.0 for pid in pids)

    before, began = seconds(), time.monotonic()
    yield
    shares.append((seconds() - before) / (time.monotonic() - began))


@contextmanager
def _listening(server: PageServer) -> Iterator[None]:
    connection = http.client.HTTPConnection(server.web.host, server.web.port, timeout=60)
    connection.request("GET", "/stream?run=run", headers=server.web.cookie)
    answer = connection.getresponse()
    reader = threading.Thread(target=lambda: [None for _ in iter(answer.readline, b"")])
    reader.daemon = True
    reader.start()
    yield
    connection.sock.shutdown(2)
    reader.join()


def step_seconds(
    way: str, options: argparse.Namespace, pool: WorkerPool, shares: dict[str, list[float]]
) -> float:
    """The median step of one run, without its first fifth."""
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder) / "runs"
        MadeRun(runs / "first").rows(1, 4)
        with beside(way, runs, shares):
            overrides = [
                f"train.steps={options.steps}",
                "train.evaluate_every_steps=0",
                "checkpoint.every_steps=0",
                "parallel.replicate=2",
                "launch.workers=processes",
                "train.micro_batch_samples=2",
            ]
            local.train(options.recipe, overrides, out=runs / "run", console=False, pool=pool)
        rows = [
            row["step_seconds"]
            for row in read_lines(runs / "run" / "metrics.jsonl")
            if "loss" in row
        ]
        return statistics.median(rows[len(rows) // 5 :])


def cost(options: argparse.Namespace) -> None:
    """Training alone and watched, in turns."""
    ratios: dict[str, list[float]] = {way: [] for way in WAYS[1:]}
    shares: dict[str, list[float]] = {way: [] for way in WAYS[1:]}
    with WorkerPool() as pool:
        step_seconds("alone", argparse.Namespace(**{**vars(options), "steps": 5}), pool, shares)
        for number in range(options.pairs):
            found = {}
            for way in WAYS if number % 2 else WAYS[::-1]:
                found[way] = step_seconds(way, options, pool, shares)
            for way in ratios:
                ratios[way].append(found[way] / found["alone"])
            print({way: round(seconds, 4) for way, seconds in found.items()}, flush=True)
    for way, each in ratios.items():
        print(
            f"{way}: {statistics.median(each):.4f} of the step alone ({min(each):.4f} to "
            f"{max(each):.4f}); {100 * statistics.median(shares[way]):.2f} % of one core"
        )


def screen(options: argparse.Namespace) -> None:
    """Rows on the screen, and a long run."""
    with tempfile.TemporaryDirectory() as folder, served(Path(folder) / "runs") as server:
        run = MadeRun(server.runs / "prompt")
        run.rows(1, 200)
        MadeRun(server.runs / "long").rows(1, 100_001)
        with chromium() as browser:
            window = Screen(browser, server)
            window.open("prompt")
            window.wait_for_step(199)
            took = []
            for step in range(200, 200 + options.rows):
                time.sleep(0.137 * (step % 7) / 3)  # at any moment between two looks
                began = time.monotonic()
                run.rows(step, step + 1)
                window.wait_for_step(step)
                took.append(time.monotonic() - began)
            print(
                f"row on the screen: median {statistics.median(took):.3f} s, worst {max(took):.3f}"
            )
            for _ in range(3):
                began = time.monotonic()
                window.page.get_by_role("button", name="long", exact=True).click()
                window.wait_for_step(100_000)
                print(f"100,000 rows: {time.monotonic() - began:.2f} s")
                window.page.get_by_role("button", name="prompt", exact=True).click()
                window.wait_for_step(199 + options.rows)
            window.close()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("cost", "screen"))
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--recipe", default="quickstart")
    options = parser.parse_args()
    {"cost": cost, "screen": screen}[options.what](options)


if __name__ == "__main__":
    main()
