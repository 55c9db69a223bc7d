"""Requests with tensors to a process that serves them, and its answers: authenticated, checked.

ZeroMQ over TCP, encrypted and authenticated at both ends by CURVE keys (comm/keys.py). A message
is an envelope (its number, the tensors' dtypes, shapes and hashes), a body of at most 1 MiB that
means something to the two ends, and the tensors' raw bytes in frames of 1 MiB. Nothing is used
before its sizes and hashes are right; a server that goes away is called again, wherever it then
is, with the same number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
import zmq
import zmq.utils.monitor
from torch import Tensor

from shoal.comm.guard import HANDSHAKE_MILLISECONDS, Guard
from shoal.comm.keys import Keys
from shoal.comm.wire import DTYPES, NAMES, Count, TensorHead, bytes_of, hash_of
from shoal.errors import ChannelError

FRAME_BYTES = 1 << 20
_SOON = 0.05
_SAY_AFTER_SECONDS = 1.0
_REFUSED_KEY = zmq.EVENT_HANDSHAKE_FAILED_AUTH
_GONE = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_CONNECT_RETRIED
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


class Envelope(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Goes before a body and its tensors."""

    number: Count
    """Of the request, by its sender; an answer has that of its request."""
    tensors: Annotated[tuple[TensorHead, ...], msgspec.Meta(max_length=64)] = ()


@dataclass(frozen=True)
class Received:
    """A message that arrived whole: who sent it, under which number, and what it holds."""

    peer: bytes
    number: int
    body: bytes
    tensors: list[Tensor]


def _heads(tensors: Sequence[Tensor]) -> tuple[tuple[TensorHead, ...], list[memoryview]]:
    data = [bytes_of(tensor) for tensor in tensors]
    heads = [
        TensorHead(str(index), NAMES[tensor.dtype], tuple(tensor.shape), hash_of(each))
        for index, (tensor, each) in enumerate(zip(tensors, data))
    ]
    return tuple(heads), data


def _frames(envelope: bytes, body: bytes, data: Sequence[memoryview]) -> list[Any]:
    if len(body) > FRAME_BYTES:
        raise ChannelError(f"a message of {len(body)} bytes, at most {FRAME_BYTES} are allowed")
    cut = [each[at : at + FRAME_BYTES] for each in data for at in range(0, len(each), FRAME_BYTES)]
    return [envelope, body, *cut]


