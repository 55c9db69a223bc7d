"""Functions of whole matrices, of which each rank of a replica has a part.

Each matrix is worked on by one of the ranks that have parts of it, as in Liu et al., "Muon is
scalable" (arXiv 2502.16982): parts are gathered, the ranks compute, each its own matrices, and the
results go round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.boxes import Box, Slot
from shoal.comm.group import ProcessGroup, watched
from shoal.comm.messages import gather_json
from shoal.parallel.exchange import Exchange, all_gather_into
from shoal.parallel.local import Holdings
from shoal.parallel.mesh import REPLICA
from shoal.runtime import complete


@dataclass(frozen=True)
class _Spread:
    """One matrix: who has parts of it, and where they lie; `exchange` None: it is whole here."""

    shape: tuple[int, ...]
    exchange: Exchange | None
    parts: tuple[tuple[Slot, ...], ...] = ()
    """Of each rank of the exchange."""


class Wholes:
    """The matrices `names` of a replica. Made by all of its ranks together."""

    def __init__(self, holdings: Holdings, names: Sequence[str]) -> None:
        self._spread: dict[str, _Spread] = {}
        exchanges = _exchanges(holdings)
        for axes, exchange in exchanges.items():
            cut = [name for name in names if _cut(holdings, name) == axes]
            own = [[[s.box.offsets, s.box.sizes, s.begins] for s in holdings[n].slots] for n in cut]
            every = gather_json(ProcessGroup(exchange.group), own)
            for number, name in enumerate(cut):
                parts = tuple(
                    tuple(Slot(Box(tuple(o), tuple(s)), tuple(b)) for o, s, b in each[number])
                    for each in every
                )
                self._spread[name] = _Spread(holdings[name].shape, exchange, parts)
        for name in names:
            self._spread.setdefault(name, _Spread(holdings[name].shape, None))

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole matrix."""
        return self._spread[name].shape

    def apply(
        self, function: Callable[[Tensor], Tensor], parts: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """This rank's parts of `function(whole)`, a tensor of the same shape, for each matrix.

        `parts`: this rank's storage of each, alike on all ranks of the replica that have parts.
        Raises PeersLost.
        """
        return watched(lambda: self._apply(function, parts))

    def _apply(
        self, function: Callable[[Tensor], Tensor], parts: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for number, (name, part) in enumerate(parts.items()):
            spread = self._spread[name]
            whole = part if spread.exchange is None else _gathered(part, spread, number)
            if whole is not None:
                made[name] = function(whole)
        found = {}
        for number, (name, part) in enumerate(parts.items()):
            spread = self._spread[name]
            if spread.exchange is None:
                found[name] = made[name]
            else:
                found[name] = _handed_out(made.pop(name, None), part, spread, number)
        return found


def _exchanges(holdings: Holdings) -> dict[tuple[str, ...], Exchange]:
    """One for each set of axes that a matrix can be cut along, made in one order by all ranks."""
    mesh, found = holdings.mesh, dict[tuple[str, ...], Exchange]()
    sharded = ("shard", "context") if mesh.degree("shard") > 1 else ()
    for axes in (sharded, ("tensor",), (*sharded, "tensor")):
        able = _able(axes, holdings)
        group = mesh.group(*able) if able else None
        if group is not None and able not in found:
            found[able] = Exchange(group, dist.get_rank(group), dist.get_world_size(group))
            found[able].traffic = mesh.traffic
    return found


def _cut(holdings: Holdings, name: str) -> tuple[str, ...]:
    """The axes along which ranks have different parts of a matrix."""
    holding = holdings[name]
    sharded = {"shard", "context"} if holding.rows is not None else set[str]()
    tensor = {"tensor"} if holding.segments else set[str]()
    return _able([axis for axis in REPLICA if axis in sharded | tensor], holdings)


def _able(axes: Sequence[str], holdings: Holdings) -> tuple[str, ...]:
    return tuple(axis for axis in axes if holdings.mesh.degree(axis) > 1)


def _gathered(part: Tensor, spread: _Spread, number: int) -> Tensor | None:
    """The whole matrix on the rank that works on it, None on the others."""
    exchange = spread.exchange
    assert exchange is not None, "it has parts"
    landing = part.new_empty(exchange.size, *part.shape)
    with exchange.sending("all_gather", (exchange.size - 1) * part.nbytes):
        all_gather_into(landing.flatten(0, 1), part.contiguous(), group=exchange.group)
    if exchange.rank != number % exchange.size:
        return None
    whole = part.new_zeros(spread.shape)
    for storage, slots in zip(landing, spread.parts):
        for slot in slots:
            whole[slot.box.slices] = slot.of(storage)
    return whole


def _handed_out(made: Tensor | None, part: Tensor, spread: _Spread, number: int) -> Tensor:
    """This rank's part of what one rank has made, laid out as `part` is; 0 beyond its own rows."""
    exchange = spread.exchange
    assert exchange is not None, "it has parts"
    source = number % exchange.size
    whole = part.new_empty(spread.shape) if made is None else made.to(part.dtype).contiguous()
    with exchange.sending("broadcast", whole.nbytes if exchange.rank == source else 0):
        complete(partial(dist.broadcast, group_src=source), whole, group=exchange.group)
    own = torch.zeros_like(part)
    for slot in spread.parts[exchange.rank]:
        slot.of(own).copy_(whole[slot.box.slices])
    return own
