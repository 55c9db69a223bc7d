"""That `parallel.compile` compiles: it once did nothing on a CPU, and nothing told."""

from __future__ import annotations

import os
from pathlib import Path

from parity.test_replicas import SHORT, assert_same_curve
from tiny import Bench, Run


def test_blocks_are_compiled(bench: Bench, tmp_path: Path) -> None:
    given, out = ("parallel.compile=true", *SHORT), bench.new_path()
    done = bench.command(
        *("train", str(bench.recipe), *given, "--out", str(out)),
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert [*tmp_path.rglob("*.cpp")], "torch.compile wrote no code"
    assert_same_curve(Run(out), bench.run(*SHORT))
