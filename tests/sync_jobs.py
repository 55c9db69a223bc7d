"""Worker jobs that sum and step through policies over real processes, and say what they sent."""

from __future__ import annotations

import hashlib
import os
import socket
import stat
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from replicas import LAYOUT, drawn, policy_of
from shoal.comm.group import ProcessGroup
from shoal.comm.link import SlowLink
from shoal.comm.messages import gather_json
from shoal.comm.tree import Node, TreeSum
from shoal.config.link import Link
from shoal.config.sync import SyncSection
from shoal.observe.events import Report
from shoal.runtime import start_process_group, stop_process_group
from shoal.sync.every_step import EveryStep
from shoal.sync.policy import Division, Gradients


def run(payload: dict[str, Any], descriptor: int) -> int:
    """For each section of `payload["sections"]`: bytes by operation, and by rank that they went
    to, in each of some steps."""
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
            traffic = group.traffic.take()
            sent.append([traffic.sent_bytes, {str(to): n for to, n in traffic.sent_to.items()}])
        found.append(sent)
    Report(descriptor).say("sent", found={"rank": rank, "sent": found})
    stop_process_group()
    return 0


def _sent_by_kernel() -> dict[tuple[int, int], int]:
    """Bytes that each connection of this process has sent, by its ports (Linux's TCP_INFO)."""
    found = {}
    for name in os.listdir("/dev/fd"):
        with suppress(OSError):
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                with socket.socket(fileno=os.dup(int(name))) as each:
                    if each.family == socket.AF_INET and each.getpeername():
                        info = each.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                        ports = each.getsockname()[1], each.getpeername()[1]
                        sent, again = struct.unpack_from("QQ", info, 200)  # tcpi_bytes_retrans
                        found[ports] = sent - again
    return found


def joined(payload: dict[str, Any]) -> ProcessGroup:
    """The group of `size` ranks that meet at `store`, this one being `rank`."""
    start_process_group(
        rank=payload["rank"],
        size=payload["size"],
        device=torch.device("cpu"),
        meeting=Path(payload["store"]).as_uri(),
        timeout_seconds=60,
    )
    return ProcessGroup()


def links(payload: dict[str, Any], descriptor: int) -> int:
    """What was counted for each operation and rank, and what the kernel says was sent there."""
    torch.set_num_threads(1)
    rank, size, numel = payload["rank"], payload["size"], payload["numel"]
    group = joined(payload)
    ports = gather_json(group, [near for near, _ in _sent_by_kernel()])
    owner = {port: other for other, theirs in enumerate(ports) for port in theirs}
    values = torch.randn(numel)
    bounds = [(numel * r // size, numel * (r + 1) // size) for r in range(size)]
    calls: dict[str, Callable[[], object]] = {
        "sum_": lambda: group.sum_(values),
        "gather": lambda: group.gather(values),
        "broadcast_": lambda: group.broadcast_(values, source=1),
        "slices": lambda: group.slices([values], bounds),
        "swap": lambda: group.swap(values, to=(rank + 1) % size, source=(rank - 1) % size),
    }
    found = {}
    for name, call in calls.items():
        group.barrier()
        group.traffic.take()
        before = _sent_by_kernel()
        call()
        counted = group.traffic.take().sent_to
        group.barrier()  # so that all has left
        sent = [0] * size
        for near, far in before:
            sent[owner[far]] += _sent_by_kernel()[near, far] - before[near, far]
        found[name] = [[counted.get(other, 0) for other in range(size)], sent]
    Report(descriptor).say("links", found=found)
    stop_process_group()
    return 0


def sum_in_groups(payload: dict[str, Any], descriptor: int) -> int:
    """For each size of groups: the bits of a sum of flat vectors and of the leaves of a tree, and
    the bytes that went to each rank."""
    torch.set_num_threads(1)
    rank, size, found = payload["rank"], payload["size"], []
    group = joined(payload)
    for within in payload["within"]:
        policy = EveryStep(
            Division(payload["leaves"], 1), bucket_bytes=1 << 16, group_replicas=within
        )
        policy.enter(world=group, peers=group, inside=group)
        share, tree = policy.share(0), TreeSum()
        for leaf in range(share.start, share.stop):
            tree.push(Node(0, leaf, drawn(leaf)))
        for nodes in ([], tree.nodes):
            group.traffic.take()
            reduced = policy.reduce(Gradients(drawn(100 + rank), LAYOUT, nodes))
            sent = {str(to): n for to, n in group.traffic.take().sent_to.items()}
            bits = hashlib.sha256(reduced.values.numpy().tobytes()).hexdigest()
            wanted = sum(drawn(100 + r).double() for r in range(size))
            error = 0.0 if nodes else float((reduced.values - wanted).abs().max())
            found.append({"bits": bits, "sent": sent, "nodes": len(nodes), "error": error})
    Report(descriptor).say("sums", found={"rank": rank, "sums": found})
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
