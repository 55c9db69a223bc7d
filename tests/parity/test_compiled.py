"""That `parallel.compile` compiles: it once did nothing on a CPU, and nothing told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from shoal.models.attention import attend
from tiny import Bench, Run, largest_difference

LITTLE = ("train.steps=3", "train.evaluate_every_steps=0", "model.num_hidden_layers=1")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_blocks_are_compiled(bench: Bench, tmp_path: Path) -> None:
    given, out = ("parallel.compile=true", *LITTLE), bench.new_path()
    done = bench.command(
        *("train", str(bench.recipe), *given, "--out", str(out)),
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
        timeout=390,
    )
    assert done.returncode == 0, done.stderr
    assert [*tmp_path.rglob("*.cpp")], "torch.compile wrote no code"
    assert largest_difference(Run(out).losses, bench.run(*LITTLE).losses) < 1e-5


def test_a_hundred_layers_share_their_code() -> None:
    """Eight versions of a function are all that torch keeps; then it computes it uncompiled."""
    torch.compiler.reset()
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    query, key = torch.randn(2, 4, 16, 8), torch.randn(2, 2, 16, 8)
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for number in range(100):
            layer = nn.Module()
            layer.layer_idx = number  # type: ignore[assignment]
            found = compiled(layer, query, key, key, None)[0]
    assert torch.equal(found, attend(layer, query, key, key, None)[0])
