"""Trained tokenizers are exact, repeatable, cached, and fit for transformers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from shoal.data.tokenize import (
    CHARACTERS_PER_TOKEN,
    END,
    PAD,
    check_vocabulary,
    load_tokenizer,
    sampled,
    tokenizer_key,
    train_tokenizer,
)
from shoal.errors import DataError

TEXTS = [f"The {n} fish swam past {n * 7} boats; nobody's net was there." for n in range(200)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_CACHE", str(tmp_path_factory.mktemp("cache")))
        return train_tokenizer([TEXTS], vocabulary_size=400, cache_key="fish")


@given(text=st.text(max_size=80))
@settings(deadline=None)
def test_any_text_round_trips(trained: Path, text: str) -> None:
    tokenizer = load_tokenizer(trained)
    plain = text.replace(PAD, "").replace(END, "")
    assert tokenizer.decode(tokenizer.encode(plain).ids, skip_special_tokens=False) == plain


def test_special_tokens_come_first(trained: Path) -> None:
    tokenizer = load_tokenizer(trained)
    assert (tokenizer.token_to_id(PAD), tokenizer.token_to_id(END)) == (0, 1)
    assert tokenizer.get_vocab_size() == 400


@given(order=st.permutations(TEXTS[:40]), count=st.integers(1, 3000))
@settings(deadline=None, max_examples=30)
def test_a_sample_is_whole_texts_and_the_same_in_any_order(order: list[str], count: int) -> None:
    picked = list(sampled(order, count=count))
    assert picked == list(sampled(TEXTS[:40], count=count))
    assert set(picked) <= set(TEXTS[:40]) and len(set(picked)) == len(picked)
    size = sum(map(len, picked))
    assert size - len(picked[-1]) < count and (size >= count or len(picked) == 40)


def test_the_order_of_the_texts_changes_no_byte(trained: Path) -> None:
    long = [f"{text} {'and more ' * (n % 7)}" * 40 for n, text in enumerate(TEXTS)]
    assert sum(map(len, long)) > 2 * 300 * CHARACTERS_PER_TOKEN, "more than is sampled"
    one = train_tokenizer([long], vocabulary_size=300, cache_key="one")
    two = train_tokenizer([long[::-1]], vocabulary_size=300, cache_key="two")
    assert one != two and tokenizer_key(one) == tokenizer_key(two)


def test_a_damaged_tokenizer_is_trained_again_and_that_is_said() -> None:
    said: list[str] = []

    def train() -> Path:
        return train_tokenizer([TEXTS], vocabulary_size=300, cache_key="k", announce=said.append)

    path = train() / "tokenizer.json"
    whole = path.read_bytes()
    for damage in (whole.replace(b"a", b"b", 1), whole[:-9], None):
        path.write_bytes(damage) if damage is not None else path.unlink()
        said.clear()
        assert train() / "tokenizer.json" == path and path.read_bytes() == whole
        assert said[0].startswith(f"the cached tokenizer is damaged and trained again: {path}: ")
        assert said[1:] == ["training a tokenizer of 300 tokens"]
    said.clear()
    train()
    assert said == []
    for notes in ("", "[" * 100_000, '{"files": 3}'):
        (path.parent / "shoal-files.json").write_text(notes)
        said.clear()
        assert train() / "tokenizer.json" == path and path.read_bytes() == whole
        assert "shoal-files.json: cannot be read" in said[0]


def test_cached_texts_are_not_read_again() -> None:
    folder = train_tokenizer([TEXTS], vocabulary_size=300, cache_key="k")

    def never() -> Iterator[str]:
        raise AssertionError("the texts were read although a tokenizer is cached")
        yield ""

    assert train_tokenizer([never()], vocabulary_size=300, cache_key="k") == folder
    assert train_tokenizer([TEXTS], vocabulary_size=301, cache_key="k") != folder
    assert train_tokenizer([TEXTS], vocabulary_size=300, cache_key="other") != folder


def test_same_texts_give_the_same_bytes_in_another_process(trained: Path, tmp_path: Path) -> None:
    """Another process has another hash seed and another order of threads."""
    program = (
        "from shoal.data.tokenize import train_tokenizer, tokenizer_key\n"
        f"texts = {TEXTS!r}\n"
        "print(tokenizer_key(train_tokenizer([texts], vocabulary_size=400, cache_key='fish')))"
    )
    environment = {**os.environ, "SHOAL_CACHE": str(tmp_path / "other"), "PYTHONHASHSEED": "5"}
    said = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == tokenizer_key(trained)


def test_transformers_reads_it(trained: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(trained)
    ours = load_tokenizer(trained)
    assert (theirs.eos_token, theirs.pad_token) == (END, PAD)
    assert theirs(TEXTS[3])["input_ids"] == ours.encode(TEXTS[3]).ids


def test_padding_and_truncation_of_the_file_are_switched_off(trained: Path, tmp_path: Path) -> None:
    fixed = load_tokenizer(trained)
    fixed.enable_padding(length=32)
    fixed.enable_truncation(max_length=4)
    fixed.save(str(tmp_path / "tokenizer.json"))
    encoded = load_tokenizer(tmp_path).encode_batch(TEXTS[:5])
    expected = load_tokenizer(trained).encode_batch(TEXTS[:5])
    assert [each.ids for each in encoded] == [each.ids for each in expected]


def test_bad_folders_and_sizes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer.json: there is no such file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"is not a tokenizer: .*fetch or train it again"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match=r"vocabulary_size: expected at least 258.*got 100"):
        train_tokenizer([], vocabulary_size=100, cache_key="x")


def test_vocabularies_that_disagree(trained: Path) -> None:
    tokenizer: Tokenizer = load_tokenizer(trained)
    check_vocabulary(tokenizer, model_vocabulary_size=400)
    check_vocabulary(tokenizer, model_vocabulary_size=512)
    with pytest.raises(DataError, match=r"ids up to 399, the model has 399.*at least 400"):
        check_vocabulary(tokenizer, model_vocabulary_size=399)
