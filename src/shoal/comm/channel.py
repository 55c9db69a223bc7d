"""A channel that hands a whole training state from a living worker to one that joins.

ZeroMQ over TCP (loopback, or the address that `bind` says), encrypted and authenticated at both
ends by CURVE keys (comm/keys.py). The receiver asks, the donor answers: first for the header (which
tensors there are, their hashes and some facts), then chunk by chunk with a few requests under way,
so that the donor keeps nothing per receiver and a receiver that dies costs nothing. Every request
carries the generation; one of another generation is refused. Headers are msgspec structures with
limits, tensors are raw bytes; nothing that arrives is ever run, and nothing is used before its size
and hash are right.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec
import torch
import zmq
import zmq.utils.monitor
from torch import Tensor

from shoal.comm.guard import HANDSHAKE_MILLISECONDS, Guard
from shoal.comm.keys import Keys
from shoal.comm.wire import (
    DTYPES,
    LARGEST_HEADER,
    NAMES,
    Answer,
    Header,
    Request,
    TensorHead,
    bytes_of,
    hash_of,
)
from shoal.errors import ChannelError

CHUNK_BYTES = 1 << 20
_UNDER_WAY = 8
"""Requests without an answer yet: enough to keep both ends and the wire busy."""
_LARGEST_REQUEST = 4096
_NO_HANDSHAKE = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


class Donor:
    """Serves one state to any number of receivers, from a thread of its own, until `close`.

    Contiguous CPU tensors are not copied: they must not change before `close` (a receiver would
    find other bytes than were announced, and refuse them). Only receivers of the same
    `generation` and keys are served. Raises ChannelError for a dtype that no state has.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        keys: Keys,
        generation: int,
        facts: Mapping[str, Any] | None = None,
        bind: str = "127.0.0.1",
    ) -> None:
        self.generation = generation
        self.num_requests = 0
        """Answered requests."""
        self._num_senseless = 0
        self._data = [bytes_of(tensor) for tensor in tensors.values()]
        self._header = msgspec.msgpack.encode(self._describe(tensors, facts or {}))
        if len(self._header) > LARGEST_HEADER:
            raise ChannelError(
                f"names and facts take {len(self._header)} bytes, more than {LARGEST_HEADER}"
            )
        self._decoder = msgspec.msgpack.Decoder(Request)
        self._context = zmq.Context()
        self._guard = Guard(
            self._context,
            keys=keys,
            largest_frame=_LARGEST_REQUEST,
            high_water_mark=4 * _UNDER_WAY,
            bind=bind,
        )
        self._socket, self.address = self._guard.socket, self._guard.address
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="donor", daemon=True)
        self._thread.start()

    @property
    def num_refused(self) -> int:
        """Requests of another generation or without sense, and connections that did not prove (or
        not yet) that they have the right key."""
        return self._num_senseless + self._guard.num_refused

    def __enter__(self) -> Donor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop serving at once; what a receiver still waits for does not come."""
        self._closing.set()
        self._thread.join()

    def _describe(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Header:
        heads = []
        for (name, tensor), data in zip(tensors.items(), self._data):
            if tensor.dtype not in NAMES:
                raise ChannelError(f"{name}: dtype {tensor.dtype} cannot be sent")
            shape = tuple(tensor.shape)
            heads.append(TensorHead(name, NAMES[tensor.dtype], shape, hash_of(data)))
        total = sum(len(data) for data in self._data)
        return Header(self.generation, total, tuple(heads), json.dumps(dict(facts)))

    def _serve(self) -> None:
        while not self._closing.is_set():
            if self._socket in self._guard.ready(timeout_seconds=0.05):
                self._reply(self._socket.recv_multipart())
        self._guard.close()
        self._context.destroy(linger=0)

    def _reply(self, frames: list[bytes]) -> None:
        peer, *rest = frames
        try:
            (text,) = rest
            request = self._decoder.decode(text)
            data = self._part(request)
        except (ValueError, msgspec.DecodeError, ChannelError) as error:
            self._num_senseless += 1
            problem = str(error) if isinstance(error, ChannelError) else "not a request"
            answer = msgspec.msgpack.encode(Answer(-1, 0, problem[:1024]))
            self._socket.send_multipart([peer, answer, b""])
            return
        self.num_requests += 1
        answer = msgspec.msgpack.encode(Answer(request.tensor, request.chunk))
        self._socket.send_multipart([peer, answer], flags=zmq.SNDMORE)
        self._socket.send(data, copy=False)

    def _part(self, request: Request) -> bytes | memoryview:
        if request.generation != self.generation:
            raise ChannelError(
                f"asked for generation {request.generation}, this donor is of generation "
                f"{self.generation}"
            )
        if request.tensor == -1:
            return self._header
        start = request.chunk * CHUNK_BYTES
        if request.tensor >= len(self._data) or start >= len(self._data[request.tensor]):
            raise ChannelError(f"no chunk {request.chunk} of tensor {request.tensor}")
        return self._data[request.tensor][start : start + CHUNK_BYTES]


def fetch(
    address: str,
    *,
    keys: Keys,
    generation: int,
    timeout_seconds: float,
    into: Mapping[str, Tensor] | None = None,
    most_bytes: int = 1 << 36,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and facts that the donor at `address` gives, every one checked by its hash.

    `into`: tensors to fill, which must be exactly those announced, with their dtypes and shapes;
    they are touched only once all has arrived and is right. Without it new CPU tensors are made,
    of `most_bytes` at most. Raises ChannelError, with the reason, within `timeout_seconds`.
    """
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        line = _Line(socket, keys=keys, timeout_seconds=timeout_seconds)
        try:
            line.connect(address)
            header = _header_of(
                line.ask_one(Request(generation)), generation=generation, address=address
            )
            _check(header, address=address, most_bytes=most_bytes, into=into)
            tensors = _receive(line, header)
        finally:
            line.close()
    if into is not None:
        with torch.no_grad():
            for name, tensor in tensors.items():
                into[name].copy_(tensor)
        tensors = dict(into)
    return tensors, json.loads(header.facts)


