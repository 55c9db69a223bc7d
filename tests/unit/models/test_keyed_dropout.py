import threading

import pytest
import torch
import torch.nn.functional as functional
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import columns, config_of, packed_batch, real_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shoal.errors import ModelError
from shoal.models.anatomy import hidden_of
from shoal.models.dropout import KeyedDropout, apply_keyed, keep_mask, wants_dropout
from shoal.models.forward_context import (
    ROW_STRIDE,
    ForwardContext,
    checkpoint_contexts,
    forward_context_of,
    get_forward_context,
    set_forward_context,
)
from shoal.models.probe import probe_keyed_dropout


def _keyed(family: str, *, seed: int = 0) -> nn.Module:
    model = real_model(family, dropout="keyed")
    apply_keyed(model, seed=seed)
    return model.train()


def _rows(batch: dict[str, Tensor], *rows: int) -> dict[str, Tensor]:
    return {name: tensor[list(rows)] for name, tensor in batch.items()}


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_masks_do_not_depend_on_how_the_batch_is_cut(family: str) -> None:
    model, batch = _keyed(family), packed_batch(rows=4)
    whole = hidden_of(model, batch, step=5)
    parts = [hidden_of(model, _rows(batch, *rows), step=5) for rows in ((0,), (1, 2), (3,))]
    # the same masks; products of other shapes may round differently
    assert torch.allclose(torch.cat(parts), whole, rtol=0, atol=1e-5)
    other = hidden_of(model, batch, step=6)
    assert not torch.allclose(other, whole, atol=1e-2)


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_a_bit_depends_on_token_and_feature_only(data: st.DataObject) -> None:
    features = data.draw(st.integers(1, 40))
    whole = keep_mask(torch.arange(60).view(4, 15), num_features=features, key=9, threshold=9000)
    row, start = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 14))
    width = data.draw(st.integers(1, features))
    indices = torch.arange(60).view(4, 15)[row : row + 1, start:]
    part = keep_mask(indices, num_features=width, key=9, threshold=9000)
    assert torch.equal(part[0], whole[row, start:, :width])


def test_rows_may_be_trimmed() -> None:
    layer = KeyedDropout(0.5, seed=0, layer="a").train()
    hidden, batch = torch.ones(2, 16, 8), packed_batch()
    with set_forward_context(forward_context_of(batch)):
        whole = layer(hidden)
    with set_forward_context(forward_context_of(columns(batch, 0, 9))):
        trimmed = layer(hidden[:, :9])
    assert torch.equal(whole[:, :9], trimmed)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate_and_scale_are_right(p: float) -> None:
    layer = KeyedDropout(p, seed=1, layer="a").train()
    with set_forward_context(ForwardContext(token_indices=torch.arange(2000)[None])):
        result = layer(torch.ones(1, 2000, 64))
    kept = float((result != 0).float().mean())
    # 128,000 draws: standard error sqrt(p (1 - p) / n) <= 1.4e-3; five of them, and p's rounding
    assert abs(kept - (1 - p)) < 7e-3
    assert torch.allclose(result[result != 0], torch.tensor(1 / (1 - p)), rtol=1e-4)
    # neither tokens nor features repeat one another: correlations of n draws are below 5 / sqrt(n)
    bits = (result[0] != 0).float()
    assert abs(float(torch.corrcoef(bits[:, :2].T)[0, 1])) < 5 / 2000**0.5
    assert abs(float(torch.corrcoef(bits[:2000:400])[0, 1])) < 5 / 64**0.5


def test_layers_steps_and_seeds_have_masks_of_their_own() -> None:
    def mask(*, seed: int = 0, layer: str = "a", step: int = 0) -> Tensor:
        with set_forward_context(ForwardContext(token_indices=torch.arange(8)[None], step=step)):
            return KeyedDropout(0.5, seed=seed, layer=layer).train()(torch.ones(1, 8, 32))

    assert torch.equal(mask(), mask())
    for other in (mask(seed=1), mask(layer="b"), mask(step=1)):
        assert not torch.equal(mask(), other)


def test_gradients_pass_where_values_do() -> None:
    layer = KeyedDropout(0.4, seed=0, layer="a").train()
    hidden = torch.randn(1, 8, 32, requires_grad=True)
    with set_forward_context(ForwardContext(token_indices=torch.arange(8)[None])):
        result = layer(hidden)
    result.sum().backward()
    assert torch.equal(hidden.grad != 0, result != 0)


def test_evaluation_and_zero_leave_the_tensor_alone() -> None:
    hidden = torch.randn(1, 2, 4)
    assert KeyedDropout(0.5, seed=0, layer="a").eval()(hidden) is hidden
    assert KeyedDropout(0.0, seed=0, layer="a").train()(hidden) is hidden
    assert not KeyedDropout(1.0, seed=0, layer="a").train()(hidden).any()


