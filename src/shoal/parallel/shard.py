"""Sharding of parameters, gradients and optimizer state over the shard axis, with FSDP2.

Three levels (docs/guide/layouts.md has their memory):

- `parameters`: a block's parameters are gathered before its forward and again before its backward,
  which for the last block follows at once: it keeps them;
- `gradients`: gathered once per micro batch and kept from forward to backward;
- `optimizer`: gathered once per step; gradients are held whole and scattered by one reduction after
  the last micro batch.

With the context axis, whose ranks hold the same and sum their gradients, it goes over both axes:
a part is smaller, and one reduction does both sums while backward goes on.

Every reduction is a SUM: the loss is divided by the step's number of targets before.
With replicas the policy sums the shards' gradients between them; FSDP2 never sees that axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

# public by documentation, though its module is not: right for uneven shards (torch 2.13)
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from shoal.models.anatomy import Anatomy, canonical_name, canonical_parameters, ties_of
from shoal.models.experts import experts_of
from shoal.parallel.local import Holdings, sharded_of
from shoal.parallel.mesh import Mesh
from shoal.parallel.settings import Settings
from shoal.parallel.stages import own_blocks

LEVELS = ("parameters", "gradients", "optimizer")


class _Root(nn.Module):
    """What FSDP2 takes for the model: its forward is a whole forward with the loss.

    A transformers model's own forward would give whole logits; ours calls its base model, then its
    head chunk by chunk. Inside, what lies outside blocks (embeddings, last norm, head) is whole.
    `function(model, *arguments)` says what is computed.
    """

    def __init__(self, model: nn.Module, *, level: str) -> None:
        super().__init__()
        self.model, self.holds_gradients = model, level == "optimizer"

    def forward(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        return function(self.model, *arguments)


def apply_shard(
    model: nn.Module, anatomy: Anatomy, mesh: Mesh, holdings: Holdings, settings: Settings
) -> Holdings:
    """Shard `model` (meta or real) over the shard axis in place; nothing for a degree of 1.

    Raises ValueError for a level that is none.
    """
    level = settings.shard_level
    if level not in LEVELS:
        raise ValueError(f"level: expected one of {', '.join(LEVELS)}; got {level!r}")
    if mesh.degree("shard") == 1:
        return holdings
    blocks = own_blocks(model, anatomy)
    return _cut(model, blocks, _Root(model, level=level), mesh, holdings, settings)


def apply_shard_called(
    model: nn.Module, mesh: Mesh, holdings: Holdings, settings: Settings
) -> Holdings:
    """Shard a model that its owner calls himself: it is FSDP2's root, and needs no anatomy.

    The level `optimizer` is not for it: nobody says which backward is the step's last. Raises
    ValueError.
    """
    if settings.shard_level not in ("parameters", "gradients"):
        raise ValueError(f"level: expected parameters or gradients; got {settings.shard_level!r}")
    if mesh.degree("shard") == 1:
        return holdings
    return _cut(model, units_of(model), model, mesh, holdings, settings)


def units_of(model: nn.Module) -> list[nn.Module]:
    """What of any model is gathered together: members of its lists of modules, else its children.

    Only those with parameters, which no other part of the model shares.
    """
    lists = [each for each in model.modules() if isinstance(each, nn.ModuleList | nn.Sequential)]
    inner = {id(part) for each in lists for part in each.modules() if part is not each}
    outer = [each for each in lists if id(each) not in inner]
    shared = {name for names in ties_of(model) for name in names}
    owners = {id(p) for n, p in model.named_parameters() if canonical_name(n) in shared}
    chosen = []
    holders: list[nn.Module] = [*outer] or [model]
    for unit in (part for each in holders for part in each.children()):
        own = list(unit.parameters())
        if own and not any(id(parameter) in owners for parameter in own):
            chosen.append(unit)
    return chosen


def _cut(
    model: nn.Module,
    units: list[nn.Module],
    root: nn.Module,
    mesh: Mesh,
    holdings: Holdings,
    settings: Settings,
) -> Holdings:
    """Shard `units` of `model` one by one, and under `root` what is left."""
    level, offload, ties = settings.shard_level, settings.offload, ties_of(model)
    pinned = mesh.device.type == "cuda"
    policy = CPUOffloadPolicy(pin_memory=pinned) if offload else OffloadPolicy()
    fully: dict[str, Any] = {
        "mesh": mesh.along(*_axes(mesh)),
        "reshard_after_forward": level == "parameters",
        "offload_policy": policy,
    }
    ordered = [each for each in model.modules() if any(each is unit for unit in units)]
    if mesh.degree("expert") > 1:
        fully["ignored_params"] = _shard_experts(model, ordered[-1], mesh, fully)
    kept = {**fully, "reshard_after_forward": False}
    for unit in ordered:
        unit.register_forward_hook(_own_outputs)
        fully_shard(unit, **(kept if unit is ordered[-1] else fully))
    fully_shard(root, **kept)
    sharded = sharded_of(model)
    sharded.root, sharded.offloaded = root, offload
    for module in _sharded(root):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    assert ties_of(model) == ties, "shard: the tied parameters changed"
    cut = {n: p for n, p in canonical_parameters(model).items() if isinstance(p, DTensor)}
    over = frozenset((*_axes(mesh), "expert_shard"))
    changes: dict[str, dict[str, Any]] = {}
    for name, parameter in cut.items():
        copies, partial = holdings[name].copies - over, holdings[name].partial - over
        changes[name] = {"rows": _rows(parameter), "copies": copies, "partial": partial}
    return holdings.changed(changes)


def _axes(mesh: Mesh) -> tuple[str, ...]:
    """Those that rows of parameters are divided over, but for experts'."""
    return ("shard", "context") if mesh.degree("context") > 1 else ("shard",)


