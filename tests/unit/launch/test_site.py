"""A host's workers as a supervisor sees them, and which ranks go to which host."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.launch.cluster import ThisHost
from shoal.launch.pool import WorkerPool
from shoal.launch.site import LocalSite, Slot, process_state, stack_of
from shoal.layout import Layout, host_of_rank
from shoal.observe.pulse import Pulse
from shoal.runtime import MeetingFile, meeting_point


def test_a_site_starts_sees_and_ends_workers(pool: WorkerPool) -> None:
    with LocalSite(pool, num_ranks=2) as site:
        payload = {"rank": 0, "size": 1}
        worker = site.start("lame_worker:run", payload, slot=Slot(0), ranks=[0, 1])
        assert [seen.rank for seen in site.sightings()] == [0, 1], "threads of one process"
        assert site.last_beat(1) is None
        pulse = Pulse(site.folder / "pulse", slot=1)
        pulse.mark("forward", step=3)
        beat = site.last_beat(1)
        assert beat is not None and (beat.phase, beat.step) == ("forward", 3)
        site.kill([worker])
        assert worker.status == -signal.SIGKILL and site.sightings() == []
        folder = site.folder
    assert not folder.exists()


def test_the_time_in_which_a_site_was_stopped_itself_counts_for_nobody(pool: WorkerPool) -> None:
    with LocalSite(pool, num_ranks=1) as site:
        site.start("lame_worker:run", {"rank": 0, "size": 1}, slot=Slot(0), ranks=[0])
        site._started[Slot(0)].started_at -= 29.0
        site._since -= 30.0
        (seen,) = site.sightings()
        assert seen.silent_seconds > 28
        site._looked_at -= 30.0  # as after SIGSTOP and SIGCONT of this process
        (seen,) = site.sightings()
        assert seen.silent_seconds < 1.0


@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_ranks_lie_in_blocks_cut_as_high_up_as_it_goes(
    replicate: int, pipeline: int, tensor: int, num_hosts: int
) -> None:
    """Replicas stay whole where there is one for each host; else the stages do."""
    layout = Layout(replicate=replicate, pipeline=pipeline, tensor=tensor)
    hosts = [host_of_rank(layout, rank, num_hosts=num_hosts) for rank in range(layout.workers)]
    assert hosts == sorted(hosts) and set(hosts) <= set(range(num_hosts))
    size = 1
    if replicate >= num_hosts:
        size = pipeline * tensor
    elif replicate * pipeline >= num_hosts:
        size = tensor
    for start in range(0, layout.workers, size):
        assert len(set(hosts[start : start + size])) == 1
    loads = [hosts.count(host) // size for host in range(num_hosts)]
    assert max(loads) - min(loads) <= 1


def test_generations_meet_at_new_urls(tmp_path: Path) -> None:
    cluster = ThisHost(tmp_path / "a folder")
    first, second = cluster.meeting(1), cluster.meeting(2)
    assert first != second and first.startswith("file:///")
    point = meeting_point(first)
    assert isinstance(point, MeetingFile)
    assert point.path == tmp_path / "a folder" / "generation-000001"
    assert [host.address for host in cluster.hosts()] == ["127.0.0.1"]
    for url in ("tcp://head", "tcp://:29500", "generation-1", "file://other/path"):
        with pytest.raises(ValueError, match=r"meeting: expected file:///"):
            meeting_point(url)


def wait_for(true: Callable[[], bool]) -> None:
    """Poll for ten seconds: the machine may be busy."""
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_state_and_stack_of_a_real_process(tmp_path: Path) -> None:
    code = (
        "import faulthandler, signal, sys\n"
        "faulthandler.register(signal.SIGUSR1, file=open(sys.argv[1], 'a'), all_threads=True)\n"
        "print('ready', flush=True)\n"
        "def busy():\n    while True: pass\n"
        "busy()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "stack")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            wait_for(lambda: process_state(process.pid)[0] == "runs")
            file = tmp_path / "stack"
            wait_for(lambda: "in busy" in stack_of(process.pid, file, stopped=False))
            os.kill(process.pid, signal.SIGSTOP)
            wait_for(lambda: process_state(process.pid)[0] == "is stopped")
            wait_for(lambda: "in busy" in stack_of(process.pid, file, stopped=True))
        finally:
            process.kill()
    assert process_state(None) == ("unknown", None)


@pytest.mark.parametrize("computes", [True, False])
def test_a_process_whose_main_thread_waits_for_others(computes: bool) -> None:
    """Ranks may be threads: it runs as long as one of them does."""
    code = (
        "import threading, time\n"
        f"def other():\n    while {computes}: pass\n    time.sleep(60)\n"
        "thread = threading.Thread(target=other)\n"
        "thread.start()\nprint('ready', flush=True)\nthread.join()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            wait_for(lambda: process_state(process.pid)[0] == "sleeps")
            wanted = "runs" if computes else "sleeps"
            wait_for(lambda: process_state(process.pid, every_thread=True)[0] == wanted)
            for _ in range(20):
                assert process_state(process.pid, every_thread=True)[0] == wanted
                time.sleep(0.01)
        finally:
            process.kill()


def test_ranks_of_one_process_share_what_it_computed(pool: WorkerPool) -> None:
    with LocalSite(pool, num_ranks=2) as site:
        payload = {"rank": 0, "size": 1}
        worker = site.start("lame_worker:run", payload, slot=Slot(0), ranks=[0, 1])
        deadline = time.monotonic() + 60  # the fork server may still import
        while worker.pid is None and time.monotonic() < deadline:
            list(site.events(timeout_seconds=0.5))
        whole = process_state(worker.pid)[1]
        assert whole is not None
        shares = [seen.cpu_seconds for seen in site.sightings()]
        assert all(share is not None and whole / 2 <= share <= whole / 2 + 1.0 for share in shares)
