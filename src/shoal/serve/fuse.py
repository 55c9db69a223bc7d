"""Fewer, larger operations in a model's own modules, kept only where no bit of them changes.

Norms become one call, and an attention of Llama's form turns its queries and keys at once. What a
module gave before is compared with what it gives after, to the bit, and where they differ the
module stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from shoal.models.anatomy import hidden_of
from shoal.models.attention import attend
from shoal.models.kernels import Kernel
from shoal.serve.exact import LANES, AnyProduct, Product, Together

_TILE = 256
"""Rows of a gated part at once: what is between its products fits in a core's own cache."""

_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


def fuse_norms(model: nn.Module) -> int:
    """Have norms of root mean squares computed by one call where that changes no bit; how many."""
    count = 0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not type(module).__name__.endswith("RMSNorm") or not isinstance(epsilon, float):
            continue
        if not isinstance(weight, Tensor) or weight.dim() != 1:
            continue
        fused = _norm(weight.detach(), epsilon)
        rows = torch.randn(1, 40, len(weight), generator=torch.Generator().manual_seed(4))
        rows = rows.to(weight)
        with torch.no_grad():
            if all(torch.equal(module(each), fused(each)) for each in (rows, rows[:, :1])):
                module.forward = fused
                count += 1
    return count


def _norm(weight: Tensor, epsilon: float) -> Callable[[Tensor], Tensor]:
    shape = tuple(weight.shape)
    return lambda rows: functional.rms_norm(rows, shape, weight, epsilon)


def fuse_gates(model: nn.Module, joined: dict[str, Together]) -> int:
    """Have gated parts of Llama's form computed in place, some rows at a time; how many are.

    What is between the products of `_TILE` rows stays in the cache of a core.
    """
    count = 0
    for path, module in model.named_modules():
        down = _down_of(module) if path in joined else None
        if down is None:
            continue
        fused = _gated(joined[path].product, down)
        drawn = torch.Generator().manual_seed(6)
        rows = torch.randn(1, _TILE + 40, module.gate_proj.in_features, generator=drawn)
        rows = rows.to(next(model.parameters()))
        with torch.no_grad():
            if all(torch.equal(module(each), fused(each)) for each in (rows, rows[:, :1])):
                module.forward = fused
                count += 1
    return count


def _down_of(module: Any) -> Product | None:
    """The exact product of a gated part's last layer; None: it has another form."""
    act, down = getattr(module, "act_fn", None), getattr(module, "down_proj", None)
    if not isinstance(act, nn.SiLU | SiLUActivation) or not isinstance(down, nn.Linear):
        return None
    found = getattr(down.forward, "__self__", None)
    if not isinstance(found, Product) or down.in_features % (LANES * found.way.pieces):
        return None
    return found if found.way.multiple == 1 else None


def _gated(product: AnyProduct, down: Product) -> Callable[[Tensor], Tensor]:
    pieces, of_all = down.way.pieces, product.forward

    def tile(rows: Tensor) -> Tensor:
        gates, ups = (each.chunk(pieces, dim=1) for each in of_all(rows).chunk(2, dim=1))
        return down.of_parts(
            [functional.silu(gate).mul_(up) for gate, up in zip(gates, ups, strict=True)]
        )

    def forward(rows: Tensor) -> Tensor:
        flat = rows.view(-1, rows.shape[-1])
        if len(flat) <= _TILE:
            return tile(flat).view(rows.shape)
        return torch.cat([tile(part) for part in flat.split(_TILE)]).view(rows.shape)

    return forward


def fuse_attention(
    model: nn.Module, joined: dict[str, Together], *, kernel: Callable[[], Kernel]
) -> int:
    """Have attention of Llama's form turn queries and keys at once; how many layers do."""
    turns = _Turns()
    found = [
        (module, _attention(module, joined[path].product, turns))
        for path, module in model.named_modules()
        if path in joined and _is_llamas(module)
    ]
    return _swap(model, found, kernel)


