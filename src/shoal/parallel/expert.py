"""Expert parallelism: each rank has some experts of every block, and tokens go where theirs are.

The ranks of shard x context are counted as expert_shard x expert: neighbours along `expert` have
different experts of one set and exchange rows (two uneven all-to-alls forward, two backward:
GShard, arXiv 2006.16668); ranks along `expert_shard` have the same experts, whose parameters FSDP2
cuts over them (parallel/shard.py). Everything else of the model knows nothing of it.

No token is dropped: an expert computes as many rows as it gets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shoal.models.anatomy import Anatomy, canonical_name
from shoal.models.experts import Products, experts_of, inverse, take
from shoal.parallel.exchange import Exchange
from shoal.parallel.local import Holdings, Segment, sharded_of
from shoal.parallel.mesh import Mesh
from shoal.parallel.settings import Settings


def apply_expert(
    model: nn.Module, anatomy: Anatomy, mesh: Mesh, holdings: Holdings, settings: Settings
) -> Holdings:
    """Give this rank its experts of every block of `model`, in place; nothing for a degree of 1.

    The degree divides the number of experts (legal/rules.py).
    """
    degree, rank = mesh.degree("expert"), mesh.coordinate("expert")
    if degree == 1:
        return holdings
    group = mesh.group("expert")
    assert group is not None, "a degree above 1 has a group"
    exchange = Exchange(group, rank=rank, size=degree)
    changes: dict[str, dict[str, Any]] = {}
    for path, module in experts_of(model).items():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            size = parameter.shape[0] // degree
            own = parameter.data.narrow(0, rank * size, size).clone()
            module._parameters[leaf] = nn.Parameter(own, requires_grad=parameter.requires_grad)
            name = canonical_name(f"{path}.{leaf}")
            changes[name] = {
                "segments": (Segment(0, rank * size, size), *holdings[name].segments),
                # whatever was said of the ranks of context: they have other experts, or FSDP2's
                # part of the same, and an expert has seen the tokens of all of them
                "copies": holdings[name].copies - {"context"},
                "partial": holdings[name].partial - {"context"},
            }
        module.shoal_dispatch = AllToAll(exchange)  # type: ignore[assignment]
    sharded_of(model).expert = exchange
    return holdings.changed(changes)


@dataclass(frozen=True)
class AllToAll:
    """Sends each row to the rank that has its expert, and what is made of it back."""

    exchange: Exchange

    def __call__(self, rows: Tensor, counts: Tensor, products: Products) -> Tensor:
        """Rows [R, D] sorted by expert, of which `counts` [E] -> what is made of each [R, D].

        Rows arrive sorted by the rank they are from, and there by expert: an expert's rows lie in
        the order of one worker that had the ranks' tokens one after the other.
        """
        own = counts.view(self.exchange.size, -1)  # [ranks, E / ranks]
        theirs = self.exchange.transpose(own)
        sent, received = torch.stack([own.sum(1), theirs.sum(1)]).tolist()
        arrived = self.exchange.send_rows(rows, sent=sent, received=received)
        ranks, experts = theirs.shape
        numbers = torch.arange(experts, device=rows.device).repeat(ranks)
        order = numbers.repeat_interleave(theirs.flatten()).argsort(stable=True)
        made = products(take(arrived, order), theirs.sum(0))
        return self.exchange.send_rows(take(made, inverse(order)), sent=received, received=sent)