def test_unknown_tokens_are_an_error() -> None:
    model, batch = _keyed("gpt2"), packed_batch()
    batch.pop("sample_ids")
    with pytest.raises(ModelError, match=r"transformer.drop: .* unknown\s+the batch needs sample"):
        hidden_of(model, batch)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_recompute_repeats_the_bits(family: str) -> None:
    model, batch = _keyed(family), packed_batch()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        hidden = hidden_of(model, batch, step=3)
        # another micro batch goes forward before this one goes backward, as pipelines do
        hidden_of(model, {**batch, "sample_ids": batch["sample_ids"] + 50}, step=3)
        hidden.square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={
            "use_reentrant": False,
            "context_fn": checkpoint_contexts,
        }
    )
    for first, second in zip(plain, gradients(), strict=True):
        assert torch.equal(first, second)


def test_the_context_is_seen_in_recompute_on_another_thread() -> None:
    seen = []

    def body(x: Tensor) -> Tensor:
        seen.append(get_forward_context().step)
        return x.sin()

    x = torch.ones(3, requires_grad=True)
    with set_forward_context(ForwardContext(step=7)):
        y = checkpoint(body, x, use_reentrant=False, context_fn=checkpoint_contexts)
    worker = threading.Thread(target=lambda: y.sum().backward())
    worker.start()
    worker.join()
    assert seen == [7, 7] and get_forward_context().step == 0


def test_threads_do_not_disturb_one_another() -> None:
    model, batch = _keyed("gpt2"), packed_batch(rows=4)
    expected = [hidden_of(model, _rows(batch, row), step=row) for row in range(4)]
    wrong: list[int] = []

    def work(row: int) -> None:
        torch.set_num_threads(1)
        for _ in range(5):
            found = hidden_of(model, _rows(batch, row), step=row)
            if not torch.equal(found, expected[row]):
                wrong.append(row)

    workers = [threading.Thread(target=work, args=(row,)) for row in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_what_was_muted_is_said() -> None:
    config = config_of("gpt2")
    model = real_model("gpt2", dropout="keyed")
    notes = apply_keyed(model, seed=0, asked=config)
    assert notes == [
        "model.attn_pdrop 0.1 is set to 0: dropout inside attention kernels has no key"
    ]
    assert {type(m).__name__ for m in model.modules() if "ropout" in type(m).__name__} == {
        "KeyedDropout"
    }
    assert model.transformer.h[0].attn.attn_dropout.p == 0.0
    assert config.attn_pdrop == 0.1  # the user's configuration is not touched


def test_off_and_framework() -> None:
    off = real_model("bert", dropout="off").train()
    batch = packed_batch()
    assert torch.equal(hidden_of(off, batch), hidden_of(off, batch))
    framework = real_model("bert", dropout="framework").train()
    assert not torch.equal(hidden_of(framework, batch), hidden_of(framework, batch))


def test_a_model_that_drops_in_its_own_code_is_refused() -> None:
    model = _keyed("llama")
    probe_keyed_dropout(model)
    norm = model.model.norm
    norm.forward = lambda hidden: functional.dropout(hidden, 0.5, training=True)
    with pytest.raises(ModelError, match="LlamaForCausalLM: it drops values in its own code"):
        probe_keyed_dropout(model)


def test_which_configurations_ask_for_dropout() -> None:
    assert wants_dropout(config_of("gpt2")) and wants_dropout(config_of("bert"))
    assert not wants_dropout(config_of("llama"))


def test_a_rank_may_have_several_slices_of_a_row() -> None:
    """As a balanced ring cuts it: the first and the last quarter. Indices come with the batch."""
    layer = KeyedDropout(0.5, seed=0, layer="a").train()
    batch = packed_batch()
    with set_forward_context(forward_context_of(batch)):
        whole = layer(torch.ones(2, 16, 8))
    indices = batch["sample_ids"][:, None] * ROW_STRIDE + torch.arange(16)
    own = torch.cat([indices[:, :4], indices[:, 12:]], dim=1)
    with set_forward_context(forward_context_of({"token_indices": own})):
        sliced = layer(torch.ones(2, 8, 8))
        # a strategy that cuts hidden states further says how: here the second half
        layer.own_tokens = lambda each: each[:, 4:]
        half = layer(torch.ones(2, 4, 8))
        with pytest.raises(
            ModelError, match=r"a: keyed dropout sees a tensor of shape \(2, 8, 8\)"
        ):
            layer(torch.ones(2, 8, 8))
    assert torch.equal(sliced, torch.cat([whole[:, :4], whole[:, 12:]], dim=1))
    assert torch.equal(half, whole[:, 12:])
