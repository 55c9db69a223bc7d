"""What this machine offers, and the traps it holds."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from shoal.environment import cache_directory, noted_settings, usable_cores, usable_memory_bytes
from shoal.units import format_bytes

Finding = tuple[str, str]
"""(`ok`, `note` or `warning`; text)."""

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "numpy", "pydantic")


def findings() -> Iterator[Finding]:
    """Everything worth knowing before a run, a line each."""
    yield from _system()
    yield from _versions()
    yield from _compute()
    yield from _folders()


def _system() -> Iterator[Finding]:
    yield "ok", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    if sys.platform == "win32":
        yield "warning", "Windows is not supported; use WSL (Windows Subsystem for Linux)"
    yield "ok", f"{usable_cores()} usable cores of {os.cpu_count()}"
    memory = usable_memory_bytes()
    if memory is not None:
        yield "ok", f"memory {format_bytes(memory)}"


def _versions() -> Iterator[Finding]:
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)
    yield "ok", found
    nvidia = [
        each.metadata["Name"]
        for each in importlib.metadata.distributions()
        if (each.metadata["Name"] or "").startswith("nvidia-")
    ]
    if nvidia and not Path("/proc/driver/nvidia").exists():
        yield (
            "warning",
            f"{len(nvidia)} CUDA packages are installed and no NVIDIA driver is here: torch was "
            "resolved without constraints.txt; 'make clean setup' takes the CPU build",
        )


def _compute() -> Iterator[Finding]:
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            yield "ok", f"GPU {index}: {about.name}, {format_bytes(about.total_memory)}"
    else:
        yield "ok", "no CUDA device; training runs on the CPU"
    backends = [
        name
        for name, here in (
            ("gloo", dist.is_gloo_available()),
            ("nccl", dist.is_nccl_available()),
            ("mpi", dist.is_mpi_available()),
        )
        if here
    ]
    yield "ok", f"collectives: {', '.join(backends)}"
    if "gloo" not in backends:
        yield "warning", "torch was built without gloo: workers cannot be processes on the CPU"
    ratio = _format_ratio()
    choice = "bfloat16" if ratio >= 1.15 else "float32"
    speed = (
        f"{ratio:.1f} x as fast as" if ratio >= 1 else f"{1 / max(ratio, 0.01):.1f} x slower than"
    )
    yield "ok", f"bfloat16 matrix products are {speed} float32's; precision auto: {choice}"
    for name, value in noted_settings().items():
        yield "note", f"{name}={value} is set; workers set their own thread count"


def _format_ratio() -> float:
    from shoal.engine.measure import measured_formats

    return float(measured_formats("cpu")["format_ratio"])


def _folders() -> Iterator[Finding]:
    cache = cache_directory()
    where = cache if cache.exists() else next(p for p in cache.parents if p.exists())
    free = shutil.disk_usage(where).free
    level = "ok" if free > 5 * 2**30 else "warning"
    yield level, f"cache {cache} (SHOAL_CACHE moves it), {format_bytes(free)} free"
    if not os.access(where, os.W_OK):
        yield "warning", f"{where} cannot be written to; set SHOAL_CACHE to a folder that can"
