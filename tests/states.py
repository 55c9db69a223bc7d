"""States and parts of models for tests: made by hand, or read off a model that was cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from shoal.boxes import Box
from shoal.comm.flat import FlatLayout, Vector
from shoal.engine.state import ALL, TRAINABLE, FlatState
from shoal.models.anatomy import canonical_parameters
from shoal.parallel.local import Holdings, local, sharded_of
from shoal.parallel.mesh import Mesh


def state_of(layout: FlatLayout, values: Tensor, moments: Mapping[str, Tensor]) -> FlatState:
    """A state of whole tensors."""
    vectors = [Vector("parameter", values, ALL)]
    vectors += [Vector(kind, moment, TRAINABLE) for kind, moment in moments.items()]
    holdings = Holdings.whole(Mesh.alone(torch.device("cpu")), layout.shapes)
    gradients = torch.zeros(layout.numel)
    return FlatState(layout, gradients, {each.kind: each for each in vectors}, holdings)


def parts_of(model: nn.Module, *, gradients: bool = False) -> dict[str, list[tuple[Box, Tensor]]]:
    """By canonical name the boxes of a cut model's parameters (or gradients) with their storage."""
    return {name: list(_parts(model, name, gradients)) for name in canonical_parameters(model)}


def _parts(model: nn.Module, name: str, gradients: bool) -> Iterator[tuple[Box, Tensor]]:
    parameter = canonical_parameters(model)[name]
    tensor = parameter.grad if gradients else parameter
    if tensor is not None:
        for slot in sharded_of(model).holdings[name].slots:
            yield slot.box, slot.of(local(tensor))
