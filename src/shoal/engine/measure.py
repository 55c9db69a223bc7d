"""Which devices this machine has, and how fast it multiplies in each number format."""

from __future__ import annotations

import time
from typing import Any

import torch

from shoal.engine.worker import report_failure
from shoal.observe.events import Report
from shoal.runtime import WorkerInfo, start_worker

WORTH_IT = 1.15
"""bfloat16 is chosen when its matrix products are at least this much faster than float32's."""

_PEAK_SECONDS = 0.1
"""After so long no further product is timed."""


def run_formats(payload: dict[str, Any], descriptor: int) -> int:
    """Entry point of a lone worker that reports what `measured_formats` finds."""
    report = Report(descriptor)
    try:
        start_worker(WorkerInfo(0, 1, torch.device("cpu"), payload["threads"]), seed=0)
        report.say("measured", **measured_formats(payload["device"]))
    except BaseException as error:
        return report_failure(error, report=report, rank=0)
    return 0


def measured_formats(wanted: str) -> dict[str, Any]:
    """Devices of the kind `wanted` (auto, cpu, cuda), and the peak of each number format.

    `peaks`: FLOPs per second of a large square product on one device, or on this thread count;
    `format_ratio`: bfloat16's over float32's; `device_name`: as its driver calls it.
    """
    devices = torch.cuda.device_count() if wanted != "cpu" else 0
    device = torch.device("cuda") if devices else None
    peaks = {name: _peak(getattr(torch, name), device) for name in ("float32", "bfloat16")}
    ratio = peaks["bfloat16"] / peaks["float32"]
    if devices and not torch.cuda.is_bf16_supported():
        ratio = 0.0
    return {
        "devices": devices,
        "device_name": torch.cuda.get_device_name() if devices else None,
        "format_ratio": ratio,
        "compute": "bfloat16" if ratio >= WORTH_IT else "float32",
        "peaks": peaks,
    }


def _peak(dtype: torch.dtype, device: torch.device | None) -> float:
    """FLOPs per second of the best of six products, of a size that fills the processor.

    The first warms up, and loads libraries on a device; of an emulated format a second is enough.
    """
    size = 512 if device is None else 4096
    a = torch.full((size, size), 0.01, dtype=dtype, device=device)
    tries: list[float] = []
    while len(tries) < 6 and sum(tries[1:]) < _PEAK_SECONDS:
        _wait(device)
        began = time.perf_counter()
        torch.mm(a, a)
        _wait(device)
        tries.append(time.perf_counter() - began)
    return 2.0 * size**3 / min(tries)


def _wait(device: torch.device | None) -> None:
    if device is not None:
        torch.cuda.synchronize(device)
