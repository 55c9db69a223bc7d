"""Which hosts are there for a supervisor: left out, taken in again, placed elsewhere."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.launch import hosts as module
from shoal.launch.hang import Sighting
from shoal.launch.hosts import Hosts
from shoal.layout import Layout
from unit.launch.test_reach import Told


class Site(Told):
    """A host that is there or not, as a test says."""

    leaving = False

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.name = f"h{number}"


class Seen:
    """Three hosts, and what is told of them."""

    def __init__(self, *, fewest: int = 1) -> None:
        self.sites: list[Any] = [Site(number) for number in range(3)]
        self.told: list[tuple[str, dict[str, Any]]] = []
        layout = Layout(replicate=3)
        self.hosts = Hosts(
            self.sites,
            layout=layout,
            fewest=fewest,
            tell=lambda name, fields: self.told.append((name, fields)),
        )

    def look(self) -> list[int]:
        """Seconds later, until no test is under way; the hosts that may be used again."""
        self.hosts._reach.asked_at -= module._TEST_LEFT_OUT_SECONDS
        ready = self.hosts.look()
        while self.hosts._reach.under_way:
            ready += self.hosts.look()
        return [self.sites.index(site) for site in ready]

    def events(self) -> list[str]:
        return [name for name, _ in self.told]


@pytest.fixture
def seen() -> Seen:
    return Seen()


def test_of_two_that_do_not_reach_each_other_the_later_one_is_left_out(seen: Seen) -> None:
    assert seen.hosts.in_doubt, "nothing begins before the first test"
    assert seen.look() == [] and not seen.hosts.in_doubt
    assert seen.hosts.cut_off() == [] and seen.told == []
    seen.sites[1].cannot = {"tcp://h2:1"}
    seen.hosts.doubt()
    seen.look()
    assert seen.hosts.cut_off() == [seen.sites[2]] and seen.hosts.cut_off() == []
    ((name, fields),) = seen.told
    assert name == "left-out"
    assert fields["hosts"] == ["host h2"] and fields["pairs"] == [["host h1", "host h2"]]
    assert fields["text"] == "host h1 and host h2 do not reach each other: host h2 left out"
    assert seen.hosts.place(1, workers=[]) is seen.sites[1]
    assert seen.hosts.place(2, workers=[]) is None, "the others go on without it"
    assert seen.look() == [] and len(seen.told) == 1, "said once"
    seen.sites[1].cannot = set()
    assert seen.look() == [2]
    assert seen.told[1][1]["text"] == "host h2 reaches all others again"
    assert seen.hosts.place(2, workers=[]) is seen.sites[2]


def test_without_room_to_shrink_another_host_takes_its_part() -> None:
    seen = Seen(fewest=3)
    seen.sites[1].cannot = {"tcp://h2:1"}
    seen.look()
    assert seen.hosts.place(2, workers=[]) is seen.sites[0]


def test_who_comes_back_is_tested_first_and_stays_out_if_it_was_the_cause(seen: Seen) -> None:
    """The one that is at work stays, though it is the later one in the list."""
    seen.look()
    seen.sites[1].gone = "gives no sign for 6 s"
    assert seen.look() == [] and seen.events() == ["host-lost"]
    seen.sites[1].gone, seen.sites[1].cannot = None, {"tcp://h2:1"}
    assert seen.look() == []
    assert seen.events() == ["host-lost", "host-back", "left-out"]
    assert seen.told[2][1]["hosts"] == ["host h1"]
    assert seen.hosts.place(1, workers=[]) is None
    assert seen.hosts.place(2, workers=[]) is seen.sites[2]


def test_who_is_left_out_again_and_again_rests_first(seen: Seen) -> None:
    seen.look()
    for _ in range(2):
        seen.sites[1].cannot = {"tcp://h2:1"}
        seen.hosts.doubt()
        seen.look()
        seen.sites[1].cannot = set()
        ready = seen.look()
    assert ready == [] and seen.hosts.place(2, workers=[]) is None
    assert seen.told[-1][1]["text"] == (
        "host h2 reaches all others again, and is used again in 10 s"
    )


def test_who_is_left_out_and_falls_silent_is_lost_and_no_cut_any_more(seen: Seen) -> None:
    seen.sites[1].cannot = {"tcp://h2:1"}
    seen.look()
    seen.sites[2].gone = "has ended the connection"
    seen.look()
    assert seen.events() == ["left-out", "host-lost"]
    seen.sites[1].cannot, seen.sites[2].gone = set(), None
    seen.look()
    assert seen.events() == ["left-out", "host-lost", "host-back"], "once, though left out before"


def test_silence_of_all_workers_asks_who_reaches_whom(seen: Seen) -> None:
    seen.look()
    silent = [Sighting(rank, 1, None, 3.5, "sleeps") for rank in range(3)]
    seen.hosts.watch([*silent[:2], Sighting(2, 1, None, 0.5, "runs")])
    seen.hosts.watch([])
    assert not seen.hosts.in_doubt, "one of them works"
    seen.hosts.watch(silent)
    assert not seen.hosts.in_doubt, "asked a moment ago"
    seen.hosts._reach.asked_at -= module._TEST_AGAIN_SECONDS
    seen.hosts.watch(silent)
    assert seen.hosts.in_doubt
