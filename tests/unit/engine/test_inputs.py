"""What a tokenizer of several sources is trained on."""

from __future__ import annotations

from shoal.engine.prepare import in_turns


def test_any_beginning_has_texts_of_every_source() -> None:
    texts = in_turns([iter("abcd"), iter("XY"), iter("1")])
    assert "".join(texts) == "aX1bYcd"


def test_an_empty_text_is_passed_on() -> None:
    assert list(in_turns([iter(["", "b"]), iter(["", "Y", "Z"])])) == ["", "", "b", "Y", "Z"]
