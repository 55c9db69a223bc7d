"""Proof that an answer does not depend on company: random requests together against each alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from shoal.models.anatomy import head_parameters, hidden_of, logits_of
from shoal.observe.lasting import Lasting
from shoal.serve.cache import Cache, Rows
from shoal.serve.divided import Divided
from shoal.serve.engine import Engine
from shoal.serve.request import Request, Sampling, Scored
from shoal.serve.runner import Runner
from shoal.serve.scheduler import blocks_for
from shoal.tasks.losses import TokenCrossEntropy
from shoal.tasks.task import Output


@dataclass(frozen=True)
class Condition:
    """A way to serve all requests at once."""

    name: str
    step_tokens: int = 128
    share_prefixes: bool = True
    most_guesses: int = 0
    tight: bool = False
    """So few blocks that requests are preempted."""
    twice: bool = False
    """Everything was served before, so prefixes are found."""
    one_thread: bool = False
    """Where the others have several."""


CONDITIONS = (
    Condition("together"),
    Condition("chunks of 16", step_tokens=16, share_prefixes=False),
    Condition("prefixes found", twice=True),
    Condition("preempted", tight=True),
    Condition("guesses", most_guesses=4),
    Condition("one thread", one_thread=True),
)


Answers = Mapping[str, tuple[Scored, ...]]
"""By the name of the request."""


@dataclass
class Found:
    """What a condition gave."""

    condition: str
    requests: int
    different: int
    """Requests of which a token or a bit of a log-probability differs from the answer alone."""
    steps: int
    preemptions: int = 0
    cached_tokens: int = 0
    taken_tokens: int = 0
    kills: int = 0
    """Replicas that were killed in the middle of it."""


@dataclass
class Training:
    """Log-probabilities of served tokens beside minus the training's loss of each."""

    tokens: int
    different: int
    """Of which a bit differs."""
    largest: float


@dataclass
class Certificate:
    """All conditions of one model on one machine."""

    model: str
    products: str
    found: list[Found] = field(default_factory=list)
    training: Training | None = None

    @property
    def proven(self) -> bool:
        """Whether no bit differed."""
        agrees = self.training is None or self.training.different == 0
        return agrees and all(each.different == 0 for each in self.found)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "proven": self.proven}

    def __str__(self) -> str:
        lines = [f"{self.model}: {self.products}"]
        for each in self.found:
            lines.append(
                f"  {each.condition}: {each.different} of {each.requests} answers differ "
                f"({each.steps} steps, {each.preemptions} preemptions, {each.cached_tokens} tokens "
                f"found, {each.taken_tokens} guesses right"
                + (f", {each.kills} kills)" if each.kills else ")")
            )
        if self.training is not None:
            one = self.training
            lines.append(
                f"  training's loss of the same tokens: {one.different} of {one.tokens} differ "
                f"(at most by {one.largest:.1e})"
            )
        verdict = "proven: the same bits alone and in company" if self.proven else "NOT proven"
        return "\n".join([*lines, verdict])


def certify(
    runner: Runner,
    *,
    name: str,
    num_requests: int,
    seed: int = 0,
    most_prompt: int = 160,
    most_made: int = 24,
    conditions: Sequence[Condition] = CONDITIONS,
    also: Callable[[Sequence[Request], Answers], list[Found]] | None = None,
    told: Lasting | None = None,
) -> Certificate:
    """Serve random requests alone, then together under each condition; count what differs.

    `also`: conditions that need more than one process.
    """
    requests = list(
        _requests(
            runner, count=num_requests, seed=seed, most_prompt=most_prompt, most_made=most_made
        )
    )
    told = told or Lasting(lambda text: None)
    alone: dict[str, tuple[Scored, ...]] = {}
    for number, request in enumerate(requests):
        alone.update(answers(Engine(runner, share_prefixes=False), [request]))
        told.at((number + 1) / num_requests)
    result = Certificate(name, str(runner.report))
    for condition in conditions:
        told.begin(condition.name)
        result.found.append(judged(runner, requests, alone, condition, told=told))
    if also is not None:
        result.found += also(requests, alone)
    told.begin("the training's loss of what was served")
    result.training = against_training(runner, requests, alone, told=told)
    return result


