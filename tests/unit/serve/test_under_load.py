"""The short form of benchmarks/load.py: arrivals that do not wait, and replicas that are killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from served import write_model

LOAD = Path(__file__).parents[3] / "benchmarks" / "load.py"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_error_below_capacity_only_429_above_and_no_answer_changes_under_kills(
    tmp_path: Path,
) -> None:
    folder = write_model(tmp_path / "model")
    sizes = ["--seconds", "4", "--every", "1.5", "--tokens", "24", "--prompt", "40"]
    done = subprocess.run(
        [sys.executable, LOAD, folder, *sizes], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    rows = {row["part"]: row for row in map(json.loads, done.stdout.splitlines()) if "part" in row}
    assert set(rows) == {"one stream", "8 streams", "80 %", "200 %", "kills"}
    for part, row in rows.items():
        assert row["errors"] == 0, (part, row)
        assert row["answered"] + row["told to come again"] == row["requests"] > 0
    assert rows["kills"]["answered"] == rows["kills"]["requests"]
    assert rows["kills"]["answers that differ"] == 0 < rows["kills"]["kills"]
