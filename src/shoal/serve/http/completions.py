"""POST /v1/completions and /v1/chat/completions."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from shoal.serve.choice import Piece
from shoal.serve.http.answers import (
    Asked,
    Gone,
    Whole,
    asked,
    chat_logprobs,
    completion_logprobs,
    event_line,
    head,
    pieces,
    usage,
    whole,
)
from shoal.serve.http.errors import Refused
from shoal.serve.http.fields import ChatFields, CompletionFields, NamedTool, StreamOptions
from shoal.serve.http.service import Service
from shoal.serve.request import Scored
from shoal.serve.tools import Call, Part, Reader, schema_of


class Completion:
    """One call of /v1/completions: a choice for each prompt and each of `n`."""

    def __init__(self, service: Service, fields: CompletionFields) -> None:
        """Raises Refused."""
        self._service, self._fields = service, fields
        adapter = service.check_model(fields.model)
        self.choices: list[Asked] = []
        most = 16 if fields.max_tokens is None else fields.max_tokens
        logprobs = -1 if fields.logprobs is None else fields.logprobs
        for prompt in _prompts(service, fields.prompt):
            sampling = service.sampling(
                fields,
                prompt_tokens=len(prompt),
                max_tokens=most,
                logprobs=logprobs,
                prompt_logprobs=logprobs if fields.echo else -1,
            )
            self.seed = sampling.seed
            self.choices += asked(
                service, prompt, sampling, n=fields.n or 1, stop=fields.stop, adapter=adapter
            )

    def _echo(self, number: int) -> str:
        if not self._fields.echo:
            return ""
        prompt = self.choices[number].request.prompt
        return str(self._service.tokenizer.decode(list(prompt), skip_special_tokens=False))

    async def body(self, gone: Gone) -> dict[str, Any]:
        """The whole answer."""
        made = await whole(self._service, self.choices, gone=gone)
        return {
            **head("text_completion", self._fields.model, seed=self.seed),
            "choices": [self._choice(number, each) for number, each in enumerate(made)],
            "usage": usage(self.choices),
        }

    def _choice(self, number: int, one: Whole) -> dict[str, Any]:
        scores = None
        if self._fields.logprobs is not None:
            scored: list[Scored | int] = [*one.scored]
            if self._fields.echo:
                scored = [self.choices[number].request.prompt[0], *one.prompt, *scored]
            offset = 0
            scores = completion_logprobs(self._service, scored, offset=offset)
        return {
            "index": number,
            "text": self._echo(number) + one.text,
            "logprobs": scores,
            "finish_reason": one.finish,
        }

    async def lines(self, gone: Gone) -> AsyncIterator[str]:
        """The answer as a stream."""
        start = head("text_completion", self._fields.model, seed=self.seed)
        options = self._fields.stream_options or StreamOptions()
        begun: set[int] = set()
        offsets = [0] * len(self.choices)
        async for number, piece in pieces(self._service, self.choices, gone=gone):
            text, scored = piece.text, [*piece.prompt, *piece.scored]
            shown: list[Scored | int] = [*scored]
            if number not in begun:
                begun.add(number)
                text = self._echo(number) + text
                if self._fields.echo:
                    shown = [self.choices[number].request.prompt[0], *shown]
            scores = None
            if self._fields.logprobs is not None:
                scores = completion_logprobs(self._service, shown, offset=offsets[number])
                offsets[number] += sum(map(len, scores["tokens"]))
            elif not text and piece.finish is None:
                continue
            choice = {
                "index": number,
                "text": text,
                "logprobs": scores,
                "finish_reason": piece.finish,
            }
            yield event_line({**start, "choices": [choice], **_usage(options, self.choices)})
        if options.include_usage:
            yield event_line({**start, "choices": [], "usage": usage(self.choices)})


def _usage(options: StreamOptions, choices: Sequence[Asked]) -> dict[str, Any]:
    """The usage of a chunk: null before the last, unless it was asked for in each."""
    if options.continuous_usage_stats:
        return {"usage": usage(choices)}
    return {"usage": None} if options.include_usage else {}


def _prompts(service: Service, given: Any) -> list[list[int]]:
    """The prompts of a call: one or several, as text or as tokens. Raises Refused."""
    if isinstance(given, str) or isinstance(given[0], int):
        given = [given]
    found = [service.encode(each) if isinstance(each, str) else list(each) for each in given]
    for prompt in found:
        _check_prompt(service, prompt)
    return found


def _check_prompt(service: Service, prompt: Sequence[int]) -> None:
    vocabulary = int(service.replicas.facts["vocabulary"])
    if not prompt:
        raise Refused("prompt: it has no tokens; give at least one", param="prompt")
    if max(prompt) >= vocabulary:
        raise Refused(
            f"prompt: token {max(prompt)} is none of the model's {vocabulary}", param="prompt"
        )


class Chat:
    """One call of /v1/chat/completions."""

    def __init__(self, service: Service, fields: ChatFields, *, schema: str | None) -> None:
        """`schema`: what `schema_for` gave. Raises Refused."""
        self._service, self._fields = service, fields
        adapter = service.check_model(fields.model)
        if fields.top_logprobs is not None and not fields.logprobs:
            raise Refused("top_logprobs goes with logprobs: true", param="top_logprobs")
        self._tools = [] if fields.tool_choice == "none" else _tools(fields)
        shown = [each.model_dump(exclude_none=True) for each in fields.tools or ()]
        prompt = service.chat_prompt(fields.messages, tools=shown if self._tools else None)
        _check_prompt(service, prompt)
        most = fields.max_completion_tokens or fields.max_tokens
        self._wants = bool(fields.logprobs)
        sampling = service.sampling(
            fields,
            prompt_tokens=len(prompt),
            max_tokens=most,
            logprobs=(fields.top_logprobs or 0) if self._wants else -1,
            schema=schema,
        )
        self.seed = sampling.seed
        self.choices = asked(
            service, prompt, sampling, n=fields.n or 1, stop=fields.stop, adapter=adapter
        )

    async def _said(self, gone: Gone) -> AsyncIterator[tuple[int, Piece, Part, str | None]]:
        """(choice, piece, what its text is, finish): the one reader of streams and of wholes."""
        named = self._fields.tool_choice not in (None, "auto", "none")
        names = [each["name"] for each in self._tools]
        readers = [Reader(names, only_calls=named) for _ in self.choices]
        async for number, piece in pieces(self._service, self.choices, gone=gone):
            reader = readers[number]
            part = Part(piece.text)
            if self._tools:
                part = reader.add(piece.text, finished=piece.finish is not None)
            finish = piece.finish
            if finish == "stop" and reader.num_calls:
                finish = "tool_calls"
            yield number, piece, part, finish

    async def body(self, gone: Gone) -> dict[str, Any]:
        """The whole answer."""
        messages: list[dict[str, Any]] = [
            {"role": "assistant", "content": "", "refusal": None} for _ in self.choices
        ]
        scored: list[list[Scored]] = [[] for _ in self.choices]
        finishes: list[str | None] = [None for _ in self.choices]
        async for number, piece, part, finish in self._said(gone):
            message = messages[number]
            message["content"] += part.content
            if part.calls:
                message.setdefault("tool_calls", []).extend(map(_call, part.calls))
            scored[number] += piece.scored
            finishes[number] = finish
        for message in messages:
            if "tool_calls" in message and not message["content"].strip():
                message["content"] = None
        return {
            **head("chat.completion", self._fields.model, seed=self.seed),
            "choices": [
                {
                    "index": number,
                    "message": message,
                    "logprobs": chat_logprobs(self._service, own) if self._wants else None,
                    "finish_reason": finish,
                }
                for number, (message, own, finish) in enumerate(zip(messages, scored, finishes))
            ],
            "usage": usage(self.choices),
        }

    async def lines(self, gone: Gone) -> AsyncIterator[str]:
        """The answer as a stream."""
        start = head("chat.completion.chunk", self._fields.model, seed=self.seed)
        options = self._fields.stream_options or StreamOptions()
        begun: set[int] = set()
        calls = [0] * len(self.choices)
        async for number, piece, part, finish in self._said(gone):
            delta: dict[str, Any] = {"content": part.content} if part.content else {}
            if number not in begun:
                begun.add(number)
                delta = {"role": "assistant", "content": part.content}
            if part.calls:
                first = calls[number]
                calls[number] += len(part.calls)
                delta["tool_calls"] = [
                    {"index": first + at, **_call(call)} for at, call in enumerate(part.calls)
                ]
            scores = chat_logprobs(self._service, piece.scored) if self._wants else None
            if not delta and scores is None and finish is None:
                continue
            choice = {
                "index": number,
                "delta": delta,
                "logprobs": scores,
                "finish_reason": finish,
            }
            yield event_line({**start, "choices": [choice], **_usage(options, self.choices)})
        if options.include_usage:
            yield event_line({**start, "choices": [], "usage": usage(self.choices)})


def _call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def _tools(fields: ChatFields) -> list[dict[str, Any]]:
    """Tools that may be called, by name and parameters. Raises Refused."""
    tools = [each.function.model_dump() for each in fields.tools or ()]
    chosen = fields.tool_choice
    if chosen not in (None, "auto", "none") and not tools:
        raise Refused("tool_choice goes with tools", param="tool_choice")
    if isinstance(chosen, NamedTool):
        tools = [each for each in tools if each["name"] == chosen.function.name]
        if not tools:
            raise Refused(f"there is no tool {chosen.function.name!r}", param="tool_choice")
    return tools


async def schema_for(service: Service, fields: ChatFields) -> str | None:
    """The schema that an answer must follow: of its format, or of a call. Raises Refused."""
    given = fields.response_format
    if fields.tool_choice not in (None, "auto", "none"):
        return await service.schema(schema_of(_tools(fields)), param="tools")
    if given is None or given.type == "text":
        return None
    if given.type == "json_object":
        return await service.schema("", param="response_format")
    if given.json_schema is None:
        raise Refused("json_schema is missing", param="response_format.json_schema")
    text = json.dumps(given.json_schema.schema_)
    return await service.schema(text, param="response_format")
