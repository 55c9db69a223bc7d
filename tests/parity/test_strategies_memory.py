"""Memory per rank falls with the shard and tensor degree as docs/guide/layouts.md says.

Counted are the bytes of all tensor storage that is alive, at three moments of a step when no
activations are: before it, at the end of a forward without gradients, and after the backward of a
micro batch that is not the last.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from shoal.launch.pool import WorkerPool
from shoal.layout import Layout
from shoal.models.anatomy import (
    anatomy_of,
    canonical_parameters,
    head_parameters,
    hidden_of,
    logits_of,
)
from shoal.models.init import record
from shoal.observe.events import Report
from shoal.parallel import shard
from shoal.parallel.apply import apply
from shoal.parallel.local import sharded_of
from shoal.parallel.materialise import materialise
from shoal.parallel.mesh import build_mesh
from shoal.parallel.settings import Settings
from shoal.runtime import start_process_group, stop_process_group
from shoal.tasks.losses import chunked_loss
from unit.models.tiny_models import meta_model
from workers import run_workers

pytestmark = pytest.mark.slow

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}


def live_bytes() -> int:
    """Bytes of the storage of every tensor that is alive, each storage once."""
    gc.collect()
    found = [each for each in gc.get_objects() if type(each) in (torch.Tensor, nn.Parameter)]
    # a gradient that no code has looked at has no Python object yet
    found += [each.grad for each in found if type(each) is nn.Parameter and each.grad is not None]
    storages = [each.untyped_storage() for each in found if type(each) is not DTensor]
    return sum({each.data_ptr(): each.nbytes() for each in storages if each.nbytes()}.values())


def run(payload: dict[str, Any], descriptor: int) -> int:
    """Entry point of a worker."""
    torch.set_num_threads(1)
    layout, device = Layout(**payload["layout"]), torch.device("cpu")
    rank, size = payload["rank"], layout.workers
    if size > 1:
        meeting = Path(payload["store"]).as_uri()
        start_process_group(
            rank=rank, size=size, device=device, meeting=meeting, timeout_seconds=60
        )
    mesh = build_mesh(layout, rank=rank, device=device)
    model = meta_model("llama", **SIZES)
    anatomy, recorded = anatomy_of(model), record(model)
    numbers = {name: each.numel() for name, each in canonical_parameters(model).items()}
    in_blocks = {n: c for n, c in numbers.items() if n.startswith(anatomy.blocks + ".")}
    apply(model, anatomy, mesh, Settings(shard_level=payload["level"]))
    shapes = shard.storage_shapes(model)
    # parameter, gradient and both moments: what an optimizer step needs on this rank
    kept = [{name: torch.zeros(shape) for name, shape in shapes.items()} for _ in range(4)]
    empty = live_bytes() - 16 * sum(each.numel() for each in kept[0].values())
    materialise(model, record=recorded, seed=0, storage=kept[0], gradients=kept[1])
    tokens = torch.arange(8)[None]
    batch = {"input_ids": tokens, "position_ids": tokens, "labels": tokens}

    def loss(model: nn.Module) -> torch.Tensor:
        found = chunked_loss(
            hidden_of(model, batch),
            batch["labels"],
            logits_of(model),
            head_parameters=head_parameters(model),
            vocabulary=sharded_of(model).vocabulary,
        )
        found_bytes.append(live_bytes())
        return found

    found_bytes: list[int] = []
    before = live_bytes()
    with torch.no_grad():
        shard.forward(model, loss)
    shard.micro_batch(model, last=False)
    shard.forward(model, loss).backward()
    between = live_bytes()
    found = {
        "whole": 4 * sum(numbers.values()),
        "blocks": 4 * sum(in_blocks.values()),
        "state": before - empty,
        "forward": found_bytes[0] - before,
        "between": between - before,
    }
    Report(descriptor).say("compared", found=found)
    stop_process_group()
    return 0


def measured(pool: WorkerPool, folder: Path, layout: Layout, level: str) -> dict[str, int]:
    """The rank that needs most."""
    payload = {
        "layout": {"shard": layout.shard, "tensor": layout.tensor},
        "level": level,
        "store": str(folder / f"store-{layout.shard}-{layout.tensor}-{level}"),
    }
    ranks = run_workers(pool, "parity.test_strategies_memory:run", payload, size=layout.workers)
    return {key: max(each[key] for each in ranks) for key in ranks[0]}


@pytest.mark.parametrize(("degree", "tensor"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)])
def test_state_falls_with_the_degrees(
    degree: int, tensor: int, pool: WorkerPool, tmp_path: Path
) -> None:
    """Parameters, gradients and two moments: 16P / (S x T) bytes, norms apart."""
    found = measured(pool, tmp_path, Layout(shard=degree, tensor=tensor), "parameters")
    expected = 4 * found["whole"] / (degree * tensor)
    assert found["state"] == pytest.approx(expected, rel=0.1), found


@pytest.mark.parametrize(
    ("level", "blocks_in_forward", "held_between"),
    [("parameters", 1, 0.0), ("gradients", 6, 0.0), ("optimizer", 6, 2.0)],
)
def test_levels_gather_what_they_say(
    level: str, blocks_in_forward: int, held_between: float, pool: WorkerPool, tmp_path: Path
) -> None:
    """At the end of forward: what lies outside blocks, all blocks or the last, and FSDP2's buffer
    of one block. After a micro batch: nothing, or (`optimizer`) parameters and gradients whole."""
    found = measured(pool, tmp_path, Layout(shard=2), level)
    outside, block = found["whole"] - found["blocks"], found["blocks"] / 6
    gathered = outside + block * (blocks_in_forward + 1)
    assert found["forward"] == pytest.approx(gathered, rel=0.1), found
    assert found["between"] == pytest.approx(held_between * found["whole"], rel=0.1, abs=2e4), found
