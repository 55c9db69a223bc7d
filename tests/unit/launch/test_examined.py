"""A model that is wrong is refused before a run begins; a good verdict is asked for once."""

from __future__ import annotations

import io
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import FalconConfig, FalconForCausalLM

from shoal.config.load import load_recipe
from shoal.errors import ModelError
from shoal.launch.examined import refuse_by
from shoal.launch.measuring import wait_for_imports
from shoal.launch.prepare import prepare_inputs
from shoal.launch.score import score
from shoal.observe.console import Console
from tiny import Bench, write_corpus


def test_what_is_wrong_is_asked_for_again_and_what_is_right_only_once(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(str(bench.recipe))
    inputs = prepare_inputs(recipe, say=lambda line: None)
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    verdict: dict[str, Any] = {"problems": ["it sees padding", "and more"], "difference": 0.5}
    asked: list[int] = []

    def ask() -> dict[str, Any]:
        asked.append(1)
        return verdict

    for _ in range(2):
        with pytest.raises(ModelError, match="a llama for causal-lm: it sees padding; and more"):
            refuse_by(ask, recipe, inputs=inputs)
    verdict = {"problems": [], "difference": 1e-8}
    refuse_by(ask, recipe, inputs=inputs)
    refuse_by(ask, recipe, inputs=inputs)
    assert len(asked) == 3
    for change in ("model.hidden_size=48", "data.packing=false", "model.dropout=off"):
        refuse_by(ask, load_recipe(str(bench.recipe), [change]), inputs=inputs)
    assert len(asked) == 6, "another model, or used otherwise"


ENCODER = (
    "model={kind: config, architecture: bert, hidden_size: 32, intermediate_size: 48,"
    " num_hidden_layers: 2, num_attention_heads: 4}"
)


def test_an_encoder_is_no_language_model_for_a_run_either(bench: Bench) -> None:
    out = bench.new_path()
    with pytest.raises(ModelError, match="a token sees those after it"):
        bench.train(ENCODER, "data.packing=false", out=out)
    assert not out.exists()


def test_what_no_run_may_train_is_not_scored_either(bench: Bench, tmp_path: Path) -> None:
    """Falcon's attention is its own: in packed rows it sees the documents beside."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    FalconForCausalLM(FalconConfig(vocab_size=300, **sizes)).save_pretrained(tmp_path)
    shutil.copy(bench.run().path / "model/tokenizer.json", tmp_path)

    def scored(*overrides: str) -> dict[str, Any]:
        show = Console(out=io.StringIO())
        return score(
            tmp_path, recipe=bench.recipe, overrides=overrides, console=show, pool=bench.pool
        )

    with pytest.raises(ModelError, match="a document in a packed row differs from the same docum"):
        scored()
    loss = scored("data.packing=false")["evaluation_loss"]
    assert loss == pytest.approx(math.log(300), rel=0.1), "random weights know nothing"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.num_key_value_head=2", "model.num_key_value_head: did you mean 'num_key_value_he"),
        ("model.architecture=lama", "did you mean 'llama'"),
    ],
)
def test_a_misspelt_key_is_told_before_the_data_is_prepared(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, said: str
) -> None:
    """Which may take hours, and was what came first."""
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    corpus = write_corpus(tmp_path / "own.jsonl", documents=40)
    wait_for_imports(bench.pool, console=Console(out=io.StringIO()))
    with pytest.raises(ModelError, match=said):
        bench.train(override, f"data.source={corpus}")
    made = [path.name for path in (tmp_path / "cache").glob("*/*") if path.name[0] != "."]
    assert not [name for name in made if not name.startswith("bpe-")], "but for a tokenizer"