def _header_of(data: memoryview, *, generation: int, address: str) -> Header:
    try:
        header = msgspec.msgpack.decode(data, type=Header)
    except msgspec.DecodeError as error:
        raise ChannelError(f"{address}: its header cannot be read: {error}") from None
    if header.generation != generation:
        raise ChannelError(
            f"{address}: expected a state of generation {generation}, got {header.generation}"
        )
    return header


def _check(
    header: Header, *, address: str, most_bytes: int, into: Mapping[str, Tensor] | None
) -> None:
    """Compare what is announced with itself and with what is expected, before any allocation."""
    total = sum(head.num_bytes for head in header.tensors)
    if total != header.total_bytes:
        raise ChannelError(
            f"{address}: announces {header.total_bytes} bytes, its tensors have {total}"
        )
    names = {head.name for head in header.tensors}
    if len(names) != len(header.tensors):
        raise ChannelError(f"{address}: announces a name twice")
    if into is None:
        if total > most_bytes:
            raise ChannelError(f"{address}: announces {total} bytes, more than {most_bytes}")
        return
    if names != set(into):
        other = sorted(names ^ set(into))[0]
        side = "the donor" if other in names else "this worker"
        raise ChannelError(f"{address}: only {side} has {other!r}; expected the same state")
    for head in header.tensors:
        wanted = into[head.name]
        if (DTYPES[head.dtype], head.shape) != (wanted.dtype, tuple(wanted.shape)):
            raise ChannelError(
                f"{address}: {head.name} is {head.dtype} {list(head.shape)}, expected "
                f"{NAMES.get(wanted.dtype)} {list(wanted.shape)}"
            )


