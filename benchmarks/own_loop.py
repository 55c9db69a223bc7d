"""A loop of one's own beside torch's DistributedDataParallel: the same model, steps and workers.

    shoal run benchmarks/own_loop.py --workers 2

Both are in the same processes, and take turns of 8 steps; printed is the median of 7 pairs of
turns, with the range. A BERT of 4 layers, 16 rows of 64 tokens a step, AdamW, float32.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertForTokenClassification

import shoal

PAIRS, STEPS, ROWS = 7, 8, 16


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    size = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
    drop = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=8192, num_attention_heads=4, num_labels=9, **size, **drop)
    ours = BertForTokenClassification(config)
    theirs = copy.deepcopy(ours)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-4) for each in (ours, theirs)]
    fleet = shoal.join()
    fleet.parallelize(ours, optimizers[0])
    wrapped = DistributedDataParallel(theirs, gradient_as_bucket_view=True)
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(8192, (STEPS, ROWS, 64), generator=draw)
    batches = [{"input_ids": each, "labels": each % 9} for each in ids]
    share = fleet.share_of(ROWS)
    parts = [{k: v[share.start : share.stop] for k, v in each.items()} for each in batches]

    def with_shoal() -> float:
        for batch in fleet.batches(batches):
            fleet.backward(ours(**batch).loss)
            last = fleet.step().loss
        return last

    def with_ddp() -> float:
        for batch in parts:
            optimizers[1].zero_grad()
            loss = wrapped(**batch).loss
            loss.backward()
            optimizers[1].step()
        whole = loss.detach().clone()
        torch.distributed.all_reduce(whole)
        return float(whole) / fleet.size

    turns: list[tuple[float, float]] = []
    for _ in range(PAIRS + 1):  # the first warms up
        (first, ours_loss), (second, theirs_loss) = timed(with_shoal), timed(with_ddp)
        assert abs(ours_loss - theirs_loss) < 1e-4 * theirs_loss, (ours_loss, theirs_loss)
        turns.append((first, second))
    ratios = [ddp / own for own, ddp in turns[1:]]
    own, ddp = (statistics.median(each) / STEPS * 1e3 for each in zip(*turns[1:]))
    print(f"{fleet.size} workers; ms a step: shoal.join {own:.1f}, DDP {ddp:.1f}")
    print(
        f"speed beside DDP: {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f}, {PAIRS} pairs of {STEPS} steps)"
    )


def timed(turn: Callable[[], float]) -> tuple[float, float]:
    """Seconds of a turn, and its last loss."""
    torch.distributed.barrier()
    began = time.perf_counter()
    loss = turn()
    return time.perf_counter() - began, loss


if __name__ == "__main__":
    main()
