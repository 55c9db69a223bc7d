"""An etcd of one server on loopback, for as long as a test needs it."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path


def has_etcd() -> bool:
    return shutil.which("etcd") is not None


def free_port() -> int:
    with socket.socket() as end:
        end.bind(("127.0.0.1", 0))
        return int(end.getsockname()[1])


@contextlib.contextmanager
def etcd_server(folder: Path) -> Iterator[str]:
    """Its endpoint."""
    client, peer = (f"http://127.0.0.1:{free_port()}" for _ in "ab")
    words = ["--listen-client-urls", client, "--advertise-client-urls", client]
    words += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
    words += ["--initial-cluster", f"default={peer}", "--logger", "zap", "--log-level", "error"]
    process = subprocess.Popen(["etcd", "--data-dir", str(folder / "etcd"), *words])
    try:
        for _ in range(200):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{client}/health", timeout=1).read()
                break
            time.sleep(0.05)
        yield client
    finally:
        process.kill()
        process.wait()
