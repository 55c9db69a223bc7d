"""Ranks that sum over and over until their generation is broken; each says how long it waited."""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import torch

from shoal.comm.group import ProcessGroup
from shoal.errors import PeersLost
from shoal.observe.events import Report
from shoal.runtime import break_generation, now_in, start_process_group, stop_process_group

CPU = torch.device("cpu")


def run(payload: dict[str, Any], descriptor: int) -> int:
    """`told`: ranks that hear of the end; `dies`: rank 0 ends at that moment."""
    rank, size = payload["rank"], payload["size"]
    torch.set_num_threads(1)
    waited = []
    for number in range(payload["rounds"]):
        place = Path(f"{payload['folder']}/{number}")
        now_in(number)
        start_process_group(
            rank=rank, size=size, device=CPU, meeting=place.as_uri(), timeout_seconds=60.0
        )
        moment = random.Random(f"{payload['seed']} {number}").random() * 0.02
        if rank == 0 and payload.get("dies"):
            threading.Timer(moment, os._exit, [0]).start()
        elif rank in payload["told"]:
            threading.Timer(moment, break_generation, [number]).start()
        waited.append(_sum_until_lost(ProcessGroup(), torch.zeros(payload["numel"])))
        stop_process_group(at_once=True)
    Report(descriptor).say("found", found=max(waited))
    return 0


def _sum_until_lost(group: ProcessGroup, tensor: torch.Tensor) -> float:
    while True:
        began = time.monotonic()
        try:
            group.sum_(tensor)
        except PeersLost:
            return time.monotonic() - began
