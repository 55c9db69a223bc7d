"""Hand-written loops of the quickstart's model, as a careful user of torch has them.

    python -m torch.distributed.run --nproc-per-node N baseline_strategies.py KIND ...

KIND is plain, shard, tensor or pipeline.

plain: one process. shard: FSDP2 per block and root, resharded after forward. tensor: DTensor by
`parallelize_module` with sequence parallel and loss parallel, and the tie made again.
pipeline: half of the layers each, 1f1b, the tied embedding's gradient summed over both. Rows come
ready-made from a file of token ids. Prints one JSON line per step on rank 0.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as functional
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from transformers import LlamaConfig, LlamaForCausalLM


def sharded(model: torch.nn.Module) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


def divided(model: torch.nn.Module) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    block = {
        "input_layernorm": SequenceParallel(),
        "self_attn": PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": Shard(1)},
            desired_input_kwarg_layouts={"hidden_states": Replicate()},
        ),
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(output_layouts=Shard(1)),
        "post_attention_layernorm": SequenceParallel(),
        "mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(output_layouts=Shard(1)),
    }
    for layer in model.model.layers:
        parallelize_module(layer, mesh, block)
    outside = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "model.norm": SequenceParallel(),
        "lm_head": ColwiseParallel(
            input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False
        ),
    }
    parallelize_module(model, mesh, outside)
    model.lm_head.weight = model.model.embed_tokens.weight  # parallelize_module unties them


class Half(torch.nn.Module):
    """The first or the last half of a model's layers, with the embedding or the head."""

    def __init__(self, model: LlamaForCausalLM, rank: int) -> None:
        super().__init__()
        half = len(model.model.layers) // 2
        self.layers = model.model.layers[half:] if rank else model.model.layers[:half]
        self.rotary, self.embed = model.model.rotary_emb, None if rank else model.model.embed_tokens
        self.norm, self.head = (model.model.norm, model.lm_head) if rank else (None, None)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.embed is not None:
            hidden = self.embed(hidden)
        places = self.rotary(hidden, torch.arange(hidden.shape[1])[None])
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings=places)
        return hidden if self.head is None else self.head(self.norm(hidden))

    @property
    def tied(self) -> torch.nn.Parameter:
        return (self.head if self.embed is None else self.embed).weight


class Pipeline:
    """Forward and backward of a step by torch's schedule, and one norm over both halves."""

    def __init__(self, model: LlamaForCausalLM, micros: int, rows: int, tokens: int) -> None:
        self.rank = dist.get_rank()
        self.half = Half(model, self.rank)
        states = torch.empty(rows, tokens, model.config.hidden_size, requires_grad=True)
        given = states if self.rank else torch.zeros(rows, tokens, dtype=torch.int64)
        stage = PipelineStage(
            self.half, self.rank, 2, torch.device("cpu"), input_args=given, output_args=states
        )
        self.schedule = Schedule1F1B(stage, micros, loss_fn=self.loss)

    @staticmethod
    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def step(self, rows: torch.Tensor) -> None:
        labels = functional.pad(rows[:, 1:], (0, 1), value=-100)
        if self.rank:
            self.schedule.step(target=labels, return_outputs=False)
        else:
            self.schedule.step(rows)
        dist.all_reduce(self.half.tied.grad)

    def clip(self, limit: float) -> None:
        own = [p.grad for p in self.half.parameters() if not self.rank or p is not self.half.tied]
        square = torch.nn.utils.get_total_norm(own) ** 2
        dist.all_reduce(square)
        torch.nn.utils.clip_grads_with_norm_(self.half.parameters(), limit, square.sqrt())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=("plain", "shard", "tensor", "pipeline"))
    parser.add_argument("--tokens", required=True, help="int64 [steps, batch, T] as .npy")
    parser.add_argument("--config", required=True, help="JSON of LlamaConfig keys")
    parser.add_argument("--micro", type=int, required=True)
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rank, size = 0, 1
    if given.kind != "plain":
        dist.init_process_group("gloo")
        rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**json.loads(given.config), use_cache=False))
    model.train()
    if given.kind == "shard":
        sharded(model)
    elif given.kind == "tensor":
        divided(model)
    steps = torch.from_numpy(np.load(given.tokens))
    line = None
    if given.kind == "pipeline":
        line = Pipeline(model, steps.shape[1] // given.micro, given.micro, steps.shape[2])
    trained = list((model if line is None else line.half).parameters())
    decayed = [p for p in trained if p.dim() >= 2]
    plain = [p for p in trained if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    parts = size if given.kind == "shard" else 1
    share, part = steps.shape[1] // parts, rank if given.kind == "shard" else 0
    whole = contextlib.nullcontext if given.kind != "tensor" else loss_parallel
    for number, rows in enumerate(steps):
        began = time.perf_counter()
        micros = rows[part * share : (part + 1) * share].split(given.micro)
        for micro in micros if line is None else ():
            places = torch.arange(micro.shape[1])[None]
            labels = functional.pad(micro[:, 1:], (0, 1), value=-100)
            with whole():
                logits = model(input_ids=micro, position_ids=places).logits
                loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
                (loss / len(micros)).backward()
        if line is None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        else:
            line.step(rows)
            line.clip(1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if rank == 0:
            seconds = time.perf_counter() - began
            print(json.dumps({"step": number + 1, "seconds": seconds}), flush=True)
    if given.kind != "plain":
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
