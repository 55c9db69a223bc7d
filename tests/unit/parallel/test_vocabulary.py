"""The loss over a vocabulary that ranks divide: same number, same gradients, no whole logits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shoal.launch.pool import WorkerPool
from shoal.observe.events import Report
from shoal.parallel.vocabulary import Vocabulary
from shoal.runtime import start_process_group, stop_process_group
from shoal.tasks.losses import chunked_loss, chunked_losses
from workers import run_workers

TOKENS, WIDTH, ENTRIES = 37, 6, 23
"""ENTRIES is no multiple of the ranks."""


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, labels (some without a target) and the whole head."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=draw, dtype=torch.float64) * 3
    head = torch.randn(ENTRIES, WIDTH, generator=draw, dtype=torch.float64)
    labels = torch.randint(0, ENTRIES, (TOKENS,), generator=draw)
    labels[::5] = -100
    return hidden.to(dtype), labels, head.to(dtype)


def capped(logits: torch.Tensor) -> torch.Tensor:
    """A transform of the logits, as Gemma 2 has one."""
    return torch.tanh(logits / 20.0) * 20.0


def run(payload: dict[str, Any], descriptor: int) -> int:
    """Entry point of a worker: its part of the vocabulary against the whole, in float64."""
    torch.set_num_threads(1)
    rank, size = payload["rank"], payload["size"]
    meeting, device = Path(payload["store"]).as_uri(), torch.device("cpu")
    start_process_group(rank=rank, size=size, device=device, meeting=meeting, timeout_seconds=60)
    hidden, labels, head = inputs(torch.float64)
    start, stop = ENTRIES * rank // size, ENTRIES * (rank + 1) // size
    part = Vocabulary(start, stop - start, ENTRIES, dist.group.WORLD)

    def both(weight: torch.Tensor, vocabulary: Vocabulary | None) -> tuple[Any, ...]:
        leaf, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        widest = [0]

        def logits_of(states: torch.Tensor) -> torch.Tensor:
            logits = capped(states @ weight.t())
            widest[0] = max(widest[0], logits.shape[-1])
            return logits

        settings: Any = {"head_parameters": [weight], "chunk_tokens": 8, "vocabulary": vocabulary}
        loss = chunked_loss(leaf, labels, logits_of, **settings)
        (loss * 0.25).backward()
        told = chunked_losses(leaf, labels, logits_of, predict=True, **settings)
        return loss.item(), leaf.grad, weight.grad, told, widest[0]

    wanted, mine = both(head, None), both(head[start:stop], part)
    hidden_gradient = mine[1].clone()
    dist.all_reduce(hidden_gradient)  # each rank has a part of it
    found = {
        "loss": abs(mine[0] - wanted[0]) / wanted[0],
        "hidden": float((hidden_gradient - wanted[1]).abs().max()),
        "head": float((mine[2] - wanted[2][start:stop]).abs().max()),
        "losses": float((mine[3].losses - wanted[3].losses).abs().max()),
        "predictions": int((mine[3].predictions != wanted[3].predictions).sum()),
        "widest": mine[4],
    }
    Report(descriptor).say("compared", found=found)
    stop_process_group()
    return 0


def test_a_divided_vocabulary_gives_the_same_loss(pool: WorkerPool, tmp_path: Path) -> None:
    payload = {"size": 3, "store": str(tmp_path / "store")}
    found = run_workers(pool, "unit.parallel.test_vocabulary:run", payload, size=3)
    assert len(found) == 3
    for each in found:
        # float64: sums of 23 terms in another order, 2e-16 each
        assert max(each[key] for key in ("loss", "hidden", "head", "losses")) < 1e-13, each
        assert each["predictions"] == 0
        assert each["widest"] == math.ceil(ENTRIES / 3) or each["widest"] == ENTRIES // 3
