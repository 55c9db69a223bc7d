"""What a tokenizer of several sources is trained on, and what a checkpoint keeps of the inputs."""

from __future__ import annotations

from shoal.data.tokenize import in_turns
from shoal.engine.job import Inputs


def test_any_beginning_has_texts_of_every_source() -> None:
    texts = in_turns([iter("abcd"), iter("XY"), iter("1")])
    assert "".join(texts) == "aX1bYcd"


def test_an_empty_text_is_passed_on() -> None:
    assert list(in_turns([iter(["", "b"]), iter(["", "Y", "Z"])])) == ["", "", "b", "Y", "Z"]


def test_inputs_of_older_checkpoints_are_read() -> None:
    inputs = Inputs("data", None, None, {"classes": ["a"]}, None, 3, 1)
    assert Inputs.from_json({**inputs.to_json(), "unigram_nats": 6.3}) == inputs
