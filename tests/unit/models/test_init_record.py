import math
import time
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FIRST, SETTINGS, auto_class_of, config_of, meta_model, real_model
from torch import nn

from shoal.boxes import Box
from shoal.errors import ModelError
from shoal.models.anatomy import canonical_parameters, ties_of
from shoal.models.huggingface import build_meta, read_config
from shoal.models.init import InitRecord, Operation, materialise, record

_RECORDS = {family: record(meta_model(family)) for family in FIRST}


@pytest.mark.parametrize("family", FIRST)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_box_is_the_slice_of_the_whole(family: str, data: st.DataObject) -> None:
    made = _RECORDS[family]
    name = data.draw(st.sampled_from(sorted(made.programs)))
    shape = made.shapes[name]
    offsets = [data.draw(st.integers(0, size - 1)) for size in shape]
    sizes = [data.draw(st.integers(0, whole - o)) for whole, o in zip(shape, offsets)]
    whole = made.draw(name, seed=3)
    cut = whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes))]
    assert torch.equal(made.draw(name, seed=3, box=Box(tuple(offsets), tuple(sizes))), cut)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_boxes_of_long_and_deep_tensors_too(data: st.DataObject) -> None:
    # longer than one chunk of the generator, four dims, a zeroed slice and a reworked normal
    shape = (3, 50, 7, 401)
    program = (
        Operation("uniform", (-0.9, 0.9)),
        Operation("erfinv_"),
        Operation("mul_", (0.5,)),
        Operation("clamp_", (-1.0, 1.0)),
        Operation("fill", (0.0,), Box((1, 0, 0, 0), (1, 50, 7, 401))),
    )
    made = InitRecord(shapes={"w": shape}, programs={"w": program})
    offsets = [data.draw(st.integers(0, size - 1)) for size in shape]
    sizes = [data.draw(st.integers(1, whole - o)) for whole, o in zip(shape, offsets)]
    whole = made.draw("w", seed=0)
    cut = whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes))]
    assert torch.equal(made.draw("w", seed=0, box=Box(tuple(offsets), tuple(sizes))), cut)
    assert not whole[1].any() and whole[0].any()


@pytest.mark.parametrize("family", [*SETTINGS])
def test_statistics_are_those_of_the_models_own_initialisation(family: str) -> None:
    config = config_of(family)
    ours = real_model(family)
    torch.manual_seed(0)
    factory: Any = getattr(transformers, auto_class_of(family))
    theirs = canonical_parameters(factory.from_config(config))
    for name, mine in canonical_parameters(ours).items():
        own, mine = theirs[name].detach(), mine.detach()
        assert mine.shape == own.shape
        # for n normal draws the standard error of mean and deviation is at most std / sqrt(n):
        # six of them, twice, as both sides are draws
        allowed = 12 * float(own.std(correction=0)) / math.sqrt(own.numel())
        assert abs(float(mine.mean() - own.mean())) <= allowed + 1e-7, name
        assert abs(float(mine.std(correction=0) - own.std(correction=0))) <= allowed + 1e-7, name
        assert torch.equal(mine == 0, own == 0), name


def test_a_padding_row_stays_zero_under_a_tied_head() -> None:
    model = real_model("llama")
    weight = model.get_input_embeddings().weight
    assert not weight[0].any() and weight[1].all()
    assert model.lm_head.weight is weight


def test_residual_projections_of_gpt2_get_their_smaller_deviation() -> None:
    made = _RECORDS["gpt2"]
    name = "transformer.h.0.mlp.c_proj.weight"
    assert made.program(name)[0].arguments == (0.0, pytest.approx(0.02 / math.sqrt(4)))


@pytest.mark.parametrize("family", [*SETTINGS])
def test_materialised_models_are_whole(family: str) -> None:
    meta = meta_model(family)
    ties = ties_of(meta)
    model = materialise(meta, record=record(meta), seed=0)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    assert not [name for name, each in tensors if each.is_meta]
    assert ties_of(model) == ties
    # buffers are recomputed, not drawn
    own = getattr(transformers, auto_class_of(family)).from_config(config_of(family))
    for name, buffer in own.named_buffers():
        assert torch.equal(dict(model.named_buffers())[name], buffer), name


def test_seeds_and_names_give_different_weights() -> None:
    made = _RECORDS["qwen3"]
    first, second = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(made.draw(first, seed=0), made.draw(first, seed=1))
    assert not torch.equal(made.draw(first, seed=0), made.draw(second, seed=0))


def test_the_weights_of_a_seed_are_fixed_for_ever() -> None:
    # golden: a change here changes every run that anybody reproduces from a seed
    made = InitRecord(shapes={"w": (6,)}, programs={"w": (Operation("normal", (0.0, 1.0)),)})
    assert [f"{x:.6f}" for x in made.draw("w", seed=0).tolist()] == GOLDEN


GOLDEN = ["0.444767", "0.480284", "0.863823", "0.147676", "-1.291931", "0.576910"]


class _Odd(nn.Module):
    def __init__(self, fill: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 4, device="meta"))
        self._fill = fill

    def initialize_weights(self) -> None:
        self._fill(self.weight)


def test_truncated_normals_are_recorded_step_by_step() -> None:
    made = record(_Odd(lambda w: nn.init.trunc_normal_(w, std=0.5, a=-0.7, b=0.7)))
    made = InitRecord(shapes={"weight": (400, 400)}, programs=made.programs)
    drawn = made.draw("weight", seed=0)
    reference = nn.init.trunc_normal_(torch.empty(400, 400), std=0.5, a=-0.7, b=0.7)
    # standard error of the deviation of 160,000 draws: 0.4 / sqrt(160,000) = 1e-3; six of them
    assert abs(float(drawn.std() - reference.std())) < 6e-3
    assert float(drawn.abs().max()) <= 0.7


@pytest.mark.parametrize(
    ("fill", "expected"),
    [
        (lambda w: None, "weight: the model's own _init_weights does not initialise it"),
        (lambda w: w.exponential_(), "'exponential_', which has no form by position"),
        (lambda w: w.copy_(torch.empty(4, 4, device="meta")), "out of sight"),
        (lambda w: w[:, ::2].zero_(), "strided slice"),
    ],
)
def test_what_cannot_be_drawn_is_refused(fill: Any, expected: str) -> None:
    with pytest.raises(ModelError, match=expected):
        record(_Odd(fill)).draw("weight", seed=0)


def test_boxes_outside_the_tensor_are_refused() -> None:
    with pytest.raises(ModelError, match=r"box \(30,\)\+\(3,\) is outside \(32,\)"):
        _RECORDS["gpt2"].draw("transformer.ln_f.weight", seed=0, box=Box((30,), (3,)))


@pytest.mark.timed
def test_ten_million_weights_take_less_than_two_seconds() -> None:
    made = InitRecord(
        shapes={"w": (2500, 4000)}, programs={"w": (Operation("normal", (0.0, 0.02)),)}
    )
    started = time.monotonic()
    made.draw("w", seed=0)
    # 0.2 s on a quiet core: ten times that is a fault, not a busy machine
    assert time.monotonic() - started < 2.0


def test_a_config_with_a_setting_of_its_own_keeps_its_deviation() -> None:
    config = read_config(
        architecture="llama", settings={**SETTINGS["llama"], "initializer_range": 0.3}
    )
    made = record(build_meta(config, auto_class="AutoModelForCausalLM"))
    assert made.program("model.embed_tokens.weight")[0].arguments == (0.0, 0.3)
