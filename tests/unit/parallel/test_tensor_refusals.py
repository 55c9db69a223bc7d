"""What cannot be cut along tensor is refused with the reason, before anything is changed."""

from __future__ import annotations

import dataclasses

import pytest

from shoal.errors import ModelError
from shoal.models.anatomy import anatomy_of
from shoal.parallel.tensor import check_degree
from unit.models.tiny_models import meta_model


def test_heads_that_do_not_divide_name_the_degrees_that_do() -> None:
    model = meta_model("llama")
    with pytest.raises(ModelError) as caught:
        check_degree(model, anatomy_of(model), 4)
    assert "4 does not divide 4 query heads, 2 key-value heads" in str(caught.value)
    assert "degrees that do: 1, 2" in str(caught.value)
    check_degree(model, anatomy_of(model), 2)


def test_families_without_a_table_are_refused() -> None:
    for family in ("vit", "t5", "cohere"):
        model = meta_model(family)
        with pytest.raises(ModelError, match=f"{family}: no table says.*|use parallel.shard"):
            check_degree(model, anatomy_of(model), 2)


def test_logits_of_its_own_and_dropout_without_a_key_are_refused() -> None:
    model = meta_model("llama")
    anatomy = dataclasses.replace(anatomy_of(model), whole_logits=True)
    with pytest.raises(ModelError, match="its head cannot be cut by vocabulary"):
        check_degree(model, anatomy, 2)
    model = meta_model("gpt2", dropout="framework")
    with pytest.raises(ModelError, match=r"(?s)framework dropout differs.*set model.dropout to"):
        check_degree(model, anatomy_of(model), 2)
