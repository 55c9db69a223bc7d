"""The balance loss of experts against that of transformers, and what is counted of their load."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from shoal.models import init
from shoal.models.anatomy import balanced_hidden_of, canonical_parameters, logits_of
from shoal.models.forward_context import checkpoint_contexts, get_forward_context
from shoal.models.huggingface import build_meta, build_reference
from shoal.models.routing import balance_of
from shoal.models.stored import InMemory
from unit.models.tiny_models import VOCABULARY, config_of

CAUSAL = "AutoModelForCausalLM"
LENGTHS = (9, 4, 7)
ROUTED = ("mixtral", "qwen2_moe", "qwen3_moe")


def pair_of(family: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    config = config_of(family, output_router_logits=True, router_aux_loss_coef=0.5)
    theirs = build_reference(config, auto_class=CAUSAL)
    ours = build_meta(config, auto_class=CAUSAL)
    weights = InMemory(dict(canonical_parameters(theirs)))
    return theirs, init.materialise(ours, record=init.record(ours), seed=0, source=weights)


def batch() -> dict[str, Tensor]:
    """Rows of three lengths, padded; each token is to be told from the one before."""
    ids = torch.randint(VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1))
    documents = torch.tensor([[0] * n + [-1] * (9 - n) for n in LENGTHS], dtype=torch.int32)
    labels = ids.roll(-1, dims=1)
    for row, length in enumerate(LENGTHS):
        labels[row, length - 1 :] = -100
    return {"input_ids": ids, "document_ids": documents, "labels": labels}


def total(model: nn.Module, rows: dict[str, Tensor], kind: str) -> Tensor:
    """SUM over targets with the balance term, as a task makes it."""
    model.shoal_balance = balance_of(model, kind)
    targets = (rows["labels"] >= 0).sum(1)
    inputs = {name: each for name, each in rows.items() if name != "labels"}
    hidden, extra = balanced_hidden_of(model, inputs, targets=targets)
    logits = logits_of(model)(hidden).flatten(0, 1)
    loss = functional.cross_entropy(logits, rows["labels"].flatten(), reduction="sum")
    return loss + sum(extra)


def wanted(model: nn.Module, rows: dict[str, Tensor]) -> Tensor:
    """Mean loss of transformers, as a user calls it, times the number of targets."""
    mask = (rows["document_ids"] >= 0).long()
    labels = rows["input_ids"].masked_fill(mask == 0, -100)
    made = model(input_ids=rows["input_ids"], attention_mask=mask, labels=labels)
    assert made.aux_loss > 1
    return made.loss * (rows["labels"] >= 0).sum()


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [each.grad.clone() for each in model.parameters()]


@pytest.mark.parametrize("family", ROUTED)
@pytest.mark.parametrize("kind", ["batch", "sequence"])
def test_the_loss_is_that_of_transformers(family: str, kind: str) -> None:
    """Of a batch at once, and of each row alone without its padding: 5e-7, float32's rounding."""
    theirs, ours = pair_of(family)
    rows = batch()
    alone = [
        {name: each[row : row + 1, :length] for name, each in rows.items()}
        for row, length in enumerate(LENGTHS)
    ]
    parts = [rows] if kind == "batch" else alone
    right = sum(wanted(theirs, part) for part in parts)
    found = total(ours, rows, kind)
    assert float(((found - right).abs() / right).detach()) < 2e-6
    for ours_, theirs_ in zip(gradients(ours, found), gradients(theirs, right), strict=True):
        assert (ours_ - theirs_).norm() <= 1e-4 * max(float(theirs_.norm()), 1e-3)
    other = total(ours, rows, "sequence" if kind == "batch" else "batch")
    assert float(((other - right).abs() / right).detach()) > 1e-4, "the two kinds can be told apart"


@pytest.mark.parametrize("kind", ["sequence", "batch"])
def test_only_the_sum_over_rows_adds_up_over_micro_batches(kind: str) -> None:
    _, ours = pair_of("mixtral")
    rows = batch()
    parts = [{n: each[at : at + 1] for n, each in rows.items()} for at in range(3)]
    apart = float((total(ours, rows, kind) - sum(total(ours, p, kind) for p in parts)).detach())
    assert (abs(apart) < 1e-4) == (kind == "sequence")


def test_off_where_a_user_of_transformers_has_none() -> None:
    _, asked = pair_of("mixtral")
    assert balance_of(asked, "sequence").coefficient == 0.5
    assert balance_of(asked, "off") is None
    for settings in ({}, {"output_router_logits": True, "router_aux_loss_coef": 0.0}):
        model = build_meta(config_of("mixtral", **settings), auto_class=CAUSAL)
        assert balance_of(model, "sequence") is None
    latent = build_meta(config_of("deepseek_v3", output_router_logits=True), auto_class=CAUSAL)
    assert balance_of(latent, "sequence") is None


def test_load_is_counted_when_training_and_once_under_recompute() -> None:
    _, ours = pair_of("qwen3_moe")
    total(ours.eval(), batch(), "off")
    ours.shoal_load.take()
    total(ours.train(), batch(), "off")
    load = ours.shoal_load
    given = load.take()
    assert given[:-2].view(2, 8).sum(1).tolist() == [2 * sum(LENGTHS)] * 2, "no padding"
    assert given[-2:].tolist() == [2 * 2 * 27.0] * 2, "all rows were computed"
    assert load.take().sum() == 0
    uneven = torch.tensor([6.0, 2, 0, 0, 0, 0, 0, 0, *[1] * 8, 16, 15], dtype=torch.float64)
    assert load.figures(uneven) == {"expert_load": 6.0, "dropped_tokens": 1.0}


def test_a_recompute_decides_again_and_counts_nothing() -> None:
    seen = []
    _, ours = pair_of("mixtral")
    inner = ours.model.forward

    def forward(*args, **named):
        made, contexts = inner(*args, **named), checkpoint_contexts()
        routing = get_forward_context().routing
        before = len(routing.counts)
        with contexts[1]:
            inner(*args, **named)
            seen.append((len(get_forward_context().routing.counts), before, len(routing.counts)))
        return made

    ours.model.forward = forward
    total(ours, batch(), "sequence")
    assert seen == [(2, 2, 2)]
