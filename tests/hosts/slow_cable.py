"""slow_cable.py NEAR FAR SECONDS: a cable with latency, as two network devices and a queue."""

from __future__ import annotations

import fcntl
import os
import select
import struct
import sys
import time
from collections import deque

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
FRAME_BYTES = 65536


def device(name: str) -> int:
    """A new Ethernet device of this network namespace; what is sent to it is read from here."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return descriptor


def main() -> None:
    ends, seconds = [device(name) for name in sys.argv[1:3]], float(sys.argv[3])
    print("ready", flush=True)
    waiting: deque[tuple[float, int, bytes]] = deque()
    poll = select.poll()
    for end in ends:
        poll.register(end, select.POLLIN)
    while True:
        left = None if not waiting else max(0.0, (waiting[0][0] - time.monotonic()) * 1000)
        for end, _ in poll.poll(left):
            try:
                frame = os.read(end, FRAME_BYTES)
            except OSError:  # not up yet
                continue
            other = ends[1 - ends.index(end)]
            waiting.append((time.monotonic() + seconds, other, frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, target, frame = waiting.popleft()
            try:
                os.write(target, frame)
            except OSError:
                continue


main()
