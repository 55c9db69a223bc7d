"""What a server adds to a step of its engine, and what planning a step takes.

    python benchmarks/serve_step.py MODEL [--streams 16] [--rounds 5] [--tokens 48]

One thread computes. Each round times the engine in this process and then the whole server with as
many streams (HTTP, router, replica in its own process, texts made of tokens, events): the gap
between two tokens of a stream against the engine's step, medians of both. Then `plan_step` alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from load import at_once, body_of, server
from shoal.config.serve import serve_settings
from shoal.serve import engine as engines
from shoal.serve.engine import Engine
from shoal.serve.reading import model_directory
from shoal.serve.request import Request, Sampling
from shoal.serve.runner import Runner, load


def steps(runner: Runner, bodies: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Seconds of the steps in which all streams make a token, and of their planning."""
    planned: list[float] = []
    plan = engines.plan_step

    def timed(*args: Any, **more: Any) -> Any:
        began = time.perf_counter()
        made = plan(*args, **more)
        planned.append(time.perf_counter() - began)
        return made

    engine = Engine(runner, share_prefixes=False, max_running=len(bodies))
    for number, body in enumerate(bodies):
        sampling = Sampling(max_tokens=body["max_tokens"], seed=body["seed"], ignore_end=True)
        engine.submit(Request(id=str(number), prompt=tuple(body["prompt"]), sampling=sampling))
    took = []
    engines.plan_step = timed
    try:
        while not engine.idle:
            began = time.perf_counter()
            events = engine.step()
            if sum(bool(each.tokens) for each in events) == len(bodies):
                took.append(time.perf_counter() - began)
    finally:
        engines.plan_step = plan
    return took, planned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--prompt", type=int, default=64)
    given = parser.parse_args()
    torch.set_num_threads(1)
    words = ["port=0", "name=model", "replicate=1", "threads=1", "guesses=0"]
    settings = serve_settings([*words, "share_prefixes=false", f"max_running={given.streams}"])
    runner = Runner(load(model_directory(given.model)), num_blocks=8 * given.streams)
    bodies = [
        body_of(n, name="model", prompt=given.prompt, tokens=given.tokens)
        for n in range(given.streams)
    ]
    ratios, alone, planned = [], [], []
    with server(given.model, settings) as (url, _):
        for number in range(given.rounds + 1):
            took, plans = steps(runner, bodies)
            answers = asyncio.run(at_once(url, bodies))
            gaps = [
                later - earlier
                for each in answers
                for earlier, later in zip(each.times, each.times[1:], strict=False)
            ]
            if number:  # the first one warms up
                ratios.append(statistics.median(gaps) / statistics.median(took))
                alone.append(statistics.median(took))
                planned += plans
    found = {
        "streams": given.streams,
        "step ms": round(1e3 * statistics.median(alone), 2),
        "gap / step": round(statistics.median(ratios), 3),
        "from": round(min(ratios), 3),
        "to": round(max(ratios), 3),
        "planning ms, median": round(1e3 * statistics.median(planned), 3),
        "planning ms, p95": round(1e3 * statistics.quantiles(planned, n=20)[-1], 3),
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
