"""Recompute gives the same gradients from less memory; one worker's layout is the model itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from shoal.layout import Layout
from shoal.models.anatomy import anatomy_of, canonical_parameters, hidden_of
from shoal.models.dropout import apply_keyed
from shoal.models.init import record
from shoal.parallel.apply import apply
from shoal.parallel.local import Holdings, sharded_of
from shoal.parallel.materialise import materialise
from shoal.parallel.mesh import Mesh, build_mesh
from shoal.parallel.recompute import apply_recompute
from shoal.parallel.settings import Settings
from shoal.parallel.shard import apply_shard, forward, micro_batch
from states import parts_of
from unit.models.tiny_models import meta_model, packed_batch, real_model


def placed(family: str, *, recompute: str = "none", seed: int = 0) -> nn.Module:
    """A tiny model in the layout of one worker, with keyed dropout."""
    model = meta_model(family, dropout="keyed")
    apply_keyed(model, seed=7)
    recorded = record(model)
    mesh = build_mesh(Layout(), rank=0, device=torch.device("cpu"))
    apply(model, anatomy_of(model), mesh, Settings(recompute=recompute))
    materialise(model, record=recorded, seed=seed)
    return model.train()


def kept_bytes(model: nn.Module) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes that the forward keeps for the backward, and the gradients."""
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each):
        hidden = hidden_of(model, packed_batch(lengths=(40, 24)), step=4)
    hidden.square().sum().backward()
    return sum(seen.values()), {n: p.grad for n, p in canonical_parameters(model).items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_recompute_is_exact_and_keeps_less(family: str) -> None:
    """The same operations on the same inputs: the same bits, dropout of GPT-2 included."""
    whole, wanted = kept_bytes(placed(family))
    for kind, share in (("full", 0.35), ("selective", 1.0)):
        kept, found = kept_bytes(placed(family, recompute=kind))
        for name, gradient in wanted.items():
            if gradient is not None:
                assert torch.equal(found[name], gradient), (kind, name)
        # full keeps a block's input only; what selective keeps its own hooks hold, unseen here
        assert kept < share * whole, (kind, kept, whole)


def test_one_worker_is_the_model_itself() -> None:
    model, plain = placed("gpt2", seed=3), real_model("gpt2", seed=3)
    batch = packed_batch()
    assert torch.equal(hidden_of(model.eval(), batch), hidden_of(plain, batch))
    parts = parts_of(model)
    for name, parameter in canonical_parameters(plain).items():
        assert [box.sizes for box, _ in parts[name]] == [tuple(parameter.shape)]
        assert torch.equal(parts[name][0][1], parameter)
    hidden_of(model, batch).sum().backward()
    squares = [p.grad.square().sum() for p in model.parameters() if p.grad is not None]
    gradients = {n: p.grad for n, p in canonical_parameters(model).items() if p.grad is not None}
    assert sharded_of(model).holdings.norm(gradients) == pytest.approx(
        float(sum(squares).sqrt()), rel=1e-6
    )
    micro_batch(model, last=False)
    assert forward(model, lambda model: torch.tensor(4.0)) == 4.0


def wrongly(strategy: Any, **settings: str) -> Any:
    """A call of `strategy` with these settings on one worker."""
    mesh = Mesh.alone(torch.device("cpu"))
    return lambda m, a: strategy(m, a, mesh, Holdings(mesh, {}), Settings(**settings))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (wrongly(apply_recompute, recompute="some"), "recompute: expected one of none, sel"),
        (wrongly(apply_shard, shard_level="all"), "level: expected one of parameters"),
        (
            lambda m, a: build_mesh(Layout(shard=2), rank=0, device=torch.device("cpu")),
            r"the degrees \(shard 2\) multiply to 2, but 1 met",
        ),
    ],
)
def test_wrong_words_and_degrees_are_named(call: Any, message: str) -> None:
    model = meta_model("llama")
    with pytest.raises(ValueError, match=message):
        call(model, anatomy_of(model))
