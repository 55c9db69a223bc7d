"""What every `Group` owes its callers: each check runs on every rank, of threads or processes."""

from __future__ import annotations

import itertools
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from shoal.comm.group import Group, ProcessGroup
from shoal.comm.messages import broadcast_json, gather_json
from shoal.comm.threads import Meeting, ThreadGroup
from shoal.observe.events import Report
from shoal.runtime import start_process_group, stop_process_group

Failures = dict[str, str | None]
"""Name of a check -> None, or the traceback of the first rank that it failed on."""


def mine(rank: int, *, numel: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor that differs from rank to rank; whole numbers, so that sums are exact."""
    return (torch.arange(numel, dtype=torch.int64) % 91 + 100 * rank).to(dtype)


def sums_replace_the_tensor(group: Group) -> None:
    for dtype in (torch.float32, torch.float64, torch.int64):
        for numel in (1, 2, 7, 1000):
            tensor = mine(group.rank, numel=numel, dtype=dtype)
            group.sum_(tensor)
            wanted = sum(mine(rank, numel=numel, dtype=dtype) for rank in range(group.size))
            assert torch.equal(tensor, wanted)


def sums_are_the_same_bits_on_every_rank(group: Group) -> None:
    generator = torch.Generator().manual_seed(group.rank)
    tensor = torch.randn(4097, generator=generator)
    group.sum_(tensor)
    parts = group.gather(tensor)
    assert all(torch.equal(part, parts[0]) for part in parts)


def sums_keep_shape_and_views(group: Group) -> None:
    flat = torch.zeros(12)
    view = flat[2:8].view(2, 3)
    view.fill_(group.rank + 1.0)
    group.sum_(view)
    assert flat[2:8].tolist() == [sum(range(1, group.size + 1))] * 6
    assert flat[:2].tolist() == [0.0, 0.0]


def gather_is_in_rank_order(group: Group) -> None:
    own = mine(group.rank, numel=5)
    parts = group.gather(own)
    own.zero_()  # what was gathered is a copy, or nobody could go on with their own
    group.barrier()
    if group.size > 1:
        for rank, part in enumerate(parts):
            assert torch.equal(part, mine(rank, numel=5))


def broadcast_comes_from_any_rank(group: Group) -> None:
    for source in range(group.size):
        tensor = mine(group.rank, numel=9)
        group.broadcast_(tensor, source=source)
        assert torch.equal(tensor, mine(source, numel=9))


def uneven_bounds(size: int, *, numel: int) -> list[tuple[int, int]]:
    """Parts of growing size; the first is empty."""
    edges = [numel * rank * rank // (size * size) // 2 * 2 for rank in range(size)] + [numel]
    edges[0] = 0
    if size > 1:
        edges[1] = 0
    return list(itertools.pairwise(edges))


def slices_bring_everybodys_part(group: Group) -> None:
    bounds = uneven_bounds(group.size, numel=100)
    own = [mine(group.rank, numel=100), -mine(group.rank, numel=100)]
    received = group.slices(own, bounds)
    start, stop = bounds[group.rank]
    for rank, (first, second) in enumerate(received):
        assert torch.equal(first, mine(rank, numel=100)[start:stop])
        assert torch.equal(second, -mine(rank, numel=100)[start:stop])
    group.barrier()


def assemble_fills_every_part(group: Group) -> None:
    bounds = uneven_bounds(group.size, numel=100)
    tensor = torch.full((100,), -1.0)
    start, stop = bounds[group.rank]
    tensor[start:stop] = torch.arange(100.0)[start:stop]
    group.assemble_(tensor, bounds)
    assert torch.equal(tensor, torch.arange(100.0))


def buffers_begin_at_zero(group: Group) -> None:
    buffer = group.buffer(10, dtype=torch.float32, device=torch.device("cpu"))
    assert buffer.tolist() == [0.0] * 10
    group.barrier()
    if group.rank == 0:
        buffer.fill_(1.0)
    group.barrier()
    seen = group.shares_memory or group.rank == 0
    assert buffer.tolist() == [1.0 if seen else 0.0] * 10
    assert group.computes_in_place == (group.shares_memory and group.size > 1)


def json_travels(group: Group) -> None:
    value = {"rank": group.rank, "text": "snow\u2603" * group.rank, "none": None}
    found = gather_json(group, value)
    assert [each["rank"] for each in found] == list(range(group.size))
    assert found[-1]["text"] == "snow\u2603" * (group.size - 1)
    last = group.size - 1
    assert broadcast_json(group, value, source=last)["rank"] == last
    assert broadcast_json(group, ["only", 0] if group.rank == 0 else None) == ["only", 0]


def many_operations_in_a_row(group: Group) -> None:
    """No operation may see what a fast rank already wrote for a later one."""
    for turn in range(60):
        tensor = torch.full((3,), float(turn + group.rank))
        group.sum_(tensor)
        assert tensor[0] == sum(turn + rank for rank in range(group.size))
        group.broadcast_(tensor, source=turn % group.size)
        parts = group.gather(torch.tensor([turn * group.rank]))
        assert [int(part) for part in parts] == [turn * rank for rank in range(group.size)]


def swaps_go_round(group: Group) -> None:
    rank, size = group.rank, group.size
    for far in range(size):
        own = mine(rank, numel=7)
        got = group.swap(own, to=(rank + far) % size, source=(rank - far) % size)
        own.zero_()
        group.barrier()
        assert torch.equal(got, mine((rank - far) % size, numel=7))


def what_was_started_arrives_though_others_are_called(group: Group) -> None:
    whole, total = mine(group.rank, numel=11), torch.full((3,), 1.0)
    summing, gathering = group.start_sum(mine(group.rank, numel=11)), group.start_gather(whole)
    group.sum_(total)
    everybody = [mine(rank, numel=11) for rank in range(group.size)]
    assert total.tolist() == [group.size] * 3
    assert all(torch.equal(a, b) for a, b in zip(gathering.wait(), everybody, strict=True))
    assert torch.equal(summing.wait(), torch.stack(everybody).sum(0))


def bytes_are_counted(group: Group) -> None:
    group.traffic.take()
    group.sum_(torch.zeros(1000))
    group.gather(torch.zeros(10))
    group.broadcast_(torch.zeros(8))
    traffic = group.traffic.take()
    others = group.size - 1
    if not others:
        assert traffic.sent_bytes == {}
        return
    assert traffic.sent_bytes["all_reduce"] == 2 * others * 4000 // group.size
    assert traffic.sent_bytes["all_gather"] == others * 40
    tree = {2: [1], 3: [2], 4: [2, 1]}[group.size]  # copies that ranks 0 and 1 send on
    copies = tree[group.rank] if group.rank < len(tree) else 0
    assert traffic.sent_bytes.get("broadcast", 0) == 32 * copies
    assert traffic.communication_seconds + traffic.waiting_seconds > 0
    assert group.traffic.take().sent_bytes == {}


def parts_meet_by_themselves(group: Group) -> None:
    for ranks in (
        [rank for rank in range(group.size) if rank // 2 == group.rank // 2],
        [rank for rank in range(group.size) if rank % 2 == group.rank % 2],
    ):
        part, own = group.part(ranks, world=group), mine(group.rank, numel=5)
        assert (part.rank, part.size) == (ranks.index(group.rank), len(ranks))
        part.sum_(own)
        assert torch.equal(own, torch.stack([mine(rank, numel=5) for rank in ranks]).sum(0))
        group.traffic.take()
        part.sum_(own)
        sent = group.traffic.take().sent_bytes.get("all_reduce", 0)
        assert sent == 2 * (len(ranks) - 1) * 20 // len(ranks), "counted with the whole group's"


def who_comes_late_is_waited_for(group: Group) -> None:
    """By longer than a rank waits between two looks at its connections (runtime.py)."""
    own, numel = mine(group.rank, numel=4), 4 * group.size
    bounds = [(4 * rank, 4 * rank + 4) for rank in range(group.size)]
    for call in (
        lambda: group.sum_(own),
        lambda: group.gather(own),
        lambda: group.broadcast_(own),
        lambda: group.slices([mine(group.rank, numel=numel)], bounds),
        lambda: group.start_sum(own).wait(),
        group.barrier,
    ):
        if group.rank == 0:
            time.sleep(0.4)
        call()


CHECKS: dict[str, Callable[[Group], None]] = {
    check.__name__: check
    for check in (
        sums_replace_the_tensor,
        sums_are_the_same_bits_on_every_rank,
        sums_keep_shape_and_views,
        gather_is_in_rank_order,
        broadcast_comes_from_any_rank,
        slices_bring_everybodys_part,
        assemble_fills_every_part,
        buffers_begin_at_zero,
        json_travels,
        many_operations_in_a_row,
        swaps_go_round,
        what_was_started_arrives_though_others_are_called,
        bytes_are_counted,
        parts_meet_by_themselves,
        who_comes_late_is_waited_for,
    )
}


def run_checks(group: Group) -> Failures:
    """Every check on this rank. All ranks go on after a failure, so that none waits for ever."""
    found: Failures = {}
    for name, check in CHECKS.items():
        try:
            check(group)
            found[name] = None
        except AssertionError:
            found[name] = traceback.format_exc()
        group.barrier()
    return found


def run(payload: dict[str, Any], descriptor: int) -> int:
    """Entry point of a worker process of the pool."""
    torch.set_num_threads(1)
    rank, size = payload["rank"], payload["size"]
    if size > 1:
        start_process_group(
            rank=rank,
            size=size,
            device=torch.device("cpu"),
            meeting=Path(payload["store"]).as_uri(),
            timeout_seconds=60,
        )
    Report(descriptor).say("checked", found=run_checks(ProcessGroup()))
    stop_process_group()
    return 0


def fail(payload: dict[str, Any], descriptor: int) -> int:
    """A worker that ends badly, in the way asked for."""
    import os

    Report(descriptor).say("about-to", how=payload["how"])
    if payload["how"] == "raise":
        raise RuntimeError("as planned")
    if payload["how"] == "kill":
        os.kill(os.getpid(), 9)
    if payload["how"] == "wait":
        threading.Event().wait()
    return int(payload["how"])


def in_threads(size: int) -> Failures:
    """The checks on `size` threads of this process."""
    meeting = Meeting(size, timeout_seconds=60)
    found: list[Failures] = []

    def body(rank: int) -> None:
        try:
            found.append(run_checks(ThreadGroup(meeting, rank=rank)))
        except BaseException as error:
            meeting.fail(repr(error))
            raise

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return merge(found)


def merge(found: list[Failures]) -> Failures:
    """The first failure of each check over ranks."""
    return {name: next((f[name] for f in found if f[name]), None) for name in CHECKS}
