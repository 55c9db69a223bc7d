"""The agent of a host and the site at the other end of its line: real sockets, real processes."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from held_agent import SECRET, HeldAgent
from shoal.comm.keys import Keys
from shoal.launch import agent as agents
from shoal.launch import calls
from shoal.launch.hang import Sighting
from shoal.launch.pool import Worker, WorkerPool
from shoal.launch.reach import unreached
from shoal.launch.remote_site import RemoteSite
from shoal.launch.site import LocalSite, Site, Slot

KEYS = Keys.of(SECRET)
TARGET = "speaking_worker:run"


@pytest.fixture(scope="module")
def light() -> Iterator[WorkerPool]:
    """Workers that import nothing that they do not need."""
    with WorkerPool(start_method="exec") as made:
        yield made


@pytest.fixture
def host(light: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> Iterator[HeldAgent]:
    monkeypatch.setattr(agents, "TARGETS", (TARGET,))
    made = HeldAgent(light)
    yield made
    made.close()


def hello(**more: Any) -> calls.Hello:
    known: dict[str, Any] = {"coordinator": "me", "nonce": "1", "run": "", "ranks": 2}
    return calls.Hello(**{**known, **more})


@pytest.fixture
def sites() -> Iterator[Callable[..., RemoteSite]]:
    made: list[RemoteSite] = []

    def make(host: HeldAgent, *, keys: Keys = KEYS, check: Any = None, **more: Any) -> RemoteSite:
        own = {} if check is None else {"check": check}
        made.append(RemoteSite(host.agent.address, keys=keys, hello=hello(**more), **own))
        return made[-1]

    yield make
    for site in made:
        site.close()


def heard(site: RemoteSite, until: Callable[[list[Any]], object]) -> list[Any]:
    """What happens on a site until that is so, which takes ten seconds at most."""
    found: list[tuple[Worker, dict[str, Any] | None]] = []
    deadline = time.monotonic() + 10
    while not until(found):
        assert time.monotonic() < deadline, (found, site.gone, site.wrong)
        found += site.events(timeout_seconds=0.05)
    return found


def started(site: RemoteSite, rank: int = 0) -> Worker:
    heard(site, lambda _: site.gone is None)
    return site.start(TARGET, {"rank": rank}, slot=Slot(rank), ranks=[rank])


def test_a_remote_site_does_what_a_site_does(host: HeldAgent, sites: Any, tmp_path: Path) -> None:
    site = sites(host, run=str(tmp_path))
    assert site.gone == "has not answered yet"
    first, second = started(site), started(site, 1)
    (worker, said), *_ = heard(site, lambda found: len(found) == 2)
    assert worker in (first, second)
    assert said == {"kind": "here", "keys": ["donor.key", "receiver.key"]}
    heard(site, lambda _: len([s for s in site.sightings() if s.beat is not None]) == 2)
    assert [seen.rank for seen in site.sightings()] == [0, 1]
    beat = site.last_beat(1)
    assert beat is not None and (beat.phase, beat.step) == ("forward", 7)
    assert first.pid is not None and site.cpu_seconds(first) is not None
    site.send(first, {"order": "save"})
    assert next(m for w, m in heard(site, bool) if w is first) == {"kind": "heard", "order": "save"}
    site.send(first, {"order": "stop"})
    heard(site, lambda found: (first, None) in found)
    assert first.status == 3 and first.told and second.status is None
    site.signal(second, signal.SIGSTOP)
    heard(site, lambda _: site.is_stopped(second))
    site.kill([second])
    assert second.status == -signal.SIGKILL and site.sightings() == []
    assert site.last_beat(1) == beat


def test_both_kinds_of_sites_have_all_the_calls() -> None:
    calls_of = {name for name in vars(Site) if not name.startswith("_")}
    kept = {"gone", "leaving", "open_address"}
    assert calls_of - kept <= {*dir(RemoteSite)} and calls_of <= {*dir(LocalSite)}


def test_a_host_that_is_silent_counts_as_dead_and_may_come_back(
    host: HeldAgent, sites: Any, tmp_path: Path
) -> None:
    site = sites(host, run=str(tmp_path), lease_seconds=1.0)
    worker = started(site)
    heard(site, bool)
    host.held.set()
    at = time.monotonic()
    happened = heard(site, lambda found: (worker, None) in found)
    assert 0.5 < time.monotonic() - at < 2.5
    assert happened[-1] == (worker, None) and worker.status == -signal.SIGKILL
    assert site.gone is not None and "gives no sign for 1 s" in site.gone
    late = site.start(TARGET, {"rank": 0}, slot=Slot(0), ranks=[0])
    assert late.status == -signal.SIGKILL, "nobody has heard it"
    host.held.clear()
    heard(site, lambda _: site.gone is None)
    assert host.agent._workers == {}, "what it had for the coordinator before is ended"
    again = started(site)
    assert heard(site, lambda found: any(w is again for w, _ in found))


def test_workers_end_when_their_coordinator_is_silent(
    host: HeldAgent, sites: Any, tmp_path: Path
) -> None:
    site = sites(host, run=str(tmp_path), lease_seconds=1.0)
    started(site)
    heard(site, bool)
    deadline = time.monotonic() + 10  # nobody polls the site any more
    while host.agent._site is not None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert host.agent._site is None
    assert any("me is silent for 1 s: its workers end" in text for text in host.said)


def test_another_secret_is_refused(host: HeldAgent, sites: Any) -> None:
    site = sites(host, keys=Keys.of(b"t" * 32))
    heard(site, lambda _: site.wrong)
    assert site.wrong == "does not know this run's secret (--keys, or SHOAL_KEYS)"
    assert site.gone == "has not answered yet"


def test_a_host_works_for_one_run_at_a_time(host: HeldAgent, sites: Any, tmp_path: Path) -> None:
    first = sites(host, run=str(tmp_path))
    heard(first, lambda _: first.gone is None)
    other = sites(host, run="/runs/b", nonce="2", coordinator="another")
    heard(other, lambda _: other.wrong)
    assert other.wrong == f"is at work for {tmp_path} of me"
    first.close(status=4)
    heard(other, lambda _: other.wrong != f"is at work for {tmp_path} of me")
    assert host.agent.ended == 4


def test_workers_go_over_to_who_leads_in_a_later_term(
    host: HeldAgent, sites: Any, tmp_path: Path
) -> None:
    run, kept = str(tmp_path), {"keep_seconds": 30.0, "lease_seconds": 1.0}
    first = sites(host, run=run, term=5, **kept)
    worker = started(first)
    assert heard(first, bool) and first.found() == []
    first.send(worker, {"order": "generation", "number": 7})
    heard(first, lambda found: len(found) > 0)
    time.sleep(1.5)  # and nobody polls the site any more
    assert host.agent._site is not None, "kept for whoever leads next"
    second = sites(host, run=run, term=9, nonce="2", adopts=True, **kept)
    heard(second, lambda _: second.gone is None)
    (found,) = second.found()
    assert (found.rank, found.generation, found.waiting, found.done) == (0, 7, False, False)
    second.send(found.worker, {"order": "save"})
    assert next(m for w, m in heard(second, bool)) == {"kind": "heard", "order": "save"}
    again = started(second, 1)
    assert again.name != found.worker.name
    earlier = sites(host, run=run, term=8, nonce="3", adopts=True)
    heard(earlier, lambda _: earlier.wrong)
    assert earlier.wrong == f"is at work for {run} of me", "who was deposed gets nothing back"
    other = sites(host, run="/runs/b", term=10, nonce="4")
    heard(other, lambda _: other.wrong)
    assert other.wrong == f"is at work for {run} of me", "terms of another run say nothing"
    last = sites(host, run=run, term=10, nonce="5")
    heard(last, lambda _: last.gone is None)
    assert last.found() == [] and host.agent._workers == {}, "it begins anew"


def test_what_is_found_too_late_is_ended(host: HeldAgent, sites: Any, tmp_path: Path) -> None:
    """The others have gone on meanwhile: what was cut off with its host holds an older state."""
    first = sites(host, run=str(tmp_path), term=5, keep_seconds=30.0)
    started(first)
    second = sites(host, run=str(tmp_path), term=9, nonce="2", adopts=True)
    heard(second, lambda _: second._greeted)
    second.begin()
    heard(second, lambda _: second.gone is None)
    assert second.found() == [] and host.agent._workers == {}


def test_a_run_that_a_host_does_not_see_is_refused(
    host: HeldAgent, sites: Any, tmp_path: Path
) -> None:
    (tmp_path / "note").write_text("other")
    data = tmp_path / "data"
    data.mkdir()
    digest = calls.folder_digest(data)
    (data / "a").write_text("1")
    more = {str(data): digest, "/nowhere": "x"}
    site = sites(host, run=str(tmp_path), note=(str(tmp_path / "note"), "mine"), folders=more)
    heard(site, lambda _: site.wrong)
    assert site.wrong is not None
    assert f"does not see {tmp_path} (put --out on storage that all hosts share, or" in site.wrong
    assert f"{data} holds something else" in site.wrong
    assert "/nowhere is not there (set SHOAL_CACHE" in site.wrong


def test_another_program_is_refused(host: HeldAgent, sites: Any) -> None:
    site = sites(host, check=lambda here: f"has torch {here.torch}, we another")
    heard(site, lambda _: site.wrong)
    assert "has torch 2." in site.wrong and site.gone is not None


def test_an_agent_tests_whom_its_host_reaches(host: HeldAgent, sites: Any, tmp_path: Path) -> None:
    site = sites(host, run=str(tmp_path))
    heard(site, lambda _: site.gone is None)
    assert site.unreached(4) is None
    assert site.open_address != host.agent.address, "a port as workers get theirs"
    for _ in range(5):  # more than wait there at a time
        assert unreached([site.open_address] * 60) == ()
        time.sleep(0.3)
    site.test_reach(4, [site.open_address, "tcp://127.0.0.1:1"])
    heard(site, lambda _: site.unreached(4) is not None)
    assert site.unreached(4) == {"tcp://127.0.0.1:1"} and site.unreached(5) is None


def test_who_replaces_a_worker_is_not_seen_as_that_one(
    host: HeldAgent, sites: Any, tmp_path: Path
) -> None:
    """What was seen last of a rank that waited too long had its successor ended as well."""
    site = sites(host, run=str(tmp_path))
    first = started(site)
    heard(site, lambda _: any(seen.beat is not None for seen in site.sightings()))
    site.kill([first])
    site._seen = calls.Seen(sightings=(Sighting(0, first.pid, None, 99.0, "sleeps"),))
    started(site)
    assert site.sightings() == []
    heard(site, lambda _: [seen.pid != first.pid for seen in site.sightings()] == [True])


def test_an_agent_starts_what_trains_and_nothing_else(
    host: HeldAgent, sites: Any, tmp_path: Path
) -> None:
    site = sites(host, run=str(tmp_path))
    heard(site, lambda _: site.gone is None)
    worker = site.start("os:getpid", {"rank": 0}, slot=Slot(0), ranks=[0])
    ((_, said), *_) = heard(site, lambda found: (worker, None) in found)
    assert said["text"] == "an agent does not start os:getpid" and worker.status == 2


def test_keys_of_one_secret_are_the_same_and_of_another_are_not() -> None:
    assert Keys.of(SECRET) == KEYS and Keys.of(b"t" * 32).donor != KEYS.donor
    assert KEYS.donor.secret != KEYS.receiver.secret
