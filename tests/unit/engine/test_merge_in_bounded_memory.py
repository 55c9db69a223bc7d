"""A model several times larger than the memory that a merge may take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from passing_on import newest
from shoal.boxes import Box, Piece
from shoal.checkpoint.store import Store
from shoal.models import init
from shoal.models.anatomy import canonical_parameters
from shoal.models.huggingface import build_meta, config_from, fingerprint
from tiny import Bench

LIMIT_BYTES = 16_000_000
SIZES = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "vocab_size": 14000}
UNTIED = {"head_dim": 128, "tie_word_embeddings": False}
HALF = (
    *("train.steps=20", "train.evaluate_every_steps=5", "checkpoint.every_steps=5"),
    "train.stop_after_steps=10",
)


@pytest.fixture(scope="module")
def checkpoint(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a llama of 120 MB, saved by two ranks: rows halved, as shard does it."""
    state = newest(bench.run(*HALF)).state
    config = config_from({**state["model_config"], **SIZES, **UNTIED})
    model = build_meta(config, auto_class="AutoModelForCausalLM")
    init.materialise(model, record=init.record(model), seed=0)
    state = {**state, "model_config": config.to_dict(), "fingerprint": fingerprint(model)}
    store = Store(tmp_path_factory.mktemp("large"))
    store.begin(10)
    parts = []
    for rank in (0, 1):
        pieces = []
        for name, parameter in canonical_parameters(model).items():
            shape, rows = tuple(parameter.shape), len(parameter)
            low, high = rows * rank // 2, rows * (rank + 1) // 2
            box = Box((low, *(0 for _ in shape[1:])), (high - low, *shape[1:]))
            pieces.append(Piece(name, "parameter", shape, box, parameter[low:high]))
        parts.append(store.write_part(10, rank=rank, pieces=pieces))
    return store.publish(10, parts=parts, state=state, keep=1)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_merge_keeps_to_its_limit(bench: Bench, checkpoint: Path, tmp_path: Path) -> None:
    script = Path(__file__).with_name("merging.py")
    small = newest(bench.run(*HALF)).folder
    words = [sys.executable, script, small, checkpoint, tmp_path, f"{LIMIT_BYTES}B"]
    # memory that is freed goes back at once, so that the peak is of what is held
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    ended = subprocess.run(
        words, capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert ended.returncode == 0, ended.stderr
    bounded, free = json.loads(ended.stdout.splitlines()[-1])
    paths = [tmp_path / name / "model.safetensors" for name in ("bounded", "free")]
    size = paths[0].stat().st_size
    assert size > 7 * LIMIT_BYTES
    print(f"{size / 1e6:.0f} MB merged: bounded {bounded / 1e6:.1f}, free {free / 1e6:.1f} MB")
    # resident memory: beside the tensors, of which the limit speaks, it counts all that is touched,
    # the pages of files around what is read (2 MiB each) and the library's buffers
    assert bounded < LIMIT_BYTES + 6_000_000
    assert free > size, "the measurement can see a whole model"
    assert paths[0].read_bytes() == paths[1].read_bytes()
    with safe_open(paths[0], framework="pt") as file:
        assert torch.equal(
            file.get_tensor("model.embed_tokens.weight"),
            Store(checkpoint.parent).open(10).read("model.embed_tokens.weight"),
        )