@torch.no_grad()
def against_training(
    runner: Runner,
    requests: Sequence[Request],
    served: dict[str, tuple[Scored, ...]],
    *,
    told: Lasting,
) -> Training:
    """The loss that training has of what was served, by its own forward of whole rows.

    The forward and the loss are training's (models/anatomy.py, tasks/losses.py); its products and
    the sums of its attention are the exact ones.
    """
    model = runner.model
    kernel = Rows(block_tokens=runner.cache.block_tokens, least=runner.least)
    loss = TokenCrossEntropy(logits_of(model), head_parameters(model))
    tokens = different = 0
    largest = 0.0
    for number, request in enumerate(requests):
        told.at(number / len(requests))
        made = [each.token for each in served[request.id]]
        row = [*request.prompt, *made]
        length = len(row) + -len(row) % runner.multiple
        ids = torch.zeros(1, length, dtype=torch.long)
        ids[0, : len(row)] = torch.tensor(row)
        labels = torch.full((1, length), -100)
        first = len(request.prompt) - 1
        labels[0, first : len(row) - 1] = torch.tensor(made)
        batch = {"input_ids": ids, "position_ids": torch.arange(length)[None]}
        hidden = hidden_of(model, batch, kernel=kernel)
        scores = loss.each(Output(hidden, {"labels": labels}, loss))
        found = -scores.losses[0, first : len(row) - 1]
        wanted = torch.tensor([each.logprob for each in served[request.id]], dtype=found.dtype)
        tokens += len(made)
        different += int((found != wanted).sum())
        largest = max(largest, float((found - wanted).abs().max()))
    return Training(tokens, different, largest)


def judged(
    runner: Runner | Divided,
    requests: Sequence[Request],
    alone: Answers,
    condition: Condition,
    *,
    told: Lasting,
) -> Found:
    """What serving all `requests` at once under `condition` gives, beside each `alone`."""
    whole, threads = runner.cache, torch.get_num_threads()
    if condition.tight:
        size = whole.block_tokens
        most = max(len(each.prompt) + each.sampling.max_tokens for each in requests)
        runner.cache = Cache(blocks_for(most, size) + 2, size)
    try:
        engine = Engine(
            runner,
            step_tokens=condition.step_tokens,
            share_prefixes=condition.share_prefixes,
            most_guesses=condition.most_guesses,
        )
        if condition.one_thread:
            torch.set_num_threads(1)
        if condition.twice:
            answers(engine, requests, told=told)
        found = answers(engine, requests, told=told)
    finally:
        runner.cache = whole
        torch.set_num_threads(threads)
    counters = engine.counters
    return Found(
        condition.name,
        len(requests),
        sum(found[each.id] != alone[each.id] for each in requests),
        counters.steps,
        counters.preemptions,
        counters.prefix_hits,
        counters.taken_tokens,
    )


def answers(
    engine: Engine, requests: Sequence[Request], *, told: Lasting | None = None
) -> dict[str, tuple[Scored, ...]]:
    """Serve `requests` together to their ends: the tokens of each, with their scores."""
    made: dict[str, tuple[Scored, ...]] = {each.id: () for each in requests}
    ended = 0
    for request in requests:
        engine.submit(request)
    while not engine.idle:
        for event in engine.step():
            made[event.id] = made[event.id] + event.tokens
            ended += event.finish is not None
        if told is not None:
            told.at(ended / len(requests))
    return made


def _requests(
    runner: Runner, *, count: int, seed: int, most_prompt: int, most_made: int
) -> Iterator[Request]:
    """Requests of every kind: long and short, greedy and drawn, some with the same beginning."""
    draw = random.Random(seed)
    vocabulary, context = runner.sizes.vocabulary, runner.sizes.context
    most_made = min(most_made, context // 4)
    most_prompt = min(most_prompt, context - most_made)
    stem = [draw.randrange(vocabulary) for _ in range(most_prompt)]
    for number in range(count):
        length = draw.randint(1, most_prompt)
        own = [draw.randrange(vocabulary) for _ in range(length)]
        prompt = [*stem[: length // 2], *own[length // 2 :]] if draw.random() < 0.5 else own
        if draw.random() < 0.3:
            prompt = (own[:5] * most_prompt)[:length]  # repeats itself: guesses come true
        yield Request(
            id=f"r{number}",
            prompt=tuple(prompt),
            sampling=Sampling(
                max_tokens=draw.randint(1, most_made),
                temperature=draw.choice((0.0, 0.0, 0.7, 1.3)),
                top_k=draw.choice((0, 0, 40)),
                top_p=draw.choice((1.0, 0.9)),
                min_p=draw.choice((0.0, 0.02)),
                frequency_penalty=draw.choice((0.0, 0.0, 0.5)),
                seed=draw.getrandbits(40),
                logprobs=2,
            ),
        )
