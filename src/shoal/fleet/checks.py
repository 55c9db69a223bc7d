"""What a fleet refuses: models that cannot be divided, and gradients that somebody has changed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from shoal.errors import ModelError, UserError
from shoal.parallel.local import local


def refuse_changed(
    before: Mapping[str, float] | None, parameters: Mapping[str, nn.Parameter]
) -> None:
    """Raises UserError where a gradient is not as `marks` gave it after the last backward."""
    if before is None:
        raise UserError(
            "fleet.step: no fleet.backward(loss) since the last step; loss.backward() alone "
            "does not weight the gradients by their targets"
        )
    now = marks(parameters)
    changed = [name for name in now if now[name] != before[name] and now[name] == now[name]]
    if changed:
        raise UserError(
            f"fleet.step: the gradient of {changed[0]} was changed since fleet.backward, but "
            "it is this worker's part of a sum until the step\n    clip by "
            "fleet.step(max_gradient_norm=1.0), and zero gradients before backward"
        )


def marks(parameters: Mapping[str, nn.Parameter]) -> dict[str, float]:
    """What tells whether a gradient was written to since; -1 where there is none.

    The count of writes that torch keeps; it keeps none of a DTensor, so of a shard its norm.
    """
    found = dict.fromkeys(parameters, -1.0)
    cut: dict[str, Tensor] = {}
    for name, each in parameters.items():
        if type(each.grad) is Tensor:
            found[name] = float(each.grad._version)
        elif each.grad is not None:
            cut[name] = torch.linalg.vector_norm(local(each.grad))
    if cut:  # brought over at once
        found |= dict(zip(cut, torch.stack([*cut.values()]).tolist()))
    return found


def refuse_model(
    model: nn.Module, named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Raises ModelError, UserError for what a fleet cannot divide."""
    if not any(each.requires_grad for each in named.values()):
        raise ModelError("fleet.parallelize: the model has no parameter to train")
    meta = [name for name, each in named.items() if each.is_meta]
    if meta:
        raise ModelError(f"fleet.parallelize: {meta[0]} has no values (it is on the meta device)")
    dtypes = sorted({str(each.dtype) for each in named.values()})
    if len(dtypes) > 1:
        raise ModelError(
            f"fleet.parallelize: expected parameters of one dtype, got {' and '.join(dtypes)}; "
            "call model.float(), and compute in another by torch.autocast"
        )
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ModelError(
                f"fleet.parallelize: {path} normalises over the rows of a batch, of which a worker "
                "has a part: a layout would change the numbers\n    use GroupNorm or LayerNorm"
            )
    known = {id(each) for each in named.values()}
    listed = [each for group in optimizer.param_groups for each in group["params"]]
    if any(id(each) not in known for each in listed):
        raise UserError(
            "fleet.parallelize: the optimizer has parameters that the model has not; make it from "
            "model.parameters()"
        )
    if optimizer.state:
        raise UserError(
            "fleet.parallelize: the optimizer has stepped already; give a new one, and let "
            "fleet.load bring its state back"
        )
