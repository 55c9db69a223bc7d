"""Smaller sizes for a model that keep it of the same kind: what `shoal parity` trains instead.

The model's class, its vocabulary, its kinds of layers in their order, whether query heads share
keys, and what its positions need stay; layers, heads and widths become few.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from shoal.errors import ModelError
from shoal.legal.families.table import family_of

_HEAD_SIZE = 16
_WINDOW = 8
"""Tokens: shorter than the rows that parity trains on, so that the window is felt."""


_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_EXPERT_WIDTHS = ("moe_intermediate_size", "shared_expert_intermediate_size")


def shrunk(
    config: Mapping[str, Any], *, tensor: int = 1, pipeline: int = 1, expert: int = 1
) -> dict[str, Any]:
    """Sizes to override in `config` (what `to_dict()` of a transformers configuration gives).

    The result is legal for `tensor` ranks, for so many blocks of a `pipeline` and for experts over
    `expert` ranks where the model itself is. Sizes never grow. Raises ModelError for a
    configuration without the sizes that this rule reads.
    """
    keys = family_of(str(config.get("model_type"))).size_keys
    missing = [key for key in (keys.hidden, keys.heads, keys.layers[0]) if not config.get(key)]
    if missing:
        raise ModelError(
            f"config.json, key {missing[0]!r}: expected a size, found none, so this "
            f"{config.get('model_type')!r} cannot be made smaller\n"
            "    prove the layout on the model as it is: shoal parity --whole"
        )
    hidden, heads = int(config[keys.hidden]), int(config[keys.heads])
    groups = int(config.get(keys.groups) or heads)
    size = int(config.get(keys.head_size) or hidden // heads)
    few = min(groups, tensor if tensor > 1 else 2)
    fewer_heads = few * min(2, heads // groups)
    small = _head_size(config, size)
    width = fewer_heads * small
    inner = int(config.get(keys.inner) or 4 * hidden)
    step = 4 * tensor

    def narrow(size: int) -> int:
        return min(size, max(step, round(size * width / hidden / step) * step))

    result: dict[str, Any] = {
        keys.hidden: width,
        keys.heads: fewer_heads,
        keys.inner: narrow(inner),
        **{key: narrow(int(config[key])) for key in _EXPERT_WIDTHS if config.get(key)},
        **_experts(config, degree=expert),
    }
    if config.get(keys.groups):
        result[keys.groups] = few
    if config.get(keys.head_size):
        result[keys.head_size] = small
    if config.get("sliding_window"):
        result["sliding_window"] = min(int(config["sliding_window"]), _WINDOW)
    return {**result, **_layers(config, keys.layers, least=max(2, pipeline))}


def _experts(config: Mapping[str, Any], *, degree: int) -> dict[str, Any]:
    """At least two experts on each rank and in each group, of which a token has at most two."""
    whole = next((int(config[key]) for key in _EXPERTS if config.get(key)), 0)
    step = math.lcm(2 * degree, 2 * int(config.get("n_group") or 1))
    few = max(step, 4)
    if not whole or whole <= few or whole % few:
        return {}
    sizes = {key: few for key in _EXPERTS if config.get(key)}
    if config.get("num_experts_per_tok"):
        sizes["num_experts_per_tok"] = min(2, int(config["num_experts_per_tok"]))
    return sizes


def _layers(config: Mapping[str, Any], names: tuple[str, ...], *, least: int) -> dict[str, Any]:
    """The fewest layers in which every kind of layer appears, in the model's own order."""
    kinds = config.get("layer_types")
    count = least
    if kinds:
        seen = [len(set(kinds[:n])) for n in range(len(kinds) + 1)]
        count = max(least, seen.index(len(set(kinds))))
    result: dict[str, Any] = {
        name: min(count, int(config[name])) for name in names if config.get(name)
    }
    if kinds:
        result["layer_types"] = list(kinds[:count])
    if config.get("first_k_dense_replace"):  # a dense layer and one of experts
        result["first_k_dense_replace"] = min(int(config["first_k_dense_replace"]), count - 1)
    return result


def _head_size(config: Mapping[str, Any], size: int) -> int:
    """A small head whose rotated part is an even number of dims, as rotary positions need."""
    rotary = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if any(isinstance(value, (list, tuple)) for value in rotary.values()):
        return size  # factors per dim (longrope): their number is that of the head
    nested = [value for value in rotary.values() if isinstance(value, Mapping)]
    part = min(
        [float(each.get("partial_rotary_factor", 1.0)) for each in [rotary, *nested]],
        default=1.0,
    )
    for small in (_HEAD_SIZE, 2 * _HEAD_SIZE, 4 * _HEAD_SIZE):
        if small < size and int(small * part) >= 2 and int(small * part) % 2 == 0:
            return small
    return size
