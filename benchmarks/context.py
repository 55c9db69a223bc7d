"""Attention of two ranks that each have half of every row: shoal's ring beside torch's own.

torch's `context_parallel` has no rule for the CPU's attention (torch 2.13 raises
NotImplementedError), so beside shoal's stand the functions that it is made of, called as it calls
them: the ring with balanced slices, forward and backward (private names of
torch.distributed.tensor.experimental). Those take no masks, so rows are one document.

python benchmarks/context.py [--tokens 4096] [--pairs 7] [--dtype float32]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import Tensor
from torch.distributed.tensor.experimental._context_parallel import _attention as theirs

from shoal.parallel import ring
from shoal.parallel.exchange import Exchange
from shoal.parallel.rows import Context

RANKS = 2
OP = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=4096, help="of a row")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--size", type=int, default=64, help="of a head")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(measure, (given, f"file://{folder}/meeting"), nprocs=RANKS)


def measure(rank: int, given: argparse.Namespace, meeting: str) -> None:
    """Forward and backward of both, one after the other; rank 0 prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS)
    shape = (given.rows, given.heads, given.tokens // RANKS, given.size)
    torch.manual_seed(rank)
    dtype = getattr(torch, given.dtype)
    own = [torch.randn(shape, dtype=dtype) for _ in range(4)]
    context = Context(Exchange(dist.group.WORLD, rank, RANKS), "ring")
    slices = [context.slices(each, tokens=given.tokens) for each in range(RANKS)]
    way = ring.Ring(context.exchange, slices)
    ways: dict[str, Callable[[], list[Tensor]]] = {
        "shoal": lambda: shoals(own, way, given.size**-0.5),
        "torch": lambda: torchs(own, given.size**-0.5),
    }
    for ours, other in zip(ways["shoal"](), ways["torch"](), strict=True):
        apart = float((ours.double() - other.double()).abs().max() / other.double().abs().max())
        assert apart < (1e-4 if dtype == torch.float32 else 5e-2), f"they differ by {apart}"
    ratios, seconds = [], {name: [] for name in ways}
    for pair in range(given.pairs):
        for name in sorted(ways, reverse=pair % 2 == 1):
            dist.barrier()
            began = time.perf_counter()
            ways[name]()
            dist.barrier()
            seconds[name].append(time.perf_counter() - began)
        ratios.append(seconds["torch"][-1] / seconds["shoal"][-1])
    if rank == 0:
        for name, each in seconds.items():
            print(f"{name}: {1e3 * statistics.median(each):.0f} ms")
        low, high = min(ratios), max(ratios)
        print(f"speed beside torch: {statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})")
    dist.destroy_process_group()


def shoals(own: list[Tensor], way: ring.Ring, scale: float) -> list[Tensor]:
    """Output and gradients of queries, keys and values."""
    query, key, value = (each.detach().requires_grad_() for each in own[:3])
    output = ring.attend(query, key, value, ring=way, seen=ring.Seen(), scale=scale, softcap=None)
    output.backward(own[3].transpose(1, 2))
    return [output.detach().transpose(1, 2), *(each.grad for each in (query, key, value))]


def torchs(own: list[Tensor], scale: float) -> list[Tensor]:
    """The same by torch's templates, with the CPU's fused kernel."""
    group: Any = dist.group.WORLD
    query, key, value, gradient = own
    theirs._cp_options.enable_load_balance = True
    output, logs, *_ = theirs._templated_ring_attention(
        group, 2, OP, query, key, value, is_causal=True, scale=scale
    )
    found = theirs._templated_ring_attention_backward(
        group,
        2,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
        grad_out=gradient,
        grad_out_name="grad_out",
        query=query,
        key=key,
        value=value,
        out=output,
        logsumexp=logs,
        is_causal=True,
        dropout_p=0.0,
        scale=scale,
    )
    return [output, *found[:3]]


if __name__ == "__main__":
    main()
