"""Measures a machine, in workers: products, attention, whole blocks, memory, sums of gradients.

One job of as many processes as there are cores. Rank 0 times a lone worker and replicas as
threads while the others wait; then all time together, since busy workers share caches and memory.
A second kind of job times the sum of gradients among another number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from shoal.comm.flat import CHUNK, FlatLayout, chunk_squares
from shoal.comm.group import Group, ProcessGroup
from shoal.engine.step import Batch
from shoal.engine.timing import Clock, Subject, Threads, alone
from shoal.engine.worker import report_failure as tell
from shoal.models.attention import attend
from shoal.models.huggingface import config_from
from shoal.observe.events import Report
from shoal.plan.calibrate import reference_config, reference_facts
from shoal.plan.workload import FORMATS
from shoal.runtime import WorkerInfo, start_process_group, start_worker, stop_process_group
from shoal.sync.every_step import EveryStep
from shoal.sync.policy import Division, Gradients
from shoal.tasks.kinds import create

# (tokens, columns, depth) of a linear layer, smaller products first.
_SHORT = (
    (256, 256, 256),
    (256, 1024, 256),
    (1024, 256, 1024),
    (2048, 2048, 256),
    (2048, 1024, 1024),
)
_FULL = (
    *((64, 256, 256), (256, 256, 256), (256, 1024, 256), (256, 256, 1024), (1024, 256, 256)),
    *((1024, 1024, 256), (1024, 512, 512), (256, 1024, 1024), (2048, 256, 1024), (2048, 2048, 256)),
    *((4096, 1024, 256), (1024, 4096, 512), (2048, 1024, 1024)),
)
_FORMATS = ("float32", "bfloat16")
_LONGEST = {True: 0.03, False: 0.08}  # seconds of a product or attention: longer are left out
_BLOCK_SECONDS = {True: 0.6, False: 1.2}  # the same of a micro batch of a reference model
_BLOCKS = (1, 3)  # blocks of a reference model: their difference is a block
_SAMPLES = ((1, 64), (4, 256), (8, 256))  # (rows, tokens of a row)
_SHORT_SAMPLES = ((1, 64), (2, 256))  # the same at a first use
_SLOW_SAMPLES = ((1, 16), (1, 64))  # where products are emulated
_ROWS = {True: (256, 1024), False: (128, 256, 512, 1024)}  # row lengths for attention
_HEADS, _HEAD_SIZE = 4, 64
_STREAMS = (1 << 16, 1 << 20, 1 << 24)  # elements of an addition in place
_SUMS = (CHUNK, 1 << 18, 1 << 22)  # elements of a gradient


def run(payload: dict[str, Any], descriptor: int) -> int:
    """Entry point of one measuring worker; rank 0 reports `measured`."""
    report = Report(descriptor)
    rank, size = payload["rank"], payload["size"]
    report.say("begun")
    try:
        start_worker(WorkerInfo(rank, size, torch.device("cpu"), 1), seed=0)
        if size > 1:
            start_process_group(
                rank=rank,
                size=size,
                device=torch.device("cpu"),
                meeting=Path(payload["store"]).as_uri(),
                timeout_seconds=300,
            )
        try:
            bench = _Bench(ProcessGroup(), report=report, payload=payload)
            found = bench.sums() if payload["only_sums"] else bench.everything()
            if rank == 0:
                report.say("measured", **found)
        finally:
            stop_process_group()
    except BaseException as error:
        return tell(error, report=report, rank=rank)
    return 0


class _Bench:
    """What one worker does. `short_for`: a recipe's `precision.compute`, or None for everything."""

    def __init__(self, group: Group, *, report: Report, payload: dict[str, Any]) -> None:
        self._group, self._report = group, report
        self._wanted: str | None = payload["short_for"]
        self._short = self._wanted is not None
        self._block_formats = list(_FORMATS)
        self._samples: dict[str, list[tuple[int, int]]] = {}

    def _say(self, what: str) -> None:
        if self._group.rank == 0:
            self._report.say("phase", text=f"measuring: {what}")

    def everything(self) -> dict[str, Any]:
        """All conditions of this machine, and the sums among its cores."""
        cores, lead = self._group.size, self._group.rank == 0
        conditions: list[dict[str, Any]] = []
        reduces: list[Any] = []
        if lead and cores > 1:
            if not self._short:
                self._say("one worker, one thread")
                conditions.append(self._condition(alone(), threads=1))
            self._say(f"one worker, {cores} threads")
            torch.set_num_threads(cores)
            conditions.append(self._condition(alone(), threads=cores))
            torch.set_num_threads(1)
            self._say(f"{cores} threads at once")
            threaded, sums = self._threads(cores)
            conditions.append(threaded)
            reduces += sums
        self._group.barrier()
        self._say(f"{cores} processes at once" if cores > 1 else "one worker, one core")
        conditions.append(self._condition(self._group, threads=1))
        reduces += self.sums()["reduces"]
        return {"conditions": conditions, "reduces": reduces}

    def sums(self) -> dict[str, Any]:
        """Sums of a flat gradient over the group: (kind, ranks, bytes, seconds)."""
        return {"reduces": [["processes", *row] for row in self._sums(self._group)]}

    def _condition(self, group: Group, *, threads: int) -> dict[str, Any]:
        """Everything of one worker of a group of processes."""
        clock = Clock(group)
        products = list(self._products(clock))
        self._plan_blocks(products, busy_cores=group.size * threads)
        subjects = self._subjects()
        return {
            "workers": "processes",
            "busy": group.size,
            "threads": threads,
            "products": products,
            "attention": [
                row for name in self._block_formats for row in self._attention(clock, name)
            ],
            "blocks": list(self._blocks(clock, subjects)),
            "streams": list(_streams(clock)),
            "updates": list(_updates(clock, share=1)),
        }

    def _threads(self, count: int) -> tuple[dict[str, Any], list[Any]]:
        """Blocks, update and sums with replicas as threads; the rest is as with processes."""
        subjects = [self._subjects() for _ in range(count)]

        def body(group: Group) -> tuple[Any, ...]:
            clock = Clock(group)
            blocks = list(self._blocks(clock, subjects[group.rank]))
            return blocks, list(_updates(clock, share=count)), list(self._sums(group))

        blocks, updates, sums = Threads(count, threads_each=1).run(body)[0]
        condition = {"workers": "threads", "busy": count, "threads": 1, "products": []}
        condition |= {"attention": [], "blocks": blocks, "streams": [], "updates": updates}
        return condition, [["threads", *row] for row in sums]

    def _plan_blocks(self, products: list[list[Any]], *, busy_cores: int) -> None:
        """Which formats and sizes of micro batch to time blocks with, from the smallest products.

        At a first use only the format wanted, or the fastest; sizes as far as they take no longer
        than allowed, and two where most cores idle, which few runs choose.
        """
        rates = {}
        for name in _FORMATS:
            small = [row for row in products if row[0] == FORMATS[name]][:3]
            flops = sum(2.0 * row[2] * row[3] * row[4] for row in small)
            rates[name] = flops / sum(row[-1] for row in small)
        if self._short:
            fastest = max(_FORMATS, key=lambda name: rates[name])
            self._block_formats = [self._wanted if self._wanted in _FORMATS else fastest]
        most = 6.0 * reference_facts("llama", blocks=_BLOCKS[-1]).parameters
        for name in self._block_formats:
            limit = rates[name] * _BLOCK_SECONDS[self._short] / most
            sizes = _SHORT_SAMPLES if self._short else _SAMPLES
            fitting = [each for each in sizes if each[0] * each[1] <= limit]
            if len(fitting) < 2:
                fitting = list(_SLOW_SAMPLES)
            few = busy_cores == 1 and self._group.size > 1
            self._samples[name] = fitting[:2] if few else fitting

    def _subjects(self) -> dict[tuple[str, str, int], Subject]:
        """Reference models by format, family and number of blocks."""
        task = create("causal-lm")
        return {
            (name, family, blocks): Subject(
                config_from(reference_config(family, blocks=blocks)), task=task, compute=name
            )
            for name in self._block_formats
            for family in self._families(name)
            for blocks in _BLOCKS
        }

    def _families(self, name: str) -> list[str]:
        """Kinds of blocks to time: of an emulated format, and at a first use, only one."""
        emulated = self._samples[name][-1] == _SLOW_SAMPLES[-1]
        return ["llama"] if self._short or emulated else ["llama", "gpt2"]

    def _blocks(
        self, clock: Clock, subjects: dict[tuple[str, str, int], Subject]
    ) -> Iterator[list[Any]]:
        """(precision, family, blocks, rows, tokens of a row, seconds) of both passes."""
        for (name, family, blocks), subject in subjects.items():
            sizes = self._samples[name]
            for rows, tokens in sizes[:2] if family == "gpt2" else sizes:
                batch = _batch(family, rows=rows, tokens=tokens)
                seconds = clock.seconds(partial(subject, batch))
                yield [FORMATS[name], family, blocks, rows, tokens, seconds]

    def _attention(self, clock: Clock, name: str) -> Iterator[list[Any]]:
        """(precision, tokens of a row, head size, seconds per token and head), both passes."""
        module = torch.nn.Module()
        rate = 0.0  # seconds per token, head and token of its row: a longer row's are told from it
        for tokens in _ROWS[self._short]:
            rows = max(1, 512 // tokens)
            if rate * rows * tokens**2 * _HEADS > _LONGEST[self._short]:
                return
            shape = (rows, _HEADS, tokens, _HEAD_SIZE)
            parts = [
                torch.full(shape, 0.01, dtype=getattr(torch, name), requires_grad=True)
                for _ in range(3)
            ]
            mask = _documents(rows, tokens)
            mask = (mask[:, None, :, None] == mask[:, None, None, :]).tril()

            def both(parts: list[torch.Tensor] = parts, mask: torch.Tensor = mask) -> None:
                query, key, value = parts
                output, _ = attend(module, query, key, value, mask)
                torch.autograd.grad(output, parts, torch.ones_like(output))

            each = clock.seconds(both) / (rows * tokens * _HEADS)
            rate = each / tokens
            yield [FORMATS[name], tokens, _HEAD_SIZE, each]

    def _sums(self, group: Group) -> Iterator[list[Any]]:
        """(ranks, bytes, seconds): a meeting over a few bytes, then gradients."""
        if group.size == 1:
            return
        clock = Clock(group)
        few = torch.zeros(4, dtype=torch.int64)
        yield [group.size, few.nbytes, clock.seconds(lambda: group.sum_(few))]
        policy = EveryStep(Division(group.size, 1), bucket_bytes=1 << 27)
        policy.enter(world=group, peers=group, inside=group)
        for count in _SUMS:
            gradient = torch.zeros(count)
            layout = FlatLayout.of({"decay": {"gradient": (count,)}})
            seconds = clock.seconds(partial(policy.reduce, Gradients(gradient, layout)))
            yield [group.size, gradient.nbytes, seconds]

    def _products(self, clock: Clock) -> Iterator[list[Any]]:
        """(precision, kind, tokens, columns, depth, seconds) of the products of linear layers."""
        best = 0.0  # FLOPs per second of the fastest format's smallest products
        for name in _FORMATS:
            rate: dict[str, float] = {}
            for number, (tokens, columns, depth) in enumerate(_SHORT if self._short else _FULL):
                if number == 1:
                    slow = sum(rate.values()) < 0.5 * best
                    if self._short and slow and name != self._wanted:
                        break  # emulated: nobody will choose it, and large ones take seconds
                    best = max(best, sum(rate.values()))
                dtype = getattr(torch, name)
                inputs = torch.full((tokens, depth), 0.01, dtype=dtype)
                weight = torch.full((columns, depth), 0.01, dtype=dtype)
                gradient = torch.full((tokens, columns), 0.01, dtype=dtype)
                calls = {
                    "forward": partial(torch.mm, inputs, weight.t()),
                    "input": partial(torch.mm, gradient, weight),
                    "weight": partial(torch.mm, gradient.t(), inputs),
                }
                flops = 2.0 * tokens * columns * depth
                for kind, call in calls.items():
                    if flops > rate.get(kind, math.inf) * _LONGEST[self._short]:
                        continue
                    seconds = clock.seconds(call)
                    rate[kind] = flops / seconds
                    yield [FORMATS[name], kind, tokens, columns, depth, seconds]


def _documents(rows: int, tokens: int) -> torch.Tensor:
    """Rows of four packed documents each."""
    return (torch.arange(tokens) * 4 // tokens).expand(rows, tokens).contiguous()


def _batch(family: str, *, rows: int, tokens: int) -> Batch:
    """Packed rows of tokens, as the data's stream gives them."""
    size = reference_facts(family, blocks=1).vocabulary
    ids = torch.arange(rows * tokens).view(rows, tokens) * 7919 % size
    return {
        "input_ids": ids,
        "labels": ids.roll(-1, dims=1),
        "position_ids": (torch.arange(tokens) % (tokens // 4)).expand(rows, tokens).contiguous(),
        "document_ids": _documents(rows, tokens),
        "sample_ids": torch.arange(rows),
    }


def _streams(clock: Clock) -> Iterator[list[float]]:
    """(bytes moved, seconds) of adding one vector to another: two are read, one is written."""
    for count in _STREAMS:
        into, other = torch.zeros(count), torch.zeros(count)
        yield [3.0 * into.nbytes, clock.seconds(partial(into.add_, other))]


def _updates(clock: Clock, *, share: int) -> Iterator[list[float]]:
    """(parameters, seconds) of what a step does to them after the reduction (engine/update.py).

    `share` replicas update a part each; the parameters counted are those of one part.
    """
    for count in (1 << 20, 1 << 22):
        part = max(1, count // share // CHUNK) * CHUNK
        parameter = torch.nn.Parameter(torch.zeros(part))
        parameter.grad = torch.zeros_like(parameter)
        gradient = parameter.grad
        optimizer = torch.optim.AdamW([parameter], fused=True)

        def step(
            gradient: torch.Tensor = gradient, optimizer: torch.optim.Optimizer = optimizer
        ) -> None:
            chunk_squares(gradient)
            gradient.mul_(0.5)
            optimizer.step()
            gradient.zero_()

        yield [part, clock.seconds(step)]
