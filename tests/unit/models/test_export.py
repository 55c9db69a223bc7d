import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import SETTINGS, auto_class_of, config_of, real_model
from torch import nn

from shoal.errors import ModelError
from shoal.models import export as exporting
from shoal.models.anatomy import canonical_parameters, ties_of
from shoal.models.export import export
from shoal.models.huggingface import fingerprint

LIMIT = 350_000
"""Bytes: just what the experts of one block of mixtral take with what they are made into."""


def _export(model: nn.Module, family: str, out: Path, **more) -> Path:
    tensors = {name: each.detach() for name, each in canonical_parameters(model).items()}
    return export(
        tensors=more.pop("tensors", tensors),
        config=config_of(family),
        auto_class=auto_class_of(family),
        out=out,
        **more,
    )


@pytest.mark.parametrize("family", [*SETTINGS])
def test_transformers_opens_what_is_written(family: str, tmp_path: Path) -> None:
    model = real_model(family)
    out = _export(model, family, tmp_path / "model")
    factory = getattr(transformers, auto_class_of(family))
    opened = factory.from_pretrained(out, local_files_only=True)
    for name, tensor in canonical_parameters(opened).items():
        assert torch.equal(tensor, canonical_parameters(model)[name]), name
    assert ties_of(opened) == ties_of(model)
    # the same weights through shoal's attention and transformers': rounding of float32
    expected = fingerprint(model)
    assert fingerprint(opened) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_the_configuration_is_the_users(tmp_path: Path) -> None:
    out = _export(real_model("gpt2"), "gpt2", tmp_path / "model")
    written = json.loads((out / "config.json").read_text())
    assert written["architectures"] == ["GPT2LMHeadModel"]
    # what shoal changed for itself does not leak out
    assert (written["attn_pdrop"], written["resid_pdrop"]) == (0.1, 0.1)
    assert written["use_cache"] and "shoal" not in json.dumps(written)
    assert (out / "generation_config.json").is_file()


def test_generation_settings_survive_and_a_new_tokenizers_ids_are_written(tmp_path: Path) -> None:
    given = {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "eos_token_id": [2, 7]}
    model = real_model("llama")
    out = _export(model, "llama", tmp_path / "kept", generation=given)
    opened = transformers.GenerationConfig.from_pretrained(out)
    assert {name: getattr(opened, name) for name in given} == given
    assert json.loads((out / "generation_config.json").read_text()) == given

    ids = {"eos_token_id": 1, "bos_token_id": None, "pad_token_id": 0}
    out = _export(model, "llama", tmp_path / "new", generation=given, special_tokens=ids)
    for kind in (transformers.GenerationConfig, transformers.AutoConfig):
        opened = kind.from_pretrained(out)
        assert {name: getattr(opened, name) for name in ids} == ids
    assert transformers.GenerationConfig.from_pretrained(out).temperature == 0.6

    out = _export(model, "llama", tmp_path / "none", special_tokens=ids)
    opened = transformers.GenerationConfig.from_pretrained(out)
    assert (opened.eos_token_id, opened.use_cache) == (1, True)


def test_large_models_become_shards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(exporting, "SHARD_SIZE", "20KB")
    out = _export(real_model("qwen3"), "qwen3", tmp_path / "model", dtype=torch.bfloat16)
    assert (out / "model.safetensors.index.json").is_file()
    opened = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert opened.dtype == torch.bfloat16


def test_the_tokenizer_travels_along(tmp_path: Path) -> None:
    source = tmp_path / "tokenizer"
    source.mkdir()
    with pytest.raises(ModelError, match="no tokenizer files"):
        _export(real_model("llama"), "llama", tmp_path / "a", tokenizer_directory=source)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["tokenizer"]  # nothing half done
    (source / "tokenizer.json").write_text("{}")
    (source / "private.txt").write_text("no")
    out = _export(real_model("llama"), "llama", tmp_path / "a", tokenizer_directory=source)
    assert (out / "tokenizer.json").read_text() == "{}" and not (out / "private.txt").exists()


def test_the_folder_has_the_rights_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        out = _export(real_model("llama"), "llama", tmp_path / "model")
    finally:
        os.umask(before)
    assert out.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o077 == 0 for path in out.iterdir())


def test_nothing_is_written_over_unless_asked(tmp_path: Path) -> None:
    out = tmp_path / "model"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match=r"model: it exists and is not empty; nothing was written"):
        _export(real_model("llama"), "llama", out)
    assert (out / "notes.txt").read_text() == "mine"
    _export(real_model("llama"), "llama", out, replace=True)
    assert (out / "model.safetensors").is_file() and not (out / "notes.txt").exists()


def test_tensors_of_another_model_are_refused(tmp_path: Path) -> None:
    model = real_model("llama")
    tensors = {name: each.detach() for name, each in canonical_parameters(model).items()}
    moved = {**tensors, "extra": torch.zeros(1)}
    norm = moved.pop("model.norm.weight")
    with pytest.raises(ModelError, match=r"(?s)lacking: model.norm.weight; unknown: extra"):
        _export(model, "llama", tmp_path / "a", tensors=moved)
    short = {**tensors, "model.norm.weight": norm[:3]}
    with pytest.raises(ModelError, match=r"has shape \(3,\), expected \(32,\)"):
        _export(model, "llama", tmp_path / "a", tensors=short)


def test_fingerprints_tell_weights_apart() -> None:
    first, again, other = (fingerprint(real_model("gpt2", seed=seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert len(first) == 32


@pytest.mark.parametrize("family", [*SETTINGS, "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_byte_is_what_transformers_writes(
    family: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several files, written in pieces of a few rows. (What transformers computes for mixtral are
    views of one storage, which it counts whole when it divides into files: so one file there.)"""
    size = "10MB" if family == "mixtral" else f"{10 * dtype.itemsize}KB"
    monkeypatch.setattr(exporting, "SHARD_SIZE", size)
    model = real_model(family)
    ours = _export(model, family, tmp_path / "ours", dtype=dtype, limit_bytes=LIMIT)
    whole = _export(model, family, tmp_path / "whole", dtype=dtype)
    model.to(dtype).save_pretrained(tmp_path / "theirs", max_shard_size=size)
    written = sorted(each.name for each in ours.iterdir())
    assert written == sorted(each.name for each in (tmp_path / "theirs").iterdir())
    assert family == "mixtral" or len(list(ours.glob("*.safetensors"))) > 1
    for name in written:
        content = (ours / name).read_bytes()
        assert content == (whole / name).read_bytes(), name
        if name != "config.json":  # in which dropout and the cache are the user's
            assert content == (tmp_path / "theirs" / name).read_bytes(), name


def test_what_is_computed_is_divided_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "SHARD_SIZE", "40KB")
    model = real_model("mixtral")
    out = _export(model, "mixtral", tmp_path / "model", limit_bytes=LIMIT)
    assert len(list(out.glob("*.safetensors"))) > 3
    opened = transformers.AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
    for name, tensor in canonical_parameters(opened).items():
        assert torch.equal(tensor, canonical_parameters(model)[name]), name


def test_a_form_that_does_not_fit_names_what_it_needs(tmp_path: Path) -> None:
    model = real_model("mixtral")
    with pytest.raises(ModelError, match=r"mixtral: its stored form.*(?s:.)*use --memory-limit"):
        _export(model, "mixtral", tmp_path / "a", limit_bytes=1000)
    assert not (tmp_path / "a").exists()
