"""Text from tokens as they come: characters cut at every byte, and stop strings across tokens."""

from __future__ import annotations

import itertools

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from shoal.serve.choice import Choice
from shoal.serve.request import Event, Scored
from shoal.serve.text import Detokeniser, Stops

SAMPLE = (
    "plain text",
    "h\u00e9ll\u00f6 w\u00f6rld",
    "\u4f60\u597d\uff0c\u4e16\u754c",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 family",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd",
    "a\u0301 e\u0301 \u1100\u1161\u11a8",
    "tab\tand\nline  two",
)


@pytest.fixture(scope="module")
def by_byte() -> Tokenizer:
    """A token for every byte: each character beyond ASCII is cut inside."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: n for n, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.mark.parametrize("text", SAMPLE)
def test_whole_characters_come_out_whatever_the_cut(by_byte: Tokenizer, text: str) -> None:
    """The prompt ends after every byte in turn; the answer is the rest."""
    ids = by_byte.encode(text).ids
    for cut in range(len(ids) + 1):
        reader = Detokeniser(by_byte, prompt=ids[:cut])
        pieces = [reader.add(token) for token in ids[cut:]]
        told = "".join(pieces) + reader.end()
        assert all("\ufffd" not in piece for piece in pieces[:-1] if cut == 0)
        whole_before = text.encode()[:cut].decode(errors="ignore")
        if len(whole_before.encode()) == cut:  # between two characters: exactly the rest
            assert told == text[len(whole_before) :]
            assert "\ufffd" not in told
        else:  # inside one: of it only what the answer itself has
            rest = text[len(whole_before) + 1 :]
            assert told.endswith(rest) and set(told[: len(told) - len(rest)]) <= {"\ufffd"}


def test_bytes_that_never_become_a_character_are_told_at_the_end(by_byte: Tokenizer) -> None:
    ids = by_byte.encode("ok\U0001f600").ids[:-1]
    reader = Detokeniser(by_byte, prompt=[])
    assert "".join(map(reader.add, ids)) == "ok"
    assert set(reader.end()) == {"\ufffd"}


@pytest.mark.parametrize(
    "stops", [["stop"], ["xx", "sto"], ["aab"], ["\u4f60\u597d"], ["op", "p n"]]
)
def test_a_stop_string_is_found_across_any_pieces(stops: list[str]) -> None:
    text = "aaab do not stop now xx \u4f60\u597d end"
    at = min(text.index(each) for each in stops)
    for sizes in itertools.product((1, 2, 5), repeat=4):
        reader, shown, rest = Stops(stops), "", text
        for size in itertools.cycle(sizes):
            shown += reader.add(rest[:size])
            rest = rest[size:]
            assert text.startswith(shown) and len(shown) <= at
            if reader.stopped or not rest:
                break
        assert reader.stopped and shown == text[:at]


def test_what_only_looked_like_a_stop_string_is_shown() -> None:
    reader = Stops(["stop!"])
    assert reader.add("do not sto") == "do not "
    assert reader.add("p") == ""
    assert reader.end() == "stop"


def test_tokens_behind_a_stop_string_do_not_count(by_byte: Tokenizer) -> None:
    ids = by_byte.encode("one two three").ids
    choice = Choice(by_byte, [], ["two"])
    event = Event(id="a", tokens=tuple(Scored(token, 0.0) for token in ids))
    piece = choice.add(event)
    assert piece.text == "one " and piece.finish == "stop" and choice.num_tokens == 7
    assert choice.add(event).text == ""
