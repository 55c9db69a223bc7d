"""A server under open-loop load: Poisson arrivals with a fixed seed, latencies, and kills.

    python benchmarks/load.py MODEL [--seconds 60] [--replicas 2] [--tokens 32] [--prompt 64]

First the capacity is measured (as many streams at once as run), then requests come at 80 % of it
(no error is allowed), then at 200 % (only 429 is), then a replica is killed every so often under
8 streams, whose answers are compared with those of a run without kills. A closed loop would hide
queueing, so arrivals do not wait for answers. Before all of it, with an idle server: one stream,
and prompts that begin as one before. One JSON row for each part.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from shoal.config.serve import ServeSection, serve_settings
from shoal.launch.pool import WorkerPool
from shoal.launch.serving import Fleet, listen, open_service

PARTS = ("latency", "load", "kills")


@dataclass
class Answer:
    """What became of one request."""

    status: int = 0
    text: str = ""
    times: list[float] = field(default_factory=list)
    """When each part of the text came, in seconds from the request on."""
    problem: str = ""


@contextmanager
def server(model: Path, settings: ServeSection) -> Iterator[tuple[str, Fleet]]:
    """Serve in this process, replicas in their own."""
    folder, _, make = open_service(model, settings=settings)
    threads = 1 if settings.threads == "auto" else settings.threads
    with (
        listen(settings) as listening,
        WorkerPool(threads) as pool,
        Fleet(folder, settings, pool) as fleet,
    ):
        fleet.wait_ready()
        chosen = uvicorn.Config(make(fleet), log_level="warning", access_log=False, lifespan="off")
        run = uvicorn.Server(chosen)
        thread = threading.Thread(target=run.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", fleet
        finally:
            run.should_exit = True
            thread.join(timeout=30)


def body_of(number: int, *, name: str, prompt: int, tokens: int) -> dict[str, Any]:
    """Request `number`: its prompt, length and seed depend on the number alone."""
    draw = random.Random(number)
    return {
        "model": name,
        "prompt": [draw.randrange(10, 290) for _ in range(prompt)],
        "max_tokens": tokens,
        "seed": number,
        "ignore_eos": True,
        "stream": True,
    }


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
    """One streamed answer."""
    answer, began = Answer(), time.monotonic()
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            answer.status = response.status_code
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                said = json.loads(line.removeprefix("data: "))
                if "error" in said:
                    answer.problem = str(said["error"])
                elif said["choices"]:
                    answer.text += said["choices"][0]["text"]
                    answer.times.append(time.monotonic() - began)
    except httpx.HTTPError as error:
        answer.problem = repr(error)
    return answer


def client_of(url: str) -> httpx.AsyncClient:
    """A client without a limit of its own on connections or time.

    It gives up idle connections before the server does: one that the server just closed looks like
    a request that failed.
    """
    limits = httpx.Limits(max_connections=None, keepalive_expiry=1.0)
    return httpx.AsyncClient(base_url=url, timeout=600, limits=limits)


async def at_once(url: str, bodies: list[dict[str, Any]]) -> list[Answer]:
    """All requests at once."""
    async with client_of(url) as client:
        return list(await asyncio.gather(*(ask(client, body) for body in bodies)))


async def poisson(
    url: str, bodies: list[dict[str, Any]], *, per_second: float, seed: int
) -> list[Answer]:
    """Requests that come by themselves, `per_second` in the mean."""
    draw = random.Random(seed)
    async with client_of(url) as client:
        tasks = []
        due = time.monotonic()
        for body in bodies:
            due += draw.expovariate(per_second)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            tasks.append(asyncio.create_task(ask(client, body)))
        return list(await asyncio.gather(*tasks))


def row_of(part: str, answers: list[Answer]) -> dict[str, Any]:
    """Counts by status, and latencies of those that were answered."""
    good = [each for each in answers if each.status == 200 and not each.problem]
    wrong = [each for each in answers if each.status != 429 and each not in good]
    firsts = [each.times[0] for each in good if each.times]
    between = [b - a for each in good for a, b in zip(each.times, each.times[1:], strict=False)]
    row: dict[str, Any] = {
        "part": part,
        "requests": len(answers),
        "answered": len(good),
        "told to come again": sum(each.status == 429 for each in answers),
        "errors": len(wrong),
    }
    if wrong:
        row["first error"] = f"{wrong[0].status} {wrong[0].problem}"
    for name, values in (("first token", firsts), ("between tokens", between)):
        if len(values) > 1:
            cuts = statistics.quantiles(values, n=100, method="inclusive")
            row[name] = {f"p{at}": round(cuts[at - 1], 4) for at in (50, 95, 99)}
    row["longest pause"] = round(max(between, default=0.0), 3)
    return row


def of_prefix(url: str, name: str, *, prompt: int, rounds: int = 5) -> dict[str, Any]:
    """First tokens of new prompts, and of prompts that differ from one before in the last token.

    One request at a time: a prompt is in the cache of the replica that had it.
    """
    new, hit = [], []
    for number in range(rounds):
        body = body_of(20_000 + number, name=name, prompt=prompt, tokens=2)
        other = {**body, "prompt": [*body["prompt"][:-1], 9]}
        for asked, seconds in ((body, new), (other, hit)):
            (answer,) = asyncio.run(at_once(url, [asked]))
            seconds.append(answer.times[0])
    ratios = [a / b for a, b in zip(hit, new, strict=True)]
    firsts = {"new": statistics.median(new), "hit": statistics.median(hit)}
    row: dict[str, Any] = {"part": f"prefix of {prompt} tokens", "ratio": statistics.median(ratios)}
    return {**row, "first token": {each: round(value, 4) for each, value in firsts.items()}}


def kill_by_turns(fleet: Fleet, *, every_seconds: float, done: threading.Event) -> int:
    """SIGKILL to one replica after another, until `done`; how many."""
    count = 0
    while not done.wait(every_seconds):
        workers = fleet.workers()
        pid = workers[sorted(workers)[count % len(workers)]]
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            count += 1
    return count


def under_kills(
    url: str, fleet: Fleet, bodies: list[dict[str, Any]], *, every_seconds: float
) -> dict[str, Any]:
    """8 streams at a time with a replica killed every so often, beside the same without."""

    def run() -> list[Answer]:
        return [
            each
            for first in range(0, len(bodies), 8)
            for each in asyncio.run(at_once(url, bodies[first : first + 8]))
        ]

    wanted = run()
    done, kills = threading.Event(), [0]

    def kill() -> None:
        kills[0] = kill_by_turns(fleet, every_seconds=every_seconds, done=done)

    thread = threading.Thread(target=kill)
    thread.start()
    found = run()
    done.set()
    thread.join()
    differ = sum(a.text != b.text for a, b in zip(found, wanted, strict=True))
    return {**row_of("kills", found), "kills": kills[0], "answers that differ": differ}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each part")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--prefix", type=int, help="tokens that prompts share; as many as fit, 448")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--every", type=float, default=30.0, help="seconds from kill to kill")
    parser.add_argument("--weights", default="full")
    chosen = parser.parse_args()
    settings = serve_settings(
        [
            "port=0",
            "name=model",
            f"replicate={chosen.replicas}",
            f"threads={chosen.threads}",
            f"weights={chosen.weights}",
            "max_running=8",
            "queue_requests=16",
        ]
    )

    def bodies(count: int, first: int = 0) -> list[dict[str, Any]]:
        return [
            body_of(first + n, name="model", prompt=chosen.prompt, tokens=chosen.tokens)
            for n in range(count)
        ]

    with server(chosen.model, settings) as (url, fleet):
        print(json.dumps({"products": fleet.facts["products"]}), flush=True)
        asyncio.run(at_once(url, bodies(4, 10_000)))  # whoever is first pays for the cache
        if "latency" in chosen.parts:
            alone = [each for n in range(5) for each in asyncio.run(at_once(url, bodies(1, n)))]
            print(json.dumps(row_of("one stream", alone)), flush=True)
            eight = asyncio.run(at_once(url, bodies(8, 100)))
            print(json.dumps(row_of("8 streams", eight)), flush=True)
            prefix = chosen.prefix or min(448, fleet.facts["context"] - 2)
            print(json.dumps(of_prefix(url, "model", prompt=prefix)), flush=True)
        full = 8 * chosen.replicas
        began = time.monotonic()
        asyncio.run(at_once(url, bodies(2 * full, 200)))
        capacity = 2 * full / (time.monotonic() - began)
        for part, share in (("80 %", 0.8), ("200 %", 2.0)) if "load" in chosen.parts else ():
            rate = share * capacity
            asked = bodies(max(4, round(rate * chosen.seconds)), 1000)
            found = asyncio.run(poisson(url, asked, per_second=rate, seed=1))
            row = {**row_of(part, found), "requests per second": round(rate, 2)}
            print(json.dumps(row), flush=True)
        if "kills" in chosen.parts:
            count = max(8, 8 * round(capacity * chosen.seconds / 8))
            row = under_kills(url, fleet, bodies(count, 5000), every_seconds=chosen.every)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
