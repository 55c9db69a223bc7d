"""Reads published measurements out of a CSV table and says what each row leaves unsaid."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from shoal.errors import UserError
from shoal.layout import Layout
from shoal.legal import ModelFacts
from shoal.plan.hardware import GB, GIB, Cluster, Device, Nodes, device
from shoal.plan.software import (
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
    Software,
)
from shoal.plan.workload import Candidate, Workload

_TEXT = """
row_id source model arch task params layers hidden heads kv_heads ffn_hidden vocab seq_len
gpu_type num_gpus intra_node inter_node dp tp sp pp cp ep vpp sharding micro_batch global_batch
act_ckpt offload precision attention_kernel compile framework step_seconds peak_mem_gib
peak_alloc_gib mem_kind status
"""
COLUMNS: tuple[str, ...] = tuple(_TEXT.split())
"""The columns that are read; a table may have more."""

_GROUP = (
    "model",
    "params",
    "gpu_type",
    "num_gpus",
    "seq_len",
    "precision",
    "global_batch",
    "framework",
    "task",
)


Row = Mapping[str, str]


class Skipped(Exception):
    """A row that cannot be scored; the text is the reason, short and countable."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row made ready for prediction; `assumed` names what the row does not say.

    `step_seconds` is 0 where the row has no speed, the GiB are 0 where it has no memory.
    """

    row_id: str
    source: str
    group: tuple[str, ...]
    workload: Workload
    candidate: Candidate
    cluster: Cluster
    software: Software
    step_seconds: float
    allocated_gib: float
    reserved_gib: float
    includes_context: bool
    is_first_rank: bool
    failed: bool
    recompute_is_stated: bool
    assumed: tuple[str, ...]


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table; raises UserError naming what is missing, with row and column."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            absent = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if absent:
                raise UserError(
                    f"{path}, row 1: the column{'s' if len(absent) > 1 else ''} "
                    f"{', '.join(absent)} are missing; expected a header with at least "
                    f"{len(COLUMNS)} columns: {', '.join(COLUMNS)}"
                )
            rows = []
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(
                        f"{path}, row {reader.line_num}: the number of cells differs from the "
                        "header; quote cells that hold a comma"
                    )
                rows.append(row)
            return rows
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a CSV table ({error})") from error


def cases(rows: list[dict[str, str]], *, path: str = "table") -> Iterator[Case | tuple[str, str]]:
    """A `Case` per row that can be scored, (source, reason) for each other one."""
    for number, row in enumerate(rows, start=2):
        try:
            yield case_of(row)
        except Skipped as skipped:
            yield row["source"], str(skipped)
        except _BadCell as bad:
            raise UserError(
                f"{path}, row {number} ({row['row_id']}), column {bad.column}: expected a number, "
                f"got {row[bad.column]!r}"
            ) from bad


class _BadCell(Exception):
    def __init__(self, column: str) -> None:
        super().__init__(column)
        self.column = column


def _number(row: Row, column: str) -> float:
    text = row[column].strip()
    if not text:
        return 0.0
    try:
        return float(text)
    except ValueError as error:
        raise _BadCell(column) from error


def _needed(row: Row, *columns: str, reason: str) -> list[int]:
    values = [_number(row, column) for column in columns]
    if not all(values):
        raise Skipped(reason)
    return [int(value) for value in values]


def case_of(row: Row) -> Case:
    """Turn one row into a case; raises Skipped with the reason where something is missing."""
    if row["status"] == "suspect":
        raise Skipped("suspect")
    assumed: list[str] = []
    facts = _facts(row, assumed)
    sequence, batch, micro = _needed(
        row, "seq_len", "global_batch", "micro_batch", reason="batch or sequence not stated"
    )
    replicas, tensor, pipeline = _needed(row, "dp", "tp", "pp", reason="layout not stated")
    context, workers = int(_number(row, "cp") or 1), int(_number(row, "num_gpus"))
    if replicas * tensor * pipeline * context != workers:
        raise Skipped("degrees do not multiply to the devices")
    if row["offload"] not in {"", "none"}:
        raise Skipped("offload is not modelled")
    seconds = _number(row, "step_seconds")
    if not seconds and row["status"] != "oom":
        raise Skipped("no step time")
    if row["task"].startswith("qlora"):
        raise Skipped("quantised weights are not modelled")
    software = _software(row, assumed)
    cluster = _cluster(row, workers, assumed)
    shard, level = _sharding(row, replicas, software, cluster, assumed)
    chunks = max(1, int(_number(row, "vpp") or 1)) if pipeline > 1 else 1
    layout = Layout(
        replicate=replicas // shard,
        shard=shard,
        context=context,
        tensor=tensor,
        pipeline=pipeline,
    )
    recompute = _recompute(row, assumed)
    kind = row["mem_kind"]
    peak, allocated = _number(row, "peak_mem_gib"), _number(row, "peak_alloc_gib")
    if peak and not allocated and ("alloc" in kind or kind == "torch peak"):
        peak, allocated = 0.0, peak
    return Case(
        row_id=row["row_id"],
        source=row["source"],
        group=tuple(row[column] for column in _GROUP),
        workload=Workload(
            facts=facts,
            sequence_tokens=sequence,
            global_batch_samples=batch,
            precision=_precision(row),
            trainable="adapters" if "lora" in row["task"] else "all",
        ),
        candidate=Candidate(
            layout=layout,
            micro_batch_samples=micro,
            schedule="interleaved-1f1b" if chunks > 1 else "1f1b",
            chunks=chunks,
            recompute=recompute,
            level=level,
        ),
        cluster=cluster,
        software=software,
        step_seconds=seconds,
        allocated_gib=allocated,
        reserved_gib=peak,
        includes_context="nvidia-smi" in kind,
        is_first_rank="rank 0" in kind,
        failed=row["status"] == "oom",
        recompute_is_stated="recompute" not in assumed,
        assumed=tuple(assumed),
    )


def _facts(row: Row, assumed: list[str]) -> ModelFacts:
    if row["arch"] != "dense":
        raise Skipped("mixture of experts without shape")
    layers, hidden, heads = _needed(
        row, "layers", "hidden", "heads", reason="model shape not stated"
    )
    vocabulary = int(_number(row, "vocab"))
    if not vocabulary:
        assumed.append("vocabulary")
        vocabulary = 51200  # the padded GPT-2 vocabulary; half a percent of a large model
    groups = int(_number(row, "kv_heads")) or heads
    inner = int(_number(row, "ffn_hidden")) or 4 * hidden
    exact = "exact" in row.get("params_kind", "exact")
    return _dense_facts(
        layers, hidden, heads, groups, inner, vocabulary, int(_number(row, "params") * exact)
    )


@cache
def _dense_facts(
    layers: int, hidden: int, heads: int, groups: int, inner: int, vocabulary: int, stated: int
) -> ModelFacts:
    """Facts from sizes. Gated or not, tied or not: whichever comes nearest to the stated count.

    Without an exact count, a feed-forward width of four times the hidden size means ungated.
    """

    def build(gated: bool, tied: bool) -> ModelFacts:
        size = hidden // heads
        return ModelFacts(
            family="stated sizes",
            layers=layers,
            hidden=hidden,
            heads=heads,
            key_value_heads=groups,
            head_size=size,
            value_head_size=size,
            feed_forward=inner,
            vocabulary=vocabulary,
            gated=gated,
            tied=tied,
            attention_parameters=2 * hidden * (heads + groups) * size + 2 * hidden,
            feed_forward_parameters=(3 if gated else 2) * hidden * inner,
            embedding_parameters=vocabulary * hidden,
            head_parameters=0 if tied else vocabulary * hidden,
            final_parameters=hidden,
        )

    if not stated:
        return build(inner != 4 * hidden, inner == 4 * hidden)
    options = [build(gated, tied) for gated in (True, False) for tied in (True, False)]
    return min(options, key=lambda facts: abs(facts.parameters - stated))


def _precision(row: Row) -> str:
    text = row["precision"].lower()
    for name, marks in (
        ("fp4", ("fp4",)),
        ("fp8", ("fp8",)),
        ("bf16", ("bf16",)),
        ("fp16", ("fp16",)),
        ("fp32", ("fp32", "tf32")),
    ):
        if any(mark in text for mark in marks):
            return name
    raise Skipped("precision not stated")


def _recompute(row: Row, assumed: list[str]) -> str:
    text = row["act_ckpt"].lower()
    for name in ("none", "selective", "full"):
        if text.startswith(name) or (text == "no" and name == "none"):
            return name
    assumed.append("recompute")
    return "none"


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


def _software(row: Row, assumed: list[str]) -> Software:
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
    text = row["gpu_type"].upper()
    found = re.search(r"(RTX\s*\w+|GB\d00|[ABH]\d00|GH200|V100|MI\d+X|L4\b)", text)
    if found is None:
        raise Skipped("device not in the hardware table")
    name = found[1].replace(" ", "")
    memory = re.search(r"-?(\d+)\s*GB", text)
    try:
        return device(f"{name}-{memory[1]}" if memory else name)
    except UserError:
        try:
            return device(name)
        except UserError as error:
            raise Skipped("device not in the hardware table") from error


def _cluster(row: Row, workers: int, assumed: list[str]) -> Cluster:
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


def _sharding(
    row: Row, replicas: int, software: Software, cluster: Cluster, assumed: list[str]
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


def gib(num_bytes: float) -> float:
    """Bytes as GiB."""
    return num_bytes / GIB
