"""Who may talk to a ZeroMQ socket that listens: those who prove that they have the right key.

The mechanism is CURVE (http://curvezmq.org); who is let in is decided by ZAP
(https://rfc.zeromq.org/spec/27).
"""

from __future__ import annotations

import hmac
import ipaddress
from typing import Any

import zmq
import zmq.utils.monitor
import zmq.utils.z85

from shoal.comm.keys import Keys
from shoal.errors import ChannelError

HANDSHAKE_MILLISECONDS = 5000
_ZAP = "inproc://zeromq.zap.01"


class Guard:
    """A listening socket of `context`, and who is let in. One context has one guard.

    `bind`: an IP address of this host; `port` 0: one that the system chooses. `largest_frame`:
    bytes; who announces more is disconnected before any memory is taken. Without `keys` everybody
    on this host may come in, so that raises ChannelError for an address that is not loopback.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        *,
        keys: Keys | None,
        largest_frame: int,
        high_water_mark: int,
        bind: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        if keys is None and not _is_loopback(bind):
            raise ChannelError(
                f"{bind}: not an address of this host alone, and there are no keys; listen on "
                "127.0.0.1, or give the keys of both ends"
            )
        self.num_refused = 0
        """Connections that did not prove (or not yet) that they have the right key."""
        self._keys = keys
        self._zap = context.socket(zmq.REP)
        self._zap.bind(_ZAP)
        self.socket = context.socket(zmq.ROUTER)
        options = {
            zmq.LINGER: 0,
            zmq.MAXMSGSIZE: largest_frame,
            zmq.SNDHWM: high_water_mark,
            zmq.RCVHWM: high_water_mark,
            zmq.HANDSHAKE_IVL: HANDSHAKE_MILLISECONDS,
        }
        for option, value in options.items():
            self.socket.setsockopt(option, value)
        if keys is not None:
            self.socket.setsockopt(zmq.CURVE_SERVER, 1)
            self.socket.setsockopt(zmq.CURVE_SECRETKEY, keys.donor.secret)
            self.socket.setsockopt(zmq.ZAP_DOMAIN, b"shoal")
        self._monitor = self.socket.get_monitor_socket(
            zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED
        )
        host = f"[{bind}]" if ":" in bind else bind
        try:
            self.socket.bind(f"tcp://{host}:{port or '*'}")
        except zmq.ZMQError as error:
            raise ChannelError(f"{bind} port {port or 'any'}: cannot listen: {error}") from None
        endpoint = self.socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(endpoint, bytes), "as ZeroMQ documents it"
        self.address: str = endpoint.rstrip(b"\0").decode()
        self._poller = zmq.Poller()
        for socket in (self.socket, self._zap, self._monitor):
            self._poller.register(socket, zmq.POLLIN)

    def register(self, descriptor: int) -> None:
        """Let `ready` also return when there is something to read on `descriptor`."""
        self._poller.register(descriptor, zmq.POLLIN)

    def forget(self, descriptor: int) -> None:
        """Undo `register`."""
        self._poller.unregister(descriptor)

    def ready(self, *, timeout_seconds: float) -> dict[Any, int]:
        """What can be read within `timeout_seconds`; who knocks meanwhile is let in or refused."""
        found = dict(self._poller.poll(int(1000 * timeout_seconds)))
        if self._zap in found:
            self._admit(self._zap.recv_multipart())
        while self._monitor in found and self._monitor.poll(0):
            event = zmq.utils.monitor.recv_monitor_message(self._monitor)["event"]
            self.num_refused += 1 if event == zmq.EVENT_ACCEPTED else -1
        return found

    def close(self) -> None:
        """Stop watching; the context ends the sockets."""
        self.socket.disable_monitor()

    def _admit(self, frames: list[bytes]) -> None:
        version, request, _domain, _address, _identity, mechanism, *credentials = frames
        right = self._keys is None
        if self._keys is not None:
            known = zmq.utils.z85.decode(self._keys.receiver.public)
            right = mechanism == b"CURVE" and hmac.compare_digest(b"".join(credentials), known)
        status = (b"200", b"OK") if right else (b"400", b"unknown key")
        self._zap.send_multipart([version, request, *status, b"", b""])


def _is_loopback(bind: str) -> bool:
    try:
        return ipaddress.ip_address(bind).is_loopback
    except ValueError:
        raise ChannelError(f"{bind!r}: expected an IP address, such as 127.0.0.1") from None
