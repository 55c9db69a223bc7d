"""What each policy sends with each codec, to the byte, over processes: the guide's formulas."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from replicas import LAYOUT
from shoal.comm.tree import node_places
from shoal.launch.pool import WorkerPool
from shoal.sync.streaming_diloco import fragments_of
from workers import run_workers

N = LAYOUT.numel
STEPS = 8
CODECS = ("none", "bf16", "fp16", "int8", "int4", "sign", "topk", "powersgd")
MESSAGES = ("none", "bf16", "fp16", "int8", "int4", "sign")
BLOCKS = {"bf16": 1, "fp16": 1024, "int8": 256, "int4": 128, "sign": 256}
BITS = {"bf16": 16, "fp16": 16, "int8": 8, "int4": 4, "sign": 1}
Sent = dict[str, int]


def coded(kind: str, numel: int) -> int:
    """Bytes of a message of `numel` values: codes, and 4 bytes of scale a block."""
    whole = math.ceil(numel / BLOCKS[kind]) * BLOCKS[kind]
    return whole * BITS[kind] // 8 + (0 if kind == "bf16" else 4 * whole // BLOCKS[kind])


def ring(num_bytes: int, size: int) -> int:
    return 2 * (size - 1) * num_bytes // size


def one_sum(kind: str, size: int) -> Sent:
    """Bytes a rank sends to sum N float32 values with a codec."""
    if kind == "none":
        return {"all_reduce": ring(4 * N, size)}
    if kind == "topk":
        return {"all_gather": (size - 1) * 8 * math.ceil(0.01 * N)}
    if kind == "powersgd":
        shapes = list(LAYOUT.shapes.values())
        left = sum(4 * s[0] for s in shapes if len(s) == 2)
        right = sum(4 * s[1] for s in shapes if len(s) == 2) + sum(
            s[0] for s in shapes if len(s) == 1
        )
        return {"all_reduce": ring(4 * left, size) + ring(4 * right, size)}
    part = math.ceil(N / (size * BLOCKS[kind])) * BLOCKS[kind]
    each = (size - 1) * coded(kind, part)
    return {"all_to_all": each, "all_gather": each}


def with_count(sent: Sent, size: int) -> Sent:
    """And a sum of targets, a whole number of 8 bytes."""
    return {**sent, "all_reduce": sent.get("all_reduce", 0) + ring(8, size)}


def by_link(section: dict[str, Any], sent: Sent, step: int, rank: int, size: int) -> Sent:
    """To whom a step's bytes go: gloo's sums go round one way, its gathers the other."""
    found: Sent = {}
    for operation, num_bytes in sent.items():
        ways = {
            "all_reduce": [rank - 1],
            "all_gather": [rank + 1],
            "all_to_all": [rank + n for n in range(1, size)],
            "send": [rank + 2 ** ((step - 1) % max(1, (size - 1).bit_length()))],
        }[operation]
        for other in ways:
            to = str(other % size)
            found[to] = found.get(to, 0) + num_bytes // len(ways)
    return {to: num_bytes for to, num_bytes in found.items() if num_bytes}


def fragments(number: int) -> int:
    """Elements of a fragment of two: blocks 0 and 2 with what is before, 1 and 3 with the rest."""
    return sum(len(span) for span in fragments_of(LAYOUT, numel=N, count=2)[number])


def expected(section: dict[str, Any], step: int, size: int) -> Sent:
    """What step `step` (from 1) sends."""
    policy, codec = section["kind"], section.get("codec", {"kind": "none"})["kind"]
    if policy == "every-step":
        if section.get("codec", {}).get("block") == 16:
            return {"all_gather": (size - 1) * (2 * 16 + 4) * math.ceil(N / 256)}
        if section.get("codec", {}).get("block"):
            return {"all_gather": (size - 1) * 3 * 13 * math.ceil(N / 256)}
        return one_sum(codec, size)
    if policy == "gossip":
        last = step == STEPS
        exchanges = {} if last else {"send": 4 * N}
        meets = {"all_reduce": ring(4 * N, size) + ring(16, size)} if step % 4 == 0 else {}
        return {"all_reduce": ring(4 * N, size)} if last else exchanges | meets
    if policy in ("local-sgd", "diloco"):
        return with_count(one_sum(codec, size), size) if step % 4 == 0 else {}
    leaves = {2: 0, 4: 1, 6: 0, 7: 0, 8: 1}.get(step)  # in the last two steps each once more
    if leaves is None:
        return {}
    numel = fragments(leaves)
    if codec == "none":
        return {"all_reduce": ring(4 * (numel + 1), size)}
    return {"all_gather": (size - 1) * (coded(codec, numel) + 4)}


SECTIONS: list[dict[str, Any]] = [
    *({"kind": "every-step", "codec": {"kind": codec}} for codec in CODECS),
    *({"kind": "diloco", "every_steps": 4, "codec": {"kind": codec}} for codec in CODECS),
    *(
        {"kind": "streaming-diloco", "every_steps": 4, "codec": {"kind": codec}}
        for codec in MESSAGES
    ),
    {"kind": "local-sgd", "every_steps": 4},
    {"kind": "every-step", "codec": {"kind": "topk", "block": 256, "fraction": 0.05}},
    {"kind": "every-step", "codec": {"kind": "topk", "block": 16, "fraction": 0.125}},
    {"kind": "gossip", "meet_every_steps": 4},
]


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_every_byte_is_as_the_formula_has_it(size: int, pool: WorkerPool, tmp_path: Path) -> None:
    payload = {"size": size, "store": str(tmp_path / "s"), "sections": SECTIONS, "steps": STEPS}
    for found in run_workers(pool, "sync_jobs:run", payload, size=size):
        for section, sent in zip(SECTIONS, found["sent"], strict=True):
            wanted = [expected(section, step, size) for step in range(1, STEPS + 1)]
            assert [each for each, _ in sent] == wanted, f"{section}, rank {found['rank']}"
            links = [to for _, to in sent]
            there = [
                by_link(section, each, step, found["rank"], size)
                for step, each in enumerate(wanted, start=1)
            ]
            assert links == there, f"{section}, rank {found['rank']}"


def test_between_groups_each_sends_its_part_of_the_parameters(
    pool: WorkerPool, tmp_path: Path
) -> None:
    """Four replicas in groups of two, as on two hosts: within a group every second step, between
    groups every fourth."""
    section = {"kind": "local-sgd", "every_steps": 2, "group_replicas": 2, "outer_every_steps": 4}
    payload = {"size": 4, "store": str(tmp_path / "s"), "sections": [section], "steps": STEPS}
    inside = ring(4 * N, 2) + ring(8, 2)
    between = ring(4 * N // 2, 2) + ring(8, 2)
    for found in run_workers(pool, "sync_jobs:run", payload, size=4):
        near, far = str(found["rank"] ^ 1), str(found["rank"] ^ 2)
        by_step = [to for _, to in found["sent"][0]]
        outer = {near: inside + 4 * N // 2, far: between}
        assert by_step == [{}, {near: inside}, {}, outer] * 2
    assert between < 0.51 * inside, "half of what each would send without groups, or less"


@pytest.mark.parametrize(("size", "leaves"), [(4, 14), pytest.param(6, 13, marks=pytest.mark.slow)])
def test_gradients_in_groups_send_their_part_to_the_others(
    size: int, leaves: int, pool: WorkerPool, tmp_path: Path
) -> None:
    """As of `size` replicas on two hosts: the same bits of the tree, fewer bytes between hosts.

    Replicas have uneven shares, so that a group's leaves leave several nodes behind.
    """
    k = size // 2
    payload = {"size": size, "store": str(tmp_path / "s"), "leaves": leaves, "within": [None, k]}
    found = run_workers(pool, "sync_jobs:sum_in_groups", payload, size=size)
    ranks = [each["sums"] for each in sorted(found, key=lambda each: each["rank"])]
    between = [[0, 0], [0, 0]]  # flat and tree, all at once and in groups
    for rank, (flat, tree, flat_in_groups, tree_in_groups) in enumerate(ranks):
        assert max(flat["error"], flat_in_groups["error"]) < 1e-5
        assert flat_in_groups["bits"] == ranks[0][2]["bits"], "all ranks get one sum"
        assert tree["bits"] == tree_in_groups["bits"] == ranks[0][1]["bits"]
        pairs = [(flat, flat_in_groups), (tree, tree_in_groups)]
        for row, pair in zip(between, pairs, strict=True):
            for at, each in enumerate(pair):
                row[at] += sum(n for to, n in each["sent"].items() if (int(to) < k) != (rank < k))
    (flat_all, flat_groups), (tree_all, tree_groups) = between
    assert flat_groups == pytest.approx(2 * 4 * N, rel=1e-3), "2 (G-1)/G x 4 N of each host"
    assert flat_all == pytest.approx(2 * ring(4 * N, size), rel=1e-3)
    ends = [node_places(leaves * at // 2, leaves * (at + 1) // 2) for at in (0, 1)]
    nodes = max(len(places) for places in ends)
    assert tree_groups == pytest.approx((nodes + 1) * 4 * N, rel=1e-3)
    assert tree_groups < tree_all and flat_groups < flat_all


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_link_carries_what_the_kernel_says(
    size: int, pool: WorkerPool, tmp_path: Path
) -> None:
    """Beside what is counted gloo sends heads of messages: 48 bytes each, of at most 1 MiB, and
    those of two barriers; a KiB or two in all."""
    payload = {"size": size, "store": str(tmp_path / "s"), "numel": 120_000}
    for rank, found in enumerate(run_workers(pool, "sync_jobs:links", payload, size=size)):
        for name, (counted, sent) in found.items():
            for other in range(size):
                if other != rank:
                    beside = sent[other] - counted[other]
                    assert 0 <= beside < 4096, f"{name}, {rank} to {other}: {counted} {sent}"
