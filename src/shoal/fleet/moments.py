"""The state of the user's own optimizer, as a checkpoint has it: vectors by kind, the rest by name.

Whatever of it has the shape of its parameter is laid out, saved, resharded and averaged as the
parameters are; single numbers (`step`) go into the manifest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shoal.comm.flat import Vector
from shoal.engine.state import TRAINABLE, FlatState
from shoal.errors import RunError
from shoal.parallel.local import local
from shoal.parallel.shard import over

Parameters = Mapping[str, nn.Parameter]


def taken(
    optimizer: torch.optim.Optimizer, parameters: Parameters, state: FlatState, *, equal: bool
) -> tuple[list[Vector], dict[str, Any]]:
    """What there is now: copies by kind, and the facts that go with them.

    `equal`: whether all replicas have the same. Raises RunError for state of another shape, which
    no other layout could have.
    """
    flat: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for name, parameter in parameters.items():
        own = optimizer.state.get(parameter)
        if not own:
            continue
        numbers[name] = {}
        for key, value in own.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim():
                if key not in flat:
                    flat[key] = torch.zeros_like(state.gradients)
                _rows(flat[key], name, state, local(value)).copy_(local(value))
            elif not isinstance(value, Tensor) or value.numel() == 1:
                number = value.item() if isinstance(value, Tensor) else value
                numbers[name][key] = [isinstance(value, Tensor), number]
            else:
                raise RunError(
                    f"fleet.save: {type(optimizer).__name__} keeps {key!r} of {list(value.shape)} "
                    f"for {name}, which has {list(parameter.shape)}; no layout but this one could "
                    "have it\n    use an optimizer whose state is shaped as the parameters are"
                )
    groups = [_plain(group) for group in optimizer.param_groups]
    facts = {"kinds": list(flat), "numbers": numbers, "groups": groups}
    vectors = [Vector(key, tensor, TRAINABLE, equal=equal) for key, tensor in flat.items()]
    return vectors, facts


def room_for(facts: Mapping[str, Any], state: FlatState, *, equal: bool) -> list[Vector]:
    """Zeroed vectors for what a checkpoint with these facts has."""
    kinds = [str(kind) for kind in facts["kinds"]]
    made = {kind: torch.zeros_like(state.gradients) for kind in kinds}
    return [Vector(kind, tensor, TRAINABLE, equal=equal) for kind, tensor in made.items()]


def give(
    optimizer: torch.optim.Optimizer,
    parameters: Parameters,
    state: FlatState,
    *,
    vectors: Iterable[Vector],
    facts: Mapping[str, Any],
) -> None:
    """Let the optimizer go on with what was saved. Raises RunError for another optimizer."""
    groups = facts["groups"]
    if len(groups) != len(optimizer.param_groups):
        raise RunError(
            f"fleet.load: the optimizer has {len(optimizer.param_groups)} groups of parameters, "
            f"the one that was saved has {len(groups)}; make it as it was"
        )
    found = list(vectors)
    for group, saved in zip(optimizer.param_groups, groups):
        group.update({key: _restored(saved[key], group.get(key)) for key in saved if key in group})
    for name, numbers in facts["numbers"].items():
        parameter = parameters[name]
        own: dict[str, Any] = {
            key: torch.tensor(float(value)) if is_tensor else value
            for key, (is_tensor, value) in numbers.items()
        }
        for each in found:
            own[each.kind] = over(parameter, state.layout.view(each.tensor, name))
        optimizer.state[parameter] = own


def _rows(flat: Tensor, name: str, state: FlatState, like: Tensor) -> Tensor:
    """Where a tensor of this rank lies: a shard's storage may have more rows than it has."""
    view = state.layout.view(flat, name)
    return view.narrow(0, 0, len(like)) if view.shape != like.shape else view


def _plain(group: Mapping[str, Any]) -> dict[str, Any]:
    """What of a group of parameters is data, such as its learning rate as a schedule left it."""
    found = {}
    for key, value in group.items():
        value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        try:
            json.dumps(value)
        except TypeError:
            continue  # its parameters
        found[key] = value
    return found


def _restored(value: Any, before: Any) -> Any:
    if isinstance(before, Tensor):
        return torch.as_tensor(value, dtype=before.dtype, device=before.device)
    return tuple(value) if isinstance(before, tuple) else value
