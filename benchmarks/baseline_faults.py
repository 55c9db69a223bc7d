"""What torchrun + DDP + DCP do with a fault, as a careful user has them; prints one JSON row.

    python benchmarks/baseline_faults.py kill|stop|flip [--repeats 5]

Two gloo workers train the quickstart's model on random tokens, save with DCP every 5 steps into a
new folder and load the newest one at a start. Rank 1 does the fault to itself at step 12, once.
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

STEPS, AT, SAVE_EVERY = 16, 12, 5


def work(folder: Path, fault: str) -> None:
    """One worker under torchrun."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    import xxhash
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.nn.parallel import DistributedDataParallel
    from transformers import LlamaConfig, LlamaForCausalLM

    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=10))
    rank = dist.get_rank()
    (folder / f"pid-{os.getpid()}").touch()
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=4096, use_cache=False, **sizes, **heads))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    wrapped = DistributedDataParallel(model)
    start, saved = 0, sorted(folder.glob("step-*/.metadata"))
    if saved:
        start = int(saved[-1].parent.name.partition("-")[2])
        weights, moments = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=saved[-1].parent)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    for step in range(start + 1, STEPS + 1):
        generator = torch.Generator().manual_seed(1000 * step + rank)
        rows = torch.randint(4096, (8, 256), generator=generator)
        if rank == 1 and step == AT and not (folder / "done").exists():
            (folder / "done").touch()
            (folder / "fault").write_text(str(time.monotonic()))
            if fault == "flip":
                next(model.parameters()).data.view(torch.int32).view(-1)[1] ^= 1 << 12
            else:
                os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
        loss = wrapped(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if rank == 0:
            with open(folder / "steps", "a") as file:
                file.write(json.dumps({"step": step, "at": time.monotonic()}) + "\n")
        if step % SAVE_EVERY == 0:
            weights, moments = get_state_dict(model, optimizer)
            dcp.save(
                {"model": weights, "optimizer": moments},
                checkpoint_id=folder / f"step-{step:04d}",
            )
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    digest = xxhash.xxh3_64_hexdigest(flat.numpy())
    (folder / f"digest-{rank}").write_text(digest)
    dist.destroy_process_group()


def end_workers(folder: Path) -> None:
    """End the workers that outlive their launcher: each is in a session of its own."""
    for path in folder.glob("pid-*"):
        pid = int(path.name.partition("-")[2])
        try:
            if str(folder) in Path(f"/proc/{pid}/cmdline").read_text():
                os.kill(pid, signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            pass


def once(fault: str) -> dict:
    """One job; what became of it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "--max-restarts", "3", "--monitor-interval", "0.1"),
            *(__file__, fault, "--folder", name),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0"}
        launcher = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            _, said = launcher.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            launcher.kill()
            _, said = launcher.communicate()
        end_workers(folder)
        if not (folder / "fault").exists():
            raise SystemExit(said.decode()[-3000:])
        at = float((folder / "fault").read_text())
        steps = [json.loads(line) for line in (folder / "steps").read_text().splitlines()]
        after = [row["at"] for row in steps if row["at"] > at and row["step"] >= AT]
        digests = {path.read_text() for path in folder.glob("digest-*")}
        return {
            "finished": launcher.returncode == 0 and steps[-1]["step"] == STEPS,
            "seconds": after[0] - at if after else None,
            "redone": len(steps) - len({row["step"] for row in steps}),
            "replicas_equal": len(digests) == 1,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("fault", choices=["kill", "stop", "flip"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.folder is not None:
        work(given.folder, given.fault)
        return
    found = [once(given.fault) for _ in range(given.repeats if given.fault == "kill" else 1)]
    print(json.dumps(found), file=sys.stderr)
    seconds = [one["seconds"] for one in found if one["finished"] and one["seconds"]]
    spread = None
    if seconds and given.fault != "flip":
        spread = {"median": statistics.median(seconds), "p95": max(seconds), "worst": max(seconds)}
    finished = sum(one["finished"] for one in found)
    note = f"finished {finished} of {len(found)}"
    if given.fault == "flip":
        note += "; replicas " + ("equal" if found[0]["replicas_equal"] else "differ, exit 0")
    row = {
        "repeats": len(found),
        "fired": len(found),
        "noticed": finished if given.fault != "flip" else 0,
        "recovery_seconds": spread,
        "steps_redone": sum(one["redone"] for one in found),
        "note": note,
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
