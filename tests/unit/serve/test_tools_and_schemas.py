"""Tools and formats: calls told from text as it comes, and answers that cannot leave a schema."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from served import NAME, Served

from shoal.serve.tools import Call, Part, Reader

TALK: list[Any] = [{"role": "user", "content": "Which key is silver?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"days": {"type": "integer"}, "wet": {"type": "boolean"}},
            "required": ["days", "wet"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "sure": {"type": "boolean"}},
    "required": ["colour", "sure"],
    "additionalProperties": False,
}


def read(text: str, *, size: int, only_calls: bool = False) -> Part:
    reader = Reader(["weather", "time"], only_calls=only_calls)
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    parts = [reader.add(each, finished=False) for each in pieces]
    parts.append(reader.add("", finished=True))
    calls = tuple(call for part in parts for call in part.calls)
    return Part("".join(part.content for part in parts), calls)


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_are_told_from_text_in_pieces_of_any_size(size: int) -> None:
    one = '<tool_call>\n{"name": "weather", "arguments": {"days": 2}}\n</tool_call>'
    two = '<tool_call>{"name": "time", "arguments": {}}</tool_call>'
    weather, clock = Call("weather", '{"days": 2}'), Call("time", "{}")
    assert read(f"Let me look. {one}\n{two}", size=size) == Part("Let me look. ", (weather, clock))
    assert read('{"name": "time", "parameters": {}}', size=size) == Part("", (clock,))
    for text in (
        one[:-4],  # cut
        "a < b and <tool_cal",
        '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "weather"}</tool_call>',
        '{"name": "other"}',
    ):
        assert read(text, size=size) == Part(text)


def test_a_required_call_parses_and_ends_the_answer(served: Served) -> None:
    """The model is random: only the grammar makes it write a call."""
    client = served.client()
    how: Any = {"model": NAME, "messages": TALK, "tools": [WEATHER], "max_tokens": 200, "seed": 4}
    answer = client.chat.completions.create(**how, tool_choice="required")
    choice = answer.choices[0]
    if choice.finish_reason == "length":
        pytest.fail("a random model took more than 200 tokens for a call; choose another seed")
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert choice.message.tool_calls is not None
    call: Any = choice.message.tool_calls[0]
    found = json.loads(call.function.arguments)
    assert (
        call.function.name == "weather"
        and type(found["days"]) is int
        and set(found)
        == {
            "days",
            "wet",
        }
    )
    streamed: list[Any] = []
    named: Any = {"type": "function", "function": {"name": "weather"}}
    for chunk in client.chat.completions.create(**how, tool_choice=named, stream=True):
        streamed += chunk.choices[0].delta.tool_calls or ()
    assert [each.function.arguments for each in streamed] == [call.function.arguments]


def test_a_call_that_is_cut_is_no_call(served: Served) -> None:
    how: Any = {"model": NAME, "messages": TALK, "tools": [WEATHER], "max_tokens": 3, "seed": 4}
    choice = served.client().chat.completions.create(**how, tool_choice="required").choices[0]
    assert choice.finish_reason == "length" and choice.message.tool_calls is None


def test_an_answer_follows_its_schema(served: Served) -> None:
    client = served.client()
    form: Any = {"type": "json_schema", "json_schema": {"name": "colour", "schema": SCHEMA}}
    for seed in range(4):
        answer = client.chat.completions.create(
            model=NAME, messages=TALK, response_format=form, max_tokens=120, seed=seed
        )
        assert answer.choices[0].finish_reason == "stop"
        found = json.loads(answer.choices[0].message.content or "")
        assert found["colour"] in ("red", "green") and type(found["sure"]) is bool


@pytest.mark.parametrize(
    "given, words",
    [
        ({"response_format": {"type": "json_schema"}}, "json_schema is missing"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {"type": "nothing"}},
                }
            },
            "the schema cannot be followed",
        ),
        ({"tool_choice": "required"}, "goes with tools"),
        (
            {
                "tools": [WEATHER],
                "tool_choice": {"type": "function", "function": {"name": "other"}},
            },
            "there is no tool 'other'",
        ),
    ],
)
def test_what_cannot_be_followed_is_refused(served: Served, given: Any, words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        served.client().chat.completions.create(model=NAME, messages=TALK, max_tokens=8, **given)
