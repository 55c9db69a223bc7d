"""Completions for GRPO by the engine: transformers' own, drawn by their keys, in any company."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shoal.models.anatomy import canonical_parameters
from shoal.models.huggingface import build_reference
from shoal.models.stored import InMemory
from shoal.serve.request import Sampling
from shoal.serve.rollouts import Rollouts
from shoal.serve.sampler import choose
from shoal.tasks.playing import Wanted, Written
from unit.models.tiny_models import config_of

PROMPTS = [[5, 6, 7], [9], [3, 1, 4, 1, 5], [8, 8]]
AUTO = "AutoModelForCausalLM"


def wanted(count: int = 12) -> list[Wanted]:
    """Of each prompt three, the last by the likeliest tokens."""
    return [Wanted(PROMPTS[n // 3 % 4], n // 3, n % 3, n % 3 == 2) for n in range(count)]


def said(rollouts: Rollouts, some: list[Wanted], **settings: Any) -> list[Written]:
    heard: list[float] = []
    found = rollouts(some, **{"tokens": 6, "end": None, "alive": heard.append, **settings})
    assert heard[-1] == 1.0 and heard == sorted(heard)
    return found


@torch.no_grad()
def by_transformers(model: nn.Module, one: Wanted, tokens: int) -> tuple[list[int], list[float]]:
    """Whole rows, each alone, through the model as transformers has it."""
    ids, logs = list(one.prompt), []
    sampling = Sampling(
        max_tokens=1, temperature=0.0 if one.likeliest else 1.0, seed=one.seed, index=one.index
    )
    for _ in range(tokens):
        logits: Tensor = model(torch.tensor([ids])).logits[0, -1]
        token = choose(logits.numpy(), sampling=sampling, position=len(ids))
        logs.append(float(logits.double().log_softmax(-1)[token]))
        ids.append(token)
    return ids[len(one.prompt) :], logs


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3_moe"])
def test_what_is_said_is_what_transformers_says_by_the_same_draws(family: str) -> None:
    torch.manual_seed(1)
    model = build_reference(config_of(family), auto_class=AUTO).eval()
    rollouts = Rollouts(
        model.config, auto_class=AUTO, weights=lambda: InMemory(canonical_parameters(model))
    )
    found = said(rollouts, wanted())
    for one, written in zip(wanted(), found, strict=True):
        tokens, logs = by_transformers(model, one, 6)
        assert list(written.tokens) == tokens
        assert list(written.logs) == pytest.approx(logs, abs=2e-5)
    # alone, and in another order: the same bits
    assert [said(rollouts, [one])[0] for one in wanted()] == found
    assert said(rollouts, wanted()[::-1]) == found[::-1]


def test_completions_follow_the_weights_and_end_at_the_end() -> None:
    torch.manual_seed(2)
    model = build_reference(config_of("llama"), auto_class=AUTO).eval()
    kept = {name: each.detach().clone() for name, each in canonical_parameters(model).items()}
    rollouts = Rollouts(
        model.config, auto_class=AUTO, weights=lambda: InMemory(canonical_parameters(model))
    )
    before = said(rollouts, wanted())
    with torch.no_grad():
        for each in model.parameters():
            each.mul_(1.5)
    changed = said(rollouts, wanted())
    assert changed != before
    with torch.no_grad():
        for name, each in canonical_parameters(model).items():
            each.copy_(kept[name])
    assert said(rollouts, wanted()) == before
    end = before[0].tokens[2]
    for whole, cut in zip(before, said(rollouts, wanted(), end=end), strict=True):
        length = list(whole.tokens).index(end) + 1 if end in whole.tokens else 6
        assert list(cut.tokens) == list(whole.tokens)[:length]


def test_more_prompts_than_run_at_once() -> None:
    torch.manual_seed(3)
    model = build_reference(config_of("llama"), auto_class=AUTO).eval()
    rollouts = Rollouts(
        model.config, auto_class=AUTO, weights=lambda: InMemory(canonical_parameters(model))
    )
    many = said(rollouts, wanted(150), tokens=3)
    assert many[100:112] == said(rollouts, wanted(150)[100:112], tokens=3)
    assert rollouts([], tokens=3, end=None, alive=lambda done: None) == []
