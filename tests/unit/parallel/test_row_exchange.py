"""Rows to the ranks that have their experts and back: uneven, some empty, with the gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shoal.launch.pool import WorkerPool
from shoal.observe.events import Report
from shoal.parallel.exchange import Exchange
from shoal.parallel.expert import AllToAll
from shoal.runtime import start_process_group, stop_process_group
from workers import run_workers

RANKS, EXPERTS, WIDTH = 3, 6, 5
COUNTS = [[2, 0, 0, 3, 1, 0], [0, 0, 0, 0, 0, 4], [0, 0, 0, 0, 0, 0]]
"""Rows of each rank for each expert: rank 2 has none, expert 1 and 2 get none."""


def rows_of(rank: int, dtype: torch.dtype) -> torch.Tensor:
    number = sum(COUNTS[rank])
    return (torch.arange(number * WIDTH).view(number, WIDTH) + 100 * rank).to(dtype)


def made_of(expert: int, rows: torch.Tensor) -> torch.Tensor:
    return rows * (expert + 1)


def run(payload: dict[str, Any], descriptor: int) -> int:
    """Entry point of a worker: its own two experts multiply rows by their number."""
    rank, dtype = payload["rank"], getattr(torch, payload["dtype"])
    meeting = Path(payload["store"]).as_uri()
    device = torch.device("cpu")
    start_process_group(rank=rank, size=RANKS, device=device, meeting=meeting, timeout_seconds=60)
    exchange = Exchange(dist.group.WORLD, rank=rank, size=RANKS)
    seen: list[list[int]] = []

    def products(rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        seen.append(counts.tolist())
        parts = rows.split(counts.tolist())
        return torch.cat([made_of(2 * rank + n, part) for n, part in enumerate(parts)])

    rows = rows_of(rank, dtype).requires_grad_()
    made = AllToAll(exchange)(rows, torch.tensor(COUNTS[rank]), products)
    (made * made.detach()).sum().backward()
    sent = dict(exchange.traffic.sent_bytes)
    found = {
        "rank": rank,
        "made": made.float().tolist(),
        "gradient": rows.grad.float().tolist(),
        "seen": seen[0],
        "sent": sent,
    }
    Report(descriptor).say("exchanged", found=found)
    stop_process_group()
    return 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_row_meets_its_expert_and_comes_back(
    dtype: str, pool: WorkerPool, tmp_path: Path
) -> None:
    payload = {"store": str(tmp_path / "store"), "dtype": dtype}
    found = run_workers(pool, "unit.parallel.test_row_exchange:run", payload, size=RANKS)
    total = torch.tensor(COUNTS).sum(0).view(RANKS, 2).tolist()
    size = WIDTH * (4 if dtype == "float32" else 2)
    for one in found:
        rank = one["rank"]
        rows = rows_of(rank, getattr(torch, dtype))
        experts = torch.arange(EXPERTS).repeat_interleave(torch.tensor(COUNTS[rank]))
        made = rows * (experts[:, None] + 1)
        assert one["made"] == made.float().tolist()
        assert one["gradient"] == (made * (experts[:, None] + 1)).float().tolist()
        assert one["seen"] == total[rank]
        # there and back, for the result and for the gradient; and the counts, 8 bytes each
        away = sum(COUNTS[rank]) - sum(COUNTS[rank][2 * rank : 2 * rank + 2])
        theirs = sum(total[rank]) - sum(COUNTS[rank][2 * rank : 2 * rank + 2])
        assert one["sent"] == {"all_to_all": 2 * size * (away + theirs) + (RANKS - 1) * 2 * 8}


def run_joined(payload: dict[str, Any], descriptor: int) -> int:
    """Entry point of a worker: gathers a token of each rank, and swaps heads for tokens."""
    rank, device = payload["rank"], torch.device("cpu")
    meeting = Path(payload["store"]).as_uri()
    start_process_group(rank=rank, size=RANKS, device=device, meeting=meeting, timeout_seconds=60)
    exchange = Exchange(dist.group.WORLD, rank=rank, size=RANKS)
    token = torch.arange(2 * WIDTH).view(2, 1, WIDTH).float() + 100 * rank
    heads = torch.arange(2 * RANKS * WIDTH).view(2, RANKS, 1, WIDTH).float() + 100 * rank
    made = {
        "gathered": exchange.gather(token),
        "swapped": exchange.swap(heads, split=1, join=2),
    }
    found = {name: (each.is_contiguous(), each.tolist()) for name, each in made.items()}
    Report(descriptor).say("joined", found={"rank": rank, **found})
    stop_process_group()
    return 0


def test_what_is_joined_of_one_token_each_can_be_viewed_as_rows(
    pool: WorkerPool, tmp_path: Path
) -> None:
    """Routers do `hidden.view(-1, width)` (found by the fuzzer: DeepSeek, short rows, tensor 4)."""
    payload = {"store": str(tmp_path / "store")}
    tokens = torch.arange(2 * WIDTH).view(2, 1, WIDTH).float()
    heads = torch.arange(2 * RANKS * WIDTH).view(2, RANKS, 1, WIDTH).float()
    whole = torch.cat([tokens + 100 * rank for rank in range(RANKS)], dim=1)
    for found in run_workers(
        pool, "unit.parallel.test_row_exchange:run_joined", payload, size=RANKS
    ):
        assert found["gathered"] == [True, whole.tolist()]
        own = heads[:, found["rank"] : found["rank"] + 1]
        joined = torch.cat([own + 100 * rank for rank in range(RANKS)], dim=2)
        assert found["swapped"] == [True, joined.tolist()]
