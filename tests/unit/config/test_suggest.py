"""A key that is not there: what the person meant is named, and never understood silently."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.config import suggest
from shoal.config.load import load_recipe
from shoal.config.schema import keys
from shoal.config.suggest import other_names, suggestion
from shoal.config.yaml_text import parse
from shoal.errors import ConfigError


def hint(override: str, *before: str) -> str:
    """The hint of the one problem that an override makes."""
    with pytest.raises(ConfigError) as error:
        load_recipe("quickstart", [*before, override])
    (problem,) = error.value.problems
    assert problem.what == "unknown key"
    return problem.hint


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.optimizer.lr=3", "did you mean 'learning_rate'?"),
        ("lr=3", "did you mean 'train.optimizer.learning_rate'?"),
        ("train.learning_rate=3", "did you mean 'train.optimizer.learning_rate'?"),
        ("bs=3", "did you mean 'train.global_batch_samples'?"),
        ("train.batch_size=3", "did you mean 'global_batch_samples'?"),
        ("epochs=3", "did you mean 'train.epochs'?"),
        ("max_steps=3", "did you mean 'train.steps'?"),
        ("wd=0", "did you mean 'train.optimizer.weight_decay'?"),
        ("grad_clip=1", "did you mean 'train.max_gradient_norm'?"),
        ("train.max_grad_norm=1", "did you mean 'max_gradient_norm'?"),
        ("seq_len=8", "did you mean 'data.sequence_tokens'?"),
        ("data.max_length=8", "did you mean 'sequence_tokens'?"),
        ("fp16=true", "did you mean 'precision.compute=float16'?"),
        ("precision.bf16=true", "did you mean 'compute=bfloat16'?"),
        ("save_steps=5", "did you mean 'checkpoint.every_steps'?"),
        ("eval_steps=5", "did you mean 'train.evaluate_every_steps'?"),
        ("logging_steps=5", "did you mean 'observe.log_every_steps'?"),
        ("train.warmup_ratio=0.1", "did you mean 'train.schedule.warmup_fraction'?"),
        ("output_dir=x", "did you mean '--out'?"),
        ("sync.start_steps=4", "only with sync.kind=local-sgd or diloco or streaming-diloco"),
        ("sync.fragments=4", "only with sync.kind=streaming-diloco"),
        ("trian=3", "did you mean 'train'?"),
    ],
)
def test_what_was_meant(override: str, said: str) -> None:
    assert hint(override) == said


def test_gradient_accumulation_is_explained() -> None:
    assert "set train.global_batch_samples and train.micro_batch_samples" in (
        hint("train.gradient_accumulation_steps=4")
    )


def test_a_key_of_another_section_is_found() -> None:
    assert hint("train.seed=3") == "did you mean 'seed'?"
    assert hint("data.global_batch_samples=3") == "did you mean 'train.global_batch_samples'?"


def test_no_hint_names_a_key_that_is_not_there() -> None:
    """And no word of another tool is a key of ours at the place that it hints at."""
    assert len(other_names()) > 100
    for word, ours in other_names().items():
        if " " not in ours and not ours.startswith("--"):
            assert ours.partition("=")[0] in keys(), ours
            assert f"{ours.rpartition('.')[0]}.{word}".lstrip(".") not in keys(), word
        assert suggestion(word, known=["seed"])


def test_each_word_of_another_tool_means_one_thing() -> None:
    file = Path(suggest.__file__).with_name("other_names.yaml")
    words = [word for words in parse(file.read_text("utf-8")).values() for word in words.split()]
    assert len(words) == len(set(words))


def test_a_word_where_a_section_is_due() -> None:
    with pytest.raises(ConfigError) as error:
        load_recipe("quickstart", ["train.optimizer=muon"])
    assert "got 'muon'\n    did you mean train.optimizer.kind=muon?" in str(error.value)
