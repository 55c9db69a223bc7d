"""Which hosts reach one another, and whom to do without: brute force and networkx as oracles."""

from __future__ import annotations

import itertools
import random
import socket
import time
from collections.abc import Sequence
from typing import Any

import networkx
import pytest

from shoal.launch.reach import MOST_ADDRESSES, Pair, Reach, fewest_left_out, unreached


def brute_force(pairs: set[Pair], *, count: int, idle: set[int]) -> set[int]:
    """By all subsets: fewest, fewest at work, and the first hosts kept."""
    covers = [
        set(some)
        for size in range(count + 1)
        for some in itertools.combinations(range(count), size)
        if all(one in some or other in some for one, other in pairs)
    ]
    keeps = [[number not in cover for number in range(count)] for cover in covers]
    order = [
        (-len(cover), -len(cover - idle), keep) for cover, keep in zip(covers, keeps, strict=True)
    ]
    return covers[order.index(max(order))]


@pytest.mark.parametrize("seed", range(40))
def test_the_choice_is_the_best_of_all_subsets(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(5):
        count = draw.randint(2, 8)
        every = list(itertools.combinations(range(count), 2))
        pairs = {pair for pair in every if draw.random() < draw.choice([0.1, 0.3, 0.6])}
        idle = {number for number in range(count) if draw.random() < 0.3}
        wanted = brute_force(pairs, count=count, idle=idle)
        assert fewest_left_out(pairs, idle=idle) == wanted


@pytest.mark.parametrize("seed", range(5))
def test_of_forty_hosts_as_many_stay_as_networkx_finds(seed: int) -> None:
    """The hosts that stay are a largest clique of those that reach each other."""
    draw = random.Random(seed)
    pairs = {pair for pair in itertools.combinations(range(40), 2) if draw.random() < 0.06}
    graph = networkx.complete_graph(40)
    graph.remove_edges_from(pairs)
    stay, _ = networkx.max_weight_clique(graph, weight=None)
    out = fewest_left_out(pairs)
    assert len(out) == 40 - len(stay)
    assert all(one in out or other in out for one, other in pairs)


def test_a_switch_that_falls_in_two_costs_the_smaller_part() -> None:
    """Also of many hosts, and within a moment."""
    began = time.process_time()
    pairs = set(itertools.product(range(200), range(200, 500)))
    assert fewest_left_out(pairs) == set(range(200))
    assert time.process_time() - began < 5
    assert fewest_left_out([(1, 2)]) == {2}, "the first one stays"
    assert fewest_left_out([(1, 2)], idle=[1]) == {1}, "whoever is at work stays"
    assert fewest_left_out([]) == set()


class Told:
    """A site that answers what it is told to; no address of it leads anywhere."""

    def __init__(self, number: int) -> None:
        self.open_address, self.gone = f"tcp://h{number}:1", None
        self.asked: list[Sequence[str]] = []
        self.cannot: set[str] = set()
        self.answers = True

    def test_reach(self, number: int, addresses: Sequence[str]) -> None:
        self.asked.append(addresses)
        self._number = number

    def unreached(self, number: int) -> frozenset[str] | None:
        if not self.answers:
            return None
        return frozenset(self.cannot & set(self.asked[-1]))


def looked(reach: Reach) -> None:
    for _ in range(1000):
        if reach.look():
            return
    raise AssertionError("the test does not end")


@pytest.mark.parametrize("count", [2, 3, 4, 7, 300])
def test_every_pair_is_tested_from_both_ends(count: int) -> None:
    sites: list[Any] = [Told(number) for number in range(count)]
    reach = Reach(sites)
    reach.ask()
    looked(reach)
    asked = [
        (number, int(address[len("tcp://h") : -2]))
        for number, site in enumerate(sites)
        for addresses in site.asked
        for address in addresses
    ]
    assert sorted(asked) == sorted(itertools.permutations(range(count), 2))
    assert max(len(addresses) for site in sites for addresses in site.asked) <= MOST_ADDRESSES
    assert reach.cut(range(count)) == set()


def test_what_is_known_of_a_pair_is_what_was_tested_last() -> None:
    sites: list[Any] = [Told(number) for number in range(3)]
    sites[1].cannot = {"tcp://h2:1"}
    reach = Reach(sites)
    reach.ask()
    looked(reach)
    assert reach.cut([0, 1, 2]) == {(1, 2)} and reach.cut([0, 1]) == set()
    sites[1].cannot = set()
    reach.ask()
    reach.ask()  # asked while one is under way: another follows, for it may have begun too early
    looked(reach)
    assert reach.cut([0, 1, 2]) == set() and [len(site.asked) for site in sites] == [3, 3, 3]


def test_who_lets_nobody_in_is_the_one_that_goes() -> None:
    """A firewall of the first host: it reaches all, and nobody reaches it."""
    sites: list[Any] = [Told(number) for number in range(3)]
    sites[1].cannot = sites[2].cannot = {"tcp://h0:1"}
    reach = Reach(sites)
    reach.ask()
    looked(reach)
    assert reach.cut([0, 1, 2]) == {(0, 1), (0, 2)}
    assert fewest_left_out(reach.cut([0, 1, 2])) == {0}


def test_who_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.launch.reach._ANSWER_SECONDS", 0.1)
    sites: list[Any] = [Told(number) for number in range(3)]
    sites[0].answers = False
    sites[1].cannot = {"tcp://h2:1"}
    reach = Reach(sites)
    reach.ask()
    assert not reach.look() and reach.under_way
    time.sleep(0.15)
    assert reach.look() and reach.cut([0, 1, 2]) == {(1, 2)}


def test_connections_that_come_about_and_others() -> None:
    """Refused, what is no address, and a peer that answers nothing: its queue is full."""
    with (
        socket.create_server(("127.0.0.1", 0)) as open_,
        socket.create_server(("127.0.0.1", 0), backlog=0) as full,
        socket.socket() as closed,
    ):
        closed.bind(("127.0.0.1", 0))
        addresses = [
            f"tcp://{host}:{made.getsockname()[1]}"
            for host, made in (("127.0.0.1", open_), ("127.0.0.1", closed), ("127.0.0.1", full))
        ]
        filling = [socket.socket() for _ in range(3)]
        for each in filling:
            each.setblocking(False)
            each.connect_ex(full.getsockname())
        began = time.monotonic()
        senseless = ["tcp://no..host:1", "tcp://127.0.0.1:99999"]
        found = unreached([*addresses, *senseless], timeout_seconds=0.5)
        for each in filling:
            each.close()
    assert found == (*addresses[1:], *senseless)
    assert time.monotonic() - began < 3
