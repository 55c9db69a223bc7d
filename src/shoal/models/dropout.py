"""Keyed dropout: each mask bit depends on (seed, step, layer, global token index, feature) only.

So the bits are the same however the batch is split into micro batches, ranks or threads, and again
when recompute runs a block a second time. Dropout of attention probabilities lives inside fused
kernels and is set to 0.

Hash: SplitMix64 (doi 10.1145/2660193.2660195), one 64-bit word for four features of one token.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from shoal.errors import ModelError
from shoal.models.forward_context import get_forward_context
from shoal.models.random_bits import key_of, mix64

KINDS = ("off", "keyed", "framework")

_ATTENTION = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "attn_dropout")
"""Configuration keys under which families keep the dropout of attention probabilities."""

_DROPS = re.compile("dropout|pdrop|layerdrop|drop_path")
"""Of every probability of dropping values or whole layers."""

_LANES = 4
"""Features that share one 64-bit word, 16 bits each."""

_GAMMA, _MIX_1, _MIX_2 = (
    value - (1 << 64) if value >= 1 << 63 else value
    for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


class KeyedDropout(nn.Module):
    """Dropout with probability `p` (rounded to 1/65536) whose mask is a function of position.

    Takes [B, T, D], or [B, D] of pooled states, and needs the forward's context
    (models/forward_context.py) to know which tokens these are. Raises ModelError when it does not.
    `own_tokens`: where a strategy cuts hidden states along the sequence inside a forward, what cuts
    their token indices [B, T] likewise. `own_features`: where features are cut, the first one and
    how many the whole has.
    """

    own_tokens: Callable[[Tensor], Tensor] | None = None
    own_features: tuple[int, int] | None = None

    def __init__(self, p: float, *, seed: int, layer: str) -> None:
        super().__init__()
        self.p = p
        self.layer = layer
        self._key = key_of(seed, "dropout", layer)
        self._threshold = round(p * 65536)

    @torch.compiler.disable  # the context changes from call to call; compiled code would keep one
    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, D] or [B, D] -> the same shape, scaled by 1 / (1 - p) where kept; ModelError."""
        if not self.training or not self._threshold:
            return hidden
        if self._threshold >= 65536:
            return hidden * 0.0
        context = get_forward_context()
        indices = context.token_indices
        if indices is not None and hidden.dim() == 2:  # one state of each row: its first token's
            indices = indices[:, 0]
        elif self.own_tokens is not None and indices is not None:
            indices = self.own_tokens(indices)
        if indices is None or hidden.shape[:-1] != indices.shape:
            known = "unknown" if indices is None else f"of shape {tuple(indices.shape)}"
            raise ModelError(
                f"{self.layer}: keyed dropout sees a tensor of shape {tuple(hidden.shape)}, but "
                f"the tokens of this forward are {known}\n"
                "    the batch needs sample_ids [B]; or set model.dropout to off"
            )
        key = mix64(self._key + mix64(context.step + 1))
        start, whole = self.own_features or (0, hidden.shape[-1])
        keep = keep_mask(indices, num_features=whole, key=key, threshold=self._threshold)
        keep = keep[..., start : start + hidden.shape[-1]]
        return (hidden * keep) * (65536 / (65536 - self._threshold))

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"p={self.p}, layer={self.layer!r}"


@torch.no_grad()
def keep_mask(indices: Tensor, *, num_features: int, key: int, threshold: int) -> Tensor:
    """Which features of which tokens stay: bool [..., num_features] for `indices` int64 [...].

    A feature is dropped when its 16 random bits, read as an unsigned number, are below `threshold`.
    """
    signed = key - (1 << 64) if key >= 1 << 63 else key
    words = -(-num_features // _LANES)
    tokens = _mix((indices + 1) * _GAMMA + signed)
    steps = torch.arange(1, words + 1, device=indices.device) * _GAMMA
    bits = _mix(tokens[..., None] + steps)
    # compared as signed 16-bit numbers: the threshold moves by half the range
    lanes = bits.view(torch.int16)[..., :num_features]
    return lanes >= threshold - 32768


def _mix(word: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64; the result is fresh, and wraps like unsigned."""
    word = word ^ ((word >> 30) & ((1 << 34) - 1))
    word = word.mul_(_MIX_1)
    word ^= (word >> 27) & ((1 << 37) - 1)
    word *= _MIX_2
    word ^= (word >> 31) & ((1 << 33) - 1)
    return word


def mute_attention_dropout(config: Any) -> None:
    """Set what has no key to 0 in a configuration: attention probabilities, and whole layers."""
    for key in _without_key(config):
        setattr(config, key, 0.0)


def _without_key(config: Any) -> list[str]:
    layers = [key for key in vars(config) if re.search("layerdrop|drop_path", key)]
    return [
        key
        for key in (*_ATTENTION, *layers)
        if isinstance(getattr(config, key, None), (int, float))
    ]


def mute_attention_modules(model: nn.Module) -> None:
    """The same where attention shares its configuration key with all other dropout (T5)."""
    for module in model.modules():
        probability = getattr(module, "dropout", None)
        if "Attention" in type(module).__name__ and isinstance(probability, float):
            module.dropout = 0.0  # type: ignore[assignment]


def mute_dropout(config: Any) -> None:
    """Set every dropout probability of a configuration to 0."""
    for key, value in list(vars(config).items()):
        if _DROPS.search(key) and isinstance(value, float):
            setattr(config, key, 0.0)


def wants_dropout(config: Any) -> bool:
    """Whether a configuration asks for any dropout (`keyed` is the default then)."""
    return any(
        bool(_DROPS.search(key)) and isinstance(value, float) and value > 0
        for key, value in vars(config).items()
    )


def apply_keyed(model: nn.Module, *, seed: int, asked: Any = None) -> list[str]:
    """Replace every nn.Dropout of a model by keyed dropout, in place; returns notes for the user.

    `asked`: the configuration before `build_meta` muted attention dropout, to say what was muted.
    """
    for path, module in list(model.named_modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Dropout:
                layer = f"{path}.{name}" if path else name
                setattr(module, name, KeyedDropout(child.p, seed=seed, layer=layer))
    muted = {key: getattr(asked, key) for key in _without_key(asked)} if asked is not None else {}
    return [
        f"model.{key} {value} is set to 0: dropout inside attention kernels has no key"
        if key in _ATTENTION
        else f"model.{key} {value} is set to 0: dropping whole layers has no key"
        for key, value in muted.items()
        if value > 0
    ]