def _receive(line: _Line, header: Header) -> dict[str, Tensor]:
    """All tensors, chunk by chunk."""
    tensors = {h.name: torch.empty(h.shape, dtype=DTYPES[h.dtype]) for h in header.tensors}
    landing = [bytes_of(tensor) for tensor in tensors.values()]

    def requests() -> Iterator[Request]:
        for index, data in enumerate(landing):
            for chunk in range(-(-len(data) // CHUNK_BYTES)):
                yield Request(header.generation, index, chunk)

    def place(answer: Request, data: memoryview) -> None:
        start = answer.chunk * CHUNK_BYTES
        room = landing[answer.tensor][start : start + CHUNK_BYTES]
        if len(room) != len(data):
            raise ChannelError(f"{line.address}: sent {len(data)} bytes, expected {len(room)}")
        room[:] = data

    line.ask(requests(), place)
    for head, data in zip(header.tensors, landing):
        if hash_of(data) != head.hash:
            raise ChannelError(
                f"{line.address}: {head.name} arrived with another hash than announced (it changed "
                "while it was sent, or was damaged on the way); ask again, or ask another donor"
            )
    return tensors


class _Line:
    """A receiver's end of the connection: requests out, answers in, and what went wrong."""

    def __init__(self, socket: zmq.Socket[bytes], *, keys: Keys, timeout_seconds: float) -> None:
        self.address = ""
        self._socket = socket
        self._seconds = timeout_seconds
        self._deadline = time.monotonic() + timeout_seconds
        self._joined = False
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, LARGEST_HEADER)
        socket.setsockopt(zmq.RECONNECT_IVL, -1)  # a donor that goes away is gone: say so at once
        socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MILLISECONDS)
        socket.setsockopt(zmq.CURVE_SERVERKEY, keys.donor.public)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.receiver.public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, keys.receiver.secret)
        self._monitor = socket.get_monitor_socket()
        self._poller = zmq.Poller()
        self._poller.register(self._monitor, zmq.POLLIN)
        self._decoder = msgspec.msgpack.Decoder(Answer)

    def connect(self, address: str) -> None:
        """Begin to connect. Raises ChannelError for what is no address."""
        self.address = address
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            raise ChannelError(f"{address}: not an address of a donor: {error}") from None

    def close(self) -> None:
        """Stop watching the connection."""
        self._socket.disable_monitor()
        self._monitor.close(linger=0)

    def ask_one(self, request: Request) -> memoryview:
        """The bytes that answer one request."""
        found: list[memoryview] = []
        self.ask(iter([request]), lambda _, data: found.append(data))
        return found[0]

    def ask(self, requests: Iterator[Request], take: Callable[[Request, memoryview], None]) -> None:
        """Send all `requests`, a few ahead of their answers; `take` gets each with its bytes."""
        under_way: list[Request] = []
        more = True
        while more or under_way:
            while more and len(under_way) < _UNDER_WAY:
                request = next(requests, None)
                if request is None:
                    more = False
                else:
                    self._send(msgspec.msgpack.encode(request))
                    under_way.append(request)
            if under_way:
                answer, data = self._next()
                expected = under_way.pop(0)  # one donor, one connection: answers keep their order
                if (answer.tensor, answer.chunk) != (expected.tensor, expected.chunk):
                    raise ChannelError(f"{self.address}: answered something that was not asked")
                take(expected, data)

    def _send(self, request: bytes) -> None:
        self._wait_for(zmq.POLLOUT)  # after a refusal there is nobody to send to: never just block
        self._socket.send(request)

    def _next(self) -> tuple[Answer, memoryview]:
        self._wait_for(zmq.POLLIN)
        return self._read()

    def _wait_for(self, what: int) -> None:
        """Until the connection can take or has a message. Raises ChannelError if it is over."""
        self._poller.register(self._socket, what)
        while True:
            left = self._deadline - time.monotonic()
            ready = dict(self._poller.poll(int(max(0.0, left) * 1000)))
            if self._socket in ready:
                return
            if self._monitor in ready:
                self._watch(zmq.utils.monitor.recv_monitor_message(self._monitor))
            elif left <= 0:
                where = "no whole answer" if self._joined else "no connection"
                raise ChannelError(f"{self.address}: {where} within {self._seconds:g} s")

    def _read(self) -> tuple[Answer, memoryview]:
        frames = self._socket.recv_multipart(copy=False)
        if len(frames) != 2:
            raise ChannelError(f"{self.address}: answered {len(frames)} frames, expected 2")
        try:
            answer = self._decoder.decode(frames[0].buffer)
        except msgspec.DecodeError as error:
            raise ChannelError(f"{self.address}: its answer cannot be read: {error}") from None
        if answer.problem:
            raise ChannelError(f"{self.address}: refused: {answer.problem}")
        return answer, frames[1].buffer

    def _watch(self, event: Mapping[str, Any]) -> None:
        """Raise ChannelError for an event after which nothing more will come."""
        kind = event["event"]
        if kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._joined = True
        elif kind & _NO_HANDSHAKE:
            raise ChannelError(
                f"{self.address}: the donor does not accept this worker's key, or is not the donor "
                "whose key this worker has; both must be started with the keys of one attempt"
            )
        elif kind in (zmq.EVENT_DISCONNECTED, zmq.EVENT_CLOSED):
            gone = "the donor went away" if self._joined else "nobody answers there"
            raise ChannelError(f"{self.address}: {gone}; ask another donor")
