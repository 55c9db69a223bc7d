"""transformers' own expert parallel: FSDP2 and token dispatch by all-to-all, as a user has them.

    python -m torch.distributed.run --nproc-per-node 2 baseline_expert.py --model DIR --tokens FILE

The folder is opened with `DistributedConfig(fsdp_size=N, ep_size=N)`: each rank has its part of the
experts of every block, everything else is sharded. Gradients are not clipped: their norm is over
two meshes. Prints one JSON line per step on rank 0.
"""

from __future__ import annotations

import argparse
import json
import os
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as functional
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="a folder of weights")
    parser.add_argument("--tokens", required=True, help="int64 [steps, batch, T] as .npy")
    parser.add_argument("--micro", type=int, required=True)
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    model = AutoModelForCausalLM.from_pretrained(
        given.model,
        dtype=torch.float32,
        attn_implementation="sdpa",
        distributed_config=DistributedConfig(fsdp_size=size, ep_size=size),
    )
    model.config.use_cache = False
    model.train()
    kinds: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, each in model.named_parameters():  # experts lie on another mesh than the rest
        kinds.setdefault((each.dim() >= 2, ".experts." in name), []).append(each)
    groups = [{"params": p, "weight_decay": 0.1 * decays} for (decays, _), p in kinds.items()]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    steps = torch.from_numpy(np.load(given.tokens))
    share = steps.shape[1] // size
    for number, rows in enumerate(steps):
        began = time.perf_counter()
        micros = rows[rank * share : (rank + 1) * share].split(given.micro)
        for micro in micros:
            labels = functional.pad(micro[:, 1:], (0, 1), value=-100)
            logits = model(input_ids=micro).logits
            loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
            (loss / len(micros)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if rank == 0:
            line = {"step": number + 1, "seconds": time.perf_counter() - began}
            print(json.dumps({**line, "loss": float(loss.detach())}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
