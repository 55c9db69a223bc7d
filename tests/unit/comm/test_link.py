"""A link between replicas: what it says, and that bytes take the time that it gives them."""

from __future__ import annotations

import socket
import struct
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from shoal.comm.link import Bucket, LinkedStore, Relay, link_of
from shoal.config.link import Link
from shoal.config.load import load_recipe
from shoal.errors import ConfigError, WorkerError
from shoal.launch import torchrun
from shoal.launch.pool import WorkerPool
from workers import run_workers


@pytest.mark.parametrize(
    ("text", "rate", "delay"),
    [
        ("20Mbit/s,10ms", 2.5e6, 0.01),
        ("1 Gbit/s", 125e6, 0.0),
        ("500kbit/s, 1.5 s", 62500.0, 1.5),
        ("3MB/s,200us", 3e6, 0.0002),
    ],
)
def test_a_link_in_words(text: str, rate: float, delay: float) -> None:
    assert Link.parse(text) == Link(rate, pytest.approx(delay))


@pytest.mark.parametrize("text", ["fast", "20", "20Mbit", "0Mbit/s", "20Mbit/s,10", "-1Mbit/s"])
def test_no_link(text: str) -> None:
    with pytest.raises(ConfigError, match=r"launch.link: expected a rate and perhaps a delay"):
        load_recipe("quickstart", [f'launch.link="{text}"'])


def through(link: Link, sent: list[bytes]) -> tuple[list[bytes], list[bytes], float]:
    """What arrives at the far end, what comes back from there, and the seconds of it."""
    server, got = socket.create_server(("127.0.0.1", 0)), list[bytes]()
    relay = Relay(
        server.getsockname()[1],
        link=link,
        ways=(Bucket(link.bytes_per_second), Bucket(link.bytes_per_second)),
    )

    def answer() -> None:
        far, _ = server.accept()
        with far, far.makefile("rb") as lines:
            for line in lines:
                got.append(line)
                far.sendall(line.upper())

    thread = threading.Thread(target=answer)
    thread.start()
    near = socket.create_connection(("127.0.0.1", relay.port))
    began, back = time.monotonic(), []
    with near, near.makefile("rb") as lines:
        for each in sent:
            near.sendall(each)
            back.append(lines.readline())
        seconds = time.monotonic() - began
    thread.join(10)
    server.close()
    assert not thread.is_alive(), "an end that goes is heard of at the other one"
    return got, back, seconds


def test_everything_arrives_and_no_sooner_than_it_may() -> None:
    link, sent = Link(2e6, 0.005), [b"a" * 99_999 + b"\n", b"b\n", b"c" * 49_999 + b"\n"]
    got, back, seconds = through(link, sent)
    assert got == sent and back == [each.upper() for each in sent]
    assert seconds >= 2 * 150_002 / 2e6 + 2 * 3 * 0.005


@pytest.mark.timed
def test_and_not_much_later() -> None:
    seconds = through(Link(2e6, 0.005), [b"a" * 199_999 + b"\n"])[2]
    assert seconds < 1.3 * (2 * 200_000 / 2e6 + 0.01) + 0.05


def test_several_that_ask_share_one_rate() -> None:
    bucket, began = Bucket(1e6), time.monotonic()
    ends = [bucket.take(1000) for _ in range(10)]
    assert ends[-1] - began >= 0.01 and ends == sorted(ends)


def address(port: int) -> bytes:
    """As gloo leaves it: a count and a name, then a sockaddr_in among other things."""
    return (
        b"\x02\0\0\0\0\0\0\0vm\x88\0"
        + struct.pack("=H", socket.AF_INET)
        + (struct.pack("!H", port) + socket.inet_aton("127.0.0.1") + bytes(8))
    )


def port_in(value: bytes) -> int:
    return int(struct.unpack("!H", value[14:16])[0])


def test_addresses_keep_the_order_by_which_gloo_connects() -> None:
    """Whichever of two ranks has the greater port, the higher rank connects, and to a relay."""
    inner, ranks = dist.HashStore(), [0, 1, 2, 3]
    for place, port in enumerate((40000, 50001, 33024, 45000)):
        inner.set(f"0//cpu//0/{place}", address(port))
    inner.set("0//cpu//0/other", b"no address")
    for rank in ranks:
        store = LinkedStore(
            inner,
            rank=rank,
            link=Link(1e6),
            ranks=lambda: ranks,
            replica_of=lambda rank: rank // 2,
        )
        assert store.get("0//cpu//0/other") == b"no address"
        for other in ranks:
            value, true = store.get(f"0//cpu//0/{other}"), inner.get(f"0//cpu//0/{other}")
            if other // 2 == rank // 2:
                assert value == true, "inside a replica nothing is in between"
            elif other > rank:
                assert port_in(value) == 65535
            else:
                port, own = port_in(value), port_in(inner.get(f"0//cpu//0/{rank}"))
                swapped = [int.from_bytes(struct.pack("!H", n), "little") for n in (port, own)]
                assert port < own and swapped[0] < swapped[1]
                socket.create_connection(("127.0.0.1", port)).close()
        assert store.num_linked == 2


def test_groups_meet_over_a_link_again_and_again(pool: WorkerPool, tmp_path: Path) -> None:
    payload = {"size": 3, "store": str(tmp_path / "s"), "rounds": 6}
    found = run_workers(pool, "sync_jobs:meet_over_link", payload, size=3)
    assert [each["sums"] for each in found] == [[6.0] * 6] * 3


def test_where_no_link_can_be_put(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = link_of("20Mbit/s", workers=2)
    assert slow is not None and link_of(None, workers=2) is None
    slow.check(2)  # one replica: nothing is to be linked
    with pytest.raises(WorkerError, match="leaves its addresses in another form"):
        slow.check(4)
    monkeypatch.setattr("shoal.comm.link._SMALL_PORTS", [])
    with pytest.raises(WorkerError, match="none of 0 ports for relays is free"):
        Relay(1, link=Link(1.0), ways=(Bucket(1.0), Bucket(1.0)))


def test_workers_of_another_launcher_have_met_already() -> None:
    recipe = load_recipe("quickstart", ["launch.link=20Mbit/s"])
    with pytest.raises(ConfigError, match="another launcher's workers have met by themselves"):
        torchrun._joined(recipe, None, rendezvous=None, name="x")  # type: ignore[arg-type]
