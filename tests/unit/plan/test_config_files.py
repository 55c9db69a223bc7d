"""A config.json may hold anything: its sizes are read, or it is refused; never a traceback."""

from __future__ import annotations

import contextlib

import pytest

from shoal.errors import ModelError
from shoal.legal import ModelFacts, facts_from_config
from shoal.legal.families.table import known_families

RIGHT = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "n_embd": 16,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 8,
    "d_model": 16,
    "d_ff": 16,
    "num_layers": 1,
    "num_heads": 2,
    "d_kv": 8,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "num_experts": 2,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "max_position_embeddings": 24,
    "tie_word_embeddings": False,
    "id2label": {"0": "a"},
    "architectures": ["X"],
    "text_config": None,
    "rope_parameters": None,
    "layer_types": None,
}
WRONG = ([], {}, "x", -1, None, 1.5, [1, [2]], True, 10**30)


@pytest.mark.parametrize("family", known_families())
def test_a_wrong_value_is_refused_or_read_over(family: str) -> None:
    config = {**RIGHT, "model_type": family}
    for key in config:
        for value in WRONG:
            with contextlib.suppress(ModelError):
                assert isinstance(facts_from_config({**config, key: value}), ModelFacts)


def test_the_config_of_these_tests_is_right() -> None:
    assert facts_from_config({**RIGHT, "model_type": "llama"}).layers == 1
    with pytest.raises(ModelError, match="'hidden_size': expected a whole number, got \\[\\]"):
        facts_from_config({**RIGHT, "model_type": "llama", "hidden_size": []})
