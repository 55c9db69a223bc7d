"""Merges a checkpoint and tells how much memory that took. Run as a script, for a clean process.

    python merging.py SMALL-CHECKPOINT CHECKPOINT OUT LIMIT

The small one is merged first, so that what is imported on the way is not counted; then the other
within the limit, and at last without one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from shoal.cli.merge import merge


def peak_bytes() -> int:
    """Most memory that this process has had (resident, pages of files that it mapped included)."""
    status = Path("/proc/self/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def cost_of_merge(checkpoint: Path, out: Path, limit: str | None) -> int:
    """Bytes that a merge takes beyond what is taken before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = peak_bytes()
    merge(checkpoint, out, limit)
    return peak_bytes() - before


if __name__ == "__main__":
    torch.set_num_threads(1)
    small, checkpoint, out = map(Path, sys.argv[1:4])
    for limit in ("20kB", None):
        merge(small, out / f"small-{limit}", limit)
    costs = [
        cost_of_merge(checkpoint, out / name, limit)
        for name, limit in (("bounded", sys.argv[4]), ("free", None))
    ]
    print(json.dumps(costs))
