"""What torchft's fault-tolerant DDP does with a kill -9, set up as its README says; prints a row.

    python -m venv --system-site-packages SCRATCH && SCRATCH/bin/pip install torchft==0.2.0
    SCRATCH/bin/python benchmarks/baseline_torchft.py [--repeats 5]

Two replica groups of one gloo worker each train the quickstart's model on random tokens; the
launcher starts a dead one again at once. Worker 1 kills itself at step 12 before its forward. The
survivor may go on alone: the batch is then half of what was asked for, and the curve another one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS, AT = 24, 12
ROWS, TOKENS = 16, 256  # of the global batch


def work(folder: Path, number: int, lighthouse: str) -> None:
    """One replica group."""
    import torch
    from torch.distributed import TCPStore
    from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=4096, use_cache=False, **sizes, **heads))
    inner = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=datetime.timedelta(seconds=10)),
        load_state_dict=lambda state: (
            model.load_state_dict(state["model"]),
            inner.load_state_dict(state["optimizer"]),
        ),
        state_dict=lambda: {"model": model.state_dict(), "optimizer": inner.state_dict()},
        min_replica_size=1,
        timeout=datetime.timedelta(seconds=10),
        rank=0,
        world_size=1,
        store_addr="localhost",
        store_port=store.port,
        lighthouse_addr=lighthouse,
        replica_id=f"replica_{number}_",
        hostname="localhost",
    )
    wrapped = DistributedDataParallel(manager, model)
    optimizer = Optimizer(manager, inner)
    while manager.current_step() < STEPS:
        step = manager.current_step() + 1
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(1000 * step + number)
        rows = torch.randint(4096, (ROWS // 2, TOKENS), generator=generator)
        if number == 1 and step == AT and not (folder / "fault").exists():
            (folder / "fault").write_text(str(time.monotonic()))
            os.kill(os.getpid(), signal.SIGKILL)
        wrapped(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        said = {"number": number, "step": step, "committed": manager.current_step() >= step}
        said |= {"replicas": manager.num_participants(), "at": time.monotonic()}
        with open(folder / f"steps-{number}", "a") as file:
            file.write(json.dumps(said) + "\n")
    manager.shutdown(wait=False)
    os._exit(0)


def once() -> dict:
    """One job; what became of it."""
    from torchft._torchft import LighthouseServer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lighthouse = LighthouseServer(
            bind="localhost:0", min_replicas=1, join_timeout_ms=10_000, quorum_tick_ms=100
        )
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0"}

        def start(number: int) -> subprocess.Popen:
            command = [sys.executable, __file__, "--folder", name, "--number", str(number)]
            command += ["--lighthouse", lighthouse.address()]
            with open(folder / f"said-{number}", "ab") as said:
                return subprocess.Popen(command, env=environment, stdout=said, stderr=said)

        workers = [start(0), start(1)]
        until = time.monotonic() + 150
        restarts = 0
        while time.monotonic() < until and any(worker.poll() != 0 for worker in workers):
            for number, worker in enumerate(workers):
                if worker.poll() not in (None, 0) and restarts < 3:
                    restarts += 1
                    workers[number] = start(number)
            time.sleep(0.05)
        finished = all(worker.poll() == 0 for worker in workers)
        for worker in workers:
            worker.kill()
            worker.wait()
        lighthouse.shutdown()
        if not (folder / "fault").exists():
            raise SystemExit((folder / "said-0").read_text()[-3000:])
        at = float((folder / "fault").read_text())
        rows = [json.loads(x) for path in folder.glob("steps-*") for x in path.open()]
        due = (row for row in rows if row["at"] > at and row["step"] >= AT)
        after = sorted(due, key=lambda row: row["at"])
        committed = [row for row in after if row["committed"]]
        both = [row["at"] for row in committed if row["replicas"] == 2]
        return {
            "finished": finished,
            "seconds": committed[0]["at"] - at if committed else None,
            "whole_again": both[0] - at if both else None,
            "alone": len({row["step"] for row in committed if row["replicas"] == 1}),
            "redone": sum(not row["committed"] for row in after),
        }


def main() -> None:
    """Print what was found, and the row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--number", type=int)
    parser.add_argument("--lighthouse")
    given = parser.parse_args()
    if given.folder is not None:
        work(given.folder, given.number, given.lighthouse)
        return
    found = [once() for _ in range(given.repeats)]
    print(json.dumps(found), file=sys.stderr)
    seconds = [one["seconds"] for one in found if one["seconds"] is not None]
    whole = [one["whole_again"] for one in found if one["whole_again"] is not None]
    finished = sum(one["finished"] for one in found)
    note = f"finished {finished} of {len(found)}; {sum(one['alone'] for one in found)} steps "
    note += "with half the batch"
    if whole:
        note += f", both replicas again after {statistics.median(whole):.1f} s"
    spread = None
    if seconds:
        spread = {"median": statistics.median(seconds), "p95": max(seconds), "worst": max(seconds)}
    row = {
        "repeats": len(found),
        "fired": len(found),
        "noticed": len(seconds),
        "recovery_seconds": spread,
        "steps_redone": sum(one["redone"] for one in found),
        "note": note,
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
