import json
from pathlib import Path

import pytest
import torch
from tiny_models import SETTINGS, config_of

from shoal.errors import ModelError
from shoal.models.dropout import apply_keyed
from shoal.models.huggingface import build_meta, read_config


def test_recipe_keys_reach_the_configuration() -> None:
    config = read_config(
        architecture="llama",
        settings={"hidden_size": 64, "num_attention_heads": 4},
        vocabulary_size=99,
    )
    assert (config.hidden_size, config.vocab_size) == (64, 99)


def test_a_set_vocabulary_may_exceed_the_tokenizers() -> None:
    config = read_config(
        architecture="gpt2", settings={"vocab_size": 128, "n_head": 4}, vocabulary_size=100
    )
    assert config.vocab_size == 128


def test_special_tokens_outside_the_vocabulary_are_dropped() -> None:
    config = config_of("gpt2")
    assert config.eos_token_id is None
    kept = read_config(architecture="llama", settings={}, vocabulary_size=100)
    assert kept.eos_token_id == 2


def test_a_class_that_wants_special_tokens_gets_the_first() -> None:
    """CWM has no configuration without a token that begins a text."""
    settings = {**SETTINGS["llama"], "vocab_size": 61}
    assert read_config(architecture="cwm", settings=settings).bos_token_id == 0


def test_sizes_may_differ_from_layer_to_layer() -> None:
    widths = [[64, 128], [64, -1]]
    small = {
        "num_hidden_layers": 2,
        "num_kv_shared_layers": 0,
        "layer_types": ["full_attention"] * 2,
    }
    config = read_config(
        architecture="gemma3n_text", settings={**small, "intermediate_size": widths[0]}
    )
    assert config.intermediate_size == [64, 128]
    with pytest.raises(ModelError, match=r"intermediate_size: expected a positive integer"):
        read_config(architecture="gemma3n_text", settings={**small, "intermediate_size": widths[1]})


def test_layers_that_drop_out_are_dropout_too() -> None:
    """M2M-100 leaves out one layer in twenty by default."""
    config = read_config(
        architecture="m2m_100", settings={"encoder_layers": 1, "decoder_layers": 1}
    )
    assert config.encoder_layerdrop > 0
    for dropout in ("off", "keyed"):
        model = build_meta(config, auto_class="AutoModelForSeq2SeqLM", dropout=dropout)
        assert model.config.encoder_layerdrop == model.config.decoder_layerdrop == 0.0
    notes = apply_keyed(model, seed=0, asked=config)
    assert "model.encoder_layerdrop 0.05 is set to 0: dropping whole layers has no key" in notes


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"architecture": "lama"}, ["'lama'", "did you mean 'llama'"]),
        (
            {"architecture": "llama", "settings": {"hiden_size": 4}},
            ["no setting 'hiden_size'", "did you mean 'hidden_size'"],
        ),
        (
            {"architecture": "llama", "settings": {"hidden_size": 250, "num_attention_heads": 4}},
            ["refuses", "250"],
        ),
        (
            {
                "architecture": "llama",
                "settings": {
                    "hidden_size": 256,
                    "num_attention_heads": 8,
                    "num_key_value_heads": 3,
                },
            },
            ["num_attention_heads 8 is not a multiple of num_key_value_heads 3"],
        ),
        ({"architecture": "llama", "settings": {"hidden_size": "wide"}}, ["hidden_size", "wide"]),
        (
            {"architecture": "llama", "settings": {"num_hidden_layers": 0}},
            ["num_hidden_layers: expected a positive integer, got 0"],
        ),
        (
            {"architecture": "llama", "settings": {"vocab_size": 10}, "vocabulary_size": 20},
            ["vocabulary has 10 entries", "20"],
        ),
        ({}, ["expected an architecture or a path"]),
    ],
)
def test_bad_settings_are_refused(arguments: dict, expected: list[str]) -> None:
    with pytest.raises(ModelError) as caught:
        read_config(**arguments)
    for text in expected:
        assert text in str(caught.value)


def test_a_folder_is_read_and_settings_override_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", **SETTINGS["bert"]}))
    config = read_config(path=tmp_path, settings={"num_labels": 5})
    assert (config.hidden_size, config.num_labels) == (32, 5)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no config.json"),
        ("{", "not valid JSON"),
        ("{}", "names no model_type"),
        ('{"model_type": "own", "auto_map": {"AutoConfig": "x.Y"}}', "knows no 'own'"),
    ],
)
def test_bad_folders_are_refused(tmp_path: Path, content: str | None, expected: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=expected):
        read_config(path=tmp_path)


def test_models_are_built_on_meta_in_float32() -> None:
    config = config_of("llama")
    config.dtype = torch.bfloat16
    model = build_meta(config, auto_class="AutoModelForCausalLM")
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float32)}
    assert model.config is not config


def test_an_impossible_task_and_an_unknown_dropout_are_refused() -> None:
    with pytest.raises(ModelError, match="cannot build a 'vit' as AutoModelForCausalLM"):
        build_meta(read_config(architecture="vit", settings={}), auto_class="AutoModelForCausalLM")
    with pytest.raises(ModelError, match="expected off, keyed, framework; got 'keyd'"):
        build_meta(config_of("llama"), auto_class="AutoModelForCausalLM", dropout="keyd")
