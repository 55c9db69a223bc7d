"""Conversations: the shapes that people keep them in become one, recognised by their columns.

A record of one has `messages` (each a role and its content, and what a template may read beside),
`tools` where there are any, `shape` (the columns it came in) and `where` it stands.

Shapes: `messages` (roles and contents), ShareGPT's `conversations` (from and value), alpaca's
`instruction`, `input` and `output`, and `prompt` with `completion` (texts, or lists of messages).
Of preferences: `chosen` and `rejected`, with or without `prompt`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shoal.data.special import read_object
from shoal.errors import DataError, nearest

Record = dict[str, Any]
Message = dict[str, Any]

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""Role of each name for one; ShareGPT's beside those of everybody else."""

_CHOICE = {"chosen", "rejected"}
_ALPACA = {"instruction", "output"}
_PAIR = {"prompt", "completion"}
_LARGEST_TEMPLATE = 1 << 20


def conversation_of(row: Record, *, where: str) -> Record | None:
    """The record of a conversation, or None for a row that is none. Raises DataError."""
    if row.keys() >= _CHOICE:
        return _choice(row, where=where)
    for column in ("messages", "conversations"):
        if column in row:
            return _record(row, _listed(row, column, where=where), shape=column, where=where)
    if row.keys() >= _ALPACA:
        asked = [_text(row, "instruction", where=where), row.get("input") or ""]
        said = [_said("user", "\n\n".join(filter(None, asked)))]
        said.append(_said("assistant", _text(row, "output", where=where)))
        if row.get("system"):
            said.insert(0, _said("system", row["system"]))
        return _record(row, said, shape="instruction, input, output", where=where)
    if row.keys() >= _PAIR:
        said = []
        for column, role in (("prompt", "user"), ("completion", "assistant")):
            said += _turns(row, column, role, where=where)
        return _record(row, said, shape="prompt, completion", where=where)
    return None


def _choice(row: Record, *, where: str) -> Record:
    """Two answers to the same, of which one was preferred: `chosen` and `rejected` conversations.

    As TRL keeps them: texts or lists of messages, the prompt apart or at the beginning of both.
    """
    prompt: list[Message] = []
    if row.get("prompt") is not None:
        prompt = _turns(row, "prompt", "user", where=where)
    shape = "prompt, chosen, rejected" if prompt else "chosen, rejected"
    found, record = {}, Record()
    for column in ("chosen", "rejected"):
        in_json = isinstance(row[column], str) and row[column].lstrip().startswith("[{")
        read = _listed(row, column, where=where) if in_json else None
        said = read or _turns(row, column, "assistant", where=where)
        record = _record(row, [*prompt, *said], shape=shape, where=f"{where}: {column}")
        found[column] = record["messages"]
    if found["chosen"] == found["rejected"]:
        raise DataError(f"{where}: `chosen` and `rejected` are the same; remove the line")
    if found["chosen"][:-1] != found["rejected"][:-1]:
        raise DataError(
            f"{where}: `chosen` and `rejected` differ before their last message, expected two "
            "answers to the same prompt"
        )
    record.pop("text", None)
    return {**record, **found, "messages": found["chosen"], "where": where}


def _turns(row: Record, column: str, role: str, *, where: str) -> list[Message]:
    """The messages in a column, which a text is one of."""
    if isinstance(row[column], str):
        return [_said(role, row[column])]
    return _listed(row, column, where=where)


def _said(role: str, content: Any) -> Message:
    return {"role": role, "content": content}


def _text(row: Record, column: str, *, where: str) -> str:
    if not isinstance(row[column], str):
        got = type(row[column]).__name__
        raise DataError(f"{where}: expected text in {column!r}, got {got}; mend or remove it")
    return str(row[column])


