"""One end of a line to a process that listens behind a `Guard`: messages both ways, no tensors.

ZeroMQ over TCP, encrypted and authenticated at both ends by CURVE keys (comm/keys.py). A line that
breaks stays broken: what was on its way is lost, so whoever holds it begins anew. No torch.
"""

from __future__ import annotations

from contextlib import suppress

import zmq
import zmq.utils.monitor

from shoal.comm.guard import HANDSHAKE_MILLISECONDS
from shoal.comm.keys import Keys
from shoal.errors import ChannelError

LARGEST_MESSAGE = 1 << 24
_REFUSED = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


class Line:
    """A connection to `address` (tcp://HOST:PORT), which may not be there yet.

    `is_open`: the other end has proved that it has the keys. `broken`: why nothing comes any more.
    """

    def __init__(self, address: str, *, keys: Keys) -> None:
        self.address, self.is_open = address, False
        self.broken: str | None = None
        self.num_refused = 0
        """Times that the other end did not take, or not prove, the keys."""
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        options = {
            zmq.LINGER: 0,
            zmq.IMMEDIATE: 1,
            zmq.MAXMSGSIZE: LARGEST_MESSAGE,
            zmq.SNDHWM: 0,
            zmq.RCVHWM: 0,
            zmq.HANDSHAKE_IVL: HANDSHAKE_MILLISECONDS,
        }
        for option, value in options.items():
            self._socket.setsockopt(option, value)
        self._socket.setsockopt(zmq.CURVE_SERVERKEY, keys.donor.public)
        self._socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.receiver.public)
        self._socket.setsockopt(zmq.CURVE_SECRETKEY, keys.receiver.secret)
        self._monitor = self._socket.get_monitor_socket()
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self.close()
            raise ChannelError(f"{address}: not an address of an agent: {error}") from None

    def send(self, message: bytes) -> None:
        """Send, or nothing where nobody is there: what is broken says so by itself."""
        if len(message) > LARGEST_MESSAGE:
            raise ChannelError(
                f"{self.address}: a message of {len(message)} bytes, at most {LARGEST_MESSAGE} "
                "are taken"
            )
        with suppress(zmq.Again):
            self._socket.send(message, flags=zmq.NOBLOCK)

    def receive(self, *, timeout_seconds: float) -> list[bytes]:
        """All messages that are there, or come within `timeout_seconds`."""
        ready = dict(self._poller.poll(int(1000 * timeout_seconds)))
        found: list[bytes] = []
        if self._socket in ready:
            while self._socket.poll(0):
                found.append(self._socket.recv())
        if self._monitor in ready:
            self._watch()
        return found

    def _watch(self) -> None:
        while self._monitor.poll(0):
            event = int(zmq.utils.monitor.recv_monitor_message(self._monitor)["event"])
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.is_open = True
            elif event & _REFUSED:
                self.num_refused += 1
            elif event & (zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED) and self.is_open:
                self.broken = "it has closed the connection"

    def close(self, *, patience_seconds: float = 0.0) -> None:
        """End the connection; what was sent has so long to leave."""
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=int(1000 * patience_seconds))
        self._context.term()
