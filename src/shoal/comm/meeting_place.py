"""Where the ranks of a generation meet over several hosts: a store of torch on one host, kept here.

A worker of the fork server that trains nothing: for each generation it opens a fresh TCPStore, at
a port of one address of this host, so that no rank ever reads an address that an earlier generation
has left. It ends with its supervisor.
"""

from __future__ import annotations

import datetime
import json
import os
import socket
from typing import Any

import torch.distributed as dist

from shoal.observe.events import Report

_KEPT = 2
"""Stores: ranks may still leave one generation while the next one meets."""
_TIMEOUT = datetime.timedelta(seconds=30)


def run(payload: dict[str, Any], descriptor: int) -> int:
    """Entry point on the fork server; `payload["bind"]`: the address that hosts reach this one by.

    Each order {"order": "open", "generation": n} is answered with where it is.
    """
    report, stores, text = Report(descriptor), list[dist.TCPStore](), b""
    while data := _read(descriptor):
        *lines, text = (text + data).split(b"\n")
        for order in map(json.loads, lines):
            if order["order"] == "open":
                stores = [*stores, open_store(payload["bind"])][-_KEPT:]
                report.say("meeting", generation=order["generation"], port=stores[-1].port)
    return 0


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except ConnectionResetError:
        return b""


def open_store(address: str) -> dist.TCPStore:
    """A store that listens at `address` only, at a port that the system chooses."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as listener:
        return dist.TCPStore(
            address,
            listener.getsockname()[1],
            is_master=True,
            wait_for_workers=False,
            timeout=_TIMEOUT,
            master_listen_fd=listener.detach(),
        )
