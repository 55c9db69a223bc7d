import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import SETTINGS, VOCABULARY, auto_class_of, config_of, meta_model, real_model
from torch import nn
from transformers import AutoModelForCausalLM, BertForMaskedLM, BertModel

from shoal.boxes import Box
from shoal.config.recipe import PretrainedModel
from shoal.errors import ModelError
from shoal.models.anatomy import canonical_parameters, hidden_of, logits_of
from shoal.models.export import export
from shoal.models.huggingface import build_meta, read_config
from shoal.models.init import materialise, record
from shoal.models.pretrained import PretrainedWeights, has_own_head
from shoal.parallel.model import model_config


def _saved(family: str, folder: Path) -> nn.Module:
    """A tiny model as transformers itself would save it."""
    model = real_model(family, seed=4)
    model.save_pretrained(folder)
    return model


def _tagger(**settings: Any) -> nn.Module:
    config = read_config(
        architecture="bert", settings={**SETTINGS["bert"], **settings}, vocabulary_size=VOCABULARY
    )
    return build_meta(config, auto_class="AutoModelForTokenClassification")


def _filled(model: nn.Module, source: PretrainedWeights) -> dict[str, torch.Tensor]:
    materialise(model, record=record(model), seed=0, source=source)
    return {name: each.detach() for name, each in canonical_parameters(model).items()}


@pytest.mark.parametrize("family", [*SETTINGS])
def test_a_saved_model_comes_back_whole(family: str, tmp_path: Path) -> None:
    saved, model = _saved(family, tmp_path), meta_model(family)
    source = PretrainedWeights(tmp_path, model=model)
    assert (source.missing, source.unused, source.notes()) == ((), (), [])
    for name, tensor in _filled(model, source).items():
        assert torch.equal(tensor, canonical_parameters(saved)[name]), name


@pytest.mark.parametrize("prefixed", [False, True])
def test_base_weights_fit_with_and_without_their_prefix(prefixed: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = config_of("bert")
    base = BertForMaskedLM(config) if prefixed else BertModel(config)
    base.save_pretrained(tmp_path)
    model = _tagger(num_labels=5)
    source = PretrainedWeights(tmp_path, model=model)
    assert source.missing == ("classifier.weight", "classifier.bias")
    aside = "cls.predictions" if prefixed else "pooler.dense.weight"
    assert any(name.startswith(aside) for name in source.unused)
    assert "not in" in source.notes()[0] and "classifier.weight" in source.notes()[0]
    weight = "bert.encoder.layer.0.attention.self.query.weight"
    kept = dict(base.named_parameters())[weight if prefixed else weight.removeprefix("bert.")]
    filled = _filled(model, source)
    assert torch.equal(filled[weight], kept)
    drawn = record(_tagger(num_labels=5)).draw("classifier.weight", seed=0)
    assert torch.equal(filled["classifier.weight"], drawn)


def test_old_names_of_layer_norms_are_read(tmp_path: Path) -> None:
    saved = _saved("bert", tmp_path)
    file = tmp_path / "model.safetensors"
    norm, stored = "LayerNorm.", load_file(file)
    old = {
        name.replace(norm + "weight", norm + "gamma").replace(norm + "bias", norm + "beta"): tensor
        for name, tensor in stored.items()
    }
    save_file({**old, "bert.embeddings.position_ids": torch.arange(3)}, file)
    model = meta_model("bert")
    source = PretrainedWeights(tmp_path, model=model)
    assert source.missing == source.unused == ()
    name = "bert.embeddings.LayerNorm.weight"
    assert torch.equal(source.tensor(name), canonical_parameters(saved)[name])


def test_a_box_is_the_slice(tmp_path: Path) -> None:
    _saved("llama", tmp_path)
    source = PretrainedWeights(tmp_path, model=meta_model("llama"))
    name = "model.layers.1.mlp.up_proj.weight"
    whole = source.tensor(name)
    assert torch.equal(source.tensor(name, box=Box((10, 3), (20, 7))), whole[10:30, 3:10])
    assert source.tensor("no.such.parameter") is None


def test_shards_and_half_precision_are_read(tmp_path: Path) -> None:
    model = real_model("qwen3", seed=4).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    meta = meta_model("qwen3")
    for name, tensor in _filled(meta, PretrainedWeights(tmp_path, model=meta)).items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, canonical_parameters(model)[name].float())


