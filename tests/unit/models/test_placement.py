"""Every parameter of every family has a place and a gradient rule on the tensor axis, or is named.

That the rules are right is shown against one worker in tests/parity/test_strategies_tensor.py.
"""

import pytest
from tiny_models import SETTINGS, TENSOR, meta_model
from torch import nn

from shoal.errors import ModelError
from shoal.legal import axes_of
from shoal.models.anatomy import anatomy_of, canonical_parameters
from shoal.models.placement import check_placed, regions_of, row_layers_of


@pytest.mark.parametrize("family", TENSOR)
def test_every_parameter_is_placed(family: str) -> None:
    model = meta_model(family)
    anatomy = anatomy_of(model)
    check_placed(anatomy.placements, family=anatomy.family)
    assert set(anatomy.placements) == set(anatomy.parameters)
    for name, parameter in canonical_parameters(model).items():
        placed = anatomy.placements[name]
        in_block = name.startswith(anatomy.blocks + ".")
        # in a block whatever is not cut sees a part of the tokens or heads
        assert (placed.gradient == "partial") == (placed.dim is None) or not in_block, name
        # half and more of every block's weights is cut: nothing large was left whole
        assert not (in_block and parameter.dim() == 2 and placed.dim is None), name
        if placed.dim is not None:
            whole = parameter.shape[placed.dim]
            assert sum(placed.pieces) in (0, whole), name
            assert placed.style == "vocabulary" or all(
                p % 2 == 0 for p in placed.pieces or (whole,)
            )


@pytest.mark.parametrize("family", [*SETTINGS])
def test_the_legal_axes_are_those_with_a_table(family: str) -> None:
    placements = anatomy_of(meta_model(family)).placements
    unplaced = {each.style for each in placements.values()} == {"unplaced"}
    assert ("tensor" in axes_of(family)) == (not unplaced) == (family in TENSOR)


def test_fused_projections_are_cut_piece_by_piece() -> None:
    layer = "transformer.h.1.attn.c_attn"
    table = anatomy_of(meta_model("gpt2")).placements
    assert (table[layer + ".weight"].dim, table[layer + ".bias"].dim) == (1, 0)
    assert table[layer + ".weight"].pieces == (32, 32, 32)
    assert table["transformer.h.1.attn.c_proj.weight"].dim == 0
    table = anatomy_of(meta_model("phi3")).placements
    assert table["model.layers.0.self_attn.qkv_proj.weight"].pieces == (32, 16, 16)
    assert table["model.layers.0.mlp.gate_up_proj.weight"].pieces == (48, 48)


def test_gradient_rules_that_are_easily_missed() -> None:
    table = anatomy_of(meta_model("qwen3")).placements
    # head norms see a part of the heads only: their gradient is a part as well
    assert table["model.layers.1.self_attn.q_norm.weight"].gradient == "partial"
    assert table["model.layers.1.input_layernorm.weight"].gradient == "partial"
    assert table["model.norm.weight"].gradient == "partial"
    table = anatomy_of(meta_model("granite")).placements
    # a bias after a row-wise product is added to a part of the tokens; a column-wise one is cut
    row = table["model.layers.0.self_attn.o_proj.bias"]
    assert (row.dim, row.gradient) == (None, "partial")
    assert table["model.layers.0.self_attn.q_proj.bias"].dim == 0
    table = anatomy_of(meta_model("gpt2")).placements
    assert table["transformer.wpe.weight"].gradient == "local"  # runs before the first block


def test_what_stands_beside_a_cut_head_sees_a_part_of_the_loss() -> None:
    language = anatomy_of(meta_model("bert", auto_class="AutoModelForMaskedLM")).placements
    assert language["cls.predictions.transform.dense.weight"].gradient == "partial"
    assert language["cls.predictions.bias"].dim == 0  # tied to the decoder's bias
    tagging = anatomy_of(meta_model("bert")).placements
    assert (tagging["classifier.weight"].dim, tagging["classifier.weight"].gradient) == (
        None,
        "local",
    )


def test_regions_hold_the_column_wise_layers() -> None:
    regions = regions_of(meta_model("bert"), base="bert")
    assert regions[:2] == [
        "bert.encoder.layer.0.attention.self",
        "bert.encoder.layer.0.intermediate",
    ]
    assert list(row_layers_of(meta_model("llama"), base="model"))[:2] == [
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.down_proj",
    ]
    assert regions_of(meta_model("t5"), base="") == []


def test_a_mixture_of_experts_is_one_region() -> None:
    """Router and shared experts see what the routed ones see, and one sum is made of all."""
    model = meta_model("deepseek_v3")
    regions = regions_of(model, base="model")
    assert sorted(regions) == [
        f"model.layers.{n}.{part}" for n in (0, 1) for part in ("mlp", "self_attn")
    ]
    sums = row_layers_of(model, base="model")
    assert sums["model.layers.0.mlp.down_proj"]
    assert not sums["model.layers.1.mlp.shared_experts.down_proj"]
    placements = anatomy_of(model).placements
    experts = "model.layers.1.mlp.experts"
    fused, down = placements[f"{experts}.gate_up_proj"], placements[f"{experts}.down_proj"]
    assert (fused.dim, fused.pieces, down.dim) == (1, (16, 16), 2)
    for name in ("mlp.gate.weight", "self_attn.kv_a_proj_with_mqa.weight"):
        assert placements[f"model.layers.1.{name}"].gradient == "partial"


def test_an_unplaced_parameter_is_named() -> None:
    model = meta_model("llama")
    model.model.layers[1].mlp.gate = nn.Linear(32, 1, device="meta")
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.gate\.weight: no rule places it"):
        check_placed(anatomy_of(model).placements, family="llama")


def test_an_unknown_family_is_refused_with_the_reason() -> None:
    anatomy = anatomy_of(meta_model("cohere"))
    with pytest.raises(ModelError, match=r"(?s)cohere: no table says.*use parallel.shard instead"):
        check_placed(anatomy.placements, family=anatomy.family)
    check_placed({}, family="cohere")
