"""One replica: a process with a model and an engine; orders come in, events go out, as JSON lines.

orders:  {"submit": request}  {"cancel": id}  {"stop": true}
reports: {"ready": facts}  {"failed": text}  {"events": [...], "state": {...}}
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from shoal.errors import ShoalError, UserError
from shoal.serve.request import Event, Request
from shoal.serve.sizing import MOST_CACHE_BYTES, SEQUENCES, bytes_of
from shoal.units import format_bytes


def run(payload: dict[str, Any], report: int) -> int:
    """Entry point of a worker of the fork server. Returns its exit status."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    try:
        engine = _engine(payload)
    except ShoalError as error:
        _say(report, {"failed": str(error), "status": error.exit_status})
        return error.exit_status
    _say(report, {"ready": engine.facts()})
    orders = _Orders(report)
    while True:
        for order in orders.read(wait=engine.idle):
            if "stop" in order:
                return 0
            _follow(engine, order, report)
        if orders.closed:
            return 0
        if not engine.idle:
            began = time.perf_counter()
            events = engine.step()
            _say(
                report,
                {
                    "events": msgspec.to_builtins(events),
                    "state": _state(engine, time.perf_counter() - began),
                },
            )


def _engine(payload: dict[str, Any]) -> Any:
    import torch

    from shoal.runtime import choose_device
    from shoal.serve.cache import Cache
    from shoal.serve.divided import Divided
    from shoal.serve.engine import Engine
    from shoal.serve.generate import end_tokens
    from shoal.serve.grammar import Grammars
    from shoal.serve.part import Part
    from shoal.serve.pooled import Pooled
    from shoal.serve.reading import kind_of
    from shoal.serve.runner import Runner, load

    torch.set_num_threads(payload["threads"])
    device = choose_device(payload["device"], local_rank=payload["index"], key="serve.device")
    room = _room(payload, device)
    if kind_of(Path(payload["folder"])) != "generate":
        return Pooled(
            Path(payload["folder"]),
            precision=payload["precision"],
            exact=payload["exact"],
            int8=payload["int8"],
            device=device,
        )
    size = payload["block_tokens"]
    folder = Path(payload["folder"])
    read = partial(load, folder, precision=payload["precision"], device=device)

    def make(model: Any, part: Part) -> Runner:
        return Runner(
            model,
            num_blocks=2,
            block_tokens=size,
            exact=payload["exact"],
            int8=payload["int8"],
            release=True,
            adapters=payload["adapters"],
            part=part,
        )

    degree, pieces = payload["tensor"], payload["pieces"]
    runner: Runner | Divided
    if degree > 1:
        runner = Divided(read, make, degree=degree, pieces=pieces, threads=payload["threads"])
    else:
        runner = make(read(), Part(pieces=pieces))
    runner.cache = Cache(_num_blocks(runner.sizes, payload["cache_bytes"], size, room), size)

    def grammars() -> Grammars:
        ends = end_tokens(folder, runner.model.config)
        return Grammars(folder, vocabulary=runner.sizes.vocabulary, ends=ends)

    return Engine(
        runner,
        grammars=grammars,
        step_tokens=payload["step_tokens"],
        max_running=payload["max_running"],
        share_prefixes=payload["share_prefixes"],
        most_guesses=payload["guesses"],
    )


def _room(payload: dict[str, Any], device: Any) -> int:
    """Most bytes of a cache that nobody chose: a part of what a device has beside the model.

    Raises UserError for a model that does not fit there, before it is read.
    """
    if device.type == "cpu":
        return MOST_CACHE_BYTES
    import torch

    if payload["tensor"] > 1:
        raise UserError(
            f"serve.tensor: one replica on several devices is not built; it is on {device}\n"
            "    leave serve.tensor at 1, or give serve.device=cpu"
        )
    free, _ = torch.cuda.mem_get_info(device)
    folder, precision = Path(payload["folder"]), payload["precision"]
    weights = bytes_of(folder, precision=precision, int8=False, cache_bytes=0)
    left = free - weights - (payload["cache_bytes"] or 0)
    if left < 0:
        raise UserError(
            f"{folder}: it would take {format_bytes(free - left)} of {device}, which has "
            f"{format_bytes(free)} free\n"
            "    set cache_bytes lower, precision: bfloat16, or device: cpu"
        )
    return max(MOST_CACHE_BYTES, left // 2)


def _num_blocks(sizes: Any, cache_bytes: int | None, block_tokens: int, most: int) -> int:
    """Blocks of the cache, the one for padding too. Raises UserError for too few."""
    room = cache_bytes
    if room is None:
        room = min(SEQUENCES * sizes.context * sizes.token_bytes, most)
    blocks = room // (sizes.token_bytes * block_tokens)
    if blocks < 1:
        raise UserError(
            f"serve.cache_bytes: {room} bytes hold no block of {block_tokens} tokens; a token "
            f"takes {sizes.token_bytes} bytes, so give at least {sizes.token_bytes * block_tokens}"
        )
    return int(blocks) + 1


def _follow(engine: Any, order: dict[str, Any], report: int) -> None:
    if "cancel" in order:
        engine.cancel(order["cancel"])
        _say(report, {"events": [], "state": _state(engine, 0.0)})
        return
    request = msgspec.convert(order["submit"], Request)
    try:
        engine.submit(request)
    except UserError as error:
        refused = Event(id=request.id, finish="error", problem=str(error))
        _say(report, {"events": msgspec.to_builtins([refused]), "state": _state(engine, 0.0)})


def _state(engine: Any, seconds: float) -> dict[str, Any]:
    return {
        "step_seconds": seconds,
        "running": engine.num_running,
        "waiting": engine.num_waiting,
        "free_blocks": engine.num_free,
        **vars(engine.counters),
    }


class _Orders:
    """Lines that came in on a descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._text = descriptor, b""
        self.closed = False

    def read(self, *, wait: bool) -> Iterator[dict[str, Any]]:
        """Orders so far; `wait`: for at least some, or until the other end is gone."""
        while select.select([self._descriptor], [], [], None if wait else 0)[0]:
            data = os.read(self._descriptor, 1 << 16)
            if not data:
                self.closed = True
                return
            *lines, self._text = (self._text + data).split(b"\n")
            yield from map(msgspec.json.decode, lines)
            wait = False


def _say(report: int, message: dict[str, Any]) -> None:
    data = msgspec.json.encode(message) + b"\n"
    try:
        while data:
            data = data[os.write(report, data) :]
    except OSError:  # nobody listens any more
        sys.exit(0)
