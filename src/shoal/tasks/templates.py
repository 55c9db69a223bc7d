"""Chat templates: a conversation as the text that its model reads, and where the answers stand.

Rendered by transformers' own function, in its sandbox. Where a template marks answers
(`{% generation %}`), transformers says where they are; else they are found by rendering twice.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

from shoal.errors import DataError

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]
"""First character and the one after the last."""

PLAIN = """\
{%- if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\\n' }}{% endif %}
{%- for message in messages if message['role'] != 'system' %}
{{- message['role'].capitalize() + ':' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{ ' ' + message['content'] + (eos_token or '') }}{% endgeneration %}
{%- else %}{{ ' ' + message['content'] + '\\n' }}{% endif %}
{%- if message['role'] == 'assistant' and not loop.last %}{{ '\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}
"""
"""For models without one: roles by name, no token that a tokenizer would have to learn."""

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_OTHER = "\u2060"  # a word joiner: no answer begins or ends with it, and no template strips it


class Template:
    """A template, with the special tokens that it may name."""

    def __init__(
        self, text: str, *, tokens: Mapping[str, str], added: Collection[str] = ()
    ) -> None:
        """`tokens`: texts by name, such as eos_token; `added`: all that it never splits."""
        self.text, self._tokens, self._added = text, dict(tokens), set(added)

    def render(self, messages: Messages, *, tools: Any = None, prompt: bool = False) -> str:
        """The text; `prompt`: up to where an answer would begin. Raises DataError if refused."""
        text, _ = self._rendered(messages, tools=tools, add_generation_prompt=prompt)
        return text

    def answers(self, messages: Messages, *, tools: Any = None) -> tuple[str, list[Span]]:
        """The text, and where each answer stands in it: up to the next message."""
        if _MARKS.search(self.text):
            text, spans = self._rendered(messages, tools=tools, return_assistant_tokens_mask=True)
            return text, [(start, stop) for start, stop in spans if stop > start]
        text = self.render(messages, tools=tools)
        spans = [
            self._by_beginning(text, messages, number, tools=tools)
            or self._by_difference(text, messages, number, tools=tools)
            for number, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        return text, [(start, stop) for start, stop in spans if stop > start]

    def _by_beginning(
        self, text: str, messages: Messages, number: int, *, tools: Any
    ) -> Span | None:
        """Between what the model is shown and what it is to have written, if both begin `text`.

        None where a template writes earlier answers otherwise than the last.
        """
        try:
            shown = self.render(messages[:number], tools=tools, prompt=True)
            whole = self.render(messages[: number + 1], tools=tools)
        except DataError:  # refuses no messages at all, or an end there
            return None
        if not (whole.startswith(shown) and text.startswith(whole)):
            return None
        return len(shown), max(len(shown), len(whole))

    def _by_difference(self, text: str, messages: Messages, number: int, *, tools: Any) -> Span:
        """What is otherwise when the answer is another, with the token that ends it."""
        changed = [*messages]
        changed[number] = {"role": messages[number]["role"], "content": _OTHER}
        other = self.render(changed, tools=tools)
        if other == text:  # the template leaves it out
            return 0, 0
        start = _alike(text, other)
        most = min(len(text), len(other)) - start
        tail = _alike(reversed(text), reversed(other))
        stop = len(text) - min(tail, most)
        rest = text[stop:].lstrip()
        ending = [each for each in self._added if rest.startswith(each)]
        if ending:
            stop = len(text) - len(rest[max(map(len, ending)) :].lstrip())
        return start, stop

    def _rendered(self, messages: Messages, *, tools: Any, **how: Any) -> tuple[str, list[Span]]:
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        given: dict[str, Any] = {**self._tokens, **how}
        try:
            rendered: Any = render_jinja_template(
                [[dict(message) for message in messages]],
                tools=tools,
                chat_template=self.text,
                **given,
            )
        except TemplateError as error:
            raise DataError(f"the chat template refuses it: {error}") from None
        except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise DataError(f"the chat template fails at it: {error!r}") from None
        (text,), spans = rendered
        return str(text), [(start, stop) for each in spans for start, stop in each]


def _alike(one: Iterable[str], other: Iterable[str]) -> int:
    """How many first characters are the same."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other)))


def masked(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Of each token, by its characters, whether any of them stands in a span; spans ascend."""
    found, number = [], 0
    for start, stop in offsets:
        while number < len(spans) and spans[number][1] <= start:
            number += 1
        found.append(number < len(spans) and stop > spans[number][0] and stop > start)
    return found
