"""What the cells of a published row mean: the software, the cluster and the sharding they name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from planner_score.profiles import (
    DEEPSPEED_2021,
    FOUNDRY,
    FSDP,
    FSDP_COMPILED,
    GENERIC,
    GPT_NEOX,
    MEGATRON,
    MEGATRON_CLASSIC,
    NANOTRON,
    NANOTRON_EARLY,
    NEMO_2024,
    ONEFLOW,
)
from shoal.plan.devices import device_named
from shoal.plan.hardware import GB, Cluster, Device, Nodes
from shoal.plan.software import Software

Row = Mapping[str, str]


class Skipped(Exception):
    """A row that cannot be scored; the text is the reason, short and countable."""


_FRAMEWORKS = (
    ("nanotron", NANOTRON),
    ("megatron-deepspeed", MEGATRON_CLASSIC),
    ("deepspeed zero", DEEPSPEED_2021),
    ("megatron-bridge", MEGATRON),
    ("nemo", NEMO_2024),
    ("megatron-core", MEGATRON),
    ("megatron", MEGATRON),
    ("oneflow", ONEFLOW),
    ("gpt-neox", GPT_NEOX),
    ("foundry", FOUNDRY),
    ("fsdp", FSDP),
    ("litgpt", FSDP),
    ("torchtitan", FSDP),
    ("torchtune", FSDP),
)


def software_of(row: Row, *, assumed: list[str]) -> Software:
    """The profile of the row's framework, corrected by what the row says itself."""
    name, kernel = row["framework"].lower(), row["attention_kernel"].lower()
    chosen = next((profile for mark, profile in _FRAMEWORKS if mark in name), None)
    if chosen is None:
        assumed.append("software")
        chosen = GENERIC
    if chosen is NANOTRON and _is_early_stack(row.get("notes", "")):
        chosen = NANOTRON_EARLY
    plain = any(word in kernel for word in ("no flash", "none", "standard", "fused softmax"))
    early = row["gpu_type"].startswith("V100") or (
        "fp16" in row["precision"] and "megatron" in name and "flash" not in kernel
    )
    if chosen is MEGATRON and (plain or early):
        chosen = MEGATRON_CLASSIC
    compiled = row["compile"].lower()
    if chosen is FSDP and compiled not in {"", "no", "eager"}:
        chosen = FSDP_COMPILED
    if "fms" in name or "true" in row["precision"]:
        # fms-fsdp's mixed precision policy reduces in bfloat16; bf16-true has nothing wider.
        chosen = replace(chosen, reduce_bytes=2.0)
    if plain:
        chosen = replace(chosen, flash=False)
    elif "flash" in kernel:
        chosen = replace(chosen, flash=True)
    if row["sp"].lower() in {"yes", "no"}:
        chosen = replace(chosen, sequence_parallel=row["sp"].lower() == "yes")
    return chosen


def _is_early_stack(notes: str) -> bool:
    """Whether a row of the nanotron sweep ran on the older of its two software stacks.

    Its notes hold the all-reduce bandwidth measured in the node: 455 to 461 GB/s with the newer
    stack and 410 to 430 with the older one, whose collectives cost far more host time.
    """
    found = re.search(r"node\s+([\d.]+)/", notes)
    return found is not None and float(found[1]) < 440


def _device(row: Row) -> Device:
    found = device_named(row["gpu_type"])
    if found is None:
        raise Skipped("device not in the hardware table")
    return found


def cluster_of(row: Row, *, workers: int, assumed: list[str]) -> Cluster:
    """The cluster of a row; an unstated network is the usual one of the device."""
    kind = _device(row)
    per_node = min(workers, kind.node_devices)
    stated = re.search(r"(\d+)\s*GPU", row["intra_node"])
    if stated:
        per_node = min(workers, int(stated[1]))
    if "PCI" in row["intra_node"].upper():
        kind = replace(kind, node_link_bytes_per_second=25 * GB)
    network = _network(row["inter_node"], per_node=per_node)
    if not network and workers > per_node:
        assumed.append("network")
    return Cluster(
        groups=(Nodes(count=-(-workers // per_node), devices=per_node, device=kind),),
        network_bytes_per_second=network or kind.network_bytes_per_second,
        network_is_stated=bool(network),
        fabric=_fabric(row),
    )


def _fabric(row: Row) -> str:
    text = row["inter_node"].lower()
    # The sweep of the Ultrascale Playbook ran on the AWS nodes of its authors, which have EFA.
    if "efa" in text or (not text and row["framework"] == "nanotron"):
        return "efa"
    return "roce" if "roce" in text else "infiniband"


def _network(text: str, *, per_node: int) -> float:
    """Bytes per second and device from a cell; a bare rate is that of the node."""
    found = re.search(r"(?:(\d+)\s*x\s*)?([\d.]+)\s*(T|G)b/s", text)
    if found is None:
        return 0.0
    rate = float(found[2]) * (1000 if found[3] == "T" else 1) * GB / 8
    if "per GPU" in text:
        return rate
    return rate * int(found[1] or 1) / per_node


def sharding_of(
    row: Row, *, replicas: int, software: Software, cluster: Cluster, assumed: list[str]
) -> tuple[int, str]:
    """(degree of the shard axis, level); HSDP shards within a node."""
    text = row["sharding"].upper().replace("_", " ")
    if "HSDP" in text:
        local = min(replicas, cluster.node_devices)
        return (local if replicas % local == 0 else replicas), "parameters"
    for marks, level in (
        (("ZERO-3", "FULL SHARD", "FSDP", "FULLY"), "parameters"),
        (("ZERO-2", "GRAD OP"), "gradients"),
        (("ZERO-1", "DISTRIBUTED OPTIMIZER"), "optimizer"),
    ):
        if "DDP" not in text and any(mark in text for mark in marks):
            if "GRAD OP" in text:
                return replicas, "gradients"
            return replicas, level
    if text:
        return 1, "optimizer"
    if replicas > 1:
        assumed.append("sharding")
    # Megatron-Core's published recipes split the optimizer state; its ancestors had no such thing.
    return (
        (replicas, "optimizer")
        if software.name in {MEGATRON.name, NEMO_2024.name}
        else (1, "optimizer")
    )
