"""Requests with tensors: what arrives is what was sent, who has no key is nobody, a server may go.

Real sockets and keys; the other end of a broken message is a plain socket.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from shoal.comm.keys import Keys
from shoal.comm.requests import FRAME_BYTES, Caller, Listener, write_address
from shoal.errors import ChannelError

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys.make(tmp_path_factory.mktemp("requests") / "keys")


@contextmanager
def echoing(keys: Keys, place: Path, *, port: int = 0) -> Iterator[Listener]:
    """A listener that answers every request with what it got."""
    listener, closing = Listener(keys=keys, port=port), threading.Event()
    write_address(place, listener.address)

    def serve() -> None:
        while not closing.is_set():
            for each in listener.receive(timeout_seconds=0.02):
                listener.answer(each, b"heard " + each.body, each.tensors)
        listener.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener
    finally:
        closing.set()
        thread.join()


def tensors() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    small = [(100 * torch.randn(3, 5, generator=draw)).to(dtype) for dtype in DTYPES]
    odd = [torch.tensor(2.5), torch.empty(0, 4), torch.randn(6, 4, generator=draw).T]
    return [*small, *odd, torch.randn(2 * FRAME_BYTES // 4 + 7, generator=draw)]


def test_every_dtype_and_shape_comes_back(keys: Keys, tmp_path: Path) -> None:
    place = tmp_path / "server"
    with echoing(keys, place) as listener:
        caller = Caller(place, keys=keys, name="server")
        body, found = caller.ask(b"hello", tensors())
        caller.close()
        assert body == b"heard hello" and listener.num_refused == 0
    for ours, theirs in zip(tensors(), found, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_it_listens_on_loopback_and_elsewhere_only_with_keys(keys: Keys) -> None:
    with Listener(keys=None) as listener:
        assert listener.address.startswith("tcp://127.0.0.1:")
    with pytest.raises(ChannelError, match=r"0\.0\.0\.0.*no keys.*listen on 127\.0\.0\.1"):
        Listener(keys=None, bind="0.0.0.0")
    with pytest.raises(ChannelError, match=r"expected an IP address"):
        Listener(keys=None, bind="localhost")
    with Listener(keys=keys, bind="0.0.0.0") as listener:
        assert listener.address.startswith("tcp://0.0.0.0:")


def test_a_wrong_key_is_refused_and_the_others_are_served(keys: Keys, tmp_path: Path) -> None:
    place, other = tmp_path / "server", Keys.make(tmp_path / "other")
    with echoing(keys, place) as listener:
        for stranger in (Keys(keys.donor, other.receiver), Keys(other.donor, keys.receiver)):
            caller = Caller(place, keys=stranger, name="parameter server 0", patience_seconds=0.5)
            with pytest.raises(ChannelError, match=r"parameter server 0 at tcp://127\.0\.0\.1:\d+"):
                caller.ask(b"let me in")
            caller.close()
        caller = Caller(place, keys=keys, name="server")
        assert caller.ask(b"me")[0] == b"heard me"
        caller.close()
        assert listener.num_refused >= 2


def raw(listener: Listener) -> socket.socket:
    port = int(listener.address.rpartition(":")[2])
    return socket.create_connection(("127.0.0.1", port), timeout=10)


GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"CURVE".ljust(20, b"\0") + bytes(32)


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nHost: shoal\r\n\r\n" + bytes(64),
        bytes(range(256)) * 16,
        GREETING + b"\x06" + struct.pack(">Q", 4 << 30) + b"x" * 64,
        GREETING + b"\x02" + struct.pack(">Q", (1 << 63) - 1),
    ],
    ids=["http", "noise", "a command of 4 GiB", "a message of 8 EiB"],
)
def test_garbage_is_closed_and_counted(keys: Keys, tmp_path: Path, sent: bytes) -> None:
    place = tmp_path / "server"
    with echoing(keys, place) as listener:
        with raw(listener) as stranger:
            stranger.sendall(sent)
            began = time.monotonic()
            try:
                while stranger.recv(4096):
                    pass
            except ConnectionResetError:
                pass
            assert time.monotonic() - began < 8, "closed, by the handshake's time limit at most"
        caller = Caller(place, keys=keys, name="server")
        assert caller.ask(b"still there?")[0] == b"heard still there?"
        caller.close()
        assert listener.num_refused == 1


def test_a_friend_that_announces_too_much_is_not_believed(keys: Keys, tmp_path: Path) -> None:
    """What only a worker with a bug could send: more than fits, and another hash."""
    place = tmp_path / "server"
    with Listener(keys=keys, most_bytes=1000) as listener:
        write_address(place, listener.address)
        caller = Caller(place, keys=keys, name="server")
        caller.send(b"much", [torch.zeros(1000)])
        caller._frames[-1] = bytes(4000)
        deadline = time.monotonic() + 10
        while not listener.num_refused and time.monotonic() < deadline:
            assert listener.receive(timeout_seconds=0.05) == []
        caller.send(b"changed on the way", [torch.zeros(10)])
        caller._frames[-1] = bytes(39) + b"x"
        caller._send()
        found = []
        while listener.num_refused < 2 and time.monotonic() < deadline:
            found += listener.receive(timeout_seconds=0.05)
        assert [each.body for each in found] == [b"changed on the way"], "the one that was whole"
        assert listener.num_refused == 2
        caller.close()


def test_a_server_that_comes_back_elsewhere_is_found(keys: Keys, tmp_path: Path) -> None:
    place, said = tmp_path / "server", []
    caller = Caller(place, keys=keys, name="server", say=said.append)
    with echoing(keys, place):
        assert caller.ask(b"1")[0] == b"heard 1"
    caller.send(b"2")
    result: list[bytes] = []
    thread = threading.Thread(target=lambda: result.append(caller.receive()[0]))
    thread.start()
    time.sleep(1.3)
    with echoing(keys, place):
        thread.join(timeout=10)
    caller.close()
    assert result == [b"heard 2"] and caller.num_connections >= 2
    assert any("waiting for server at tcp://127.0.0.1:" in text for text in said)


def test_a_server_that_is_not_there_is_named(keys: Keys, tmp_path: Path) -> None:
    place = tmp_path / "server"
    write_address(place, "tcp://127.0.0.1:9")
    caller = Caller(place, keys=keys, name="parameter server 3", patience_seconds=0.5)
    with pytest.raises(ChannelError, match=r"parameter server 3 at tcp://127\.0\.0\.1:9 does not"):
        caller.ask(b"anybody?")
    caller.close()
