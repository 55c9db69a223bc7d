"""What is asked of the engine, and what it says: plain data, to and from JSON; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

Finish = Literal["stop", "length", "abort", "error"]


class Sampling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a token is chosen; a choice depends on these, the text so far and its position only."""

    max_tokens: int
    temperature: float = 1.0
    """0 takes the likeliest, of equals the lowest id."""
    top_k: int = 0
    """0: all."""
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int = 0
    index: int = 0
    """Of several answers to one prompt."""
    stop_tokens: tuple[int, ...] = ()
    ignore_end: bool = False
    """Go on after the model's end token."""
    logprobs: int = -1
    """Likeliest tokens told beside each chosen one; -1: not even its own."""
    prompt_logprobs: int = -1
    """The same of each token of the prompt."""
    schema: str | None = None
    """JSON schema that the answer follows; empty: any JSON."""


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One prompt with its settings."""

    id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    so_far: tuple[int, ...] = ()
    """Tokens made before, by a replica that is gone: the answer goes on after them."""
    adapter: str | None = None
    pooled: bool = False
    """Nothing is made: a row of numbers is the answer (the last token's hidden state, classes)."""
    types: tuple[int, ...] = ()
    """Of each token, which of two texts it is of, where the model wants to know."""


class Scored(msgspec.Struct, frozen=True):
    """A token's natural logarithm of its probability, and those of the likeliest."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """What a step did for one request."""

    id: str
    index: int = 0
    """Of the first token among those of the answer."""
    tokens: tuple[Scored, ...] = ()
    prompt: tuple[Scored, ...] = ()
    """Scores of further tokens of the prompt, from its second on."""
    finish: Finish | None = None
    problem: str = ""
    hidden: tuple[float, ...] = ()
    cached_tokens: int = 0
    """Of the prompt, not computed again."""


@dataclass
class Counters:
    """What happened since the engine began."""

    steps: int = 0
    prompt_tokens: int = 0
    made_tokens: int = 0
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    guessed_tokens: int = 0
    taken_tokens: int = 0
