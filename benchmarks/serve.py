"""Serving a model folder beside transformers' `generate`: tokens per core-second, interleaved.

    python benchmarks/serve.py MODEL [--streams 1 8 16] [--rounds 5] [--tokens 32]

One process, one thread; each round runs both engines on the same prompts, in turn, and a row has
the median of the rounds' ratios with their interval. `exact costs`: the engine's time over its time
with torch's own products. Processor time, not the clock, is counted: what else the machine does
disturbs it least.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from shoal.serve.certificate import answers
from shoal.serve.engine import Engine
from shoal.serve.reading import model_directory, read_model
from shoal.serve.request import Request, Sampling
from shoal.serve.runner import Runner, load


def prompts_of(count: int, *, length: int, vocabulary: int) -> list[tuple[int, ...]]:
    """Random prompts without token 0, which `generate` would take for padding."""
    draw = random.Random(1)
    return [tuple(draw.randrange(1, vocabulary) for _ in range(length)) for _ in range(count)]


def served(runner: Runner, prompts: list[tuple[int, ...]], *, tokens: int) -> float:
    """Core-seconds of answering all prompts together."""
    sampling = Sampling(max_tokens=tokens, temperature=0.0)
    asked = [Request(id=str(n), prompt=p, sampling=sampling) for n, p in enumerate(prompts)]
    engine = Engine(runner, share_prefixes=False, step_tokens=512)
    began = time.process_time()
    answers(engine, asked)
    return time.process_time() - began


def generated(model: torch.nn.Module, prompts: list[tuple[int, ...]], *, tokens: int) -> float:
    """The same by transformers' `generate` of the whole batch."""
    ids = torch.tensor(prompts)
    began = time.process_time()
    with torch.no_grad():
        model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
    return time.process_time() - began


def compared(ours: Callable[[], float], theirs: Callable[[], float], *, rounds: int) -> list[float]:
    """Their time over ours, round by round, after one that warms up."""
    ours(), theirs()
    found = []
    for number in range(rounds):
        pair = (ours, theirs) if number % 2 else (theirs, ours)
        times = {each: each() for each in pair}
        found.append(times[theirs] / times[ours])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--also-inexact", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    folder = model_directory(chosen.model)
    runner = Runner(load(folder, precision=chosen.precision), num_blocks=128)
    plain = None
    if chosen.also_inexact:
        plain = Runner(load(folder, precision=chosen.precision), num_blocks=128, exact=False)
    model = read_model(folder, auto_class="AutoModelForCausalLM", kernel="sdpa")
    model.to(next(runner.model.parameters()).dtype)
    print(f"{folder.name}: {runner.report}")
    for count in chosen.streams:
        prompts = prompts_of(count, length=chosen.prompt, vocabulary=runner.sizes.vocabulary)

        ours = partial(served, runner, prompts, tokens=chosen.tokens)
        theirs = partial(generated, model, prompts, tokens=chosen.tokens)
        ratios = compared(ours, theirs, rounds=chosen.rounds)
        row = {
            "streams": count,
            "ratio to generate": round(statistics.median(ratios), 3),
            "from": round(min(ratios), 3),
            "to": round(max(ratios), 3),
            "tokens per core-second": round(count * chosen.tokens / ours(), 1),
        }
        if plain is not None:
            without = partial(served, plain, prompts, tokens=chosen.tokens)
            costs = compared(ours, without, rounds=chosen.rounds)
            row["exact costs"] = round(1 / statistics.median(costs), 3)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
