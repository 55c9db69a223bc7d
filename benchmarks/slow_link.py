"""Replicas on two hosts whose cable is slow: shoal's ways of agreeing, and torchft's beside them.

    python benchmarks/slow_link.py --torchft SCRATCH/bin/python [--steps 240] [--rate 20mbit]

Two hosts of a lab (root; network namespaces, tests/hosts/lab.py) with a token bucket on each cable
and a relay that delays every frame. The model of recipe sync-bench, the same start, rows, optimizer
and schedule in all; one run each. Loss is of training, the mean of both replicas over the last
tenth of the steps; bytes are what the kernel counts on the cable of host 1, both ways.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from hosts.lab import Lab, call  # noqa: E402
from shoal.config.load import load_recipe  # noqa: E402
from shoal.data.stream import Stream  # noqa: E402
from shoal.launch import local  # noqa: E402
from shoal.launch.prepare import prepare_inputs  # noqa: E402
from shoal.layout import Share  # noqa: E402
from shoal.observe.events import read_lines  # noqa: E402

BIN = Path(sys.executable).parent
DILOCO = "kind: diloco, every_steps: 30, start_steps: 0"
SHOAL = {
    "every-step": "{kind: every-step}",
    "every-step, int8": "{kind: every-step, codec: {kind: int8}}",
    "diloco H=30": f"{{{DILOCO}}}",
    "diloco H=30, int8": f"{{{DILOCO}, codec: {{kind: int8, error_feedback: true}}}}",
}
TORCHFT = {"torchft DiLoCo H=30": 30, "torchft DDP": 0}


def start_of(scratch: Path) -> Path:
    """A model folder to begin from: what one step of the recipe leaves."""
    out = scratch / "start"
    local.train("sync-bench", ["train.steps=1", "parallel={replicate: 1}"], out=out, console=False)
    return out / "model"


def rows_of(steps: int, overrides: list[str]) -> np.ndarray:
    """The global batches that a run of shoal with `overrides` takes [steps, batch, T]."""
    recipe = load_recipe("sync-bench", overrides)
    inputs = prepare_inputs(recipe, say=lambda text: None)
    batch = recipe.train.global_batch_samples
    stream = Stream(Path(inputs.data_directory), seed=recipe.seed, global_batch_samples=batch)
    return np.stack([stream.at(step, Share(0, batch))["input_ids"] for step in range(steps)])


def crossed(lab: Lab) -> int:
    """Bytes over the cable of host 1 so far."""
    said = json.loads(call("ip", "-n", lab.hosts[0].space, "-j", "-s", "link", "show", "eth0"))
    stats = said[0]["stats64"]
    return int(stats["rx"]["bytes"]) + int(stats["tx"]["bytes"])


def measured(
    lab: Lab, commands: list[list[object]], *, env: dict[str, str]
) -> tuple[list[str], int]:
    """What one command on each host printed, to their ends, and the bytes that crossed."""
    before = crossed(lab)
    started = [
        host.start(*words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for host, words in zip(lab.hosts, commands)
    ]
    said = [each.communicate(timeout=1500) for each in started]
    if any(each.returncode for each in started):
        raise SystemExit("\n".join(error[-2000:] for _, error in said))
    return [out for out, _ in said], crossed(lab) - before


def row(name: str, losses: list[float], seconds: list[float], num_bytes: int, tokens: int) -> None:
    """A line of the table."""
    step = statistics.mean(seconds[2:])
    tail = statistics.mean(losses[-max(1, len(losses) // 10) :])
    print(
        f"| {name} | {tail:.3f} | {tokens / step:,.0f} | {num_bytes / len(losses) / tokens:,.0f} "
        f"| {sum(seconds):.0f} |",
        flush=True,
    )


def main() -> None:
    """Run each once, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--torchft", type=Path, help="python of an environment that has it")
    parser.add_argument("--only", nargs="+", default=[], help="choices by a part of their name")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--rate", default="20mbit")
    parser.add_argument("--delay", type=float, default=0.01)
    given = parser.parse_args()

    def chosen(name: str) -> bool:
        return not given.only or any(part in name for part in given.only)

    env = {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    with tempfile.TemporaryDirectory() as name, Lab(2, Path(name)) as lab:
        scratch = Path(name)
        start = start_of(scratch)
        common = [f"model={{kind: pretrained, path: {start}}}", f"train.steps={given.steps}"]
        common += ["train.evaluate_every_steps=0", "sync.verify_every_steps=0"]
        rows = rows_of(given.steps, common)
        np.save(scratch / "tokens.npy", rows)
        tokens = rows.shape[1] * rows.shape[2]
        for host in lab.hosts:
            host.rate(given.rate)
        lab.delay(lab.hosts[0], given.delay)
        print("| choice | loss | tokens/s | bytes a token | seconds |\n" + "| --- " * 5 + "|")
        for number, (label, sync) in enumerate(SHOAL.items()):
            if not chosen(label):
                continue
            out = scratch / f"run-{number}"
            meet = [
                "--nnodes=2",
                "--nproc-per-node=1",
                "--rdzv-backend=c10d",
                f"--rdzv-id={number}",
            ]
            meet += [f"--rdzv-endpoint=h1:{29500 + number}", "--no-python"]
            words = [BIN / "torchrun", *meet, BIN / "shoal", "train", "sync-bench", *common]
            words += [f"sync={sync}", "--out", out]
            _, num_bytes = measured(lab, [words, words], env=env)
            found = [each for each in read_lines(out / "metrics.jsonl") if "loss" in each]
            losses, seconds = ([each[key] for each in found] for key in ("loss", "step_seconds"))
            row(label, losses, seconds, num_bytes, tokens)
        for number, (label, every) in enumerate(TORCHFT.items() if given.torchft else ()):
            if not chosen(label):
                continue
            port = 29600 + number
            code = "import sys, time; from torchft._torchft import LighthouseServer as L; "
            code += f"l = L(bind='10.77.0.1:{port}', min_replicas=2, join_timeout_ms=10000); "
            code += "time.sleep(1e6)"
            lighthouse = lab.hosts[0].start(given.torchft, "-c", code, env=env)
            time.sleep(2.0)
            words = [given.torchft, ROOT / "benchmarks" / "baseline_torchft_link.py"]
            words += ["--tokens", scratch / "tokens.npy", "--start", start, "--every", every]
            words += ["--lighthouse", f"http://10.77.0.1:{port}"]
            each = [[*words, "--number", n, "--address", f"10.77.0.{n + 1}"] for n in range(2)]
            printed, num_bytes = measured(lab, each, env=env)
            lighthouse.kill()
            both = [[json.loads(x) for x in s.splitlines() if x[:1] == "{"] for s in printed]
            losses = [statistics.mean(e["loss"] for e in pair) for pair in zip(*both)]
            row(label, losses, [e["seconds"] for e in both[0]], num_bytes, tokens)


if __name__ == "__main__":
    main()
