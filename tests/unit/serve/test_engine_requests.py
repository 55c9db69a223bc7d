"""What becomes of requests in the engine: cancelled ones, and those that can never be served."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.errors import ModelError, UserError
from shoal.serve.engine import Engine
from shoal.serve.request import Request, Sampling
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
