"""What routers of experts decide in a forward: tokens that each expert gets, and a loss of that.

The balance loss is transformers' (equations 4 to 6 of Switch Transformers, arXiv 2101.03961), of
models whose configuration asks for it (`output_router_logits`). Over a batch it depends on which
rows share a micro batch; over each row alone (as DeepSeek-V3 has it, arXiv 2412.19437, equation 17)
it does not, and adds up over micro batches and ranks.

Shapes: B rows, T tokens, L blocks with experts, E experts, K experts of a token.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shoal.models.experts import experts_of
from shoal.models.forward_context import Routing, get_forward_context


@dataclass
class Load:
    """How much experts were given since the last `take`; a model with routers carries one."""

    layers: int
    experts: int
    tokens: dict[int, Tensor] = field(default_factory=dict)
    """Of each block that was met [E], padding left out."""
    chosen: int = 0
    """Rows that routers gave to experts, padding included."""
    computed: int = 0
    """Rows that experts of this rank have computed."""

    def add(self, routing: Routing) -> None:
        """Count a forward."""
        for number, counts in routing.counts.items():
            found = counts.sum(0)
            self.tokens[number] = self.tokens[number] + found if number in self.tokens else found

    def take(self) -> Tensor:
        """Everything counted, as one vector [L x E + 2] float64 that ranks add up; from zero."""
        whole = torch.zeros(self.layers * self.experts + 2, dtype=torch.float64)
        if self.tokens:
            found = torch.stack([*self.tokens.values()]).double().cpu()
            whole[:-2].view(self.layers, self.experts)[[*self.tokens]] = found
        whole[-2], whole[-1] = self.chosen, self.computed
        self.tokens, self.chosen, self.computed = {}, 0, 0
        return whole

    def figures(self, whole: Tensor) -> dict[str, float]:
        """Of a summed vector: `expert_load`, the fullest expert's tokens over the mean of its
        block, in the worst block; `dropped_tokens`, rows of tokens that no expert computed."""
        counts = whole[:-2].view(self.layers, self.experts)
        met = counts[counts.sum(1) > 0]
        load = {"expert_load": float((met.amax(1) / met.mean(1)).max())} if len(met) else {}
        return load | {"dropped_tokens": float(whole[-2] - whole[-1])}


@dataclass(frozen=True)
class Balance:
    """A model's balance loss: over each row (`sequence`) or over a micro batch (`batch`)."""

    kind: str
    coefficient: float
    share: float = 1.0
    """Of the term that this rank adds: ranks that compute the same tokens add it once."""

    def term(self, routing: Routing, targets: Tensor) -> Tensor:
        """What is added to the SUM of losses; `targets` [B]: of each row, which weigh it.

        So the mean over targets has the term of a row in proportion to its targets.
        """
        assert routing.tokens is not None, "the forward has met a router"
        counts, sums = (
            torch.stack([*each.values()]).sum(0) for each in (routing.counts, routing.sums)
        )
        tokens = routing.tokens * len(routing.counts)
        if self.kind == "batch":
            counts, sums, tokens = counts.sum(0), sums.sum(0), tokens.sum()
            targets = targets.sum()
        most = tokens.clamp(min=1)[..., None]
        uneven = counts.shape[-1] * (counts / most * (sums / most)).sum(-1)
        return self.coefficient * self.share * (uneven * targets).sum()


def watch_routers(model: nn.Module) -> None:
    """Let routers tell the forward's context what they decide; a model without any is untouched."""
    modules = experts_of(model)
    around: list[Any] = [model.get_submodule(path.rpartition(".")[0]) for path in modules]
    routers = [getattr(module, "gate", None) for module in around]
    sizes = {int(each.num_experts) for each in modules.values()}  # type: ignore[arg-type]
    if len(sizes) != 1 or not all(isinstance(each, nn.Module) for each in routers):
        return
    load = Load(len(modules), sizes.pop())
    model.shoal_load = load  # type: ignore[assignment]
    for number, module in enumerate(around):
        module.gate.register_forward_hook(functools.partial(_tell, number))
    for experts in modules.values():
        experts.shoal_load = load  # type: ignore[assignment]


@torch.compiler.disable  # it reads what belongs to the forward and not to the block
def _tell(number: int, module: nn.Module, inputs: Any, output: Any) -> None:
    """A router's output: logits, weights, experts; block `number` of those that have any."""
    context = get_forward_context()
    if context.routing is not None and isinstance(output, tuple) and len(output) == 3:
        context.routing.add(number, output[0], output[2], context.document_ids)


def balance_of(model: nn.Module, kind: str) -> Balance | None:
    """The balance loss that transformers' class adds for its configuration; None: it adds none."""
    config: Any = model.config
    coefficient = float(getattr(model, "router_aux_loss_coef", 0.0) or 0.0)
    asked = getattr(config, "output_router_logits", False) and hasattr(model, "shoal_load")
    return Balance(kind, coefficient) if asked and coefficient and kind != "off" else None


def routing_of(model: nn.Module, rows: int) -> Routing | None:
    """A record for a forward of `rows` rows; None for a model without routers."""
    if not hasattr(model, "shoal_load"):
        return None
    return Routing(rows, wants_sums=getattr(model, "shoal_balance", None) is not None)


@contextlib.contextmanager
def counted_in(model: Any, routing: Routing | None) -> Iterator[None]:
    """Count what a forward of training decides in the model's load."""
    try:
        yield
    finally:  # a stage of a pipeline leaves by an exception
        if routing is not None and model.training:
            model.shoal_load.add(routing)
