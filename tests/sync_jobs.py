"""Worker jobs that sum and step through policies over real processes, and say what they sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from replicas import LAYOUT, drawn, policy_of
from shoal.comm.group import ProcessGroup
from shoal.comm.link import SlowLink
from shoal.config.link import Link
from shoal.config.sync import SyncSection
from shoal.observe.events import Report
from shoal.runtime import start_process_group, stop_process_group
from shoal.sync.policy import Gradients


def run(payload: dict[str, Any], descriptor: int) -> int:
    """For each section of `payload["sections"]`: bytes by operation in each of some steps."""
    torch.set_num_threads(1)
    rank, size = payload["rank"], payload["size"]
    start_process_group(
        rank=rank,
        size=size,
        device=torch.device("cpu"),
        meeting=Path(payload["store"]).as_uri(),
        timeout_seconds=60,
    )
    group, found = ProcessGroup(), []
    for text in payload["sections"]:
        section = TypeAdapter(SyncSection).validate_python(text)
        values, steps = drawn(rank), payload["steps"]
        policy = policy_of(section, group, values, steps=steps)
        sent = []
        group.traffic.take()
        for step in range(steps):
            policy.before_step(step)
            policy.reduce(Gradients(drawn(10 + rank), LAYOUT, targets=1 + rank))
            values += 0.1 * drawn(100 * step + rank)
            policy.after_step(step, targets=1 + rank)
            sent.append(dict(group.traffic.take().sent_bytes))
        found.append(sent)
    Report(descriptor).say("sent", found={"rank": rank, "sent": found})
    stop_process_group()
    return 0


def meet_over_link(payload: dict[str, Any], descriptor: int) -> int:
    """Meet and part several times over a link; every rank is a replica."""
    torch.set_num_threads(1)
    rank, size, sums = payload["rank"], payload["size"], []
    for number in range(payload["rounds"]):
        link = SlowLink(Link(1e8, 0.001), workers=1)
        start_process_group(
            rank=rank,
            size=size,
            device=torch.device("cpu"),
            meeting=Path(f"{payload['store']}-{number}").as_uri(),
            timeout_seconds=60,
            around=link.around(rank),
        )
        link.check(size)
        group, total = ProcessGroup(), torch.tensor([rank + 1.0])
        group.sum_(total)
        group.barrier()
        sums.append(float(total))
        stop_process_group()
    Report(descriptor).say("met", found={"sums": sums})
    return 0
