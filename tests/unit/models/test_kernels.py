"""Kernels other than the local one run the same models, and travel into recompute."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import torch
from tiny_models import ROWS_OF_TOKENS, columns, packed_batch, real_model
from torch import Tensor

from shoal.errors import ModelError
from shoal.models.anatomy import anatomy_of, hidden_of, logits_of
from shoal.models.kernels import Kernel, MaskRequest, local
from shoal.parallel.local import Holdings
from shoal.parallel.mesh import Mesh
from shoal.parallel.recompute import apply_recompute
from shoal.parallel.settings import Settings

DECODERS = [family for family in ROWS_OF_TOKENS if family not in ("bert", "roberta")]


@dataclass
class Reference:
    """Attention by its definition, in float64, with a mask of its own kind: allowed pairs."""

    threads: list[int] = field(default_factory=list)
    layers: set[int] = field(default_factory=set)
    by_layer: ClassVar[bool] = True

    def mask(self, request: MaskRequest) -> dict[str, Tensor]:
        # never None, and no tensor: what this kernel gives comes back to it as it is
        whole = replace(request, skips_causal=False, skips_bidirectional=False)
        seen = local.mask(whole)
        assert seen is not None, "nothing is skipped"
        return {"seen": seen}

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, layer: int, mask: Any, **terms: Any
    ) -> Tensor:
        self.threads.append(threading.get_ident())
        self.layers.add(layer)
        groups = query.shape[1] // key.shape[1]
        wide = [each.double() for each in (query, key, value)]
        query, key, value = wide[0], *(each.repeat_interleave(groups, 1) for each in wide[1:])
        scores = torch.einsum("bhtd,bhsd->bhts", query, key) * terms["scale"]
        if terms["softcap"] is not None:
            scores = (scores / terms["softcap"]).tanh() * terms["softcap"]
        scores = scores.masked_fill(~mask["seen"], -torch.inf)
        return torch.einsum("bhts,bhsd->bthd", scores.softmax(-1), value).float()


@dataclass
class Cached:
    """Keeps the keys and values of every layer: a forward brings the tokens that follow."""

    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    by_layer: ClassVar[bool] = True

    def mask(self, request: MaskRequest) -> Tensor | None:
        past = self.kept[0][0].shape[2] if self.kept else 0
        asked = replace(
            request, first_query=past, num_keys=past + request.num_queries, document_ids=None
        )
        return local.mask(replace(asked, skips_causal=False))

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, layer: int, **terms: Any
    ) -> Tensor:
        if layer in self.kept:
            before = self.kept[layer]
            key, value = torch.cat([before[0], key], 2), torch.cat([before[1], value], 2)
        self.kept[layer] = (key, value)
        return local(query, key, value, layer=layer, **terms)


@pytest.mark.parametrize("family", ROWS_OF_TOKENS)
def test_a_kernel_by_definition_gives_the_models_hidden_states(family: str) -> None:
    model, batch, kernel = real_model(family), packed_batch(), Reference()
    found = hidden_of(model, batch, kernel=kernel)
    # float32 against float64 inside attention: rounding of float32 through two layers
    assert torch.allclose(found, hidden_of(model, batch), rtol=0, atol=1e-5)
    assert kernel.layers == {0, 1} and len(kernel.threads) == 2


@pytest.mark.parametrize("family", DECODERS)
def test_decoding_a_token_at_a_time_gives_the_whole_forwards_logits(family: str) -> None:
    model, batch, kernel = real_model(family), packed_batch(lengths=(16,)), Cached()
    logits = logits_of(model)
    whole = logits(hidden_of(model, batch))
    parts = [logits(hidden_of(model, columns(batch, 0, 5), kernel=kernel))]
    parts += [
        logits(hidden_of(model, columns(batch, at, at + 1), kernel=kernel)) for at in range(5, 16)
    ]
    assert torch.allclose(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-5)
    assert kernel.kept[1][0].shape[2] == 16


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_recompute_on_another_thread_runs_the_forwards_kernel(kind: str) -> None:
    def gradients(kernel: Kernel) -> list[Tensor]:
        model, batch = real_model("llama").train(), packed_batch()
        mesh = Mesh.alone(torch.device("cpu"))
        settings = Settings(recompute=kind)
        apply_recompute(model, anatomy_of(model), mesh, Holdings(mesh, {}), settings)
        hidden = hidden_of(model, batch, kernel=kernel)
        hidden_of(model, batch)  # another forward, by another kernel, comes between
        worker = threading.Thread(target=lambda: hidden.square().sum().backward())
        worker.start()
        worker.join()
        return [each.grad for each in model.parameters() if each.grad is not None]

    kernel = Reference()
    for found, expected in zip(gradients(kernel), gradients(local), strict=True):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.norm()))
    # each of two layers once in the forward, once more in the backward's thread
    assert len(kernel.threads) == 4 and len(set(kernel.threads)) == 2


@dataclass(frozen=True)
class Sharper:
    """The local kernel with scores twice as large."""

    by_layer = False

    def mask(self, request: MaskRequest) -> Tensor | None:
        return local.mask(request)

    def __call__(self, *states: Tensor, scale: float, **terms: Any) -> Tensor:
        return local(*states, scale=2 * scale, **terms)


def test_compiled_code_follows_the_context() -> None:
    """Compiled for one kernel, called with another: the other one runs, and again the first."""
    model, batch = real_model("llama").eval(), packed_batch()
    expected = {kernel: hidden_of(model, batch, kernel=kernel) for kernel in (local, Sharper())}
    assert not torch.allclose(expected[local], expected[Sharper()], atol=1e-2)
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    for block in model.model.layers:
        block.forward = torch.compile(block.forward, backend=backend)
    compiled = []
    with torch.no_grad():
        for step, kernel in enumerate([local, local, Sharper(), local, Sharper(), local]):
            found = hidden_of(model, batch, step=step, kernel=kernel)
            assert torch.allclose(found, expected[kernel], rtol=0, atol=1e-5), step
            compiled.append(len(graphs))
    # neither a step nor a kernel that was seen before is a reason to compile again
    assert compiled[0] == compiled[1] and compiled[2] == compiled[-1]


def test_framework_dropout_is_the_local_kernels_alone() -> None:
    model, batch = real_model("gpt2", dropout="framework").train(), packed_batch()
    assert not torch.equal(hidden_of(model, batch), hidden_of(model, batch))
    with pytest.raises(ModelError, match=r"Reference: it does not drop.*(?s:.)*off or keyed"):
        hidden_of(model, batch, kernel=Reference())
