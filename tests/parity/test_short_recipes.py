"""Recipes whose data are Debian packages, for two steps: fetched, read, trained and scored."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from shoal.launch import local
from shoal.launch.pool import WorkerPool

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("apt-get") is None, reason="no apt-get here"),
]

SHORT = [
    *("train.steps=2", "train.evaluate_every_steps=2", "train.global_batch_samples=4"),
    *("train.micro_batch_samples=4", "data.max_samples=120", "data.evaluation_samples=4"),
    *("parallel.replicate=1", "launch.tune=false"),
]


@pytest.mark.parametrize(
    ("recipe", "more", "score"),
    [
        ("translate", [], "chrf"),
        ("translate", ["data.source=libreoffice-help-en-es"], "chrf"),
        ("speech", ["train.epochs=null", "task.longest_seconds=2"], "word_error_rate"),
    ],
    ids=["en-zh", "en-es", "speech"],
)
def test_a_recipe_runs(
    recipe: str, more: list[str], score: str, tmp_path: Path, pool: WorkerPool
) -> None:
    result = local.train(recipe, [*SHORT, *more], out=tmp_path / "run", console=False, pool=pool)
    after = result.summary["evaluation"]
    assert math.isfinite(after["evaluation_loss"]) and score in after
    assert (tmp_path / "run/model/model.safetensors").is_file()