def test_a_tied_weight_is_found_under_either_name(tmp_path: Path) -> None:
    saved = _saved("gpt2", tmp_path)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    stored["lm_head.weight"] = stored.pop("transformer.wte.weight")
    save_file(stored, file)
    source = PretrainedWeights(tmp_path, model=meta_model("gpt2"))
    assert torch.equal(source.tensor("transformer.wte.weight"), saved.lm_head.weight)


def test_pickled_weights_are_refused_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(ModelError, match=r"(?s)pytorch_model.bin.*can run code.*save_pretrained"):
        PretrainedWeights(tmp_path, model=meta_model("bert"))


def test_damage_is_named(tmp_path: Path) -> None:
    model = meta_model("llama")
    with pytest.raises(ModelError, match=r"expected model\.safetensors"):
        PretrainedWeights(tmp_path, model=model)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"not a tensor file at all")
    with pytest.raises(ModelError, match=r"model\.safetensors: damaged"):
        PretrainedWeights(tmp_path, model=model)
    save_file({"other": torch.zeros(1)}, file)
    with pytest.raises(ModelError, match="none of its tensors belongs to a LlamaForCausalLM"):
        PretrainedWeights(tmp_path, model=model)


@pytest.mark.parametrize("file", ["../escape.safetensors", "absent.safetensors"])
def test_an_index_cannot_leave_its_folder(file: str, tmp_path: Path) -> None:
    index = {"weight_map": {"lm_head.weight": file}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="not a file of this folder"):
        PretrainedWeights(tmp_path, model=meta_model("llama"))


def test_an_index_that_promises_too_much_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    index = {"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="the index says it holds b"):
        PretrainedWeights(tmp_path, model=meta_model("llama"))


def test_sizes_of_another_model_are_refused(tmp_path: Path) -> None:
    _saved("bert", tmp_path)
    with pytest.raises(ModelError, match=r"(?s)has shape \(61, 32\).*does not describe these"):
        PretrainedWeights(tmp_path, model=_tagger(hidden_size=64))
    # a head of another size belongs to another task: drawn afresh
    source = PretrainedWeights(tmp_path, model=_tagger(num_labels=9))
    assert source.missing == ("classifier.weight", "classifier.bias")


def test_auto_classes_of_the_table() -> None:
    assert auto_class_of("llama") == "AutoModelForCausalLM"


def tied_and_not(folder: Path) -> None:
    """A folder that says tied in config.json and has a head of its own in its file."""
    _saved("llama", folder)
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = torch.randn(embedding.shape, generator=torch.Generator())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"]


def test_a_head_of_its_own_is_loaded_untied_as_transformers_does(tmp_path: Path) -> None:
    tied_and_not(tmp_path)
    config = model_config(
        PretrainedModel(kind="pretrained", path=str(tmp_path)),
        vocabulary_size=None,
        directory=str(tmp_path),
        task_settings={},
        auto_class="AutoModelForCausalLM",
    )
    model = build_meta(config, auto_class="AutoModelForCausalLM")
    source = PretrainedWeights(tmp_path, model=model)
    assert "trained and written untied" in source.notes()[0]
    _filled(model, source)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(12)[None]
    expected = theirs(input_ids=ids).logits
    found = logits_of(model)(hidden_of(model, {"input_ids": ids}))
    assert torch.allclose(found, expected, atol=1e-5)
    tensors = {name: each.detach() for name, each in canonical_parameters(model).items()}
    out = export(
        tensors=tensors, config=config, auto_class="AutoModelForCausalLM", out=tmp_path / "written"
    )
    again = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(again(input_ids=ids).logits, expected), "written as it was trained"
    assert not torch.equal(theirs.lm_head.weight, theirs.model.embed_tokens.weight)


def test_a_head_stored_beside_its_equal_embedding_stays_tied(tmp_path: Path) -> None:
    saved = _saved("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert not has_own_head(tmp_path, model=saved)


def test_quantised_folders_are_refused_with_a_way_out(tmp_path: Path) -> None:
    _saved("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    whole = {**tensors, name: (tensors[name] * 100).to(torch.int8)}
    save_file(whole, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = PretrainedWeights(tmp_path, model=meta_model("llama"))
    with pytest.raises(ModelError, match=rf"(?s){name} holds torch.int8.*unquantised weights"):
        source.tensor(name)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"(?s)its weights are quantised \(bitsandbytes\)"):
        read_config(path=tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value: float, tmp_path: Path) -> None:
    _saved("gpt2", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "transformer.h.1.mlp.c_fc.weight"
    tensors[name][3, 3] = value
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = PretrainedWeights(tmp_path, model=meta_model("gpt2"))
    with pytest.raises(ModelError, match=rf"{name} holds values that are not finite"):
        source.tensor(name)
