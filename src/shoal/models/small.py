"""Small models of the same kind as a configuration's: what probes and proofs run instead of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from torch import nn

from shoal.errors import ModelError
from shoal.legal import shrunk
from shoal.models import init
from shoal.models.dropout import apply_keyed
from shoal.models.huggingface import build_meta, config_from, setting_of

_SIZES = (
    *("hidden_size", "intermediate_size", "head_dim", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads"),
)
"""Names that configurations of any family answer to, whatever they are called in its file."""

_LIMITS = (
    (re.compile(r"(num_|n_)?(encoder|decoder|hidden)?_?layers?"), 2),
    (re.compile(r"(num_|n_)?(encoder|decoder)?_?(attention_)?heads?"), 2),
    (re.compile(r".*(ffn_dim|ffn_hidden_size|d_ff|d_inner|n_inner|intermediate_size)"), 64),
    (re.compile(r"(moe_|n_|num_)?(routed_|local_|moe_)?(num_)?experts|n_routed_experts"), 4),
    (re.compile(r"(num_)?experts_per_tok(en)?|moe_k|moe_topk|num_selected_experts"), 2),
    (re.compile(r"n_group|topk_group"), 1),
    (re.compile(r"rotary_dim|qk_rope_head_dim"), 8),
    (re.compile(r".*_rank|qk_nope_head_dim|v_head_dim"), 16),
)
"""What common names are limited to."""


def small_configs(config: Any) -> Iterator[Any]:
    """Configurations of the same kind, the smallest first; the last is `config` itself.

    First by the family's own rule (legal/shrink.py), then by names that many families share, then
    with fewer layers only. What is made so may not be buildable: the caller tries them in turn.
    """
    tree = config.to_dict()
    with suppress(ModelError):
        yield _config(config, {**tree, **shrunk(tree)})
    common = _by_common_names(config, tree)
    wider = {key: 2 * common[key] for key in _wide_keys(config) if key in common}
    for sizes in (common, {**common, **wider}, _fewer_layers(config, tree)):
        if sizes:
            with suppress(ModelError):
                yield _config(config, {**tree, **sizes})
    yield config


def small_model(config: Any, *, auto_class: str, dropout: str = "off", seed: int = 0) -> nn.Module:
    """A real model of the same kind, of few layers and little width, for probes.

    The configuration's own sizes where nothing smaller can be built.
    """
    for small in small_configs(config):
        try:
            model = build_meta(small, auto_class=auto_class, dropout=dropout)
            init.materialise(model, record=init.record(model), seed=seed)
        except Exception:  # its class has relations of sizes that nobody knows
            if small is config:
                raise
            continue
        if dropout == "keyed":
            apply_keyed(model, seed=seed, asked=small)
        return model
    raise AssertionError("the last configuration is tried too")


def _config(config: Any, tree: Mapping[str, Any]) -> Any:
    """A configuration of the same class from plain keys. Raises ModelError."""
    try:
        made = config_from(tree)
    except Exception as error:  # checks of its own class
        raise ModelError(f"{config.model_type}: not of these sizes: {error}") from None
    made.use_cache = False
    return made


def _by_common_names(config: Any, tree: Mapping[str, Any]) -> dict[str, Any]:
    names = getattr(config, "attribute_map", {})
    common = {key: value for key in _SIZES if (value := setting_of(config, key)) is not None}
    sizes: dict[str, Any] = {}
    with suppress(ModelError):
        sizes = {names.get(key, key): value for key, value in shrunk({**tree, **common}).items()}
    for key, value in tree.items():
        if isinstance(value, bool) or not isinstance(value, int) or key in sizes:
            continue
        limit = next((most for name, most in _LIMITS if name.fullmatch(key)), value)
        if value > limit:
            sizes[key] = limit
    return sizes


def _wide_keys(config: Any) -> list[str]:
    """Hidden size, heads, key-value heads and inner width, as the configuration's file names them.

    Some families need four heads at least.
    """
    names = getattr(config, "attribute_map", {})
    return [names.get(key, key) for key in _SIZES if "layers" not in key and key != "head_dim"]


def _fewer_layers(config: Any, tree: Mapping[str, Any]) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        key: 2
        for key, value in tree.items()
        if _LIMITS[0][0].fullmatch(key) and isinstance(value, int) and value > 2
    }
    kinds = tree.get("layer_types")
    if kinds:
        count = next(n for n in range(2, len(kinds) + 1) if set(kinds[:n]) == set(kinds))
        sizes = dict.fromkeys(sizes, count) | {"layer_types": list(kinds[:count])}
    return sizes
