"""What agents and a registry cost a quiet run: the same run with and without them, in turns.

    python benchmarks/hosts_overhead.py [--rounds 7] [--steps 200]

Two replicas on this machine: by the supervisor alone, and over two agents on loopback whose
coordinator keeps a registry in an etcd of one server and saves into it. Each round trains both,
one after the other; a step's time is the median of a run's, the first 20 left out. The result is
the median ratio over the rounds, with its range.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from shoal.observe.events import read_lines
from unit.launch.etcd_server import etcd_server, free_port

SHOAL = [sys.executable, "-c", "from shoal.cli.main import main; main()"]
WORDS = ["train.evaluate_every_steps=0", "task.prompts=[]", "checkpoint.every_steps=50"]
WORDS += ["parallel={replicate: 2}", "launch.workers=processes", "train.global_batch_samples=8"]
WORDS += ["train.micro_batch_samples=4", "launch.threads_per_worker=1"]
"""A thread each: two agents of one machine would take its cores for two hosts'."""
LEFT_OUT = 20


@contextlib.contextmanager
def agents(folder: Path) -> Iterator[Path]:
    """Two of them; the file that names them."""
    ports = [free_port(), free_port()]
    words = [*SHOAL, "agent", "--keys", str(folder / "keys"), "--port"]
    started = [subprocess.Popen([*words, str(port)], stdout=subprocess.DEVNULL) for port in ports]
    (folder / "hosts").write_text("".join(f"127.0.0.1:{port}\n" for port in ports))
    try:
        yield folder / "hosts"
    finally:
        for each in started:
            each.terminate()
        for each in started:
            each.wait()


def step_seconds(command: list[str], out: Path) -> float:
    done = subprocess.run(
        [*SHOAL, *command, "--out", str(out)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stdout[-3000:]}{done.stderr[-3000:]}")
    rows = [row for row in read_lines(out / "metrics.jsonl") if "loss" in row]
    shutil.rmtree(out)
    return statistics.median(row["step_seconds"] for row in rows[LEFT_OUT:])


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--steps", type=int, default=200)
    arguments.add_argument("--recipe", default="quickstart")
    given = arguments.parse_args()
    words = [given.recipe, *WORDS, f"train.steps={given.steps}"]
    ratios, alone, over = [], [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with etcd_server(folder) as store, agents(folder) as hosts:
            known = ["--hosts", str(hosts), "--keys", str(folder / "keys"), "--etcd", store]
            for number in range(given.rounds):
                turns = [
                    (alone, ["train", *words], folder / "alone"),
                    (over, ["launch", "hosts", *words, *known], folder / f"over-{number}"),
                ]
                for seconds, command, out in turns[:: 1 if number % 2 else -1]:
                    seconds.append(step_seconds(command, out))
                ratios.append(over[-1] / alone[-1])
                print(
                    f"round {number + 1}: alone {1e3 * alone[-1]:.2f} ms, over agents "
                    f"{1e3 * over[-1]:.2f} ms, ratio {ratios[-1]:.4f}",
                    flush=True,
                )
    print(f"median ratio {statistics.median(ratios):.4f} ({min(ratios):.4f} to {max(ratios):.4f})")


if __name__ == "__main__":
    main()
