"""A link between replicas: what it says, and that bytes take the time that it gives them."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from shoal.comm.link import Bucket, Relay
from shoal.config.link import Link
from shoal.config.load import load_recipe
from shoal.errors import ConfigError


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
