"""The certificate of serving with what needs processes: several replicas, and replicas killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from shoal.config.serve import ServeSection
from shoal.environment import usable_cores
from shoal.errors import WorkerError
from shoal.launch.pool import WorkerPool
from shoal.launch.serving import Fleet
from shoal.observe.lasting import Lasting
from shoal.serve.cache import Cache
from shoal.serve.certificate import Answers, Certificate, Condition, Found, certify, judged
from shoal.serve.divided import Divided
from shoal.serve.part import Part
from shoal.serve.reading import model_directory
from shoal.serve.request import Event, Request, Scored
from shoal.serve.runner import Runner, load
from shoal.serve.scheduler import blocks_for

_KILL_AFTER = 40
"""Tokens of all answers from one kill to the next."""
_MOST_SECONDS = 3600.0


def certify_folder(
    path: Path,
    *,
    settings: ServeSection,
    num_requests: int,
    say: Callable[[str], None],
) -> Certificate:
    """All conditions of a model folder, with two replicas and kills too. Raises what reading does.

    `settings`: precision, weights, threads (auto: all cores) and block_tokens of those that are
    served.
    """
    folder = model_directory(path)
    threads = settings.threads
    torch.set_num_threads(usable_cores() if threads == "auto" else threads)
    say(f"reading {folder}")
    size, pieces = settings.block_tokens, settings.sum_pieces
    read = partial(load, folder, precision=settings.precision)

    def make(model: nn.Module, part: Part) -> Runner:
        int8 = settings.weights == "int8"
        return Runner(model, num_blocks=2, block_tokens=size, int8=int8, part=part)

    runner = make(read(), Part(pieces=pieces))
    most = 4 * num_requests * blocks_for(min(runner.sizes.context, 256), size)
    runner.cache = Cache(min(most, 512), size)

    told = Lasting(say)
    told.begin(f"serving {num_requests} requests alone, then in company")

    def in_other_ways(requests: Sequence[Request], alone: Answers) -> list[Found]:
        found = []
        for degree in range(2, pieces + 1):
            if pieces % degree == 0:
                told.begin(f"tensor {degree}")
                cores = torch.get_num_threads()
                ranks = Divided(read, make, degree=degree, pieces=pieces, threads=cores)
                ranks.cache = runner.cache
                condition = Condition(f"tensor {degree}")
                found.append(judged(ranks, requests, alone, condition, told=told))
                ranks.close()
        for kills in (False, True):
            found.append(_by_two(folder, settings, requests, alone, kills=kills, told=told))
        return found

    return certify(
        runner, name=str(folder), num_requests=num_requests, also=in_other_ways, told=told
    )


def _by_two(
    folder: Path,
    settings: ServeSection,
    requests: Sequence[Request],
    alone: Answers,
    *,
    kills: bool,
    told: Lasting,
) -> Found:
    """Two replicas of one thread each serve all requests at once; every so often one is killed."""
    changes = {"replicate": 2, "threads": 1, "queue_requests": 1 << 20, "queue_tokens": 1 << 40}
    chosen = settings.model_copy(update=changes)
    name = "two replicas, killed by turns" if kills else "two replicas"
    told.begin(name)
    with WorkerPool(1) as pool, Fleet(folder, chosen, pool) as fleet:
        fleet.wait_ready()
        found = _answers(fleet, requests, kills=kills, told=told)
        return Found(
            name,
            len(requests),
            sum(found.get(each.id) != alone[each.id] for each in requests),
            sum(each.get("steps", 0) for each in fleet.states().values()),
            kills=fleet.restarts,
        )


def _answers(fleet: Fleet, requests: Sequence[Request], *, kills: bool, told: Lasting) -> Answers:
    made: dict[str, tuple[Scored, ...]] = {each.id: () for each in requests}
    left = set(made)
    changed = threading.Condition()

    def take(event: Event) -> None:
        with changed:
            made[event.id] = made[event.id] + event.tokens
            if event.finish is not None:
                left.discard(event.id)
            changed.notify()

    def count() -> int:
        return sum(map(len, made.values()))

    for request in requests:
        fleet.submit(request, take)
    deadline, wanted, turn = time.monotonic() + _MOST_SECONDS, _KILL_AFTER, 0
    while left:
        with changed:
            changed.wait(timeout=1.0)
            if time.monotonic() > deadline:
                raise WorkerError(f"{len(left)} requests were not answered")
            told.at(1 - len(left) / len(requests))
            if count() < wanted:
                continue
        wanted = count() + _KILL_AFTER * (1 + turn)
        pid = fleet.workers().get(turn % 2)
        turn += 1
        if kills and left and pid is not None:
            os.kill(pid, signal.SIGKILL)
    return made
