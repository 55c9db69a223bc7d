"""Threads and processes keep one contract, and a thread that fails releases the others."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

import group_contract
from group_contract import CHECKS, Failures, in_threads, merge
from shoal.comm.threads import Meeting, ThreadGroup
from shoal.errors import WorkerError
from shoal.launch.pool import WorkerPool

KINDS = [("threads", 1), ("threads", 2), ("threads", 3), ("processes", 1), ("processes", 3)]
_known: dict[tuple[str, int], Failures] = {}


def in_processes(size: int, *, pool: WorkerPool, folder: Path) -> Failures:
    payload = {"size": size, "store": str(folder / "store")}
    target = f"{group_contract.__name__}:run"
    workers = [pool.start(target, {**payload, "rank": rank}) for rank in range(size)]
    found = []
    while any(worker.status is None for worker in workers):
        for _, message in pool.events(timeout_seconds=1, only=workers):
            if message is not None and message["kind"] == "checked":
                found.append(message["found"])
    assert [worker.status for worker in workers] == [0] * size
    return merge(found)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(("kind", "size"), KINDS)
def test_contract(kind: str, size: int, check: str, pool: WorkerPool, tmp_path: Path) -> None:
    if (kind, size) not in _known:
        run = in_threads if kind == "threads" else None
        _known[kind, size] = run(size) if run else in_processes(size, pool=pool, folder=tmp_path)
    failure = _known[kind, size][check]
    assert failure is None, failure


def test_a_thread_that_fails_releases_the_others_with_its_reason() -> None:
    meeting = Meeting(3, timeout_seconds=30)
    said: list[str] = []

    def body(rank: int) -> None:
        group = ThreadGroup(meeting, rank=rank)
        if rank == 2:
            meeting.fail("worker 2: out of luck")
            meeting.fail("worker 2: a later reason")
            return
        try:
            group.sum_(torch.zeros(3))
        except WorkerError as error:
            said.append(str(error))

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert said == ["the threads no longer meet: worker 2: out of luck"] * 2


def test_a_thread_that_never_comes() -> None:
    group = ThreadGroup(Meeting(2, timeout_seconds=0.05), rank=0)
    with pytest.raises(WorkerError, match="a thread did not come within 0 s"):
        group.barrier()
