"""Small JSON messages between the ranks of a group (never objects of Python)."""

from __future__ import annotations

import json
from typing import Any

import torch

from shoal.comm.group import Group


def gather_json(group: Group, value: Any) -> list[Any]:
    """Everybody's JSON-able `value`, in rank order."""
    data = json.dumps(value).encode()
    longest = max(int(n) for n in group.gather(torch.tensor([len(data)])))
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return [json.loads(_text(part)) for part in group.gather(padded)]


def broadcast_json(group: Group, value: Any, *, source: int = 0) -> Any:
    """The JSON-able `value` of rank `source`, on every rank."""
    return gather_json(group, value if group.rank == source else None)[source]


def _text(part: torch.Tensor) -> str:
    return bytes(part.tolist()).rstrip(b"\0").decode()
