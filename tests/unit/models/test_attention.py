from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import ROWS_OF_TOKENS, columns, packed_batch, real_model
from torch import Tensor, nn
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sliding_window_causal_mask_function,
)

from shoal.errors import ModelError
from shoal.models import cpu_attention, kernels
from shoal.models.anatomy import hidden_of
from shoal.models.attention import attend, build_mask
from shoal.models.cpu_attention import attend_in_blocks, is_suited
from shoal.models.forward_context import ForwardContext, set_forward_context
from shoal.models.kernels import one_document_each


def _mask(documents: Tensor | None, *, function: Any = causal_mask_function, **more: Any) -> Any:
    length = 6 if documents is None else documents.shape[1]
    rows = 1 if documents is None else documents.shape[0]
    with set_forward_context(ForwardContext(document_ids=documents)):
        return build_mask(
            batch_size=rows, q_length=length, kv_length=length, mask_function=function, **more
        )


def _naive(documents: list[int], allowed: Any) -> list[list[bool]]:
    return [
        [documents[q] == documents[k] and allowed(q, k) for k in range(len(documents))]
        for q in range(len(documents))
    ]


@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.integers(0, 3))
def test_masks_say_what_their_definition_says(lengths: list[int], padding: int) -> None:
    row = [i for i, length in enumerate(lengths) for _ in range(length)] + [-1] * padding
    documents = torch.tensor([row], dtype=torch.int32)
    causal = _mask(documents)
    assert causal[0, 0].tolist() == _naive(row, lambda q, k: k <= q)
    window = sliding_window_causal_mask_function(2)
    slid = _mask(documents, function=window, local_size=2)
    assert slid[0, 0].tolist() == _naive(row, lambda q, k: q - 2 < k <= q)
    both = _mask(
        documents,
        function=bidirectional_mask_function,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=True,
    )
    assert both[0, 0].tolist() == _naive(row, lambda q, k: True)


def test_no_mask_is_built_where_none_is_needed() -> None:
    one = torch.zeros(2, 6, dtype=torch.int32)
    padded = torch.tensor([[0, 0, 0, 0, -1, -1], [0] * 6], dtype=torch.int32)
    both_ways = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": True}
    assert _mask(None) is None and _mask(one) is None and _mask(padded) is None
    assert _mask(one, function=bidirectional_mask_function, **both_ways) is None
    keys = _mask(padded, function=bidirectional_mask_function, **both_ways)
    assert keys[:, 0, 0].tolist() == (padded >= 0).tolist()
    # a window shorter than the row is always a mask; a longer one never
    window = sliding_window_causal_mask_function
    assert _mask(one, function=window(2), local_size=2) is not None
    assert _mask(one, function=window(8), local_size=8) is None


@pytest.mark.parametrize(
    ("row", "expected"),
    [([0, 0, 0], True), ([0, 0, -1], True), ([0, 1, 1], False), ([-1, 0, 0], False)],
)
def test_rows_of_one_document_are_recognised(row: list[int], expected: bool) -> None:
    assert one_document_each(torch.tensor([row])) is expected


@pytest.mark.parametrize("family", ROWS_OF_TOKENS)
@pytest.mark.parametrize("training", [False, True])
def test_a_packed_document_equals_the_document_alone(family: str, training: bool) -> None:
    model, batch = real_model(family), packed_batch()
    model.requires_grad_(training)
    packed = hidden_of(model, batch)
    for start, stop in ((0, 5), (5, 13), (13, 16)):
        alone = hidden_of(model, columns(batch, start, stop))
        # sums over 16 keys, most of weight 0, against sums over 3 to 8: rounding of float32
        assert torch.allclose(packed[:, start:stop], alone, rtol=0, atol=5e-6)


@pytest.mark.parametrize("family", ROWS_OF_TOKENS)
def test_padding_changes_nothing(family: str) -> None:
    model = real_model(family)
    batch = packed_batch(lengths=(6,))
    padded = {n: functional.pad(t, (0, 4)) if t.dim() == 2 else t for n, t in batch.items()}
    padded["document_ids"][:, 6:] = -1
    inside = hidden_of(model, padded)[:, :6]
    assert torch.allclose(inside, hidden_of(model, batch), rtol=0, atol=5e-6)


@pytest.mark.parametrize("family", ROWS_OF_TOKENS)
def test_no_family_leaks_between_documents(family: str) -> None:
    model = real_model(family)
    batch = packed_batch(lengths=(5, 6))
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][:, :5] = (other["input_ids"][:, :5] + 1) % 20
    before, after = hidden_of(model, batch), hidden_of(model, other)
    assert torch.equal(before[:, 5:], after[:, 5:])
    assert not torch.equal(before[:, :5], after[:, :5])


