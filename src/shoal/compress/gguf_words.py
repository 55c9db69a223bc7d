"""A tokenizer as GGUF tells it: tokens, merges, kinds, and the name of how text is split.

GGUF has no description of a pre-tokenizer, only names that llama.cpp knows
(https://github.com/ggml-org/llama.cpp, src/llama-vocab.cpp): what has none is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.errors import UserError

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
SPLITS = {_LLAMA3: "llama-bpe", _QWEN2: "qwen2"}
_IGNORES_MERGES = ("llama-bpe",)
"""Names with which llama.cpp takes a word that is a token before it looks at merges."""

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Kinds of tokens."""


@dataclass(frozen=True)
class Words:
    """What is written under `tokenizer.`."""

    pre: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    specials: dict[str, int]
    """Ids of `bos`, `eos`, `pad`, `unk` where there are any."""
    adds_bos: bool
    template: str | None


def words_of(folder: Path, *, vocabulary: int) -> Words:
    """Of a model folder, for a model with so many rows of embedding. Raises UserError."""
    file = folder / "tokenizer.json"
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _refused(file, f"it cannot be read: {error}") from None
    model = told.get("model", {})
    if model.get("type") != "BPE" or model.get("byte_fallback") or model.get("dropout"):
        kind = "BPE with bytes for what it lacks" if model.get("byte_fallback") else "no plain BPE"
        raise _refused(file, f"{kind} ({model.get('type')})")
    pre = _split_name(told, file)
    if bool(model.get("ignore_merges")) != (pre in _IGNORES_MERGES):
        raise _refused(file, f"ignore_merges is {model.get('ignore_merges')} beside {pre}")
    tokens = [f"[PAD{number}]" for number in range(vocabulary)]
    kinds = [UNUSED] * vocabulary
    for token, number in model["vocab"].items():
        tokens[number], kinds[number] = token, NORMAL
    for each in told.get("added_tokens", []):
        tokens[each["id"]] = each["content"]
        kinds[each["id"]] = CONTROL if each["special"] else USER_DEFINED
    merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
    specials = _specials(settings, tokens)
    template = folder / "chat_template.jinja"
    return Words(
        pre,
        tokens,
        kinds,
        merges,
        specials,
        adds_bos=_begins_with(file, specials.get("bos")),
        template=template.read_text(encoding="utf-8")
        if template.is_file()
        else settings.get("chat_template"),
    )


def _split_name(told: dict[str, Any], file: Path) -> str:
    """llama.cpp's name of the pre-tokenizer. Raises UserError."""
    whole = told.get("pre_tokenizer") or {}
    parts = whole.get("pretokenizers", [whole])
    kinds = [each.get("type") for each in parts]
    normaliser = told.get("normalizer") or {}
    if parts[-1].get("add_prefix_space") or kinds[-1] != "ByteLevel":
        raise _refused(file, "it does not split text by bytes, or puts a space before it")
    found = None
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        found = "gpt-2"
    elif kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
        found = "smollm" if parts[1].get("use_regex", True) else None
    elif kinds == ["Split", "ByteLevel"] and not parts[1].get("use_regex", True):
        found = SPLITS.get(parts[0].get("pattern", {}).get("Regex", ""))
    if found is None or (normaliser and (normaliser.get("type"), found) != ("NFC", "qwen2")):
        raise _refused(file, "llama.cpp has no name for how it splits text")
    return found


def _specials(settings: dict[str, Any], tokens: list[str]) -> dict[str, int]:
    found = {}
    for short in ("bos", "eos", "pad", "unk"):
        said = settings.get(f"{short}_token")
        content = said.get("content") if isinstance(said, dict) else said
        if content in tokens:
            found[short] = tokens.index(content)
    return found


def _begins_with(file: Path, bos: int | None) -> bool:
    """Whether a text's ids begin with that of `bos`."""
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(file)).encode("a").ids
    return bos is not None and ids[:1] == [bos]


def _refused(file: Path, why: str) -> UserError:
    return UserError(
        f"{file}: this tokenizer cannot be written to GGUF: {why}\n"
        "    expected byte-level BPE, split as GPT-2's, SmolLM's, Llama 3's or Qwen 2's\n"
        "    nearest: --quantise int8, a folder that keeps tokenizer.json as it is"
    )
