import pytest
import torch
from tiny_models import (
    FIRST,
    SETTINGS,
    VOCABULARY,
    auto_class_of,
    config_of,
    meta_model,
    packed_batch,
    real_model,
)
from torch import nn

from shoal.errors import ModelError
from shoal.models.anatomy import (
    anatomy_of,
    canonical_name,
    canonical_parameters,
    check_logits,
    example_of,
    head_parameters,
    hidden_of,
    logits_of,
    weight_decay_names,
)
from shoal.models.huggingface import build_meta

EXPECTED = {
    "llama": ("model.layers", "model.norm", "lm_head", ("model.embed_tokens",)),
    "qwen3": ("model.layers", "model.norm", "lm_head", ("model.embed_tokens",)),
    "gpt_neox": (
        "gpt_neox.layers",
        "gpt_neox.final_layer_norm",
        "lm_head",
        ("gpt_neox.embed_in",),
    ),
    "vit": (
        "vit.layers",
        "vit.layernorm",
        "classifier",
        ("vit.embeddings.patch_embeddings",),
    ),
    "phi3": ("model.layers", "model.norm", "lm_head", ("model.embed_tokens",)),
    "gpt2": (
        "transformer.h",
        "transformer.ln_f",
        "lm_head",
        ("transformer.wte", "transformer.wpe"),
    ),
    "bert": (
        "bert.encoder.layer",
        None,
        "classifier",
        (
            "bert.embeddings.word_embeddings",
            "bert.embeddings.position_embeddings",
            "bert.embeddings.token_type_embeddings",
        ),
    ),
}


@pytest.mark.parametrize("family", [*EXPECTED])
def test_parts_are_found(family: str) -> None:
    anatomy = anatomy_of(meta_model(family))
    found = (anatomy.blocks, anatomy.norm, anatomy.head, anatomy.embeddings)
    assert found == EXPECTED[family]
    assert (anatomy.family, anatomy.num_blocks) == (family, 2)


def test_an_encoder_decoder_has_two_lists_of_blocks() -> None:
    anatomy = anatomy_of(meta_model("t5"))
    assert (anatomy.blocks, anatomy.more_blocks) == ("encoder.block", ("decoder.block",))
    assert (anatomy.num_blocks, anatomy.head) == (4, "lm_head")
    assert anatomy.ties[0][:2] == ("shared.weight", "encoder.embed_tokens.weight")


def test_ties_name_the_embedding_first_and_count_once() -> None:
    model = meta_model("gpt2")
    anatomy = anatomy_of(model)
    assert anatomy.ties == (("transformer.wte.weight", "lm_head.weight"),)
    assert "lm_head.weight" not in anatomy.parameters
    assert list(canonical_parameters(model)) == list(anatomy.parameters)


@pytest.mark.parametrize("family", [*SETTINGS])
def test_logits_of_hidden_states_are_the_models_own(family: str) -> None:
    model = real_model(family)
    batch = example_of(model, num_tokens=9)
    if family == "roberta":
        batch["input_ids"] += 2  # its own positions skip the id of padding
    with torch.no_grad():
        ours = logits_of(model)(hidden_of(model, batch))
        # without positions: the model finds its own, which ours must be
        own = model(**{name: batch[name] for name in batch if name != "position_ids"}).logits
    # the same modules in the same order: only the mask may take another kernel
    assert torch.allclose(ours, own, rtol=0, atol=2e-6)
    assert not check_logits(model, anatomy_of(model)).whole_logits


def test_logits_of_works_on_any_leading_shape() -> None:
    model = real_model("granite")
    hidden = torch.randn(2, 3, 32)
    logits = logits_of(model)
    assert torch.allclose(logits(hidden)[1, 2], logits(hidden[1, 2]), atol=1e-6)


def test_a_class_with_logits_of_its_own_keeps_them_and_warns() -> None:
    model = real_model("llama")
    plain = type(model).forward

    class Louder(type(model)):
        def forward(self, *args, **kwargs):
            output = plain(self, *args, **kwargs)
            output.logits = output.logits * 2 + 1
            return output

    model.__class__ = Louder
    anatomy = anatomy_of(model)
    with pytest.warns(UserWarning, match="Louder: its logits are more than head"):
        checked = check_logits(model, anatomy)
    assert checked.whole_logits and not anatomy.whole_logits
    batch = packed_batch()
    row = {name: batch[name] for name in ("input_ids", "position_ids")}
    own = model(**row, use_cache=False).logits
    whole = logits_of(model)(hidden_of(model, row))
    assert whole.shape[-1] == VOCABULARY and torch.allclose(whole, own, atol=1e-6)
    assert head_parameters(model) == []


def test_a_base_model_gives_its_states() -> None:
    """And has no pooler: it makes none of them, so that nothing would train it."""
    model = build_meta(config_of("bert"), auto_class="AutoModel")
    assert anatomy_of(model).head is None and head_parameters(model) == []
    hidden = torch.zeros(1, 2, 8)
    assert logits_of(model)(hidden) is hidden
    assert not [name for name, _ in model.named_parameters() if "pooler" in name]


def test_a_model_without_blocks_is_refused() -> None:
    model = meta_model("llama")
    model.config.num_hidden_layers = 7
    model.model.layers = nn.Sequential()
    with pytest.raises(ModelError, match=r"(?s)found no list of 7 blocks.*legal/families"):
        anatomy_of(model)


@pytest.mark.parametrize("family", FIRST)
def test_weight_decay_spares_norms_biases_and_embeddings(family: str) -> None:
    model = meta_model(family)
    chosen = weight_decay_names(model)
    for name, parameter in canonical_parameters(model).items():
        spared = parameter.dim() < 2 or "embed" in name or "wte" in name or "wpe" in name
        assert (name in chosen) != spared, name
    assert ("lm_head.weight" in chosen) == (family == "qwen3")  # the others are tied or have none


def test_wrappers_leave_no_trace_in_names() -> None:
    wrapped = "_orig_mod.model.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight"
    assert canonical_name(wrapped) == "model.layers.0.mlp.up_proj.weight"


def test_dropout_before_the_head_belongs_to_the_hidden_states() -> None:
    model = real_model("bert", dropout="framework").train()
    assert anatomy_of(model).after_base == ("dropout",)
    model.bert.eval()  # leaves the dropout before the head as the only one
    hidden = hidden_of(model, packed_batch())
    assert 0.02 < float((hidden == 0).float().mean()) < 0.2  # p is 0.1, over 1,024 values


def test_auto_class_gives_the_tasks_head() -> None:
    assert type(meta_model("bert")).__name__ == "BertForTokenClassification"
    assert auto_class_of("bert") == "AutoModelForTokenClassification"


def test_no_norm_bias_or_embedding_decays_whatever_its_dims() -> None:
    """Cohere's norm of each head has two dims; GPT-2's tables and Conv1D have two as well."""
    model = meta_model("cohere", use_qk_norm=True)
    named, decayed = dict(model.named_parameters()), weight_decay_names(model)
    norm = "model.layers.0.self_attn.q_norm.weight"
    assert named[norm].dim() == 2 and norm not in decayed
    kinds = {name.split(".")[-2] for name in decayed}
    assert kinds == {*("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")}
    assert {n.split(".")[-2] for n in weight_decay_names(meta_model("gpt2"))} == {
        *("c_attn", "c_proj", "c_fc")
    }
