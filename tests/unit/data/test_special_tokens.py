"""End tokens come from the files of a folder, in the order that transformers' users rely on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, models

from shoal.data.special import SpecialTokens, special_tokens
from shoal.data.tokenize import load_tokenizer, train_tokenizer
from shoal.errors import DataError

TOKENS = ["<unk>", "<eos>", "</s>", "<|im_end|>", "<bos>", "<pad>", "sea"]

END = {"eos_token_id": 1}


def folder_of(folder: Path, **files: Any) -> Path:
    """A tokenizer of whole words, and the given files as JSON."""
    folder.mkdir(exist_ok=True)
    vocabulary = {token: number for number, token in enumerate(TOKENS)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def found(folder: Path) -> SpecialTokens:
    return special_tokens(load_tokenizer(folder), folder)


def test_the_tokenizers_own_file_comes_first_and_all_end_tokens_are_kept(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path,
        tokenizer_config={
            "eos_token": "<|im_end|>",
            "pad_token": {"__type": "AddedToken", "content": "<pad>"},
        },
        generation_config={"eos_token_id": [3, 1], "bos_token_id": 4},
        config={"eos_token_id": 2},
    )
    special = found(folder)
    assert (special.end, special.closing, special.text) == ((3, 1, 2), 3, "<|im_end|>")
    assert (special.begin, special.pad, special.said_by) == (4, 5, "tokenizer_config.json")
    opened = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert (opened.eos_token_id, opened.pad_token_id) == (special.closing, special.pad)


@pytest.mark.parametrize(
    ("files", "closing", "said_by"),
    [
        ({"generation_config": END, "config": {"eos_token_id": 2}}, 1, "generation_config.json"),
        ({"config": {"eos_token_id": 2}}, 2, "config.json"),
        ({"config": {"text_config": {"eos_token_id": [3, 2]}}}, 3, "config.json"),
        ({"config": {"eos_token_id": 999}}, None, None),
        ({"config": {"text_config": [], "eos_token_id": 2}}, 2, "config.json"),
        ({"config": {"text_config": [1], "eos_token_id": [None, "x", True, {}]}}, None, None),
        ({"tokenizer_config": {"eos_token": None}, "config": {"eos_token_id": None}}, None, None),
    ],
)  # fmt: skip
def test_then_the_generation_settings_then_the_configuration(
    files: dict[str, Any], closing: int | None, said_by: str | None, tmp_path: Path
) -> None:
    special = found(folder_of(tmp_path, **files))
    assert (special.closing, special.said_by) == (closing, said_by)


def test_no_name_decides_silently(tmp_path: Path) -> None:
    """`</s>` is in the vocabulary; no file says that it ends a text."""
    assert found(folder_of(tmp_path)) == SpecialTokens()


def test_the_tokenizer_trained_here_says_its_own(tmp_path: Path) -> None:
    folder = train_tokenizer(["a b c"] * 9, vocabulary_size=258, cache_key=str(tmp_path))
    special = found(folder)
    assert (special.closing, special.text, special.pad) == (1, "<|end|>", 0)
    assert special.ids() == {"eos_token_id": 1, "bos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("tokenizer_config", '{"eos_token": "<z>"}', "its eos_token '<z>' is no token of"),
        ("generation_config", "[1]", "no valid JSON object: expected an object, got list"),
        ("config", "{", "no valid JSON object"),
        ("config", "[" * 100_000, "no valid JSON object"),
    ],
)
def test_files_that_cannot_be_read_are_named(
    file: str, text: str, message: str, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path)
    (folder / f"{file}.json").write_text(text)
    with pytest.raises(DataError, match=f"(?s){file}.json.*{message}"):
        found(folder)
