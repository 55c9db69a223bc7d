"""docs/contribute/new-family.md is run: its entry alone makes a family known everywhere."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from shoal.errors import ConfigError, ModelError
from shoal.layout import Layout
from shoal.legal import axes_of, facts_from_config, shrunk, tensor_degrees
from shoal.legal.families import table
from shoal.models import init
from shoal.models.anatomy import anatomy_of, check_logits, hidden_of, logits_of
from shoal.models.huggingface import build_meta, config_from
from shoal.models.placement import check_placed
from unit.launch.test_refuse import recipe

PAGE = Path(__file__).resolve().parents[2] / "docs" / "contribute" / "new-family.md"
FAMILY = "starcoder2"
SIZES = {
    "model_type": FAMILY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 100,
}


@pytest.fixture(autouse=True)
def entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that the page says to write, in the table."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    module: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), module)
    assert list(module["FAMILIES"]) == [FAMILY]
    monkeypatch.setitem(table.FAMILIES, FAMILY, module["FAMILIES"][FAMILY])


def built(**settings: Any) -> nn.Module:
    model = build_meta(config_from({**SIZES, **settings}), auto_class="AutoModelForCausalLM")
    init.materialise(model, record=init.record(model), seed=0)
    return model


def test_the_entry_is_short_and_was_not_there_before(monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 40
    monkeypatch.delitem(table.FAMILIES, FAMILY)
    with pytest.raises(ModelError, match=r"'starcoder2' is not an architecture whose sizes"):
        facts_from_config(SIZES)


@pytest.mark.parametrize("settings", [{}, {"use_bias": False, "tie_word_embeddings": False}])
def test_its_sizes_are_the_models(settings: dict[str, Any]) -> None:
    config = transformers.AutoConfig.for_model(**SIZES, **settings)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    facts = facts_from_config(json.loads(config.to_json_string(use_diff=False)))
    assert facts.parameters == sum(each.numel() for each in model.parameters())
    assert tensor_degrees(facts) == [1, 2, 4] and "tensor" in axes_of(FAMILY)
    assert facts_from_config({**SIZES, **shrunk(SIZES, tensor=2)}).heads == 4


def test_its_parameters_are_placed_and_its_logits_are_its_own() -> None:
    model = built()
    anatomy = anatomy_of(model)
    check_placed(anatomy.placements, family=FAMILY)
    row = anatomy.placements["model.layers.0.mlp.c_proj.bias"]
    assert (row.dim, row.gradient) == (None, "partial")
    assert anatomy.placements["model.layers.1.self_attn.k_proj.weight"].dim == 0
    assert not check_logits(model, anatomy).whole_logits


def test_it_learns() -> None:
    model = built()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.arange(64).view(2, 32) % 7
    losses = []
    for _ in range(20):
        logits = logits_of(model)(hidden_of(model, {"input_ids": ids}))
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 4.0 and losses[-1] < 1.0, losses  # from log(100) = 4.6 to a period of 7


def test_degrees_that_do_not_divide_its_heads_are_refused() -> None:
    from shoal.launch.refuse import refuse_illegal

    with pytest.raises(ConfigError, match=r"(?s)3 does not divide 8 query heads.*the nearest is 2"):
        refuse_illegal(recipe("parallel.tensor=3"), Layout(tensor=3), config=SIZES)
    refuse_illegal(recipe("parallel.tensor=4"), Layout(tensor=4), config=SIZES)
