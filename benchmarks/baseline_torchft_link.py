"""One replica of torchft's DiLoCo, or of its DDP, on rows of token ids; a JSON line for each step.

    python -m venv --system-site-packages SCRATCH && SCRATCH/bin/pip install torchft==0.2.0

benchmarks/slow_link.py starts two of it on two hosts of a lab. Inner AdamW and its schedule are the
recipe's; the outer step is Nesterov with 0.7 and 0.9, as in the paper and in torchft's own example.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import time

import numpy as np
import torch
from torch.distributed import TCPStore
from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo
from torchft.local_sgd import DiLoCo
from transformers import AutoModelForCausalLM

RATE, WARMUP = 3e-3, 60


def rate_of(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine to a tenth, from step 0."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP)))


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", required=True, help="int64 [steps, batch, T] as .npy")
    parser.add_argument("--start", required=True, help="a model folder")
    parser.add_argument("--number", type=int, required=True)
    parser.add_argument("--address", required=True, help="of this host")
    parser.add_argument("--lighthouse", required=True)
    parser.add_argument("--every", type=int, default=0, help="steps of a round; 0: DDP")
    given = parser.parse_args()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(given.start, dtype=torch.float32)
    model.train()
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    plain = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    inner = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))
    store = TCPStore(given.address, 0, is_master=True, wait_for_workers=False)
    outer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=datetime.timedelta(seconds=60)),
        load_state_dict=lambda state: model.load_state_dict(state["model"]),
        state_dict=lambda: {"model": model.state_dict()},
        min_replica_size=2,
        use_async_quorum=False,
        timeout=datetime.timedelta(seconds=60),
        rank=0,
        world_size=1,
        store_addr=given.address,
        store_port=store.port,
        lighthouse_addr=given.lighthouse,
        replica_id=f"replica_{given.number}_",
        hostname=given.address,
    )
    rows = torch.from_numpy(np.load(given.tokens))
    share = rows.shape[1] // 2
    if given.every:
        with DiLoCo(manager, [model], inner, outer, sync_every=given.every):
            _train(model, model, inner, inner, rows[:, given.number * share :][:, :share])
    else:
        wrapped = DistributedDataParallel(manager, model)
        optimizer = Optimizer(manager, inner)
        _train(model, wrapped, inner, optimizer, rows[:, given.number * share :][:, :share])
    manager.shutdown(wait=False)
    os._exit(0)


def _train(model, wrapped, inner, optimizer, rows) -> None:
    for step, own in enumerate(rows):
        began = time.perf_counter()
        for group in inner.param_groups:
            group["lr"] = RATE * rate_of(step, len(rows))
        optimizer.zero_grad()
        loss = wrapped(input_ids=own, labels=own).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds = time.perf_counter() - began
        print(json.dumps({"step": step + 1, "seconds": seconds, "loss": float(loss)}), flush=True)


if __name__ == "__main__":
    main()
