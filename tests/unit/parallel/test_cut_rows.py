"""How rows are cut along the sequence: every token on one rank, with all that belongs to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shoal.errors import ModelError
from shoal.models.forward_context import ROW_STRIDE
from shoal.models.kernels import MaskRequest, local
from shoal.parallel.exchange import Exchange
from shoal.parallel.ring import Ring, Seen
from shoal.parallel.rows import Context

NOBODY: Any = None


def contexts(kind: str, size: int, *, divided: int = 1) -> list[Context]:
    """The context of each rank; no group, for nothing is sent here."""
    return [Context(Exchange(NOBODY, rank, size), kind, divided) for rank in range(size)]


def rows(*, tokens: int) -> dict[str, Tensor]:
    """Two samples, the second padded from the middle on."""
    ids = torch.arange(2 * tokens).view(2, tokens) + 1
    documents = torch.zeros(2, tokens, dtype=torch.int32)
    documents[1, tokens // 2 :] = -1
    return {
        "input_ids": ids,
        "labels": ids + 1000,
        "position_ids": torch.arange(tokens).expand(2, tokens),
        "document_ids": documents,
        "sample_ids": torch.tensor([5, 9]),
    }


@pytest.mark.parametrize("kind", ["ring", "ulysses"])
@pytest.mark.parametrize(("tokens", "size", "divided"), [(16, 2, 1), (18, 4, 1), (8, 2, 3)])
def test_every_token_is_on_one_rank_with_what_belongs_to_it(
    kind: str, tokens: int, size: int, divided: int
) -> None:
    batch = rows(tokens=tokens)
    parts = [each.own_part(batch) for each in contexts(kind, size, divided=divided)]
    lengths = {part["input_ids"].shape[1] for part in parts}
    assert len(lengths) == 1 and lengths.pop() % divided == 0
    ids = torch.cat([part["input_ids"] for part in parts], 1)
    assert sorted(ids[ids > 0].tolist()) == sorted(batch["input_ids"].flatten().tolist())
    for part in parts:
        real = part["input_ids"] > 0  # what was added is padding
        assert torch.equal(part["labels"][real], part["input_ids"][real] + 1000)
        assert (part["labels"][~real] == -100).all() and (part["document_ids"][~real] == -1).all()
        places = part["token_indices"] - batch["sample_ids"][:, None] * ROW_STRIDE
        wanted = batch["input_ids"][:, :1] + places
        assert torch.equal(part["input_ids"][real], wanted[real])
        assert torch.equal(part["position_ids"][real], places[real])
        assert torch.equal(part["sample_ids"], batch["sample_ids"])
        assert torch.equal(part["row_document_ids"], parts[0]["row_document_ids"])


def test_causal_work_is_even_in_a_ring() -> None:
    """Each rank's pairs of query and key, of 4 ranks: as many as of any other, but for its own."""
    slices = [each.slices(each.exchange.rank, tokens=64) for each in contexts("ring", 4)]
    pairs = [sum(at + 1 for part in own for at in part) for own in slices]
    assert max(pairs) == min(pairs)


@given(
    seed=st.integers(0, 1000),
    tokens=st.sampled_from([8, 16, 24]),
    size=st.sampled_from([1, 2, 4]),
    window=st.none() | st.integers(1, 30),
    packed=st.booleans(),
)
def test_a_ring_sees_what_the_local_mask_shows(
    seed: int, tokens: int, size: int, window: int | None, packed: bool
) -> None:
    """All blocks of all ranks and hops together are the mask of whole rows, each pair once."""
    generator = torch.Generator().manual_seed(seed)
    begins = torch.rand(2, tokens, generator=generator) < 0.2
    documents = begins.int().cumsum(1, dtype=torch.int32) if packed else None
    wanted = local.mask(
        MaskRequest(
            batch_size=2,
            num_queries=tokens,
            num_keys=tokens,
            allowed=lambda b, h, q, k: (k <= q) & (q - k < (window or tokens)),
            document_ids=documents,
            skips_causal=False,
        )
    )
    assert wanted is not None
    seen, ranks = Seen.of(window=window, documents=documents), contexts("ring", size)
    found = torch.zeros(2, tokens, tokens, dtype=torch.int64)
    slices = [each.slices(each.exchange.rank, tokens=tokens) for each in ranks]
    places = [torch.tensor([at for part in own for at in part]) for own in slices]
    for each in ranks:
        ring = Ring(each.exchange, slices)
        for hop in range(size):
            here, there = places[each.exchange.rank], places[ring.source(hop)]
            blocks = ring.blocks(hop, seen, bytes_per_score=1 << 24, device=torch.device("cpu"))
            for queries, keys, hidden in blocks:
                shape = (2, len(here[queries]), len(there[keys]))
                shown = torch.ones(shape, dtype=torch.int64)
                if hidden is not None:
                    shown -= hidden[:, 0].long().expand(shape)
                found[:, here[queries][:, None], there[keys]] += shown
    assert torch.equal(found, wanted[:, 0].long().expand(2, -1, -1))


@pytest.mark.parametrize("kind", ["ring", "ulysses"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"skips_bidirectional": True}, "attention that looks ahead"),
        ({"attention_mask": torch.ones(1, 4)}, "the model has a mask"),
    ],
)
def test_masks_that_are_not_known_are_refused(
    kind: str, change: dict[str, Any], words: str
) -> None:
    request = MaskRequest(
        batch_size=1, num_queries=4, num_keys=4, allowed=lambda *_: True, **change
    )
    with pytest.raises(ModelError, match=words):
        contexts(kind, 2)[0].kernel.mask(request)


@pytest.mark.parametrize("kind", ["ring", "ulysses"])
@pytest.mark.parametrize(
    ("change", "words"), [({"causal": False}, "looks ahead"), ({"bias": torch.ones(1)}, "a bias")]
)
def test_attention_that_is_not_known_is_refused(
    kind: str, change: dict[str, Any], words: str
) -> None:
    one = torch.ones(1, 2, 4, 8)
    usual = {"causal": True, "bias": None}
    terms = {"layer": 0, "mask": Seen(), "scale": 1.0, "softcap": None, **usual, **change}
    with pytest.raises(ModelError, match=words):
        contexts(kind, 2)[0].kernel(one, one, one, **terms)
