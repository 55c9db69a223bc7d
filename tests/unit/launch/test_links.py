"""The test of links between hosts: what it counts, how long it takes, who is answered."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from shoal.launch.links import MOST_BYTES, PINGS, Answering, Links, Measured, measure
from shoal.plan.over_hosts import Link


@pytest.fixture
def answering() -> Iterator[Answering]:
    made = Answering("127.0.0.1")
    yield made
    made.close()


def address(answering: Answering) -> str:
    return f"tcp://127.0.0.1:{answering.port}"


class SlowRelay:
    """Passes on what comes for `port` at a rate, in the way of a shaped cable: a burst first."""

    def __init__(self, port: int, *, bytes_per_second: float, burst: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._port, self._rate, self._burst = port, bytes_per_second, burst
        self.passed = 0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        came, _ = self._listener.accept()
        on = socket.create_connection(("127.0.0.1", self._port))
        threading.Thread(target=self._back, args=(on, came), daemon=True).start()
        began = time.monotonic()
        try:
            while text := came.recv(1 << 14):
                self.passed += len(text)
                on.sendall(text)
                due = began + max(0, self.passed - self._burst) / self._rate
                time.sleep(max(0.0, due - time.monotonic()))
        except OSError:
            pass  # the test breaks off at its limit
        finally:
            on.close()
            came.close()

    def _back(self, on: socket.socket, came: socket.socket) -> None:
        try:
            while text := on.recv(1 << 14):
                came.sendall(text)
        except OSError:
            pass

    def close(self) -> None:
        self._listener.close()


def test_a_rate_is_what_arrives_not_what_is_sent(answering: Answering) -> None:
    """2 MB/s behind a burst of 300 kB and the buffers of two sockets, within its second."""
    relay = SlowRelay(answering.port, bytes_per_second=2e6, burst=300_000)
    began = time.monotonic()
    found = measure(relay.address)
    took = time.monotonic() - began
    relay.close()
    assert found.bytes_per_second == pytest.approx(2e6, rel=0.3)
    assert 0 < found.round_trip_seconds < 0.5
    assert took < 3
    assert relay.passed < 8e6, "bounded in seconds"


def test_a_fast_link_ends_after_its_bytes(answering: Answering) -> None:
    relay = SlowRelay(answering.port, bytes_per_second=1e12, burst=0)
    found = measure(relay.address, most_seconds=60.0)
    relay.close()
    assert found.bytes_per_second > 10e6
    assert MOST_BYTES <= relay.passed <= 1.1 * MOST_BYTES, "bounded in bytes"


def test_an_address_where_nobody_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        silent = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        began = time.monotonic()
        assert measure(silent, most_seconds=0.3) == Measured(0.0, 0.0)
        assert time.monotonic() - began < 2
    for wrong in (silent, "tcp://no.such.host.invalid:1", "tcp://127.0.0.1:0", "nonsense"):
        assert measure(wrong, most_seconds=0.3) == Measured(0.0, 0.0)


def test_one_that_is_silent_after_pings_or_goes(answering: Answering) -> None:
    def once(listener: socket.socket, pings: int) -> None:
        made, _ = listener.accept()
        for number in range(pings):
            made.recv(1)
            made.sendall(struct.pack("<Q", number + 1))
        time.sleep(0.5)
        made.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        place = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        for pings in (0, 2, 5):
            thread = threading.Thread(target=once, args=(listener, pings))
            thread.start()
            assert measure(place, most_seconds=0.4).bytes_per_second == 0.0
            thread.join()


def test_strangers_are_told_how_much_came_and_let_go(
    answering: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_connection(("127.0.0.1", answering.port), timeout=5) as made:
        made.sendall(b"x" * 1000)
        total = 0
        while total < 1000:
            (total,) = struct.unpack("<Q", made.recv(8))
        assert total == 1000
    many = [socket.create_connection(("127.0.0.1", answering.port), timeout=5) for _ in range(300)]
    many[-1].sendall(b".")
    assert struct.unpack("<Q", many[-1].recv(8)) == (1,)
    assert many[0].recv(8) == b"", "the oldest of too many went"
    for each in many:
        each.close()
    monkeypatch.setattr("shoal.launch.links._LONGEST_SECONDS", 0.1)
    with socket.create_connection(("127.0.0.1", answering.port), timeout=5) as made:
        assert made.recv(8) == b"", "nobody is answered for ever"


def test_a_round_trip_is_timed_without_filling_the_way(answering: Answering) -> None:
    relay = SlowRelay(answering.port, bytes_per_second=2e6, burst=300_000)
    found = measure(relay.address, sends=False)
    relay.close()
    assert found.bytes_per_second == 0.0 and 0 < found.round_trip_seconds < 0.5
    assert relay.passed == PINGS


def test_a_plan_reckons_with_the_slowest() -> None:
    pings = (Measured(0.0, 0.004), Measured(0.0, 0.002))
    rates = (Measured(2e6, 0.2), Measured(1e6, 0.1))
    inside = (Measured(9e8, 1e-4), Measured(8e8, 2e-4))
    found = Links.of(pings, rates, inside)
    assert found is not None
    assert (found.between, found.inside) == (Link(1e6, 0.002), Link(8e8, 1e-4))
    assert found.ring == (Measured(2e6, 0.004), Measured(1e6, 0.002))
    assert Links.of(pings, (Measured(0.0, 0.0), rates[0]), inside) is None
    assert Links.of(pings, rates, inside[:1]) is None
    assert Links.of((), (), ()) is None
