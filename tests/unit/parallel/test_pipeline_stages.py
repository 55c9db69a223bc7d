"""Stages of a pipeline are the model together, whatever its family and however it is split."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from shoal.errors import ModelError
from shoal.layout import Layout
from shoal.models.anatomy import anatomy_of, canonical_parameters, hidden_of, logits_of
from shoal.models.huggingface import build_meta, read_config
from shoal.models.init import materialise, record
from shoal.parallel.apply import apply
from shoal.parallel.local import ShardedModel, sharded_of
from shoal.parallel.mesh import Mesh
from shoal.parallel.pipeline import balanced
from shoal.parallel.settings import Settings
from shoal.parallel.stages import Stages
from unit.models.tiny_models import ROWS_OF_TOKENS, SETTINGS, real_model

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_ROUTED = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
_LATENT = {
    **_ROUTED,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "n_group": 1,
    "topk_group": 1,
}
MORE: dict[str, dict[str, object]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {**_ROUTED, "num_experts": 4, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**_ROUTED, "num_experts": 4},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
}
"""Mixtures of experts beside the families that have a tiny model already."""
FAMILIES = (*(family for family in ROWS_OF_TOKENS if family != "cohere"), *MORE)
FIVE_KINDS = ["sliding_attention", "full_attention", "full_attention"] + ["sliding_attention"] * 2


class Alone(Mesh):
    """A mesh whose ranks never meet: what a rank keeps needs nobody else."""

    def ends(self) -> None:
        return None


def cut(
    family: str, rank: int, *, degree: int = 2, **settings: object
) -> tuple[nn.Module, ShardedModel]:
    """The stages of `rank` of a tiny model with five blocks, and how it was cut."""
    model = five_blocks(family)
    mesh = Alone(Layout(pipeline=degree), rank, torch.device("cpu"))
    apply(model, anatomy_of(model), mesh, Settings(**settings))  # type: ignore[arg-type]
    return model, sharded_of(model)


def five_blocks(family: str) -> nn.Module:
    """With blocks of two kinds, in an order that no shift repeats, where the family has kinds."""
    more: dict[str, object] = {"n_layer" if family == "gpt2" else "num_hidden_layers": 5}
    if "sliding_window" in SETTINGS.get(family, {}) and family != "mistral":
        more["layer_types"] = FIVE_KINDS
    if family not in MORE:
        return real_model(family, **more).double()
    config = read_config(
        architecture=family, settings={**_SIZES, **more, **MORE[family]}, vocabulary_size=61
    )
    model = build_meta(config, auto_class="AutoModelForCausalLM")
    return materialise(model, record=record(model), seed=0).eval()  # grouped: never in float64


def batch_of(model: nn.Module) -> dict[str, Tensor]:
    """Two rows of 12 tokens with two documents each."""
    ids = torch.arange(24).view(2, 12) * 7 % 61
    positions = torch.tensor([[*range(7), *range(5)]] * 2)
    documents = torch.tensor([[0] * 7 + [1] * 5] * 2, dtype=torch.int32)
    return {"input_ids": ids, "position_ids": positions, "document_ids": documents}


def staged(parts: list[tuple[nn.Module, Stages]], batch: dict[str, Tensor]) -> Tensor:
    """Logits by all stages in their order."""
    hidden: Tensor | None = None
    for number, stage in enumerate(parts[0][1].every):
        model, stages = parts[parts[0][1].ranks[number]]

        def forward(model: nn.Module = model) -> Tensor:
            return logits_of(model)(hidden_of(model, batch))

        hidden = stages.run(stage, hidden, forward)
    assert hidden is not None
    return hidden


HOW = {
    "2": {"degree": 2},
    "4": {"degree": 4},
    "by hand": {"degree": 2, "split": (4, 1)},
    "looped": {"degree": 2, "stages_per_rank": 2, "schedule": "interleaved-1f1b"},
    "v": {"degree": 2, "stages_per_rank": 2, "schedule": "zbv-zero-bubble"},
}


@torch.no_grad()
@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize("family", FAMILIES)
def test_staged_logits_are_the_whole_models(family: str, how: dict[str, object]) -> None:
    """Packed rows, layers of several kinds; beside it transformers on a row, as users call it."""
    degree = int(str(how["degree"]))
    parts = [cut(family, rank, **how) for rank in range(degree)]  # type: ignore[arg-type]
    whole = five_blocks(family)
    batch = batch_of(whole)
    found = staged([(model, each.stages) for model, each in parts], batch)  # type: ignore[misc]
    wanted = logits_of(whole)(hidden_of(whole, batch))
    assert torch.equal(found, wanted), "the same modules in the same order: the same bits"
    ids = batch["input_ids"][:1]
    alone = {"input_ids": ids, "position_ids": torch.arange(12)[None]}
    found = staged([(model, each.stages) for model, each in parts], alone)  # type: ignore[misc]
    single = family in MORE  # float32; nothing is tied to it, so a wrong layer differs by far more
    close = {"rtol": 1e-4, "atol": 1e-6} if single else {"rtol": 1e-6, "atol": 1e-9}
    assert torch.allclose(found, whole(input_ids=ids).logits, **close)


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize("family", ["llama", "qwen2", "bert", "gpt2"])
def test_every_parameter_has_a_stage_and_its_own_name(family: str, how: dict[str, object]) -> None:
    """A rank has what its stages run, no more; only what is tied is at both ends."""
    whole = five_blocks(family)
    names, ties = (
        canonical_parameters(whole),
        {n for group in anatomy_of(whole).ties for n in group},
    )
    seen: Counter[str] = Counter()
    for rank in range(int(str(how["degree"]))):
        model, sharded = cut(family, rank, **how)  # type: ignore[arg-type]
        here = canonical_parameters(model)
        assert here.keys() == sharded.holdings.keys()
        assert all(torch.equal(each, names[name]) for name, each in here.items())
        seen.update(here.keys())
        stages = sharded.stages
        assert stages is not None
        run = [{id(p) for p in stages.parameters(model, each)} for each in stages.own]
        assert set().union(*run) == {id(each) for each in here.values()}
        apart = {n for n, each in sharded.holdings.items() if "pipeline" in each.partial}
        assert apart <= ties
    assert seen.keys() == names.keys()
    twice = {name for name, count in seen.items() if count == 2}
    assert max(seen.values()) <= 2 and twice <= ties
    if how.get("schedule") == "zbv-zero-bubble":
        assert not twice, "the first and the last stage are on one rank"
    elif family in ("llama", "gpt2"):
        assert twice


def test_a_stage_leaves_the_tree_as_it_was() -> None:
    """Also when what it computes fails."""
    model, sharded = cut("llama", 0, stages_per_rank=2, schedule="zbv-zero-bubble")
    stages, before = sharded.stages, list(map(id, model.modules()))
    assert stages is not None

    def fails() -> Tensor:
        raise RuntimeError("as planned")

    with pytest.raises(RuntimeError, match="as planned"):
        stages.run(stages.own[0], None, fails)
    assert list(map(id, model.modules())) == before
    with pytest.raises(ModelError, match="did not pass block"):
        stages.run(stages.own[0], None, lambda: torch.zeros(()))


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=7),
    st.integers(1, 4),
    st.integers(0, 30),
    st.integers(0, 30),
)
def test_the_dearest_stage_is_as_cheap_as_any_split_makes_it(
    costs: list[int], parts: int, first: int, last: int
) -> None:
    if parts > len(costs):
        with pytest.raises(ModelError, match="a stage would be empty"):
            balanced(costs, parts, first=first, last=last)
        return

    def dearest(sizes: list[int]) -> int:
        edges = [0, *itertools.accumulate(sizes)]
        stages = [sum(costs[a:b]) for a, b in itertools.pairwise(edges)]
        stages[0] += first
        stages[-1] += last
        return max(stages)

    found = balanced(costs, parts, first=first, last=last)
    assert len(found) == parts and sum(found) == len(costs) and min(found) >= 1
    cuts = itertools.combinations(range(1, len(costs)), parts - 1)
    splits = ([b - a for a, b in itertools.pairwise([0, *at, len(costs)])] for at in cuts)
    assert dearest(found) == min(map(dearest, splits))


def test_the_head_counts_in_the_split() -> None:
    """A wide vocabulary makes the last stage dear: it gets fewer blocks."""
    sizes = [[s.stop - s.start for s in cut("llama", 0)[1].stages.every]]  # type: ignore[union-attr]
    assert balanced([1.0] * 8, 2, first=0.0, last=0.0) == [4, 4]
    assert balanced([1.0] * 8, 2, first=0.0, last=2.0) == [5, 3]
    assert sum(sizes[0]) == 5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"degree": 6}, "6 stages for 5 blocks"),
        ({"split": (3, 3)}, "add up to 5 blocks"),
        ({"split": (5, 0)}, "add up to 5 blocks"),
    ],
)
def test_what_cannot_be_split_is_an_error(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        cut("llama", 0, **settings)  # type: ignore[arg-type]


def test_a_model_with_parts_that_nobody_can_place_is_an_error() -> None:
    model = real_model("vit", num_hidden_layers=4)
    mesh = Alone(Layout(pipeline=2), 1, torch.device("cpu"))
    with pytest.raises(ModelError, match="no rule says in which stage"):
        apply(model, anatomy_of(model), mesh, Settings())
