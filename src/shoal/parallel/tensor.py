"""Tensor parallelism by the anatomy's table, with hidden states split along the sequence.

Parameters become plain local tensors (parallel/local.py knows their boxes). Ranks exchange in four
kinds of places: the token embedding sums its lookups, the first block takes its part of the tokens,
regions (attention, feed-forward) gather before and scatter their sums after, and the last norm's
output is gathered for the head. No module of the model is replaced, none knows that it is a part.

DTensor is not used inside: a fused projection that is cut piece by piece has no placement in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from shoal.errors import ModelError
from shoal.layout import Layout
from shoal.legal import Combination, facts_from_config, problems
from shoal.models.adapter import ADAPTER_DROPOUT, adaptation_of, product
from shoal.models.anatomy import Anatomy, canonical_name, ties_of
from shoal.models.dropout import KeyedDropout
from shoal.models.families.tensor import tensor_table
from shoal.models.placement import (
    Placement,
    check_placed,
    has_vocabulary_head,
    mixtures_of,
    regions_of,
    row_layers_of,
)
from shoal.parallel.exchange import Exchange
from shoal.parallel.local import Holding, Holdings, Segment, sharded_of
from shoal.parallel.mesh import Mesh
from shoal.parallel.settings import Settings
from shoal.parallel.vocabulary import Vocabulary


def apply_tensor(
    model: nn.Module, anatomy: Anatomy, mesh: Mesh, holdings: Holdings, settings: Settings
) -> Holdings:
    """Cut `model` (meta or real) for this rank in place; without the tensor axis nothing happens.

    Raises ModelError: a family or parameter without a rule, or heads that the degree does not
    divide, naming the degrees that do.
    """
    degree, rank = mesh.degree("tensor"), mesh.coordinate("tensor")
    if degree == 1:
        return holdings
    check_degree(model, anatomy, degree)
    group = mesh.group("tensor")
    assert group is not None, "a degree above 1 has a group"
    exchange = Exchange(group, rank=rank, size=degree)
    changes: dict[str, dict[str, Any]] = {}
    for name, holding in holdings.items():
        placement = anatomy.placements[name]
        segments = segments_of(placement, holding.shape, rank=rank, degree=degree)
        whole = frozenset[str]() if segments else frozenset({"tensor"})
        partial = frozenset({"tensor"}) if placement.gradient == "partial" else frozenset[str]()
        changes[name] = {
            "segments": holding.segments + segments,
            "copies": holding.copies | whole,
            "partial": holding.partial | partial,
        }
    cuts = holdings.changed(changes)
    cut_parameters(model, cuts)
    assert ties_of(model) == anatomy.ties, "tensor: the tied parameters changed"
    _exchange_in_regions(model, anatomy, exchange)
    _localise(model, anatomy, exchange, cuts)
    model.shoal_sequence_multiple = degree  # type: ignore[assignment]
    balance = getattr(model, "shoal_balance", None)
    if balance is not None:  # every rank computes the same tokens
        model.shoal_balance = replace(balance, share=float(rank == 0))  # type: ignore[assignment]
    sharded = sharded_of(model)
    sharded.exchange, stages = exchange, sharded.stages
    if stages is None or any(each.is_first for each in stages.own):
        _split_at_the_first(model, anatomy, exchange)
        _part_the_vocabulary(model, anatomy, exchange, cuts)
    if stages is None or any(each.is_last for each in stages.own):
        _join_at_the_last(model, anatomy, exchange)
        sharded.vocabulary = _vocabulary(model, cuts, exchange)
    return cuts


def segments_of(
    placement: Placement, shape: Sequence[int], *, rank: int, degree: int
) -> tuple[Segment, ...]:
    """The parts of a parameter of global `shape` that rank `rank` of `degree` keeps; () for all.

    Every piece is divided as evenly as it can be; layers' pieces must divide (`check_degree`), a
    vocabulary need not.
    """
    if placement.dim is None:
        return ()
    segments, start = [], 0
    for piece in placement.pieces or (shape[placement.dim],):
        low, high = piece * rank // degree, piece * (rank + 1) // degree
        segments.append(Segment(placement.dim, start + low, high - low))
        start += piece
    return tuple(segments)


def check_degree(model: nn.Module, anatomy: Anatomy, degree: int) -> None:
    """Raise ModelError when `model` cannot be cut over `degree` ranks of the tensor axis."""
    check_placed(anatomy.placements, family=anatomy.family)
    config: Any = model.config
    asked = Combination(
        layout=Layout(tensor=degree),
        dropout="framework" if getattr(model, "framework_dropout", False) else "off",
        whole_logits=anatomy.whole_logits,
    )
    found = problems(asked.of_model(facts_from_config(config.to_dict())))
    if found:
        raise ModelError("\n".join([f"{type(model).__name__}:", *map(str, found)]))


def cut_parameters(model: nn.Module, cuts: Mapping[str, Holding]) -> None:
    """Leave of every parameter, by canonical name, the segments that `cuts` has; in place."""
    made: dict[int, nn.Parameter] = {}
    kept = []  # the originals stay alive: their ids are keys
    for path, module in list(model.named_modules(remove_duplicate=False)):
        for leaf, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in made:
                kept.append(parameter)
                holding = cuts[canonical_name(f"{path}.{leaf}" if path else leaf)]
                made[id(parameter)] = _local_parameter(parameter, holding)
            module._parameters[leaf] = made[id(parameter)]
        weight = module._parameters.get("weight")
        if isinstance(module, nn.Linear) and weight is not None:
            module.out_features, module.in_features = weight.shape
        elif type(module).__name__ == "Conv1D" and weight is not None:
            module.nx, module.nf = weight.shape  # its forward shapes its output by nf


def _local_parameter(parameter: nn.Parameter, holding: Holding) -> nn.Parameter:
    if not holding.segments:
        return parameter
    dim = holding.segments[0].dim
    parts = [parameter.data.narrow(dim, each.start, each.size) for each in holding.segments]
    value = torch.cat(parts, dim=dim).contiguous()
    return nn.Parameter(value, requires_grad=parameter.requires_grad)


def _exchange_in_regions(model: nn.Module, anatomy: Anatomy, exchange: Exchange) -> None:
    for path in regions_of(model, base=anatomy.base):
        model.get_submodule(path).register_forward_pre_hook(
            _on_hidden(exchange.gather), with_kwargs=True
        )
    for path, sums in row_layers_of(model, base=anatomy.base).items():
        layer = model.get_submodule(path)
        layer.forward = _row_forward(layer, exchange, sums=sums)
    for path in mixtures_of(model):
        model.get_submodule(path).register_forward_hook(
            lambda module, inputs, output: exchange.scatter(output)
        )


def _row_forward(layer: Any, exchange: Exchange, *, sums: bool) -> Callable[[Tensor], Tensor]:
    """A row-wise layer: the sum of all ranks' products, split; the bias once, after the sum.

    `sums` False: a module around it makes the sum, to which the first rank gives the bias.
    """
    adaptation = adaptation_of(layer)
    if adaptation is not None:
        adaptation.total = exchange.sum
    has_bias = layer.bias is not None and (sums or exchange.rank == 0)

    def forward(hidden: Tensor) -> Tensor:
        output = product(layer, hidden)
        output = exchange.scatter(output) if sums else output
        return output + layer.bias.to(output.dtype) if has_bias else output

    return forward


def _split_at_the_first(model: nn.Module, anatomy: Anatomy, exchange: Exchange) -> None:
    first = next(model.get_submodule(anatomy.blocks).children())
    first.register_forward_pre_hook(_on_hidden(exchange.split), with_kwargs=True)


def _join_at_the_last(model: nn.Module, anatomy: Anatomy, exchange: Exchange) -> None:
    *_, block = model.get_submodule(anatomy.blocks).children()
    # a rank's part of the vocabulary gives a part of the gradient; a whole head all of it
    leave = exchange.gather if has_vocabulary_head(model) else exchange.join
    last = model.get_submodule(anatomy.norm) if anatomy.norm else block
    last.register_forward_hook(lambda module, inputs, output: leave(output))


def _on_hidden(move: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """A pre-hook that moves the hidden states: the first argument, by place or by name."""

    def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if inputs:
            return (move(inputs[0]), *inputs[1:]), named
        return inputs, {**named, "hidden_states": move(named["hidden_states"])}

    return hook


def _part_the_vocabulary(
    model: nn.Module, anatomy: Anatomy, exchange: Exchange, cuts: Holdings
) -> None:
    path = anatomy.embeddings[0]
    rows = cuts[_canonical(anatomy, f"{path}.weight")].segments[0]
    start, size = rows.start, rows.size
    table: Any = model.get_submodule(path)
    padding = table.padding_idx
    inside = padding is not None and start <= padding < start + size
    table.padding_idx = padding - start if inside else None
    table.num_embeddings = size
    lookup = table.forward

    def forward(tokens: Tensor) -> Tensor:
        own = tokens - start
        absent = (own < 0) | (own >= size)
        found = lookup(own.masked_fill(absent, 0)).masked_fill(absent[..., None], 0.0)
        return exchange.sum(found)

    table.forward = forward


def _canonical(anatomy: Anatomy, name: str) -> str:
    return next((group[0] for group in anatomy.ties if name in group), name)


def _vocabulary(model: nn.Module, cuts: Holdings, exchange: Exchange) -> Vocabulary | None:
    if not has_vocabulary_head(model):
        return None
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    name = next(name for name, each in model.named_parameters() if each is head.weight)
    holding = cuts[canonical_name(name)]
    rows = holding.segments[0]
    return Vocabulary(rows.start, rows.size, holding.shape[0], exchange.group)


def _localise(model: nn.Module, anatomy: Anatomy, exchange: Exchange, cuts: Holdings) -> None:
    """Correct counts of heads, and tell dropout in blocks which tokens it sees."""
    table = tensor_table(model.config)
    assert table is not None, "check_placed has passed"
    for path in regions_of(model, base=anatomy.base):
        table.localise(model.get_submodule(path), exchange.size)
    rows = row_layers_of(model, base=anatomy.base)
    for path, module in model.get_submodule(anatomy.blocks).named_modules(prefix=anatomy.blocks):
        if not isinstance(module, KeyedDropout):
            continue
        layer, _, name = path.rpartition(".")
        if name != ADAPTER_DROPOUT:
            module.own_tokens = exchange.split  # as hidden states are
        elif layer in rows:  # inside a region tokens are whole, and the features a rank's own
            holding = cuts[f"{layer}.lora_a"]
            module.own_features = (holding.segments[0].start, holding.shape[1])