def _listed(row: Record, column: str, *, where: str) -> list[Message]:
    """The messages in a column: a list, or a list that was written as JSON."""
    found = row[column]
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except (ValueError, RecursionError):
            found = None
    if not isinstance(found, list) or not found:
        raise DataError(
            f"{where}: expected a list of messages in {column!r}, each with a role and its "
            f"content, got {str(row[column])[:60]!r}"
        )
    return [
        _message(each, where=f"{where}: message {number}")
        for number, each in enumerate(found, start=1)
    ]


def _message(given: Any, *, where: str) -> Message:
    """A message in the shape that chat templates read."""
    if not isinstance(given, dict) or not ({"role", "from"} & given.keys()):
        raise DataError(
            f"{where}: expected an object with a role and its content, got {str(given)[:60]!r}"
        )
    kept = {key: value for key, value in given.items() if value is not None}
    name = str(kept.pop("role", None) or kept.pop("from", ""))
    kept.pop("from", None)
    if name.lower() not in ROLES:
        hint = nearest(name, ROLES) or f"expected one of {', '.join(ROLES)}"
        raise DataError(f"{where}: its role is {name[:40]!r}; {hint}")
    content = kept.pop("content", None)
    content = kept.pop("value", None) if content is None else content
    if isinstance(content, list):
        content = _joined(content, where=where)
    if not isinstance(content, str) and not kept.get("tool_calls"):
        got = "nothing" if content is None else type(content).__name__
        raise DataError(f"{where}: expected text as the content of {name}, got {got}")
    said = {} if content is None else {"content": plain_ends(content)}
    return {"role": ROLES[name.lower()], **said, **kept}


def _joined(parts: list[Any], *, where: str) -> str:
    """The text of a content that is a list of parts, all of which must be text."""
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    if len(texts) != len(parts) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: expected parts of type text only, got {str(parts)[:60]!r}")
    return "".join(map(str, texts))


def _record(row: Record, messages: list[Message], *, shape: str, where: str) -> Record:
    """The record; a conversation must end with an answer, or nothing would be learned from it."""
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"{where}: the conversation ends with a message of the {messages[-1]['role']}, "
            "expected an answer of the assistant; remove the last message, or the line"
        )
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError):
            raise DataError(f"{where}: `tools` is no JSON list of tools") from None
    named = {"tools": tools} if isinstance(tools, list) and tools else {}
    text = {"text": plain_ends(row["text"])} if isinstance(row.get("text"), str) else {}
    return {**text, "messages": messages, **named, "shape": shape, "where": where}


def plain_ends(text: str) -> str:
    """The text with the line ends of Windows and old Macs as those of everybody else."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def content_of_messages(record: Record) -> bytes:
    """What is said in a conversation, and nothing of how or where it was kept."""
    held = [record["messages"], record.get("tools")]
    if "rejected" in record:
        held.append(record["rejected"])
    return json.dumps(held, sort_keys=True, default=str).encode()


def chat_template_of(folder: Path) -> tuple[str, str] | None:
    """The chat template of a tokenizer's folder, and the file that has it. Raises DataError."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        if path.stat().st_size > _LARGEST_TEMPLATE:
            raise DataError(
                f"{path}: is larger than {_LARGEST_TEMPLATE} bytes; no chat template is"
            )
        try:
            return path.read_text(encoding="utf-8"), path.name
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: is no text in UTF-8: {error}") from None
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = read_object(folder / name).get("chat_template")
        if isinstance(found, list):  # several by name
            named = {
                each.get("name"): each.get("template") for each in found if isinstance(each, dict)
            }
            found = named.get("default")
        if isinstance(found, str):
            return found, name
    return None


def special_texts(folder: Path) -> dict[str, str]:
    """Texts of the special tokens by name (`eos_token`), as chat templates read them."""
    about = {**read_object(folder / "special_tokens_map.json")}
    about |= read_object(folder / "tokenizer_config.json")
    found = {}
    for name, value in about.items():
        value = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(value, str):
            found[name] = value
    return found
