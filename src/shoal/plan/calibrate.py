"""Fits what was measured on a machine: matrix products, memory, all-reduce, worker start."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shoal.environment import cache_directory
from shoal.errors import UserError
from shoal.plan.hardware import Cluster, Device, Nodes

FORMAT = "shoal-measurements-1"
"""Written into every measurements file; a file of another format is refused."""


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """What one machine was measured at, in base units.

    `products`: (precision, rows, columns, depth, seconds) of one matrix product on all threads of
    a worker. `streams`: (bytes moved, seconds). `reduces`: (ranks, bytes, seconds) of an
    all-reduce. `start_seconds`: from the order to a worker's first step.
    """

    name: str
    memory_bytes: float
    workers: int
    products: tuple[tuple[str, int, int, int, float], ...]
    streams: tuple[tuple[float, float], ...]
    reduces: tuple[tuple[int, float, float], ...] = ()
    start_seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """As stored."""
        return {
            "format": FORMAT,
            "name": self.name,
            "memory_bytes": self.memory_bytes,
            "workers": self.workers,
            "products": [list(row) for row in self.products],
            "streams": [list(row) for row in self.streams],
            "reduces": [list(row) for row in self.reduces],
            "start_seconds": self.start_seconds,
        }


def measurements_path() -> Path:
    """Where the measurements of this machine are kept."""
    return cache_directory() / "measurements.json"


def load_measurements(path: Path) -> Measurements:
    """Read a measurements file; raises UserError that says what is wrong with it."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"measurements {path}: cannot be read ({error}); delete the file to measure anew, or "
            "give --cluster"
        ) from error
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        raise UserError(
            f"measurements {path}: expected format {FORMAT!r}, got "
            f"{data.get('format') if isinstance(data, Mapping) else type(data).__name__!r}; "
            "delete the file to measure anew, or give --cluster"
        )
    try:
        return Measurements(
            name=str(data["name"]),
            memory_bytes=float(data["memory_bytes"]),
            workers=int(data["workers"]),
            products=tuple(
                (str(p), int(m), int(n), int(k), float(s)) for p, m, n, k, s in data["products"]
            ),
            streams=tuple((float(b), float(s)) for b, s in data["streams"]),
            reduces=tuple((int(r), float(b), float(s)) for r, b, s in data.get("reduces", ())),
            start_seconds=float(data.get("start_seconds", 0.0)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"measurements {path}: {error!r} while reading; expected name, memory_bytes, workers, "
            "products, streams; delete the file to measure anew, or give --cluster"
        ) from error


def fit_line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(seconds before the first byte, bytes per second) of size and time pairs.

    Least squares of relative errors, so that small sizes count as much as large ones; the start
    is kept at zero or above. Raises ValueError for fewer than two sizes.
    """
    sizes = np.array([size for size, _ in points], dtype=float)
    seconds = np.array([time for _, time in points], dtype=float)
    if len(set(sizes.tolist())) < 2:
        raise ValueError("a line needs at least two sizes")
    weights = 1 / seconds
    design = np.stack([np.ones_like(sizes), sizes], axis=1) * weights[:, None]
    start, slope = np.linalg.lstsq(design, seconds * weights, rcond=None)[0]
    if start < 0 or slope <= 0:
        start, slope = 0.0, float(np.median(seconds / sizes))
    return float(start), float(1 / slope)


def device_of(measured: Measurements) -> Device:
    """The measured machine as a device: one worker of it.

    The peak of a format is the fastest product; the achievable share then is 1 by definition.
    """
    peak: dict[str, float] = {}
    for precision, rows, columns, depth, seconds in measured.products:
        rate = 2.0 * rows * columns * depth / seconds
        peak[precision] = max(rate, peak.get(precision, 0.0))
    if not peak or not measured.streams:
        raise UserError(
            f"measurements of {measured.name}: no matrix product or no memory stream in them; "
            "delete the file to measure anew, or give --cluster"
        )
    memory = max(num_bytes / seconds for num_bytes, seconds in measured.streams)
    link = memory / 4
    many = [(b * 2 * (r - 1) / r, s) for r, b, s in measured.reduces if r > 1]
    if len({size for size, _ in many}) >= 2:
        link = fit_line(many)[1]
    return Device(
        name=measured.name,
        generation="measured",
        peak=peak,
        achievable=dict.fromkeys(peak, 1.0),
        memory_bytes=measured.memory_bytes,
        memory_bytes_per_second=memory,
        multiprocessors=0,
        node_devices=measured.workers,
        node_link_bytes_per_second=link,
        network_bytes_per_second=link,
        attention_share=0.5,
    )


def this_machine() -> Cluster:
    """The machine as last measured; raises UserError when it never was."""
    path = measurements_path()
    if not path.is_file():
        raise UserError(
            "this machine has not been measured: give --cluster, such as 8xH100, or a cluster file "
            "that describes it (docs/planner.md shows one)"
        )
    measured = load_measurements(path)
    device = device_of(measured)
    return Cluster(
        groups=(Nodes(count=1, devices=measured.workers, device=device),),
        network_bytes_per_second=device.network_bytes_per_second,
        source=str(path),
    )


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One finished run: what was predicted for a step and what it took."""

    predicted_seconds: float
    measured_seconds: float
    predicted_bytes: float = 0.0
    measured_bytes: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Correction:
    """Factors on predicted time and memory learned from runs, and how far those still lie off."""

    time: float
    memory: float
    runs: int
    median_error_before: float
    median_error_after: float


def learn(runs: Sequence[Seen]) -> Correction:
    """Median ratio of measured to predicted, shrunk towards 1 when there are few runs.

    With n runs the logarithm of the ratio counts n / (n + 1): one run moves the model half of
    the way, since a single run may have been disturbed.
    """
    if not runs:
        raise ValueError("no runs to learn from")
    weight = len(runs) / (len(runs) + 1)

    def factor(ratios: list[float]) -> float:
        return float(np.exp(weight * np.median(np.log(ratios)))) if ratios else 1.0

    time = factor([run.measured_seconds / run.predicted_seconds for run in runs])
    sized = [run for run in runs if run.predicted_bytes and run.measured_bytes]
    before = [abs(run.predicted_seconds / run.measured_seconds - 1) for run in runs]
    after = [abs(time * run.predicted_seconds / run.measured_seconds - 1) for run in runs]
    return Correction(
        time=time,
        memory=factor([run.measured_bytes / run.predicted_bytes for run in sized]),
        runs=len(runs),
        median_error_before=float(np.median(before)),
        median_error_after=float(np.median(after)),
    )


def read_run(run: Path) -> Seen:
    """The prediction and measurement that a finished run keeps in plan.json.

    Expects `predicted` and `outcome`, each with `step_seconds` and optionally
    `peak_memory_bytes`. Raises UserError naming the file and what it lacks.
    """
    path = run / "plan.json"
    try:
        data = json.loads(path.read_text())
        predicted, measured = data["predicted"], data["outcome"]
        return Seen(
            predicted_seconds=float(predicted["step_seconds"]),
            measured_seconds=float(measured["step_seconds"]),
            predicted_bytes=float(predicted.get("peak_memory_bytes") or 0.0),
            measured_bytes=float(measured.get("peak_memory_bytes") or 0.0),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: no prediction and measurement to learn from ({error!r}); expected "
            "`predicted` and `outcome`, each with step_seconds"
        ) from error
