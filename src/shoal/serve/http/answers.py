"""From a client's fields to requests, and from their pieces to bodies of OpenAI's form."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from shoal.serve.choice import Choice, Piece
from shoal.serve.http.errors import Refused, refused
from shoal.serve.http.service import Service
from shoal.serve.request import Request, Sampling, Scored

Gone = Callable[[], Awaitable[bool]]

_LOOK_SECONDS = 0.1
"""How often somebody looks whether the client is still there."""


@dataclass
class Asked:
    """One choice of an answer: what the engine is asked, and what its client has seen of it."""

    request: Request
    choice: Choice


def asked(
    service: Service,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    n: int,
    stop: str | list[str] | None,
    adapter: str | None,
) -> list[Asked]:
    """The `n` choices to one prompt; their draws differ by the index."""
    from msgspec.structs import replace

    stops = [stop] if isinstance(stop, str) else stop or []
    made = []
    for index in range(n):
        request = Request(
            id=uuid.uuid4().hex,
            prompt=tuple(prompt),
            sampling=replace(sampling, index=index),
            adapter=adapter,
        )
        choice = Choice(service.tokenizer, prompt, stops, sampling.stop_tokens)
        made.append(Asked(request, choice))
    return made


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def pieces(
    service: Service, choices: Sequence[Asked], *, gone: Gone
) -> AsyncIterator[tuple[int, Piece]]:
    """(number of the choice, piece) as they come, until all are finished.

    Leaving early, or a client that is gone, cancels what is still computed. Raises Refused.
    """
    queue: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()

    async def follow(number: int, each: Asked) -> None:
        try:
            async with contextlib.aclosing(service.events(each.request)) as events:
                async for event in events:
                    queue.put_nowait((number, each.choice.add(event)))
                    if each.choice.finish is not None:
                        return
        except Exception as error:
            queue.put_nowait((number, error))

    tasks = [asyncio.create_task(follow(*each)) for each in enumerate(choices)]
    try:
        left = len(choices)
        while left:
            try:
                number, piece = await asyncio.wait_for(queue.get(), _LOOK_SECONDS)
            except TimeoutError:
                if await gone():
                    raise ClientGone from None
                continue
            if isinstance(piece, Exception):
                raise piece
            left -= piece.finish is not None
            yield number, piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass
class Whole:
    """A finished choice."""

    text: str = ""
    scored: list[Scored] = field(default_factory=list)
    prompt: list[Scored] = field(default_factory=list)
    finish: str = "stop"


async def whole(service: Service, choices: Sequence[Asked], *, gone: Gone) -> list[Whole]:
    """All choices at their ends."""
    found = [Whole() for _ in choices]
    async for number, piece in pieces(service, choices, gone=gone):
        one = found[number]
        one.text += piece.text
        one.scored += piece.scored
        one.prompt += piece.prompt
        one.finish = piece.finish or one.finish
    return found


def usage(choices: Sequence[Asked]) -> dict[str, Any]:
    """Tokens of prompts and answers; a prompt with several answers counts once."""
    prompts = {
        tuple(each.request.prompt): 0 for each in choices if each.request.sampling.index == 0
    }
    first = [each for each in choices if each.request.sampling.index == 0]
    prompt_tokens = sum(len(each.request.prompt) for each in first) if prompts else 0
    made = sum(each.choice.num_tokens for each in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": made,
        "total_tokens": prompt_tokens + made,
        "prompt_tokens_details": {"cached_tokens": sum(e.choice.cached_tokens for e in first)},
    }


def head(kind: str, model: str, *, seed: int) -> dict[str, Any]:
    """What every body begins with; `seed` repeats the answer."""
    prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": f"seed-{seed}",
        "seed": seed,
    }


def chat_logprobs(service: Service, scored: Sequence[Scored]) -> dict[str, Any]:
    """OpenAI's form for chats."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = service.token_text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    content = [
        {**entry(s.token, s.logprob), "top_logprobs": [entry(*pair) for pair in s.top]}
        for s in scored
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    service: Service, scored: Sequence[Scored | int], *, offset: int
) -> dict[str, Any]:
    """OpenAI's older form; a plain id is a token that nothing came before."""
    found: dict[str, list[Any]] = {
        key: [] for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    }
    for each in scored:
        token = each if isinstance(each, int) else each.token
        text = service.token_text(token)
        found["tokens"].append(text)
        found["text_offset"].append(offset)
        offset += len(text)
        if isinstance(each, int):
            found["token_logprobs"].append(None)
            found["top_logprobs"].append(None)
        else:
            found["token_logprobs"].append(each.logprob)
            top = {service.token_text(token): value for token, value in each.top}
            found["top_logprobs"].append(top or {text: each.logprob})
    return found


def event_line(body: dict[str, Any] | str) -> str:
    """One server-sent event."""
    text = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)
    return f"data: {text}\n\n"


async def stream(
    lines: AsyncIterator[str],
) -> AsyncIterator[str]:
    """Lines of a stream; an error becomes its last event, as nothing else can be said by then."""
    try:
        async for line in lines:
            yield line
    except ClientGone:
        return
    except Exception as error:
        yield event_line(refused(error).body())
    yield event_line("[DONE]")


async def first_of(lines: AsyncIterator[str]) -> AsyncIterator[str]:
    """The same lines, the first already made: an error before it has a status of its own."""
    try:
        first = await anext(lines)
    except StopAsyncIteration:
        raise Refused("nothing was made", status=500) from None

    async def rest() -> AsyncIterator[str]:
        yield first
        async for line in lines:
            yield line

    return rest()
