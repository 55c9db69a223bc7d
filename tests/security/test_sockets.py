"""Rule: no listening socket but the expected ones, on loopback only; strangers do no harm."""

from __future__ import annotations

import os
import re
import socket
import struct
import sys
from pathlib import Path

import pytest
from processes import family, server_and_workers, started, wait_for_step

from tiny import Bench, Run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

SHAPE = ("train.steps=6", "train.micro_batch_samples=1", "train.evaluate_every_steps=0")
TWO = ("parallel.replicate=2", "launch.workers=processes")
LISTEN = "0A"


def inodes(pid: int) -> set[str]:
    """Sockets that a process has open."""
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            match = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(entry))
        except OSError:  # closed meanwhile
            continue
        if match:
            found.add(match[1])
    return found


def listening(pids: list[int]) -> list[tuple[int, str, int]]:
    """(process, address, port) of each socket that takes connections or datagrams."""
    owners = {inode: pid for pid in pids for inode in inodes(pid)}
    found = []
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            pid = owners.get(rest[5])
            if pid is None or (table.startswith("tcp") and state != LISTEN):
                continue
            address, port = local.split(":")
            found.append((pid, readable(address), int(port, 16)))
    return found


def readable(address: str) -> str:
    """The kernel's hexadecimal words, in the machine's byte order."""
    words = b"".join(
        struct.pack("=I", int(address[at : at + 8], 16)) for at in range(0, len(address), 8)
    )
    return socket.inet_ntop(socket.AF_INET if len(words) == 4 else socket.AF_INET6, words)


HARM = (
    os.urandom(4096),
    struct.pack("<Q", 4 << 30) + bytes(4096),
    struct.pack(">Q", 4 << 30) + bytes(4096),
    b"\x80\x04\x95" + bytes(100),
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"",
)


def send(port: int, data: bytes) -> None:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as peer:
            peer.sendall(data)
    except OSError:  # refused or hung up: as good as ignored
        pass


def test_only_loopback_listens_and_garbage_changes_nothing(bench: Bench) -> None:
    """gloo's own sockets are the only ones: at most a few for each worker, none elsewhere."""
    run = Run(bench.new_path())
    with started("train", bench.recipe, *SHAPE, *TWO, "--out", run.path) as process:
        wait_for_step(run, 1)
        _, workers = server_and_workers(process.pid)
        found = listening([process.pid, *family(process.pid)])
        assert all(address in ("127.0.0.1", "::1") for _, address, _ in found), found
        assert {pid for pid, _, _ in found} <= set(workers), "neither the command nor its server"
        assert 0 < len(found) <= 2 * len(workers), found
        for _, _, port in found:
            for data in HARM:
                send(port, data)
        _, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    assert run.digits == bench.run(*SHAPE, *TWO).digits


@pytest.mark.slow
def test_threads_listen_nowhere(bench: Bench) -> None:
    run = Run(bench.new_path())
    more = ("parallel.replicate=2", "launch.workers=threads")
    with started("train", bench.recipe, *SHAPE, *more, "--out", run.path) as process:
        wait_for_step(run, 1)
        assert listening([process.pid, *family(process.pid)]) == []
