"""The fork server: workers start in milliseconds, say how they ended, and never outlive it."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time

import pytest

from shoal.errors import WorkerError
from shoal.launch.pool import Worker, WorkerPool

FAIL = "group_contract:fail"


def end_of(pool: WorkerPool, worker: Worker) -> list[dict[str, object]]:
    """What `worker` says until it ends."""
    said = []
    while not worker.told:
        for _, message in pool.events(timeout_seconds=1, only=[worker]):
            if message is not None:
                said.append(message)
    return said


@pytest.mark.parametrize(("how", "status"), [("raise", 1), ("kill", -9), ("0", 0), ("75", 75)])
def test_a_worker_s_end_comes_after_its_words(pool: WorkerPool, how: str, status: int) -> None:
    worker = pool.start(FAIL, {"how": how})
    assert end_of(pool, worker) == [{"kind": "about-to", "how": how}]
    assert worker.status == status


def test_a_signal_is_kept_until_the_worker_is_known(pool: WorkerPool) -> None:
    worker = pool.start(FAIL, {"how": "wait"})
    assert worker.pid is None, "the server has not answered yet"
    pool.signal(worker, signal.SIGKILL)
    end_of(pool, worker)
    assert worker.status == -9
    pool.signal(worker, signal.SIGKILL)  # to a worker that is gone: nothing


def test_kill_waits_for_the_end(pool: WorkerPool) -> None:
    workers = [pool.start(FAIL, {"how": "wait"}) for _ in range(3)]
    pool.kill(workers)
    assert [worker.status for worker in workers] == [-9] * 3


@pytest.mark.timed
def test_a_worker_starts_in_milliseconds(pool: WorkerPool) -> None:
    end_of(pool, pool.start(FAIL, {"how": "0"}))  # the server has imported by now
    began = time.perf_counter()
    end_of(pool, pool.start(FAIL, {"how": "0"}))
    # a fork of a process with torch in it takes 10-30 ms; importing torch would take seconds
    assert time.perf_counter() - began < 1.0


def test_a_server_that_is_killed_takes_its_workers_along() -> None:
    with WorkerPool() as own:
        worker = own.start(FAIL, {"how": "wait"})
        while worker.pid is None:
            list(own.events(timeout_seconds=1))
        os.kill(own._server.pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match=r"the fork server ended \(status -9\)"):
            while True:
                list(own.events(timeout_seconds=1))
        with pytest.raises(WorkerError, match="the fork server ended"):
            own.start(FAIL, {"how": "0"})
        deadline = time.monotonic() + 10
        while _runs(worker.pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not _runs(worker.pid)


def test_closing_a_pool_ends_its_workers() -> None:
    with WorkerPool() as own:
        worker = own.start(FAIL, {"how": "wait"})
        while worker.pid is None:
            list(own.events(timeout_seconds=1))
    deadline = time.monotonic() + 10
    while _runs(worker.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _runs(worker.pid)


@pytest.mark.timed
def test_a_pool_that_was_not_needed_closes_at_once() -> None:
    began = time.perf_counter()
    WorkerPool().close()
    assert time.perf_counter() - began < 1.5, "it does not wait for imports"


def _runs(pid: int) -> bool:
    listed = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    state = listed.stdout.strip()
    return bool(state) and not state.startswith("Z")


def test_two_that_end_at_once_are_both_known_to_have(pool: WorkerPool) -> None:
    """Who hears of the first may want the second ended, and must not wait for news of it."""
    end_of(pool, pool.start(FAIL, {"how": "0"}))  # the server has imported by now
    workers = [pool.start(FAIL, {"how": "0"}) for _ in range(2)]
    time.sleep(1.0)  # both are gone, and nobody has asked
    began = time.monotonic()
    while any(worker.status is None for worker in workers):
        for worker, message in pool.events(timeout_seconds=1, only=workers):
            if message is None:
                pool.kill([other for other in workers if other is not worker])
    assert time.monotonic() - began < 5, "the second was waited for until the deadline"
    assert [worker.status for worker in workers] == [0, 0]


def test_threads_hear_of_their_own_workers_whoever_reads(pool: WorkerPool) -> None:
    """Two threads start and hear workers of one pool: none of an end or a word gets lost."""
    heard: list[list[list[dict[str, object]]]] = [[], []]

    def use(said: list[list[dict[str, object]]]) -> None:
        for _ in range(12):
            said.append(end_of(pool, pool.start(FAIL, {"how": "0"})))

    threads = [threading.Thread(target=use, args=(said,), daemon=True) for said in heard]
    for each in threads:
        each.start()
    for each in threads:
        each.join(timeout=60)
    assert not any(each.is_alive() for each in threads)
    assert heard == [[[{"kind": "about-to", "how": "0"}]] * 12] * 2
