"""A coordinator and the disks of its hosts: real agents, each of which has a run folder of its own.

tests/hosts has whole runs, and saves that are handed on.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from held_agent import SECRET, HeldAgent
from shoal.checkpoint.disks import Commit, kept_in, note, take
from shoal.checkpoint.files import Files
from shoal.checkpoint.folders import published_name, published_steps, waiting_saves
from shoal.comm.keys import Keys
from shoal.errors import RunError
from shoal.launch import calls
from shoal.launch.own_disks import OwnDisks
from shoal.launch.pool import WorkerPool
from shoal.launch.remote_site import RemoteSite
from shoal.observe.record import RunRecord
from unit.checkpoint.test_disks import leave

FILES = Files()


@pytest.fixture(scope="module")
def light() -> Iterator[WorkerPool]:
    with WorkerPool(start_method="exec") as made:
        yield made


class Three:
    """Hosts h0, h1, h2, as a coordinator sees them."""

    def __init__(self, pool: WorkerPool, folder: Path) -> None:
        self.agents = [HeldAgent(pool) for _ in range(3)]
        self.runs = [folder / f"h{number}" / "run" for number in range(3)]
        self.disks = [run / "checkpoints" for run in self.runs]
        self.sites: list[RemoteSite] = []

    def begin(self, *numbers: int) -> OwnDisks:
        """A start with these hosts."""
        self.leave()
        for number in numbers:
            known = {"coordinator": "me", "nonce": f"{time.monotonic()}", "ranks": 1}
            hello = calls.Hello(run=str(self.runs[number]), own_disks=True, **known)
            address = self.agents[number].agent.address
            self.sites.append(RemoteSite(address, keys=Keys.of(SECRET), hello=hello))
        self.until(lambda: all(site.gone is None for site in self.sites))
        self.said: list[str] = []
        return OwnDisks(self.sites, run=self.runs[numbers[0]], say=self.said.append)

    def until(self, true: Callable[[], object]) -> None:
        deadline = time.monotonic() + 10
        while not true():
            assert time.monotonic() < deadline
            for site in self.sites:
                for _ in site.events(timeout_seconds=0.02):
                    pass

    def save(self, disks: OwnDisks, step: int, *numbers: int, generation: int = 1) -> None:
        """Those hosts, of all that were begun with, have it whole and say so."""
        for number, site in zip(numbers, self.sites):
            manifest = self.leave_save(number, step=step, generation=generation)
            fields = {"step": step, "generation": generation, "token": f"g{generation}-1"}
            fields |= {"manifest": manifest, "keep": 2, "best": None, "disks": len(self.sites)}
            fields |= {"host": None, "needed": [], "seconds": 1.0, "stall_seconds": 0.1}
            disks.kept(site.name, fields)

    def leave_save(self, number: int, *, step: int, generation: int) -> str:
        known = {"step": step, "generation": generation, "save": f"{generation}"}
        return leave(self.disks[number], host=f"h{number}", **known)

    def told(self, disks: OwnDisks, name: str) -> dict[str, Any]:
        """The next event of that name."""
        found: list[dict[str, Any]] = []

        def heard() -> bool:
            found.extend(fields for each, fields in disks.look() if each == name)
            return bool(found)

        self.until(heard)
        return found[0]

    def leave(self) -> None:
        for site in self.sites:
            site.close()
        self.sites.clear()

    def close(self) -> None:
        self.leave()
        for each in self.agents:
            each.close()


@pytest.fixture
def three(light: WorkerPool, tmp_path: Path) -> Iterator[Three]:
    made = Three(light, tmp_path)
    yield made
    made.close()


def test_a_save_counts_once_two_hosts_have_it(three: Three) -> None:
    disks = three.begin(0, 1, 2)
    assert not disks.place(begins=True)
    (three.runs[0] / "config.yaml").write_text("seed: 1\n")
    three.save(disks, 10, 0)
    deadline = time.monotonic() + 0.5
    three.until(lambda: time.monotonic() > deadline)
    assert disks.look() == [] and published_steps(three.disks[0]) == []
    three.sites.append(three.sites.pop(0))  # h1 is the next to speak
    three.save(disks, 10, 1)
    saved = three.told(disks, "saved")
    assert saved["step"] == 10 and len(saved["hosts"]) == 2
    three.until(lambda: all(kept_in(each).commits for each in three.disks))
    assert [published_steps(each) for each in three.disks] == [[10], [10], []]
    assert [(run / "config.yaml").is_file() for run in three.runs] == [True] * 3
    assert disks.close() == []

    again = three.begin(0, 1)
    assert again.place()
    assert [published_steps(each) for each in three.disks[:2]] == [[10], [10]]


def test_what_did_not_count_goes_at_the_next_start(three: Three) -> None:
    disks = three.begin(0, 1)
    disks.place(begins=True)
    three.save(disks, 10, 0, 1)
    three.told(disks, "saved")
    three.leave_save(0, step=20, generation=2)
    three.leave_save(1, step=5, generation=3)
    assert three.begin(0, 1).place()
    assert [published_steps(each) for each in three.disks[:2]] == [[10], [10]]
    assert not any(waiting_saves(each) for each in three.disks)


def test_the_save_before_is_taken_and_said(three: Three) -> None:
    disks = three.begin(0, 1)
    disks.place(begins=True)
    for step in (10, 20):
        three.save(disks, step, 0, 1, generation=step)
        three.told(disks, "saved")
    for each in three.disks[:2]:
        file = each / published_name(20) / "rank-00000.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    again = three.begin(0, 1)
    assert again.place()
    assert [published_steps(each) for each in three.disks[:2]] == [[10], [10]]
    (event,) = again.look()
    assert event[0] == "save-lost" and event[1]["step"] == 20
    assert "step 20 was on" in event[1]["text"] and "damaged" in event[1]["text"]
    three.save(again, 15, 0, 1, generation=1)
    assert three.told(again, "saved")["step"] == 15
    assert kept_in(three.disks[0]).commits[-1].epoch == 2


def test_a_run_without_a_whole_save_never_begins_anew(three: Three) -> None:
    disks = three.begin(0, 1)
    disks.place(begins=True)
    three.save(disks, 10, 0, 1)
    three.told(disks, "saved")
    for each in three.disks[:2]:
        (each / published_name(10) / "rank-00000.safetensors").unlink()
    with pytest.raises(RunError, match="has a save whole any more\n    step 10 was on"):
        three.begin(0, 1).place()
    with pytest.raises(RunError, match="has saves of a run in this folder already"):
        three.begin(0, 2).place(begins=True)


def test_a_run_whose_saves_are_nowhere_never_begins_anew(three: Three) -> None:
    """Its rows and its model would be written over; one that never saved may."""
    assert not three.begin(0, 1).place() and three.said == [
        "nothing was saved before it ended: beginning anew"
    ]
    disks = three.begin(0, 1)
    disks.place(begins=True)
    three.save(disks, 10, 0, 1)
    with closing(RunRecord(three.runs[0])) as record:
        record.event("saved", three.told(disks, "saved"))
    for each in three.disks[:2]:
        shutil.rmtree(each)
    with pytest.raises(RunError, match="no host that is there has any of it"):
        three.begin(0, 1).place()


def test_hosts_that_went_on_without_each_other_are_refused(three: Three) -> None:
    disks = three.begin(0, 1)
    disks.place(begins=True)
    three.save(disks, 10, 0, 1)
    three.told(disks, "saved")
    for number, step in ((0, 20), (1, 30)):
        alone = three.begin(number)
        assert alone.place()
        three.save(alone, step, number, generation=1)
        three.told(alone, "saved")
    with pytest.raises(RunError, match="have gone on with the run without each other"):
        three.begin(0, 1).place()
    assert published_steps(three.disks[0])[-1] == 20 and three.begin(0).place()


def test_a_disk_of_another_run_is_left_as_it_is(three: Three) -> None:
    disks = three.begin(0, 1, 2)
    disks.place(begins=True)
    manifest = three.leave_save(2, step=90, generation=1)
    theirs = Commit(1, 1, "s", 90, (manifest,), ("h2",))
    note(three.disks[2], theirs, run="another", files=FILES)
    take(three.disks[2], theirs, keep=2, best=None, files=FILES)
    three.save(disks, 10, 0, 1)
    problem = three.told(disks, "save-failed")["text"]
    assert "has saves of another run (another)" in problem
    assert published_steps(three.disks[2]) == [90]
    with pytest.raises(RunError, match="saves of different runs"):
        three.begin(0, 1, 2).place()


def test_a_checkpoint_made_without_the_others_is_not_dropped(three: Three) -> None:
    disks = three.begin(0, 1)
    disks.place(begins=True)
    three.save(disks, 10, 0, 1)
    three.told(disks, "saved")
    three.leave_save(0, step=20, generation=7)
    waiting = next(three.disks[0].glob("uncommitted-*"))
    waiting.rename(three.disks[0] / published_name(20))  # as `shoal resume` of one host alone does
    with pytest.raises(RunError, match=r"saved without the others:\n.*step-00000020"):
        three.begin(0, 1).place()
    assert published_steps(three.disks[0]) == [10, 20]