def _reference(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool
) -> Tensor:
    """Attention by its definition."""
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if causal:
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(ahead, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@settings(deadline=None, max_examples=25)
@given(
    length=st.integers(1, 200),
    groups=st.sampled_from([1, 2, 4]),
    causal=st.booleans(),
    masked=st.sampled_from(["no", "documents", "keys"]),
)
def test_blocks_equal_the_definition(length: int, groups: int, causal: bool, masked: str) -> None:
    torch.manual_seed(length)
    shape = (2, length, 4, 8)
    query = torch.randn(shape).transpose(1, 2).requires_grad_()
    key, value = (torch.randn(2, length, groups, 8).transpose(1, 2).requires_grad_() for _ in "kv")
    mask = None
    if masked == "documents":
        documents = (torch.rand(2, length) < 0.1).cumsum(1)
        mask = documents[:, None, :, None] == documents[:, None, None, :]
    elif masked == "keys":
        mask = torch.ones(2, 1, 1, length, dtype=torch.bool)
        mask[1, ..., length // 2 + 1 :] = False
    ours = attend_in_blocks(query, key=key, value=value, mask=mask, causal=causal, scale=8**-0.5)
    theirs = _reference(query, key, value, mask, causal)
    assert ours.shape == shape
    pull = torch.randn(shape)
    gradients = torch.autograd.grad(ours, [query, key, value], pull)
    expected = torch.autograd.grad(theirs, [query, key, value], pull)
    for mine, own in zip([ours, *gradients], [theirs, *expected]):
        # float32 sums of at most 200 terms of size 1, in another order
        assert torch.allclose(mine, own, rtol=1e-4, atol=1e-4)


def test_blocks_and_the_fused_kernel_agree_in_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = real_model("qwen3").train(), packed_batch(lengths=(70, 30, 50))
    calls = []

    def counted(*arguments: Any, **named: Any) -> Tensor:
        calls.append(1)
        return attend_in_blocks(*arguments, **named)

    monkeypatch.setattr(kernels, "attend_in_blocks", counted)
    monkeypatch.setattr(cpu_attention, "_FLOAT32_TOKENS", 100)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        hidden_of(model, batch).square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    ours = gradients()
    assert len(calls) == 2
    monkeypatch.setattr(kernels, "is_suited", lambda *a, **k: False)
    largest = max(float(g.norm()) for g in ours.values())
    for name, expected in gradients().items():
        # a key's bias would have a true gradient of zero: measured against the largest then
        allowed = 1e-4 * max(float(expected.norm()), 1e-3 * largest)
        assert float((ours[name] - expected).norm()) <= allowed, name


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "gemma2"])
def test_bfloat16_regions_stay_close_to_float32(family: str) -> None:
    model, batch = real_model(family).train(), packed_batch()
    exact = hidden_of(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = hidden_of(model, batch)
    rounded.float().sum().backward()
    # bfloat16 keeps 8 bits; two layers of some ten roundings of 2^-9 each, on values of size 3
    assert float((rounded.float() - exact).detach().abs().max()) < 0.1
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("dtype", "length", "expected"),
    [
        (torch.bfloat16, 64, True),
        (torch.float32, 256, False),  # no faster there
        (torch.float32, 512, True),
        (torch.float64, 512, False),
        (torch.bfloat16, 4096, False),  # would keep 4 x 4096 x 4096 probabilities per row
    ],
)
def test_blocks_are_used_where_they_gain(dtype: torch.dtype, length: int, expected: bool) -> None:
    states = torch.empty(2, 4, length, 64, dtype=dtype, device="cpu")
    assert is_suited(states, states, dropout=0.0) is expected
    assert not is_suited(states, states, dropout=0.1)
    assert not is_suited(states[:, :, :1], states, dropout=0.0)  # decoding with a cache


def test_terms_that_are_not_known_are_refused() -> None:
    layer, states = nn.Linear(1, 1), torch.randn(1, 2, 3, 4)
    with pytest.raises(ModelError, match="Linear: attention with 's_aux' is not supported"):
        attend(layer, states, states, states, None, s_aux=states)
    with pytest.raises(ModelError, match=r"dropout of attention probabilities \(0.1\) has no key"):
        attend(layer, states, states, states, None, dropout=0.1)
    with pytest.raises(ModelError, match="overlays its own mask pattern"):
        _mask(None, use_vmap=True)
    wrong = set_forward_context(ForwardContext(document_ids=torch.zeros(2, 5)))
    with wrong, pytest.raises(ModelError, match=r"expected shape \(1, 6\).*got \(2, 5\)"):
        build_mask(batch_size=1, q_length=6, kv_length=6, mask_function=causal_mask_function)


def test_decoding_with_a_cache_sees_the_past() -> None:
    model, ids = real_model("llama"), torch.tensor([[5, 9, 2, 7]])
    whole = model(input_ids=ids).logits
    first = model(input_ids=ids[:, :2], use_cache=True)
    rest = model(input_ids=ids[:, 2:], past_key_values=first.past_key_values, use_cache=True)
    assert torch.allclose(whole[:, 2:], rest.logits, atol=1e-5)
