"""Answers of replicas whose layers are divided over ranks: the same bits under every degree."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from served import NAME, write_model

from shoal.config.serve import serve_settings
from shoal.errors import ConfigError, ModelError, WorkerError
from shoal.launch.certifying import certify_folder
from shoal.serve.certificate import Answers, answers, certify
from shoal.serve.divided import Divided
from shoal.serve.engine import Engine
from shoal.serve.int8 import cannot_multiply
from shoal.serve.part import Part
from shoal.serve.request import Request, Sampling
from shoal.serve.runner import Runner
from unit.models.tiny_models import VOCABULARY, real_model

FAMILIES = ("phi3", "gpt2", "gemma2", "qwen3", "llama", "gpt_neox")
IN_LANES = {"phi3": {"intermediate_size": 64}}
"""Its gate is a part of rows that are longer: of 32 values or a multiple."""


def model_of(family: str) -> Any:
    return real_model(family, **IN_LANES.get(family, {}))


def runner_of(model: Any, part: Part, *, int8: bool = False) -> Runner:
    return Runner(model, num_blocks=60, block_tokens=32, part=part, int8=int8)


def divided(family: str, degree: int, pieces: int, *, int8: bool = False) -> Divided:
    make = partial(runner_of, int8=int8)
    return Divided(partial(model_of, family), make, degree=degree, pieces=pieces, threads=1)


def requests() -> list[Request]:
    return [
        Request(
            id=str(number),
            prompt=tuple((7 * number + 3 * at) % VOCABULARY for at in range(4 + 9 * number)),
            sampling=Sampling(max_tokens=8, temperature=number % 2 * 0.8, seed=number, logprobs=2),
        )
        for number in range(6)
    ]


def alone(runner: Runner) -> Answers:
    found: dict[str, Any] = {}
    for request in requests():
        found.update(answers(Engine(runner, share_prefixes=False), [request]))
    return found


@pytest.mark.quick(3)
@pytest.mark.parametrize("int8", [False, True], ids=["full", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_answer_with_the_bits_of_one(family: str, int8: bool) -> None:
    if int8 and (why := cannot_multiply()) is not None:
        pytest.skip(why)
    one = runner_of(model_of(family), Part(pieces=2), int8=int8)
    two = divided(family, 2, 2, int8=int8)
    assert one.exact and two.exact, str(two.report)
    assert two.sizes == one.sizes
    wanted = alone(one)
    assert answers(Engine(two, step_tokens=24), requests()) == wanted
    assert len({tuple(each.token for each in made) for made in wanted.values()}) > 1


def test_pieces_change_the_bits_and_nothing_else() -> None:
    """Else the test above would compare nothing."""
    torch.manual_seed(0)
    whole, cut = (alone(runner_of(real_model("llama"), Part(pieces=n))) for n in (1, 2))
    scores = [(a.logprob, b.logprob) for name in whole for a, b in zip(whole[name], cut[name])]
    assert any(a != b for a, b in scores)
    assert max(abs(a - b) for a, b in scores) < 1e-4


def test_a_fused_gate_of_another_width_is_not_called_exact() -> None:
    """Its activations have other bits where a loop leaves values over (seen: phi3 of 24)."""
    whole = runner_of(real_model("phi3"), Part(pieces=2))
    assert not whole.exact and "layers in parts have other bits" in str(whole.report)


def test_training_gives_the_same_log_probabilities() -> None:
    found = certify(
        runner_of(real_model("llama"), Part(pieces=2)),
        name="llama",
        num_requests=3,
        most_prompt=20,
        most_made=6,
    )
    assert found.proven and found.training is not None and found.training.tokens > 0, str(found)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_certificate_has_every_degree(tmp_path: Path) -> None:
    folder = write_model(tmp_path / NAME)
    settings = serve_settings(["threads=1", "pieces=2"])
    found = certify_folder(folder, settings=settings, num_requests=8, say=lambda line: None)
    assert found.proven, str(found)
    assert "tensor 2" in [each.condition for each in found.found]


def test_a_rank_that_fails_fails_the_step_and_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    two = divided("llama", 2, 2)
    (request, *_) = requests()
    engine = Engine(two)
    engine.submit(request)
    broken = two._runners[1]

    def fails(*_: object, **__: object) -> None:
        raise ValueError("a broken rank")

    monkeypatch.setattr(broken, "hidden", fails)
    with pytest.raises((ValueError, WorkerError), match="a broken rank"):
        engine.step()


@pytest.mark.parametrize(
    ("family", "pieces", "said"),
    [
        ("llama", 3, r"degrees that do: 1, 2"),
        ("mixtral", 2, r"a mixture of experts is served whole\n    leave serve.tensor"),
    ],
)
def test_models_that_cannot_be_divided_so(family: str, pieces: int, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        runner_of(real_model(family), Part(pieces=pieces))


def test_adapters_are_served_whole() -> None:
    with pytest.raises(ModelError, match=r"adapters are served whole: leave serve\.tensor"):
        Runner(
            real_model("llama"),
            num_blocks=8,
            block_tokens=32,
            part=Part(pieces=2),
            adapters={"mine": "nowhere"},
        )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tensor=2", "pieces=3"], "tensor: 2 does not divide pieces: 3"),
        (["tensor=2", "exact=off"], "exact: off goes with tensor: 1"),
        (["pieces=2", "adapters.mine=FOLDER"], "adapters are served whole"),
    ],
)
def test_settings_that_contradict_each_other(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        serve_settings(words)
