"""Calls of tools in what a model writes: Hermes' <tool_call> blocks, and bare JSON objects.

Text before the first call is content; a call that was cut stays text, as it says nothing whole.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_BEGIN, _END = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Call:
    """A function that the model calls; `arguments` is JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Part:
    """What a piece of text turned out to be."""

    content: str = ""
    calls: tuple[Call, ...] = ()


def call_of(text: str) -> Call | None:
    """The call that a JSON text is: {"name": ..., "arguments" or "parameters": {...}}."""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(tree, dict) or not isinstance(tree.get("name"), str):
        return None
    arguments = tree.get("arguments", tree.get("parameters"))
    if not isinstance(arguments, dict):
        return None
    return Call(tree["name"], json.dumps(arguments, ensure_ascii=False))


@dataclass
class Reader:
    """Tells content from calls as text comes. `only_calls`: all of it is one call, by a grammar."""

    names: Sequence[str]
    only_calls: bool = False
    num_calls: int = 0
    _held: str = ""
    _bare: bool | None = None
    """Whether the answer begins as a JSON object; None: nothing of it came yet."""

    def add(self, text: str, *, finished: bool) -> Part:
        """A piece of text; `finished`: the last one."""
        if self._bare is None and text.strip():
            self._bare = self.only_calls or text.lstrip().startswith("{")
        self._held += text
        if self._bare:
            return self._all_or_nothing() if finished else Part()
        return self._blocks(finished=finished)

    def _all_or_nothing(self) -> Part:
        held, self._held = self._held, ""
        call = self._known(call_of(held))
        return Part(calls=(call,)) if call is not None else Part(held)

    def _known(self, call: Call | None) -> Call | None:
        if call is None or call.name not in self.names:
            return None
        self.num_calls += 1
        return call

    def _blocks(self, *, finished: bool) -> Part:
        content, calls = "", []
        while True:
            at = self._held.find(_BEGIN)
            if at < 0:
                keep = 0 if finished else _begun(self._held, _BEGIN)
                shown = self._held[: len(self._held) - keep]
                self._held = self._held[len(shown) :]
                # blanks between calls are no content
                content += "" if self.num_calls and not shown.strip() else shown
                break
            before = self._held[:at]
            content += "" if self.num_calls and not before.strip() else before
            end = self._held.find(_END, at)
            if end < 0:
                self._held = self._held[at:]
                if finished:
                    content, self._held = content + self._held, ""
                break
            call = self._known(call_of(self._held[at + len(_BEGIN) : end]))
            whole = self._held[at : end + len(_END)]
            self._held = self._held[end + len(_END) :]
            if call is None:
                content += whole
            else:
                calls.append(call)
        return Part(content, tuple(calls))


def _begun(text: str, mark: str) -> int:
    """Characters at the end of `text` that `mark` begins with."""
    return next((n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n])), 0)


def schema_of(tools: Sequence[dict[str, Any]]) -> str:
    """The schema of one call of one of `tools` (name and parameters of each)."""
    each = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["name"]},
                "arguments": tool.get("parameters") or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return json.dumps(each[0] if len(each) == 1 else {"anyOf": each})
