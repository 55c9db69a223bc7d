"""A rank of a cut model reads of pretrained weights what it keeps, and no more."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from shoal.launch.pool import WorkerPool
from shoal.layout import Layout
from unit.models.tiny_models import real_model
from workers import run_workers


@pytest.mark.quick(2)
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_neox", "vit"])
def test_a_rank_reads_its_own_bytes_only(family: str, pool: WorkerPool, tmp_path: Path) -> None:
    """llama and gpt2 are tied; gpt2 has columns, phi3 pieces of unequal size to cut.

    gpt_neox and vit are stored under other names than the model has.
    """
    model = real_model(family, seed=4)
    model.save_pretrained(tmp_path / "model")
    layout = Layout(shard=4) if family == "vit" else Layout(shard=2, tensor=2)
    payload = {
        "seed": 4,
        "family": family,
        "folder": str(tmp_path / "model"),
        "layout": asdict(layout),
        "store": str(tmp_path / "store"),
    }
    found = run_workers(pool, "parity.reading_weights:run", payload, size=layout.workers)
    whole = sum(each.nbytes for each in model.parameters())
    assert sorted(each["rank"] for each in found) == [0, 1, 2, 3]
    for each in found:
        assert each["equal"] and not each["missing"], each
        # the limit is 1.1 of its share; each box is asked for once, and nothing else is
        assert each["read"] == each["own"], each
        assert each["own"] < 0.3 * whole, "a quarter, but for norms and biases that are whole"
    assert sum(each["own"] for each in found) >= whole