def fuse_layers(model: nn.Module, *, kernel: Callable[[], Kernel]) -> int:
    """Have layers of Llama's form call their parts' own code at once; how many do."""
    found = [
        (each, _layer(each))
        for each in model.modules()
        if {*dict(each.named_children())} == _PARTS
        and not any(part._forward_hooks or part._forward_pre_hooks for part in each.children())
    ]
    return _swap(model, found, kernel)


def _swap(
    model: nn.Module,
    forwards: list[tuple[nn.Module, Callable[..., Any]]],
    kernel: Callable[[], Kernel],
) -> int:
    """All or none: a forward of the whole model must give the same bits as before."""
    before = _probe(model, kernel()) if forwards else torch.empty(0)
    old = [module.forward for module, _ in forwards]
    for module, forward in forwards:
        module.forward = forward
    if not forwards or _same(before, lambda: _probe(model, kernel())):
        return len(forwards)
    for (module, _), forward in zip(forwards, old, strict=True):
        module.forward = forward
    return 0


def _layer(module: Any) -> Callable[..., Tensor]:
    first, second = module.input_layernorm.forward, module.post_attention_layernorm.forward
    attention, mlp = module.self_attn.forward, module.mlp.forward

    def forward(hidden_states: Tensor, **extras: Any) -> Tensor:
        attended, _ = attention(first(hidden_states), **extras)
        hidden = attended.add_(hidden_states)
        return mlp(second(hidden)).add_(hidden)

    return forward


def _is_llamas(module: Any) -> bool:
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    extra = ("q_norm", "k_norm", "sinks")
    return (
        all(isinstance(getattr(module, name, None), nn.Linear) for name in names)
        and isinstance(getattr(module, "head_dim", None), int)
        and isinstance(getattr(module, "scaling", None), float)
        and not any(hasattr(module, name) for name in extra)
        and module.k_proj.out_features == module.v_proj.out_features
    )


def _same(before: Tensor, again: Callable[[], Tensor]) -> bool:
    try:
        return torch.equal(before, again())
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False  # its forward has another form


@torch.no_grad()
def _probe(model: nn.Module, kernel: Kernel) -> Tensor:
    config: Any = model.config
    drawn = torch.Generator().manual_seed(5)
    vocabulary = config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, (1, 32 * torch.get_num_threads()), generator=drawn)
    positions = torch.arange(tokens.shape[1])[None]
    batch = {"input_ids": tokens, "position_ids": positions}
    device = next(model.parameters()).device
    with device:  # where the kernel makes its own tensors
        own = {name: each.to(device) for name, each in batch.items()}
        return hidden_of(model, own, kernel=kernel)


class _Turns:
    """Cosines and signed sines of a forward's positions, shaped once for all layers."""

    def __init__(self) -> None:
        self._given: Tensor | None = None
        self._made: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))

    def of(self, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor]:
        """[1, T, D] each -> [1, T, 1, D] each, the first half of the sines negated."""
        if self._given is not cosines:
            half = sines.shape[-1] // 2
            signed = torch.cat([-sines[..., :half], sines[..., half:]], dim=-1)
            self._made, self._given = (cosines[..., None, :], signed[..., None, :]), cosines
        return self._made


def _attention(module: Any, product: AnyProduct, turns: _Turns) -> Callable[..., Any]:
    size, output, of_all = module.head_dim, module.o_proj.forward, product.forward
    queries = module.q_proj.out_features // size
    keys = module.k_proj.out_features // size
    scale = module.scaling

    def forward(
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **extras: Any,
    ) -> tuple[Tensor, None]:
        """rotate_half(x) * sin is x with its halves exchanged, times sines with signs."""
        cosines, signed = turns.of(*position_embeddings)
        made = of_all(hidden_states).view(*hidden_states.shape[:-1], -1, size)
        plain = made[..., : queries + keys, :]
        turned = torch.roll(plain, size // 2, -1).mul_(signed)
        turned = plain.mul_(cosines).add_(turned).transpose(1, 2)
        attended, _ = attend(
            module,
            turned[:, :queries],
            turned[:, queries:],
            made[..., queries + keys :, :].transpose(1, 2),
            attention_mask,
            scaling=scale,
            **extras,
        )
        return output(attended.flatten(-2)), None

    return forward
