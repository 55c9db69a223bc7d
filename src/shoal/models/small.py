"""Small models of the same kind as a configuration's: what probes and proofs run instead of it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from shoal.errors import ModelError
from shoal.legal import shrunk
from shoal.models import init
from shoal.models.anatomy import example_of, hidden_of
from shoal.models.dropout import apply_keyed
from shoal.models.huggingface import build_meta, config_from, setting_of

_SIZES = (
    *("hidden_size", "intermediate_size", "head_dim", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads"),
)
"""Names that configurations of any family answer to, whatever they are called in its file."""

_LAYERS = re.compile(r"(num_|n_)?(encoder|decoder|hidden)?_?layers?")

_COUNTS = (
    (re.compile(r"(.*_)?(experts?_per_tok(en)?|moe_k|moe_topk|moe_top_k|num_selected_experts)"), 2),
    (re.compile(r"(.*_)?experts?(_num)?"), 4),
    (re.compile(r"n_group|topk_group|num_expert_group|first_k_dense_replace|num_dense_layers"), 1),
    (re.compile(r".+_vocab(_size)?|vocab_size_per.*"), 512),
    (re.compile(r"attn_layer_period|block_size"), 2),
    (re.compile(r"attn_layer_offset|num_random_blocks"), 1),
    (re.compile(r"index_topk"), 8),
    (re.compile(r"(mamba_)?chunk_size"), 8),
    (re.compile(r"sliding_window_size|local_attention"), 16),
)
"""What common names are limited to: numbers of things that a model has several of."""

_HEADS = re.compile(r"(?!.*d_head)(.*_)?heads?")

_INNER = (re.compile(r".*(ffn_dim|ffn_hidden_size|d_ff|d_inner|n_inner|intermediate_size)"), 64)

_WIDTHS = (
    (_HEADS, 2),
    _INNER,
    (re.compile(r"rotary_dim|qk_rope_head_dim"), 8),
    (re.compile(r".*_rank|qk_nope_head_dim|v_head_dim"), 16),
)
"""What common names are limited to: sizes of tensors."""

_IN_PROPORTION = re.compile(
    r"d_model|d_ff|d_inner|n_embd|n_inner|(.*_)?(hidden|intermediate|embedding|ffn)_(size|dim)"
    r"|(mamba_)?n_?groups"
)
"""Heads, and the widths that they add up to: divided by one number, products of sizes stay equal
(heads x head size = width; expansion x width = heads of a state space x their size)."""

Rule = Callable[[Any, Mapping[str, Any]], dict[str, Any]]


def small_configs(config: Any) -> Iterator[Any]:
    """Configurations of the same kind, the smallest first; the last is `config` itself.

    First by the family's own rule (legal/shrink.py), then by names that many families share, then
    with every width divided by the same number, then with fewer layers only. What is made so may
    not be buildable: the caller tries them in turn.
    """
    for rule in (_by_family, _by_common_names, _wider, _in_proportion, _nothing):
        tree = _small_tree(config, rule)
        if tree is not None:
            with suppress(ModelError):
                yield _config(config, tree)
    yield config


def small_model(config: Any, *, auto_class: str, dropout: str = "off", seed: int = 0) -> nn.Module:
    """A real model of the same kind, of few layers and little width, for probes.

    The configuration's own sizes where nothing smaller can be built and run.
    """
    for small in small_configs(config):
        try:
            model = build_meta(small, auto_class=auto_class, dropout=dropout)
            init.materialise(model, record=init.record(model), seed=seed)
            with torch.no_grad():
                hidden_of(model.eval(), example_of(model))
        except Exception:  # its class has relations of sizes that nobody knows
            if small is config:
                raise
            continue
        if dropout == "keyed":
            apply_keyed(model, seed=seed, asked=small)
        return model.train()
    raise AssertionError("the last configuration is tried too")


def _config(config: Any, tree: Mapping[str, Any]) -> Any:
    """A configuration of the same class from plain keys. Raises ModelError."""
    try:
        made = config_from(tree)
    except Exception as error:  # checks of its own class
        raise ModelError(f"{config.model_type}: not of these sizes: {error}") from None
    made.use_cache = False
    return made


def _small_tree(config: Any, rule: Rule) -> dict[str, Any] | None:
    """Keys of `config` and of the configurations in it, sized by a rule; None: it has no answer."""
    derived = _derived_sizes(type(config))
    tree = {key: value for key, value in config.to_dict().items() if key not in derived}
    try:
        sizes = {key: size for key, size in rule(config, tree).items() if key not in derived}
    except (ModelError, TypeError):  # sizes that are lists, one of each layer
        return None
    parts = {key: getattr(config, key) for key, value in tree.items() if isinstance(value, dict)}
    for key, part in parts.items():
        if hasattr(part, "to_dict"):  # an encoder's and a decoder's own, for example
            tree[key] = _small_tree(part, rule) or tree[key]
    return {**tree, **sizes, **_fewer_layers(config, tree)}


def _derived_sizes(kind: Any) -> set[str]:
    """Sizes of a configuration that its class computes of others: it must compute them anew."""
    names = set(kind.attribute_map) | set(kind.attribute_map.values())
    names |= {each.name for each in dataclasses.fields(kind)} | set(PreTrainedConfig().to_dict())
    with suppress(Exception):  # a class that refuses its own defaults
        sizes = {key for key, value in kind().to_dict().items() if type(value) in (int, list)}
        return sizes - names
    return set()


def _by_family(config: Any, tree: Mapping[str, Any]) -> dict[str, Any]:
    return {**_limited(tree, (*_COUNTS, _INNER)), **shrunk(tree)}


def _by_common_names(config: Any, tree: Mapping[str, Any]) -> dict[str, Any]:
    names = getattr(config, "attribute_map", {})
    common = {key: value for key in _SIZES if (value := setting_of(config, key)) is not None}
    sizes: dict[str, Any] = {}
    with suppress(ModelError):
        sizes = {names.get(key, key): value for key, value in shrunk({**tree, **common}).items()}
    return {**_limited(tree, _COUNTS + _WIDTHS), **sizes}


def _wider(config: Any, tree: Mapping[str, Any]) -> dict[str, Any]:
    """Twice the hidden size, heads, key-value heads and inner width: some need four heads."""
    names = getattr(config, "attribute_map", {})
    sizes = _by_common_names(config, tree)
    wide = [names.get(key, key) for key in _SIZES if "layers" not in key and key != "head_dim"]
    return {**sizes, **{key: 2 * sizes[key] for key in wide if key in sizes}}


def _in_proportion(config: Any, tree: Mapping[str, Any]) -> dict[str, Any]:
    """All heads and widths divided by one number, so that two heads are left where it can be."""
    hidden, heads = (setting_of(config, key) for key in ("hidden_size", "num_attention_heads"))
    if not isinstance(hidden, int):
        return _nothing(config, tree)
    most = heads // 2 if isinstance(heads, int) else hidden // 64
    heads = heads if isinstance(heads, int) else hidden
    by = next((n for n in range(most, 1, -1) if heads % n == 0 and hidden % n == 0), 1)
    divided = {
        key: max(1, value // by)
        for key, value in _numbers(tree).items()
        if _HEADS.fullmatch(key) or _IN_PROPORTION.fullmatch(key)
    }
    return {**_limited(tree, _COUNTS), **divided}


def _nothing(config: Any, tree: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _numbers(tree: Mapping[str, Any]) -> dict[str, int]:
    return {key: value for key, value in tree.items() if type(value) is int}


def _limited(
    tree: Mapping[str, Any], limits: tuple[tuple[re.Pattern[str], int], ...]
) -> dict[str, int]:
    """Keys whose number is larger than the first limit that their name has, and that limit."""
    sizes = {}
    for key, value in _numbers(tree).items():
        limit = next((most for name, most in limits if name.fullmatch(key)), value)
        if value > limit:
            sizes[key] = limit
    return sizes


def _fewer_layers(config: Any, tree: Mapping[str, Any]) -> dict[str, Any]:
    """Two layers, or as many as show every kind in lists that say something of each layer."""
    depths = {key: value for key, value in _numbers(tree).items() if _LAYERS.fullmatch(key)}
    depth = setting_of(config, "num_hidden_layers") or max(depths.values(), default=0)
    lists = {
        key: list(value)
        for key, value in tree.items()
        if isinstance(value, (list, tuple)) and len(value) == depth > 2
    }
    count = 2
    for kinds in lists.values():
        if all(isinstance(kind, (str, bool)) for kind in kinds):
            count = next(n for n in range(count, depth + 1) if set(kinds[:n]) == set(kinds))
    sizes: dict[str, Any] = {key: min(value, count) for key, value in depths.items()}
    if "attention_types" in tree:  # GPT-Neo: the kinds of layers in turn, and how often
        sizes["attention_types"] = [[["global", "local"], 1]]
    if own := tree.get("per_layer_config"):  # what differs from layer to layer, by number
        sizes["per_layer_config"] = {key: each for key, each in own.items() if int(key) < count}
    return sizes | {key: kinds[:count] for key, kinds in lists.items()}
