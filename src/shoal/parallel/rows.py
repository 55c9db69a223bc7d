"""Rows that are cut along the sequence, and attention that finds what is on other ranks.

Each rank of the context axis has some tokens of every row, with their labels, positions and
documents, and runs the whole model on them; only attention looks beyond a rank. It is a kernel of
the forward's context:

- `ring`: keys and values go round (parallel/ring.py). Rank r of c has the slices r and 2c - 1 - r
  of 2c, so that causal work is even (Brandon et al., arXiv 2311.09431).
- `ulysses`: ranks swap tokens for heads before attention, and back after it: each has whole rows of
  its heads (Jacobs et al., arXiv 2309.14509). Rank r has slice r of c.

Shapes: B rows, T tokens of a row, c ranks, H heads, K key heads, D hidden size or head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from shoal.comm.group import watched
from shoal.errors import ModelError
from shoal.fields import TOKENS, Fields
from shoal.models.anatomy import padded
from shoal.models.forward_context import token_indices_of
from shoal.models.kernels import Kernel, Mask, MaskRequest, local, one_document_each
from shoal.parallel import ring
from shoal.parallel.exchange import Exchange


@dataclass(frozen=True)
class Context:
    """The ranks that each have a part of every row. `divided`: by how much a part must divide."""

    exchange: Exchange
    kind: str
    divided: int = 1

    @property
    def num_slices(self) -> int:
        """Slices of a row; each is as long as any other."""
        return self.exchange.size * (2 if self.kind == "ring" else 1)

    def slices(self, rank: int, *, tokens: int) -> list[range]:
        """The slices of a row of `tokens` that `rank` has."""
        numbers = [rank] if self.kind == "ulysses" else [rank, self.num_slices - 1 - rank]
        size = tokens // self.num_slices
        return [range(each * size, (each + 1) * size) for each in numbers]

    def _places(self, rank: int, *, tokens: int) -> Tensor:
        """Positions of a row that `rank` has, in its order."""
        return torch.tensor([at for each in self.slices(rank, tokens=tokens) for at in each])

    def own_part(self, batch: Mapping[str, Tensor], fields: Fields = TOKENS) -> dict[str, Tensor]:
        """What this rank has of a batch of whole rows, which all ranks of the axis read alike.

        Of `fields`, those of the sequence `tokens` are cut, with positions and token indices;
        the documents of whole rows go along.
        """
        ids = batch["input_ids"]
        places = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        whole = {"position_ids": places, **batch}
        if missing := -ids.shape[1] % (self.num_slices * self.divided):
            whole = padded(whole, {**TOKENS, **fields}, more=missing)
        tokens = whole["input_ids"].shape[1]
        indices = token_indices_of(whole)
        own = self._places(self.exchange.rank, tokens=tokens).to(ids.device)
        part = dict(whole)
        for name, field in {**TOKENS, **fields}.items():
            if field.sequence == "tokens" and name in whole:
                part[name] = whole[name].index_select(1 + field.dims.index(None), own)
        if indices is not None:
            part["token_indices"] = indices[:, own]
        if "document_ids" in whole:
            part["row_document_ids"] = whole["document_ids"]
        return part

    @torch.no_grad()
    def whole(self, part: Tensor, *, tokens: int) -> Tensor:
        """Every rank's part [B, T/c, ...] as rows [B, tokens, ...], on every rank. PeersLost."""
        joined = watched(lambda: self.exchange.join(part))
        ranks = range(self.exchange.size)
        order = torch.cat([self._places(rank, tokens=joined.shape[1]) for rank in ranks])
        return joined[:, order.argsort().to(part.device)][:, :tokens]

    @torch.no_grad()
    def at(self, part: Tensor, *, place: int) -> Tensor:
        """Position `place` of rows of which each rank has a part [B, T/c, D]: [B, 1, D]."""
        own = self._places(self.exchange.rank, tokens=part.shape[1] * self.exchange.size)
        mine = (own == place).to(part.device)
        return self.exchange.sum((part * mine[:, None]).sum(1, keepdim=True))

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums over the ranks of the axis. Raises PeersLost."""
        total = torch.tensor(values, dtype=torch.float64)
        watched(lambda: self.exchange.sum_([total]))
        return [float(each) for each in total]

    @cached_property
    def kernel(self) -> Kernel:
        """How tokens find those of other ranks."""
        return Ulysses(self) if self.kind == "ulysses" else Ring(self)


@dataclass(frozen=True)
class _Kernel:
    """What both kinds share: attention is causal, and reads documents of whole rows."""

    context: Context
    by_layer: ClassVar[bool] = False
    """Whether it must know which layer calls."""

    def _checked(self, request: MaskRequest) -> MaskRequest:
        """The request for whole rows. Raises ModelError for a pattern that is not known here.

        Its own function knows places among this rank's tokens only.
        """
        if request.skips_bidirectional or request.attention_mask is not None:
            what = "attention that looks ahead" if request.skips_bidirectional else "a mask"
            raise ModelError(f"context: the model has {what}\n    set parallel.context to 1")
        tokens, window = request.num_queries * self.context.exchange.size, request.window

        def allowed(row: Any, head: Any, query: Any, key: Any) -> Any:
            seen = key <= query
            return seen if window is None else seen & (query - key < window)

        documents = request.row_document_ids
        if documents is not None and one_document_each(documents):
            documents = None  # no token sees the padding that follows it
        return replace(
            request,
            num_queries=tokens,
            num_keys=tokens,
            allowed=allowed,
            document_ids=documents,
            skips_causal=True,
        )


def _check(causal: bool, bias: Tensor | None) -> None:
    if not causal or bias is not None:
        what = "attention with a bias of its scores" if causal else "attention that looks ahead"
        raise ModelError(f"context: the model has {what}\n    set parallel.context to 1")


@dataclass(frozen=True)
class Ulysses(_Kernel):
    """Whole rows of this rank's heads, by the local kernel."""

    def mask(self, request: MaskRequest) -> Tensor | None:
        """As of whole rows."""
        return local.mask(self._checked(request))

    @torch.compiler.disable
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layer: int,
        mask: Tensor | Mask | None,
        causal: bool,
        scale: float,
        softcap: float | None,
        bias: Tensor | None,
    ) -> Tensor:
        """See `Kernel`."""
        _check(causal, bias)
        exchange = self.context.exchange
        found = local(
            *(exchange.swap(each, split=1, join=2) for each in (query, key, value)),
            layer=layer,
            mask=mask,
            causal=causal,
            scale=scale,
            softcap=softcap,
            bias=None,
        )
        return exchange.swap(found, split=1, join=2)


@dataclass(frozen=True)
class Ring(_Kernel):
    """Keys and values go round."""

    def mask(self, request: MaskRequest) -> ring.Seen:
        """What tokens see, for `ring.attend`."""
        whole = self._checked(request)
        return ring.Seen.of(window=whole.window, documents=whole.document_ids)

    @torch.compiler.disable
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layer: int,
        mask: Tensor | Mask | None,
        causal: bool,
        scale: float,
        softcap: float | None,
        bias: Tensor | None,
    ) -> Tensor:
        """See `Kernel`."""
        _check(causal, bias)
        exchange, tokens = self.context.exchange, query.shape[2] * self.context.exchange.size
        slices = [self.context.slices(rank, tokens=tokens) for rank in range(exchange.size)]
        assert isinstance(mask, ring.Seen), "made by `mask`"
        way = ring.Ring(exchange, slices)
        return ring.attend(query, key, value, ring=way, seen=mask, scale=scale, softcap=softcap)
