"""Proves from a run's own log that no sample was lost or read twice, over restarts too.

RUN/samples.jsonl holds a header, written at every start,
    {"sources": {"chitchat": 13394}}
and one row per committed step,
    {"step": 3, "ids": {"chitchat": [11805, ...]}, "read": {"samples": 32, "hash": "9f..."}}
`ids` is what the step should read; `read` is what the workers found in the batches they computed
on, summed over them. A sample's id is epoch x samples + index, unique over the run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from shoal.errors import RunError
from shoal.splitmix import mixed

Ints = npt.NDArray[np.int64]
FILE = "samples.jsonl"
_MOST_MISSING = 1_000_000
"""Steps in a row without a row of theirs; beyond, it is the row that is wrong."""
_Count = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]


@dataclass
class _Header:
    sources: dict[str, Annotated[int, msgspec.Meta(ge=1)]]


@dataclass
class _Read:
    samples: _Count
    hash: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")]


@dataclass
class _Step:
    step: _Count
    ids: dict[str, list[_Count]]
    read: _Read | None


class Ordered(Protocol):
    """Batches whose samples are known: how many each source has, and those of a step."""

    names: list[str]
    num_samples: list[int]

    def ids(self, step: int) -> Ints:
        """(source, sample id) of each sample of `step` [G, 2]."""


def digest(*, source_ids: npt.ArrayLike, sample_ids: npt.ArrayLike) -> Ints:
    """What a worker read, as int64 [2]: a hash per sample summed modulo 2**64, and the count.

    Sums over workers do not depend on how the batch was split, so one collective sum (which
    wraps in the same way) gives the digest of the global batch. Only one rank of those that read
    the same samples may contribute.
    """
    source = np.asarray(source_ids, dtype=np.int64).astype(np.uint64)
    sample = np.asarray(sample_ids, dtype=np.int64).astype(np.uint64)
    hashes = mixed(mixed(source) ^ sample)
    return np.array([hashes.sum(dtype=np.uint64).astype(np.int64), len(sample)], dtype=np.int64)


def sample_header(stream: Ordered) -> dict[str, Any]:
    """The object to log when a run starts or resumes."""
    return {"sources": dict(zip(stream.names, stream.num_samples))}


def sample_row(step: int, *, stream: Ordered, read: npt.ArrayLike) -> dict[str, Any]:
    """The object to log for a committed step (as in `stream.at(step, ...)`, from 0).

    `read` is `digest` summed over the workers [2].
    """
    ids = stream.ids(step)
    hashed, count = (int(value) for value in np.asarray(read))
    by_source = {
        name: ids[ids[:, 0] == number, 1].tolist() for number, name in enumerate(stream.names)
    }
    return {
        "step": step,
        "ids": {name: values for name, values in by_source.items() if values},
        "read": {"samples": count, "hash": f"{hashed % 2**64:016x}"},
    }


@dataclass
class Report:
    """What `verify_run` found. `problems` is empty when no sample was lost or doubled."""

    run: Path
    num_steps: int = 0
    num_samples: int = 0
    num_restarts: int = 0
    num_redone_steps: int = 0
    num_unreadable_rows: int = 0
    epochs: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{self.run}: {self.num_steps} committed steps, {self.num_samples} samples, "
            f"{self.num_restarts} restarts, {self.num_redone_steps} steps done again"
        ]
        lines += [f"  {name}: {epochs:.2f} epochs" for name, epochs in self.epochs.items()]
        if self.num_unreadable_rows:
            lines.append(f"  {self.num_unreadable_rows} rows cut short by a crash, not used")
        if not self.problems:
            return "\n".join([*lines, "no sample was lost, none was read twice"])
        return "\n".join([*lines, *(f"PROBLEM {problem}" for problem in self.problems)])


def verify_run(run: Path | str) -> Report:
    """Check RUN/samples.jsonl. Raises RunError when there is nothing to check."""
    run = Path(run)
    report = Report(run)
    sources, rows = _committed(run / FILE, report=report)
    names = list(sources)
    for row in rows:
        _check_read(row, names=names, report=report)
    for name in names:
        ids = [np.asarray(row["ids"].get(name, []), dtype=np.int64) for row in rows]
        _check_source(name, size=sources[name], ids=ids, report=report)
    report.num_steps = len(rows)
    report.num_samples = sum(len(ids) for row in rows for ids in row["ids"].values())
    return report


def _committed(path: Path, *, report: Report) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Sources and the row of each step, 0 onwards; a step done again replaces what followed."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise RunError(
            f"{path}: cannot be read ({error.strerror}); expected the sample log of a run. Name "
            f"a run directory, the one with config.yaml in it"
        ) from error
    sources: dict[str, int] = {}
    rows: list[dict[str, Any]] = []
    for line in lines:
        try:
            row = json.loads(line)
            msgspec.convert(row, type=_Header if "sources" in row else _Step)
            known = "sources" in row or (
                row["ids"].keys() <= sources.keys() and row["step"] - len(rows) <= _MOST_MISSING
            )
        except (ValueError, TypeError, RecursionError):
            known = False
        if not known:
            report.num_unreadable_rows += 1
        elif "sources" in row:
            report.num_restarts += bool(sources)
            if sources and row["sources"] != sources:
                report.problems.append(
                    f"step {len(rows)}: the data changed at a restart, from {sources} to "
                    f"{row['sources']} samples; ids before and after cannot be compared"
                )
            sources = row["sources"]
        else:
            _append(row, rows=rows, report=report)
    if not sources or not rows:
        raise RunError(f"{path}: holds no committed step; expected a run that took at least one")
    return sources, rows


def _append(row: dict[str, Any], *, rows: list[dict[str, Any]], report: Report) -> None:
    step = row["step"]
    if step < len(rows):
        report.num_redone_steps += len(rows) - step
        del rows[step:]
    while len(rows) < step:
        report.problems.append(f"step {len(rows)}: has no row; its samples are not accounted for")
        rows.append({"step": len(rows), "ids": {}, "read": None})
    rows.append(row)


def _check_read(row: dict[str, Any], *, names: Sequence[str], report: Report) -> None:
    if row["read"] is None:
        return
    pairs = [(names.index(name), i) for name, ids in row["ids"].items() for i in ids]
    expected = digest(source_ids=[p[0] for p in pairs], sample_ids=[p[1] for p in pairs])
    count, hashed = row["read"]["samples"], int(row["read"]["hash"], 16)
    if count != expected[1]:
        report.problems.append(
            f"step {row['step']}: workers read {count} samples, expected {expected[1]}"
        )
    elif hashed != int(expected[0]) % 2**64:
        report.problems.append(
            f"step {row['step']}: workers read {count} samples, but not those of this step"
        )


def _check_source(name: str, *, size: int, ids: Sequence[Ints], report: Report) -> None:
    """Each id once; every epoch but the last whole."""
    steps = np.repeat(np.arange(len(ids)), [len(one) for one in ids])
    flat = np.concatenate(ids) if ids else np.empty(0, dtype=np.int64)
    report.epochs[name] = len(flat) / size
    order = np.argsort(flat, kind="stable")
    flat, steps = flat[order], steps[order]
    for at in np.flatnonzero(flat[1:] == flat[:-1]):
        report.problems.append(
            f"step {steps[at + 1]}: sample {flat[at]} of {name} was read before, in step "
            f"{steps[at]}"
        )
    unique = np.unique(flat)
    whole = len(flat) // size * size
    missing = np.setdiff1d(np.arange(whole), unique)
    if len(missing):
        report.problems.append(
            f"step {len(ids) - 1}: by now {len(missing)} samples of {name} were never read, e.g. "
            f"sample {missing[0]} (epoch {missing[0] // size})"
        )
    ahead = np.flatnonzero(flat >= whole + size)
    if len(ahead):
        report.problems.append(
            f"step {steps[ahead].min()}: sample {flat[ahead[0]]} of {name} is of a later epoch "
            f"than was begun"
        )
