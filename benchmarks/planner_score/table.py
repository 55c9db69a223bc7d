"""Reads published measurements out of a CSV table and says what each row leaves unsaid."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from planner_score.published import Row, Skipped, cluster_of, sharding_of, software_of
from shoal.errors import UserError
from shoal.layout import Layout
from shoal.legal import ModelFacts
from shoal.plan.hardware import Cluster
from shoal.plan.software import Software
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
    software = software_of(row, assumed=assumed)
    cluster = cluster_of(row, workers=workers, assumed=assumed)
    shard, level = sharding_of(
        row, replicas=replicas, software=software, cluster=cluster, assumed=assumed
    )
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
    stated = int(_number(row, "params") * exact)
    return _dense_facts(_Sizes(layers, hidden, heads, groups, inner, vocabulary, stated))


class _Sizes(NamedTuple):
    layers: int
    hidden: int
    heads: int
    groups: int
    inner: int
    vocabulary: int
    stated: int


@cache
def _dense_facts(sizes: _Sizes) -> ModelFacts:
    """Facts from sizes. Gated or not, tied or not: whichever comes nearest to the stated count.

    Without an exact count, a feed-forward width of four times the hidden size means ungated.
    """

    layers, hidden, heads, groups, inner, vocabulary, stated = sizes

    def build(*, gated: bool, tied: bool) -> ModelFacts:
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
        return build(gated=inner != 4 * hidden, tied=inner == 4 * hidden)
    options = [build(gated=gated, tied=tied) for gated in (True, False) for tied in (True, False)]
    return min(options, key=lambda facts: abs(facts.parameters - stated))


def _precision(row: Row) -> str:
    text = row["precision"].lower()
    for name, marks in (
        ("fp4", ("fp4",)),
        ("fp8", ("fp8",)),
        ("bf16", ("bf16", "bfloat16")),
        ("fp16", ("fp16", "float16", "half")),
        ("fp32", ("fp32", "tf32", "float32")),
    ):
        if any(mark in text for mark in marks):
            return name
    raise Skipped("precision not stated")


def _recompute(row: Row, assumed: list[str]) -> str:
    text = row["act_ckpt"].strip().lower()
    for name, marks in (
        ("none", ("none", "no", "off", "false")),
        ("selective", ("selective",)),
        ("full", ("full", "yes", "on", "true", "every", "all")),
    ):
        if re.split(r"[^a-z]", text)[0] in marks:
            return name
    assumed.append("recompute")
    return "none"