def _shard_experts(
    model: nn.Module, last: nn.Module, mesh: Mesh, fully: dict[str, Any]
) -> set[nn.Parameter]:
    """Shard experts over the ranks that have the same, `last` being the unit that keeps its own.

    Where no other rank has them they stay as they are, and are returned.
    """
    spread = experts_of(model).values()
    if mesh.degree("expert_shard") == 1:
        return {each for module in spread for each in module.parameters()}
    kept = {id(module) for module in last.modules()}
    fully = {**fully, "mesh": mesh.along("expert_shard")}
    for module in spread:
        level = {"reshard_after_forward": False} if id(module) in kept else {}
        fully_shard(module, **{**fully, **level})
    return set()


def _rows(parameter: DTensor) -> tuple[int, int]:
    """First and number of the rows of a sharded parameter that are this rank's own."""
    sizes, offsets = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return (offsets[0] if sizes[0] else 0), sizes[0]


def _own_outputs(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Copies of outputs that are views (T5's position bias): FSDP2 hooks would be lost on them."""
    if isinstance(output, tuple):
        return tuple(_own_outputs(module, inputs, each) for each in output)
    is_view = isinstance(output, Tensor) and output._base is not None
    return output.clone() if is_view else output


def forward(model: nn.Module, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """`function(model, *arguments)` as the model's forward: what it uses of the model is whole.

    It runs the model and returns the tensor that backward starts from (the loss), or what an
    evaluation wants (without gradients).
    """
    root = sharded_of(model).root
    if root is None:
        return function(model, *arguments)
    result: Tensor = root(function, *arguments)
    if not torch.is_grad_enabled():
        # no backward follows that would give the whole parameters up; the next step changes them
        give_up(model)
    return result


def give_up(model: nn.Module) -> None:
    """Free whatever of `model` is whole; what uses it next gathers it again, as it is then."""
    for module in _sharded(sharded_of(model).root or nn.Module()):
        module.reshard()


def micro_batch(
    model: nn.Module, *, last: bool, blocks: Collection[nn.Module] | None = None
) -> None:
    """Say, before its backward, whether a micro batch is the step's last one.

    Matters to the level `optimizer` only, whose gradients are reduced after the last. `blocks`: of
    these alone; without any, of what is outside of all blocks. None: of the whole model.
    """
    root = sharded_of(model).root
    if not isinstance(root, _Root) or not root.holds_gradients:
        return
    chosen = {id(each) for each in blocks or (root,)}
    for module in _sharded(root):
        if blocks is not None and id(module) not in chosen:
            continue
        module.set_requires_gradient_sync(last, recurse=False)
        module.set_reshard_after_backward(last, recurse=False)


def reduce_held(model: nn.Module) -> None:
    """Scatter the gradients of a step whose backwards were taken apart (level `optimizer`): the
    hooks by which FSDP2 knows that one is over run before its weights' gradients are there.

    As torch.distributed.pipelining ends such a step (torch 2.13, stage.py: perform_reduce_grad).
    """
    root = sharded_of(model).root
    if not isinstance(root, _Root):
        return
    micro_batch(model, last=True)
    for module in _sharded(root):
        for group in module._get_fsdp_state()._fsdp_param_groups:
            group.post_backward()
    whole: Any = root
    whole._get_fsdp_state()._root_post_backward_final_callback()


def sent_bytes(model: nn.Module, *, micro_batches: int) -> dict[str, int]:
    """Bytes that this rank sends along shard in one step, by collective; FSDP2 counts none itself.

    Each gather and each reduction sends a rank's own part to, or from, each of the others. Blocks
    of level `parameters`, but for the last, are gathered twice a micro batch, all else once; with
    the level `optimizer` gathers and reductions are once a step.
    """
    root = sharded_of(model).root
    if not isinstance(root, _Root):
        return {}
    gathered = reduced = 0
    for _, each in _fsdp_parameters(model, root):
        num_bytes = math.prod(each.padded_sharded_param_size) * each.sharded_param.element_size()
        num_bytes *= each.mesh_info.shard_mesh_size - 1
        gathered += num_bytes if each.post_forward_mesh_info is None else 2 * num_bytes
        if each.sharded_param.requires_grad:
            reduced += num_bytes
    times = 1 if root.holds_gradients else micro_batches
    return {"all_gather": times * gathered, "reduce_scatter": times * reduced}


def _sharded(root: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in root.modules() if isinstance(module, FSDPModule))


def storage_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of the storage that each parameter needs on this rank, by canonical name.

    FSDP2 wants equal storage on all ranks: rows beyond a rank's own stay zero, parameters,
    gradients and moments alike, so that they change no norm and no update.
    """
    shapes = {name: tuple(p.shape) for name, p in canonical_parameters(model).items()}
    root = sharded_of(model).root
    for name, each in _fsdp_parameters(model, root):
        shapes[name] = tuple(each.padded_sharded_param_size)
    return shapes


@torch.no_grad()
def adopt(
    model: nn.Module,
    values: Callable[[str], Tensor],
    gradients: Callable[[str], Tensor | None] = lambda name: None,
) -> None:
    """Make each parameter, and its gradient, a view of storage that the caller owns.

    `values(name)`: storage of `storage_shapes()[name]`, already filled or to be filled;
    `gradients(name)`: the same for its gradient, into which backward accumulates, or None. Ties
    are kept. After this the model is real, whatever it was.
    """
    ties = ties_of(model)
    replaced: dict[int, nn.Parameter] = {}
    originals = []
    sharded = dict(_fsdp_parameters(model, sharded_of(model).root))
    for path, module in list(model.named_modules(remove_duplicate=False)):
        for leaf, old in list(module._parameters.items()):
            if old is None:
                continue
            if id(old) not in replaced:
                name = canonical_name(f"{path}.{leaf}" if path else leaf)
                originals.append(old)
                replaced[id(old)] = _over(old, values(name), gradients(name), sharded.get(name))
            module._parameters[leaf] = replaced[id(old)]
    # FSDP2 sets parameters by name on the modules; tied ones were found under their first name
    assert ties_of(model) == ties, "adopt: the tied parameters changed"


def _over(old: nn.Parameter, values: Tensor, gradient: Tensor | None, fsdp: Any) -> nn.Parameter:
    """A parameter like `old` over given storage."""
    if fsdp is None:
        new = nn.Parameter(values.view(old.shape), requires_grad=old.requires_grad)
        new.grad = None if gradient is None or not old.requires_grad else gradient.view(old.shape)
        return new
    assert isinstance(old, DTensor), "FSDP2 keeps its parameters as DTensors"
    new = nn.Parameter(_sharded_view(old, values), requires_grad=old.requires_grad)
    if gradient is not None and old.requires_grad:
        new.grad = _sharded_view(old, gradient)
    fsdp.sharded_param = new
    fsdp._sharded_param_data = values.view(-1)
    return new


def over(parameter: Tensor, storage: Tensor) -> Tensor:
    """`storage`, of the shape `storage_shapes` gives, as a tensor like `parameter`; a view."""
    if isinstance(parameter, DTensor):
        return _sharded_view(parameter, storage)
    return storage.view(parameter.shape)


def _sharded_view(like: DTensor, storage: Tensor) -> DTensor:
    """The rows of padded `storage` that are this rank's own, as a DTensor like `like`."""
    rows = like.to_local().shape[0]
    return DTensor.from_local(
        storage.narrow(0, 0, rows),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def _fsdp_parameters(model: nn.Module, root: nn.Module | None) -> Iterator[tuple[str, Any]]:
    """FSDP2's own records of its parameters, by canonical name.

    Private in torch 2.13 (2.11 has one group in place of a list), used here only: FSDP2 re-reads a
    parameter that was replaced (`reset_sharded_param`), but copies one that needs padding into
    storage of its own; with the padded storage given beforehand it sees that nothing changed, and
    copies nothing.
    """
    if root is None:
        return
    names = {id(parameter): name for name, parameter in canonical_parameters(model).items()}
    for module in _sharded(root):
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:
            groups = filter(None, [state._fsdp_param_group])
        for group in groups:
            for each in group.fsdp_params:
                yield names[id(each.sharded_param)], each
