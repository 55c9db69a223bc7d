"""`shoal.join`: this process becomes one worker of a loop that is the user's own."""

from __future__ import annotations

import atexit
from collections.abc import Mapping
from typing import Any

import torch

from shoal.comm.group import ProcessGroup
from shoal.config.load import own_sections
from shoal.config.recipe import Elastic, ParallelSection
from shoal.engine.membership.agree import check_same_program
from shoal.environment import torchrun_rendezvous, usable_cores
from shoal.errors import ConfigError, Problem
from shoal.fleet.fleet import Fleet
from shoal.layout import Layout
from shoal.parallel.ranks import meet
from shoal.parallel.settings import Settings
from shoal.runtime import choose_device, start_process_group, stop_process_group
from shoal.sync.kinds import KINDS

_TIMEOUT_SECONDS = 1800.0
_ELSEWHERE = "a loop of your own has the axes replicate and shard; others cut parts that only"
_OWN = {
    "recompute": ("none", "the model does it: gradient_checkpointing_enable() of transformers"),
    "compile": (False, "call torch.compile yourself, after fleet.parallelize"),
}


def join(
    parallel: Mapping[str, Any] | None = None,
    sync: Mapping[str, Any] | str | None = None,
    *,
    device: str = "auto",
) -> Fleet:
    """Meet the other workers that `shoal run` or torchrun has started; alone, there are none.

    `parallel`: {"shard": 2}, or with a level, {"shard": {"degree": 2, "level": "gradients"}};
    `replicate` is what is left of the workers. `sync`: a policy, "local-sgd" or with its settings,
    {"kind": "local-sgd", "every_steps": 8}; every-step without. `device`: auto, cpu or cuda.
    Raises ConfigError for what does not go with a loop of one's own, or the number of workers.
    """
    sections = own_sections(parallel, sync)
    if getattr(sections.sync, "shares", "equal") == "measured":
        what = "a loop of one's own divides its batches itself"
        raise ConfigError([Problem("sync.shares", what, "leave it out")], source="shoal.join")
    if KINDS[sections.sync.kind].apart:
        what = f"{sections.sync.kind} needs servers beside the workers: `shoal train` starts them"
        raise ConfigError([Problem("sync.kind", what, "use every-step")], source="shoal.join")
    place = torchrun_rendezvous()
    size, local_rank = (place.world_size, place.local_rank) if place else (1, 0)
    layout = _layout(sections.parallel, size=size, started=place is not None)
    chosen = choose_device(device, local_rank=local_rank)
    if place is not None and size > 1:
        cores = usable_cores() // place.local_world_size
        torch.set_num_threads(max(1, cores))
        start_process_group(
            rank=place.rank,
            size=size,
            device=chosen,
            meeting=place.meeting,
            timeout_seconds=_TIMEOUT_SECONDS,
        )
        atexit.register(stop_process_group)
    world = ProcessGroup()
    said = {name: getattr(sections, name).model_dump(mode="json") for name in ("parallel", "sync")}
    check_same_program(world, recipe=said, parameters=0)
    sharding = sections.parallel.sharding
    return Fleet(
        meet(world, layout=layout, device=chosen),
        sync=sections.sync,
        settings=Settings(shard_level=sharding.level, offload=sharding.offload),
    )


def _layout(parallel: ParallelSection, *, size: int, started: bool) -> Layout:
    """The layout of `size` workers. Raises ConfigError with everything that stands against it."""
    problems = [
        Problem(f"parallel.{axis}", f"{_ELSEWHERE} `shoal train` knows", "leave it out")
        for axis in ("context", "tensor", "pipeline", "expert")
        if getattr(parallel, axis) not in (None, 1)
    ]
    for key, (usual, hint) in _OWN.items():
        if getattr(parallel, key) != usual:
            problems.append(Problem(f"parallel.{key}", "is the model's owner's to do", hint))
    shard = parallel.sharding
    if shard.level == "optimizer":
        what = "needs to know which backward is the step's last, which only `shoal train` does"
        problems.append(Problem("parallel.shard.level", what, "use the level gradients"))
    if isinstance(parallel.replicate, Elastic):
        what = "a loop of your own goes on with the replicas it began with"
        problems.append(Problem("parallel.replicate", what, "give a number, or leave it out"))
    replicas = parallel.replicas or max(1, size // shard.degree)
    if replicas * shard.degree != size:
        wanted = replicas * shard.degree
        hint = f"start {wanted}: shoal run --workers {wanted} SCRIPT.py"
        if started and size % shard.degree == 0:
            hint = f"leave parallel.replicate out, or {hint}"
        what = f"{replicas} x shard {shard.degree} takes {wanted} workers, and there "
        what += f"{'are' if size > 1 else 'is'} {size}"
        problems.append(Problem("parallel.replicate", what, hint))
    if problems:
        raise ConfigError(problems, source="shoal.join")
    return Layout(replicate=replicas, shard=shard.degree)
