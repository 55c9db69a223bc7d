"""What becomes of requests in the engine: cancelled ones, and those that can never be served."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shoal.errors import ModelError, UserError
from shoal.serve.engine import Engine
from shoal.serve.request import Event, Request, Sampling
from shoal.serve.runner import Runner
from unit.models.tiny_models import VOCABULARY, real_model


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner(real_model("llama"), num_blocks=9, block_tokens=32)


def request(name: str, *, length: int = 40, **given: Any) -> Request:
    prompt = tuple(7 * n % VOCABULARY for n in range(length))
    sampling = Sampling(**{"max_tokens": 20, "temperature": 0.0, **given})
    return Request(id=name, prompt=prompt, sampling=sampling)


def test_a_cancelled_request_frees_its_blocks_at_once_and_harms_no_other(runner: Runner) -> None:
    engine = Engine(runner, share_prefixes=False)
    for name in ("a", "b", "c", "waits"):
        engine.submit(request(name, length=60))
    engine.step()
    held = engine.blocks.num_blocks - engine.blocks.num_free
    assert held == 6 and engine.num_running == 3 and engine.num_waiting == 1
    engine.cancel("b")
    assert engine.blocks.num_blocks - engine.blocks.num_free == 4
    engine.cancel("b")  # once more changes nothing
    engine.cancel("waits")
    done = set()
    while not engine.idle:
        done |= {event.id for event in engine.step() if event.finish}
    assert done == {"a", "c"} and engine.blocks.num_free == engine.blocks.num_blocks


def test_a_long_prompt_without_log_probabilities_in_bfloat16() -> None:
    """Steps of which no token is wanted have no logits, and numpy knows no bfloat16."""
    runner = Runner(real_model("llama").bfloat16(), num_blocks=9, block_tokens=32)
    engine = Engine(runner, step_tokens=16)
    engine.submit(request("a", length=60, max_tokens=3))
    made = [token.token for event in steps(engine) for token in event.tokens]
    whole = Engine(runner, step_tokens=64)
    whole.submit(request("a", length=60, max_tokens=3))
    assert made == [token.token for event in steps(whole) for token in event.tokens]
    assert len(made) == 3


def steps(engine: Engine) -> Iterator[Event]:
    while not engine.idle:
        yield from engine.step()


@pytest.mark.parametrize(
    "asked, words",
    [
        (request("a", length=0), "no tokens"),
        (request("a", length=250), "at most 256"),
        (request("a", logit_bias={VOCABULARY: 1.0}), f"model's {VOCABULARY}"),
        (request("a", schema="{}"), "no tokenizer is known"),
        (Request(id="a", prompt=(1,), sampling=Sampling(max_tokens=1), adapter="b"), "no adapter"),
    ],
)
def test_what_can_never_be_served_is_refused(runner: Runner, asked: Request, words: str) -> None:
    engine = Engine(runner)
    with pytest.raises(UserError, match=words):
        engine.submit(asked)
    assert engine.idle


def test_a_name_is_served_once_at_a_time(runner: Runner) -> None:
    engine = Engine(runner)
    engine.submit(request("a"))
    with pytest.raises(UserError, match="is being served already"):
        engine.submit(request("a"))


def test_rotary_positions_that_change_with_a_batch_end_where_they_change() -> None:
    """Beyond it an answer would depend on the longest row beside it."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    }
    model = real_model(
        "phi3",
        max_position_embeddings=256,
        original_max_position_embeddings=64,
        rope_parameters=rope,
    )
    assert Runner(model, num_blocks=4).sizes.context == 64


def test_a_model_that_is_no_decoder_is_refused() -> None:
    with pytest.raises(ModelError, match="only causal attention"):
        engine = Engine(Runner(real_model("bert"), num_blocks=4))
        engine.submit(request("a", length=3))
        engine.step()


def test_blocks_that_no_layer_looks_back_at_are_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer of this model sees 40 tokens: three blocks of 32 are enough, beside a chunk's."""

    def served(keeps: bool) -> tuple[int, dict[str, Any]]:
        model = real_model("mistral")
        model.config.sliding_window = 40
        runner = Runner(model, num_blocks=9, block_tokens=32)
        if keeps:
            runner.sizes = replace(runner.sizes, window=None)
        engine = Engine(runner, step_tokens=32)
        engine.submit(request("a", length=150, max_tokens=40, logprobs=1))
        held, made = 9, ()
        while not engine.idle:
            for event in engine.step():
                made += event.tokens
            if engine.num_running and len(made) > 5:
                held = min(held, engine.blocks.num_blocks - engine.blocks.num_free)
        assert engine.blocks.num_free == engine.blocks.num_blocks
        return held, {"made": made}

    fewest, made = served(keeps=False)
    most, wanted = served(keeps=True)
    assert fewest <= 3 < most and made == wanted


@pytest.mark.parametrize("count", [120, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.timeout(900)
def test_random_requests_leave_no_block_behind_and_memory_flat(runner: Runner, count: int) -> None:
    """Long and short, cancelled, preempted, with shared beginnings and with guesses."""
    draw = random.Random(1)
    engine = Engine(runner, step_tokens=64, most_guesses=3)
    stem = [draw.randrange(VOCABULARY) for _ in range(128)]
    submitted, ended, alive = 0, 0, list[str]()
    resident = list[int]()
    while submitted < count or not engine.idle:
        while submitted < count and len(alive) < 12:
            length = draw.randint(1, 128)
            own = [draw.randrange(VOCABULARY) for _ in range(length)]
            prompt = tuple(stem[:length] if draw.random() < 0.5 else own)
            sampling = Sampling(
                max_tokens=draw.randint(1, 12), temperature=draw.choice((0.0, 1.0)), seed=submitted
            )
            engine.submit(Request(id=str(submitted), prompt=prompt, sampling=sampling))
            alive.append(str(submitted))
            submitted += 1
        for event in engine.step():
            if event.finish:
                alive.remove(event.id)
                ended += 1
        if alive and draw.random() < 0.05:
            gone = alive.pop(draw.randrange(len(alive)))
            engine.cancel(gone)
            ended += 1
        if engine.counters.steps % 50 == 0:
            resident.append(resident_bytes())
    assert ended == count and engine.blocks.num_free == engine.blocks.num_blocks
    assert engine.counters.preemptions > 0 < engine.counters.prefix_hits
    # allocators round and keep: a leak of a block's tensors in each request would be 100 times this
    half = len(resident) // 2
    assert max(resident[half:]) - max(resident[: half + 1]) < 8 << 20
    assert all(value == 0 for value in engine.blocks._counts)
    assert len(engine.blocks._keys) <= engine.blocks.num_blocks


def resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
