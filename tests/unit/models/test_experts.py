"""shoal's products of experts against the modules of transformers as their users run them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shoal.legal import facts_from_config
from shoal.models import init
from shoal.models.anatomy import canonical_parameters
from shoal.models.experts import (
    CORRECTION,
    experts_of,
    grouped,
    groups_products,
    inverse,
    keep_corrections,
    take,
)
from shoal.models.export import export
from shoal.models.huggingface import build_meta, build_reference, open_folder
from shoal.models.pretrained import PretrainedWeights
from shoal.models.stored import InMemory
from unit.models.tiny_models import MIXTURES, VOCABULARY, config_of

CAUSAL = "AutoModelForCausalLM"


def pair_of(family: str) -> tuple[nn.Module, nn.Module]:
    """transformers' model (eager experts) with drawn corrections, and shoal's with its weights."""
    torch.manual_seed(0)
    config = config_of(family)
    config._experts_implementation = "eager"
    theirs = build_reference(config, auto_class=CAUSAL)
    with torch.no_grad():
        for module in theirs.modules():
            if hasattr(module, CORRECTION):
                module.e_score_correction_bias.normal_(std=0.5)
    ours = build_meta(config_of(family), auto_class=CAUSAL)
    held = dict(canonical_parameters(theirs))
    held |= {n: b for n, b in theirs.named_buffers() if n.endswith(CORRECTION)}
    init.materialise(ours, record=init.record(ours), seed=0, source=InMemory(held))
    return theirs.double(), ours.double()


def tokens(rows: int = 3, length: int = 11) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", MIXTURES)
def test_a_model_and_its_gradients_are_those_of_transformers(family: str) -> None:
    """Norms and routers round to float32 (6e-8) even in float64; a lost row gives 0.1."""
    theirs, ours = pair_of(family)
    assert len(experts_of(ours)) == facts_from_config(ours.config.to_dict()).expert_layers > 0
    found, wanted = (model(input_ids=tokens()).logits for model in (ours, theirs))
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)
    for logits in (found, wanted):
        logits.square().sum().backward()
    gradients = {name: each.grad for name, each in theirs.named_parameters()}
    for name, each in ours.named_parameters():
        if name.endswith(CORRECTION):
            assert not each.requires_grad
            assert each.grad is None
        else:
            apart = (each.grad - gradients[name]).norm() / gradients[name].norm()
            assert apart < 1e-5, name


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_alone_are_exact(family: str) -> None:
    """float64: only the order of two sums may differ."""
    theirs, ours = pair_of(family)
    (mine, *_), (other, *_) = experts_of(ours).values(), experts_of(theirs).values()
    results = []
    for module in (mine, other):
        torch.manual_seed(2)
        hidden = torch.randn(13, 32, dtype=torch.float64, requires_grad=True)
        weights = torch.rand(13, 3, dtype=torch.float64, requires_grad=True)
        indices = torch.rand(13, module.num_experts).topk(3).indices
        made = module(hidden, indices, weights)
        made.sin().sum().backward()
        results.append([made, hidden.grad, weights.grad, *(p.grad for p in module.parameters())])
    for found, wanted in zip(*results, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-14)


def test_an_expert_without_tokens_has_a_gradient_of_zero() -> None:
    """Not none: ranks that add gradients up must all have the same."""
    _, ours = pair_of("qwen3_moe")
    ours(input_ids=tokens(1, 2)).logits.sum().backward()
    for module in experts_of(ours).values():
        norms = module.down_proj.grad.flatten(1).norm(dim=1)
        assert 0 < int((norms == 0).sum()) < 8


def test_autocast_reaches_the_experts() -> None:
    """As it reaches transformers' eager ones: products in bfloat16, sums in float32."""
    theirs, ours = (model.float() for model in pair_of("mixtral"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, wanted = (model(input_ids=tokens()).logits for model in (ours, theirs))
    apart = (found - wanted).norm() / wanted.norm()
    assert apart < 1e-2  # a bfloat16 has 3 digits
    assert not torch.equal(found, ours(input_ids=tokens()).logits)


def test_gradients_have_the_same_bits_with_more_threads() -> None:
    """index_put_ of torch adds rows in any order."""
    rows, found = torch.randn(4000, 64), []
    order = torch.randperm(16000)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        for _ in range(4):
            leaf = rows.clone().requires_grad_()
            (take(leaf, order, copies=4) * torch.arange(16000)[:, None]).sum().backward()
            found.append(leaf.grad)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(each, found[0]) for each in found)
    assert torch.equal(
        take(take(rows, inverse(order[:4000].argsort())), order[:4000].argsort()), rows
    )


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_a_folder_of_the_hub_is_written_and_read(family: str, tmp_path: Path) -> None:
    """Experts apart under the hub's names, and the router's correction, which is no zero."""
    theirs, ours = (model.float() for model in pair_of(family))
    named = {name: each.detach() for name, each in canonical_parameters(ours).items()}
    export(tensors=named, config=config_of(family), auto_class=CAUSAL, out=tmp_path / "out")
    opened = open_folder(tmp_path / "out", auto_class=CAUSAL)
    with torch.no_grad():
        found, wanted = (m(input_ids=tokens()).logits for m in (opened, theirs))
    assert torch.allclose(found, wanted, atol=1e-5)
    read = PretrainedWeights(
        tmp_path / "out", model=build_meta(config_of(family), auto_class=CAUSAL)
    )
    assert read.missing == read.unused == ()
    for name, each in named.items():
        assert torch.equal(read.tensor(name), each), name


def test_corrections_are_read_of_what_transformers_saved(tmp_path: Path) -> None:
    theirs, _ = pair_of("deepseek_v3")
    theirs.float().save_pretrained(tmp_path)
    model = build_meta(config_of("deepseek_v3"), auto_class=CAUSAL)
    read = PretrainedWeights(tmp_path, model=model)
    assert read.missing == read.unused == ()
    keep_corrections(theirs)
    name = f"model.layers.1.mlp.gate.{CORRECTION}"
    assert torch.equal(read.tensor(name), theirs.get_parameter(name))
    assert float(read.tensor(name).norm()) > 0


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="torch has no such")
def test_grouped_products_are_those_of_each_expert() -> None:
    """The kernel of GPUs has one for CPUs too; an expert without rows has a gradient of zero."""
    counts = torch.tensor([3, 0, 5])
    results = []
    for together in (True, False):
        torch.manual_seed(0)
        rows = torch.randn(8, 16, dtype=torch.bfloat16, requires_grad=True)
        stacked = torch.randn(3, 24, 16, requires_grad=True)
        if together:
            made = grouped(rows, stacked, counts)
        else:
            parts = zip(rows.split(counts.tolist()), stacked.bfloat16())
            made = torch.cat([part @ weight.T for part, weight in parts])
        made.float().square().sum().backward()
        results.append((made.float(), rows.grad.float(), stacked.grad))
        assert not groups_products(rows, stacked), "on a CPU it is no faster"
    for found, wanted in zip(*results, strict=True):
        assert (found - wanted).norm() < 2e-2 * wanted.norm()
    assert float(results[0][2][1].norm()) == 0.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_groups_products() -> None:
    """bfloat16 of a model on a GPU, with and without the kernel."""
    _, ours = pair_of("mixtral")
    ours = ours.float().cuda()
    found = []
    for can in (True, False):
        with torch.autocast("cuda", dtype=torch.bfloat16), pytest.MonkeyPatch.context() as patch:
            if not can:
                patch.setattr("shoal.models.experts.groups_products", lambda *given: False)
            logits = ours(input_ids=tokens().cuda()).logits.float()
        ours.zero_grad()
        logits.square().sum().backward()
        gradients = [each.grad for m in experts_of(ours).values() for each in m.parameters()]
        found.append([logits, *gradients])
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() < 3e-2 * other.norm()