def _tensors(heads: Sequence[TensorHead], frames: Sequence[Any], *, most_bytes: int) -> list[Any]:
    """The tensors that `frames` hold. Raises ChannelError unless sizes and hashes are right."""
    sizes = [head.num_bytes for head in heads]
    if sum(sizes) > most_bytes:
        raise ChannelError(f"announces {sum(sizes)} bytes of tensors, at most {most_bytes} fit")
    counts = [-(-size // FRAME_BYTES) for size in sizes]
    if sum(counts) != len(frames):
        raise ChannelError(f"expected {sum(counts)} frames of tensors, got {len(frames)}")
    found, at = [], 0
    for head, size, count in zip(heads, sizes, counts):
        tensor = torch.empty(head.shape, dtype=DTYPES[head.dtype])
        landing, filled = bytes_of(tensor), 0
        for frame in frames[at : at + count]:
            data = frame.buffer if hasattr(frame, "buffer") else memoryview(frame)
            if filled + len(data) > size:
                raise ChannelError(f"tensor {head.name}: more bytes than announced")
            landing[filled : filled + len(data)] = data
            filled += len(data)
        if filled != size or hash_of(landing) != head.hash:
            raise ChannelError(f"tensor {head.name}: arrived with another hash than announced")
        at += count
        found.append(tensor)
    return found


class Listener:
    """The serving end. Not started by itself: whoever owns it calls `receive` again and again.

    `most_bytes`: of the tensors of one message. Raises ChannelError for a `bind` that is not
    loopback without `keys`.
    """

    def __init__(
        self,
        *,
        keys: Keys | None,
        bind: str = "127.0.0.1",
        port: int = 0,
        most_bytes: int = 1 << 36,
    ) -> None:
        self._context = zmq.Context()
        self._most_bytes = most_bytes
        self._num_senseless = 0
        try:
            self._guard = Guard(
                self._context,
                keys=keys,
                largest_frame=FRAME_BYTES + 4096,
                high_water_mark=0,
                bind=bind,
                port=port,
            )
        except ChannelError:
            self._context.destroy(linger=0)
            raise
        self.address = self._guard.address
        self._decoder = msgspec.msgpack.Decoder(Envelope)

    @property
    def num_refused(self) -> int:
        """Messages without sense, and connections that did not prove that they have the key."""
        return self._num_senseless + self._guard.num_refused

    def register(self, descriptor: int) -> None:
        """Let `receive` also return when there is something to read on `descriptor`."""
        self._guard.register(descriptor)

    def receive(self, *, timeout_seconds: float) -> list[Received]:
        """All messages that are there, or come within `timeout_seconds`."""
        found: list[Received] = []
        if self._guard.socket not in self._guard.ready(timeout_seconds=timeout_seconds):
            return found
        while self._guard.socket.poll(0):
            peer, *frames = self._guard.socket.recv_multipart(copy=False)
            try:
                found.append(self._read(peer.bytes, frames))
            except (ValueError, msgspec.DecodeError, ChannelError):
                self._num_senseless += 1  # its sender waits in vain: it is no worker of ours
        return found

    def _read(self, peer: bytes, frames: list[Any]) -> Received:
        head, body, *rest = frames
        envelope = self._decoder.decode(head.bytes)
        tensors = _tensors(envelope.tensors, rest, most_bytes=self._most_bytes)
        return Received(peer, envelope.number, body.bytes, tensors)

    def answer(self, request: Received, body: bytes, tensors: Sequence[Tensor] = ()) -> None:
        """Answer `request`; the tensors are copied, and may change at once."""
        heads, data = _heads([tensor.clone() for tensor in tensors])
        envelope = msgspec.msgpack.encode(Envelope(request.number, heads))
        frames = _frames(envelope, body, data)
        self._guard.socket.send_multipart([request.peer, *frames], copy=False)

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all connections."""
        self._guard.close()
        self._context.destroy(linger=0)


def write_address(path: Path, address: str) -> None:
    """Leave the address of a listener where its callers look for it, whole or not at all."""
    beside = path.with_suffix(".new")
    beside.write_text(address, encoding="utf-8")
    beside.replace(path)


class Caller:
    """One caller's line to a listener, which may go away and come back elsewhere.

    `address`: where it says that it is; read anew for every connection. `say`: told what is waited
    for, once a second, when nobody answers; it may raise to end the wait. A request is sent again,
    with its number, after every loss of the connection. ChannelError after `patience_seconds`
    without a connection, and at once for a key that is not known there.
    """

    def __init__(
        self,
        address: Path,
        *,
        keys: Keys,
        name: str,
        say: Callable[[str], None] = lambda text: None,
        patience_seconds: float = 600.0,
    ) -> None:
        self.num_connections = 0
        self._path, self._keys, self._name, self._say = address, keys, name, say
        self._patience_seconds = patience_seconds
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._number = 0
        self._frames: list[Any] = []
        self._where = "no address yet"
        self._decoder = msgspec.msgpack.Decoder(Envelope)
        self._lost_at: float | None = None
        self._said_at = 0.0

    def ask(self, body: bytes, tensors: Sequence[Tensor] = ()) -> tuple[bytes, list[Tensor]]:
        """Send and wait for the answer."""
        self.send(body, tensors)
        return self.receive()

    def send(self, body: bytes, tensors: Sequence[Tensor] = ()) -> None:
        """Begin a request; `tensors` may not change until it is answered (`receive`)."""
        self._number += 1
        heads, data = _heads(tensors)
        envelope = msgspec.msgpack.encode(Envelope(self._number, heads))
        self._frames = _frames(envelope, body, data)
        self._send()

    def receive(self) -> tuple[bytes, list[Tensor]]:
        """The answer to the request under way: its body and tensors."""
        while True:
            if self._socket is None:
                self._wait_for_server()
                continue
            if self._poll() and (answer := self._answer()) is not None:
                self._lost_at = None
                return answer

    def close(self) -> None:
        """End the connection."""
        self._drop()
        self._context.destroy(linger=0)

    # --- the connection

    def _send(self) -> None:
        if self._socket is None:
            self._connect()
        if self._socket is not None:
            try:  # with no connection there is nobody to send to: never just block
                self._socket.send_multipart(self._frames, flags=zmq.NOBLOCK, copy=False)
            except zmq.Again:
                self._drop()

    def _connect(self) -> None:
        try:
            address = self._path.read_text(encoding="utf-8")
        except OSError:
            return
        self._where = address
        socket = self._context.socket(zmq.DEALER)
        options = {
            zmq.LINGER: 0,
            zmq.MAXMSGSIZE: FRAME_BYTES + 4096,
            zmq.SNDHWM: 0,
            zmq.RCVHWM: 0,
            zmq.RECONNECT_IVL: -1,
            zmq.HANDSHAKE_IVL: HANDSHAKE_MILLISECONDS,
        }
        for option, value in options.items():
            socket.setsockopt(option, value)
        socket.setsockopt(zmq.CURVE_SERVERKEY, self._keys.donor.public)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self._keys.receiver.public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._keys.receiver.secret)
        self._monitor = socket.get_monitor_socket()
        try:
            socket.connect(address)
        except zmq.ZMQError as error:
            raise ChannelError(f"{address}: not an address of a server: {error}") from None
        self._socket = socket
        self.num_connections += 1

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.disable_monitor()
            assert self._monitor is not None, "made with the socket"
            self._monitor.close(linger=0)
            self._socket.close(linger=0)
        self._socket = self._monitor = None

    def _wait_for_server(self) -> None:
        """A moment later, call again. Raises ChannelError when that was tried for long enough."""
        now = time.monotonic()
        self._lost_at = self._lost_at or now
        seconds = now - self._lost_at
        text = f"waiting for {self._name} at {self._where}, {seconds:.0f} s"
        if seconds > self._patience_seconds:
            raise ChannelError(
                f"{self._name} at {self._where} does not answer for {seconds:.0f} s; whether its "
                "process runs, RUN/events.jsonl says"
            )
        if seconds > _SAY_AFTER_SECONDS and now - self._said_at > _SAY_AFTER_SECONDS:
            self._said_at = now
            self._say(text)
        time.sleep(_SOON)
        self._send()

    def _poll(self) -> bool:
        """Whether an answer is there; the connection is dropped when its other end has gone."""
        assert self._socket is not None and self._monitor is not None, "connected"
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        ready = dict(poller.poll(200))
        if self._socket in ready:
            return True
        if self._monitor in ready:
            event = int(zmq.utils.monitor.recv_monitor_message(self._monitor)["event"])
            if event & _REFUSED_KEY:
                raise ChannelError(
                    f"{self._name} at {self._where} does not know this worker's key; workers and "
                    "servers must be started by one start of the run"
                )
            if event & _GONE:
                self._drop()
        elif self._said_at:  # it answered, or is only slow
            self._say("")
        return False

    def _answer(self) -> tuple[bytes, list[Tensor]] | None:
        """The next message, if it answers the request under way (not an earlier one again)."""
        assert self._socket is not None, "connected"
        head, body, *rest = self._socket.recv_multipart(copy=False)
        try:
            envelope = self._decoder.decode(head.bytes)
            if envelope.number != self._number:
                return None
            tensors = _tensors(envelope.tensors, rest, most_bytes=1 << 40)
        except (ValueError, msgspec.DecodeError) as error:
            raise ChannelError(f"{self._name} at {self._where}: not an answer: {error}") from None
        return body.bytes, tensors
