"""Hosts by a file: a line for each, HOST, or HOST:PORT where its agent listens elsewhere."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from shoal.environment import AGENT_PORT
from shoal.errors import UserError

_LINE = re.compile(r"(?P<host>[A-Za-z0-9._-]{1,253})(:(?P<port>[0-9]{1,5}))?")


def read_hosts(path: Path) -> list[str]:
    """Addresses (tcp://HOST:PORT) of the agents, in the file's order.

    `#` begins a remark. Raises UserError for a file that cannot be read, that names no host, or
    that names one twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UserError(f"--hosts: {path} cannot be read: {reason}") from None
    found: list[str] = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        port = int(match["port"] or AGENT_PORT) if match else 0
        if match is None or not 0 < port < 1 << 16:
            raise UserError(
                f"--hosts: {path}, line {number}: expected HOST or HOST:PORT, got {text}"
            )
        address = f"tcp://{match['host']}:{port}"
        if address in found:
            raise UserError(f"--hosts: {path}, line {number}: {text} is there already")
        found.append(address)
    if not found:
        raise UserError(
            f"--hosts: {path} names no host; expected a line HOST or HOST:PORT for each"
        )
    return found


def commands(addresses: Sequence[str], *, keys: Path, coordinator: Sequence[str]) -> list[str]:
    """What to type: an agent on each host (by ssh), then the coordinator on the first one."""
    lines = []
    for each in addresses:
        host, _, port = each.removeprefix("tcp://").rpartition(":")
        words = ["shoal", "agent", "--listen", host, "--port", port, "--keys", str(keys)]
        lines.append(f"ssh {host} {shlex.quote(shlex.join(words))} &")
    first = addresses[0].removeprefix("tcp://").rpartition(":")[0]
    return [*lines, f"ssh {first} {shlex.quote(shlex.join(coordinator))}"]
