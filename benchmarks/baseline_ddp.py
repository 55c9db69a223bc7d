"""A hand-written DistributedDataParallel loop of the quickstart's model, as a careful user has it.

Run under torchrun. Same model, batch, optimizer settings and clipping as the shoal run beside it;
rows come ready-made from a file of token ids. Prints one JSON line per step on rank 0.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", required=True, help="int64 [steps, batch, T] as .npy")
    parser.add_argument("--config", required=True, help="JSON of LlamaConfig keys")
    parser.add_argument("--micro", type=int, required=True)
    given = parser.parse_args()
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**json.loads(given.config), use_cache=False))
    model.train()
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    plain = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), fused=True)
    steps = torch.from_numpy(np.load(given.tokens))
    share = steps.shape[1] // size
    for number, rows in enumerate(steps):
        began = time.perf_counter()
        own = rows[rank * share : (rank + 1) * share]
        parts = own.split(given.micro)
        for index, part in enumerate(parts):
            wrapped.require_backward_grad_sync = index == len(parts) - 1
            loss = wrapped(input_ids=part, labels=part).loss / len(parts)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if rank == 0:
            seconds = time.perf_counter() - began
            print(json.dumps({"step": number + 1, "seconds": seconds}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
