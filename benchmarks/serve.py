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
from transformers import GenerationConfig

from shoal.data.tokenize import load_tokenizer
from shoal.models.anatomy import hidden_of
from shoal.serve.cache import Rows
from shoal.serve.certificate import answers
from shoal.serve.engine import Engine
from shoal.serve.reading import model_directory, read_model
from shoal.serve.request import Request, Sampling
from shoal.serve.runner import Runner, load

Clock = Callable[[], float]
"""Seconds: the processor's by default."""


def prompts_of(count: int, *, length: int, vocabulary: int) -> list[tuple[int, ...]]:
    """Random prompts without token 0, which `generate` would take for padding."""
    draw = random.Random(1)
    return [tuple(draw.randrange(1, vocabulary) for _ in range(length)) for _ in range(count)]


def served(
    runner: Runner, prompts: list[tuple[int, ...]], *, tokens: int, clock: Clock = time.process_time
) -> float:
    """Core-seconds of answering all prompts together."""
    sampling = Sampling(max_tokens=tokens, temperature=0.0)
    asked = [Request(id=str(n), prompt=p, sampling=sampling) for n, p in enumerate(prompts)]
    engine = Engine(runner, share_prefixes=False, step_tokens=512)
    began = clock()
    answers(engine, asked)
    return clock() - began


def generated(
    model: torch.nn.Module,
    prompts: list[tuple[int, ...]],
    *,
    tokens: int,
    clock: Clock = time.process_time,
) -> float:
    """The same by transformers' `generate` of the whole batch."""
    ids = torch.tensor(prompts, device=model.device)
    began = clock()
    with torch.no_grad():
        model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
    return clock() - began


def continuous(
    model: torch.nn.Module,
    prompts: list[tuple[int, ...]],
    *,
    tokens: int,
    clock: Clock = time.process_time,
) -> float:
    """The same by transformers' continuous batching; its start is not counted."""
    chosen = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0, use_cache=True
    )
    manager = model.init_continuous_batching(generation_config=chosen)  # type: ignore[operator]
    manager.start()
    try:
        manager.add_requests([[1] * 8], max_new_tokens=1)
        next(iter(manager))
        began = clock()
        manager.add_requests([list(each) for each in prompts], max_new_tokens=tokens)
        left = len(prompts)
        for result in manager:
            left -= bool(result is not None and result.is_finished())
            if not left:
                break
        return clock() - began
    finally:
        manager.stop(block=True)


@torch.no_grad()
def losses(runner: Runner, rows: torch.Tensor) -> torch.Tensor:
    """Of each token but the first of rows [B, T], by the served products."""
    found = []
    for row in rows[:, None]:
        positions = torch.arange(row.shape[1])[None]
        batch = {"input_ids": row, "position_ids": positions}
        hidden = hidden_of(runner.model, batch, kernel=Rows(least=runner.least))[0]
        logits = runner.logits(hidden)[:-1]
        found.append(torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="none"))
    return torch.cat(found)


def costs(folder: Path, runner: Runner, other: Runner) -> dict[str, float]:
    """What `other` adds to the loss, over 2,048 tokens of this project's guides."""
    guides = sorted((Path(__file__).parent.parent / "docs" / "guide").glob("*.md"))
    text = "\n".join(each.read_text(encoding="utf-8") for each in guides)
    ids = load_tokenizer(folder).encode(text).ids[:2048]
    rows = torch.tensor(ids).view(-1, 256)
    before, after = losses(runner, rows), losses(other, rows)
    more = after - before
    error = float(more.std() / len(more) ** 0.5)
    return {
        "loss": round(float(before.mean()), 4),
        "added": round(float(more.mean()), 4),
        "paired error": round(error, 4),
    }


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
    parser.add_argument("--also-int8", action="store_true", help="int8 rows beside our float32")
    parser.add_argument("--continuous", action="store_true", help="beside continuous batching")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    folder = model_directory(chosen.model)
    runner = Runner(load(folder, precision=chosen.precision), num_blocks=128)
    plain = None
    if chosen.also_inexact:
        plain = Runner(load(folder, precision=chosen.precision), num_blocks=128, exact=False)
    short = None
    if chosen.also_int8:
        short = Runner(load(folder), num_blocks=128, int8=True)
        print(json.dumps({"int8": str(short.report), **costs(folder, runner, short)}), flush=True)
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
            more = compared(ours, without, rounds=chosen.rounds)
            row["exact costs"] = round(1 / statistics.median(more), 3)
        if short is not None:
            eights = partial(served, short, prompts, tokens=chosen.tokens)
            gains = compared(eights, ours, rounds=chosen.rounds)
            row["int8 / float32"] = round(statistics.median(gains), 3)
        if chosen.continuous:
            batched = partial(continuous, model, prompts, tokens=chosen.tokens)
            gains = compared(ours, batched, rounds=chosen.rounds)
            row["ratio to continuous batching"] = round(statistics.median(gains), 3)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
