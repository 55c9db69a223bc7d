"""A narrower model: heads and feed-forward channels that matter least are left out of each block.

What a head or channel matters is the length of what it gives on the calibration inputs: of a head's
part of what goes into the output projection, and of a channel of what goes into the last layer of
the feed-forward part (Muralidharan et al.: Minitron, arXiv 2407.14679, section 2.2). Heads go in
whole groups that share keys and values. Every block keeps as many, which of them is its own choice.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shoal.compress.walk import Walk
from shoal.compress.workers import Workers
from shoal.errors import UserError
from shoal.models.adapter import matrix_of
from shoal.models.anatomy import Anatomy, canonical_parameters
from shoal.models.huggingface import build_meta
from shoal.models.placement import is_transposed

_INNER = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("up_proj",), "down_proj"),
    (("c_fc",), "c_proj"),
    (("fc1",), "fc2"),
)
"""Layers whose outputs are the channels of a feed-forward part, and the one that reads them."""
_MULTIPLE = 32
"""Channels stay a multiple of it where they are one: groups of scales and kernels need that."""


@dataclass(frozen=True)
class Narrower:
    """Shares that go."""

    heads: float = 0.0
    channels: float = 0.0


@dataclass(frozen=True)
class _Cut:
    """Along one dim of a parameter, what stays."""

    dim: int
    kept: Tensor


@torch.no_grad()
def narrowed(
    model: nn.Module,
    anatomy: Anatomy,
    batches: Sequence[Tensor],
    how: Narrower,
    *,
    auto_class: str,
    workers: Workers,
) -> tuple[Any, dict[str, Tensor]]:
    """The configuration and the parameters, by canonical name, of the narrower model.

    `batches`: token ids [n, T] of calibration. Raises UserError for a family whose parts have other
    names, and where nothing would go or be left.
    """
    config: Any = copy.deepcopy(model.config)
    cuts: dict[str, _Cut] = {}
    walk = Walk.begin(model, anatomy, batches, workers)
    for name in walk.blocks:
        seen = {path: each.squares for path, each in walk.watch(name, hessian=False).items()}
        walk.step(name)
        if how.heads:
            cuts |= _heads(model, seen, how.heads, config)
        if how.channels:
            cuts |= _channels(model, seen, how.channels, config)
    tensors = {}
    for name, parameter in canonical_parameters(model).items():
        cut = cuts.get(name)
        whole = parameter.detach()
        tensors[name] = whole if cut is None else whole.index_select(cut.dim, cut.kept)
    wanted = canonical_parameters(build_meta(config, auto_class=auto_class))
    for name, each in wanted.items():
        if tuple(each.shape) != tuple(tensors[name].shape):
            raise _unknown(anatomy.family, f"{name} does not become narrower with the others")
    return config, tensors


def _heads(
    model: nn.Module, seen: Mapping[str, Tensor], share: float, config: Any
) -> dict[str, _Cut]:
    """Of one block; the numbers in `config` are set."""
    family, old = config.model_type, model.config
    outputs = [path for path in seen if path.endswith(".o_proj")]
    parents = [path.removesuffix(".o_proj") for path in outputs]
    if len(parents) != 1 or any(f"{parents[0]}.{each}_proj" not in seen for each in "qkv"):
        raise _unknown(family, "its heads are not q_proj, k_proj, v_proj and o_proj")
    heads: int = old.num_attention_heads  # type: ignore[union-attr, assignment]
    groups: int = getattr(old, "num_key_value_heads", None) or heads
    size = len(seen[outputs[0]]) // heads
    fitting = [n for n in range(1, groups) if old.hidden_size % (n * (heads // groups)) == 0]  # type: ignore[union-attr, operator]
    if not fitting:
        raise UserError(
            f"--prune: {groups} groups of heads cannot become fewer in {family}; "
            "leave out channels:SHARE instead"
        )
    count = min(fitting, key=lambda n: (abs(n - (1 - share) * groups), n))
    kept = _largest(seen[outputs[0]].view(groups, -1).sum(1), count)
    config.num_attention_heads, config.head_dim = count * (heads // groups), size
    config.num_key_value_heads = count
    cuts: dict[str, _Cut] = {}
    for leaf, width in (("q", heads // groups * size), ("k", size), ("v", size)):
        rows = _spread(kept, width)
        cuts |= _cut(model, f"{parents[0]}.{leaf}_proj", rows, outputs=True)
    return cuts | _cut(model, outputs[0], _spread(kept, heads // groups * size), outputs=False)


def _channels(
    model: nn.Module, seen: Mapping[str, Tensor], share: float, config: Any
) -> dict[str, _Cut]:
    family = config.model_type
    for makers, reader in _INNER:
        for path, squares in seen.items():
            parent, _, leaf = path.rpartition(".")
            if leaf != reader or any(f"{parent}.{each}" not in seen for each in makers):
                continue
            multiple = _MULTIPLE if len(squares) % _MULTIPLE == 0 else 1
            count = max(1, round((1 - share) * len(squares) / multiple)) * multiple
            if count == len(squares):
                raise UserError(
                    f"--prune: {share:g} of {len(squares)} channels is less than the {multiple} "
                    "that go at once; give a larger share"
                )
            key = "n_inner" if hasattr(config, "n_inner") else "intermediate_size"
            setattr(config, key, count)
            kept = _largest(squares, count)
            cuts = _cut(model, path, kept, outputs=False)
            for each in makers:
                cuts |= _cut(model, f"{parent}.{each}", kept, outputs=True)
            return cuts
    raise _unknown(family, "its feed-forward layers have other names")


def _cut(model: nn.Module, path: str, kept: Tensor, *, outputs: bool) -> dict[str, _Cut]:
    layer = model.get_submodule(path)
    dim = int(outputs == is_transposed(layer))
    assert matrix_of(layer).dim() == 2
    cuts = {f"{path}.weight": _Cut(dim, kept)}
    if outputs and getattr(layer, "bias", None) is not None:
        cuts[f"{path}.bias"] = _Cut(0, kept)
    return cuts


def _largest(worth: Tensor, count: int) -> Tensor:
    """The places of the `count` largest, in order; of equals the first stays."""
    order = worth.argsort(descending=True, stable=True)
    return order[:count].sort().values


def _spread(kept: Tensor, width: int) -> Tensor:
    """Places of groups -> places of their `width` members."""
    return (kept[:, None] * width + torch.arange(width)).flatten()


def _unknown(family: str, why: str) -> UserError:
    return UserError(
        f"--prune: {family} cannot be made narrower here: {why}\n"
        "    leave out blocks instead (layers:N), or make weights zero (wanda:SHARE)"
    )
