"""An independent reference: a plain loop over the same batches, written without shoal's own parts.

It shares with a run the initial weights and the order of samples, which have tests of their own.
Attention, loss, clipping, schedule, decay and update are written out here in float64.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from shoal.config.load import load_recipe
from shoal.data.stream import Stream
from shoal.launch.prepare import prepare_inputs
from shoal.layout import Share
from shoal.models import init
from tiny import Bench, largest_difference

FLOAT32 = 1e-5
"""Rounding of float32 against float64 over 30 steps of a two-layer model: measured below 1e-6."""


def initial_model(settings: dict[str, object], *, vocabulary: int, seed: int) -> nn.Module:
    config = LlamaConfig(**settings, vocab_size=vocabulary, attn_implementation="eager")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    init.materialise(model, record=init.record(model), seed=seed)
    return model.double().train()


def mask_of(documents: Tensor) -> Tensor:
    """0 where a position may look, -inf elsewhere: causal, and inside its own document."""
    length = documents.shape[1]
    same = documents[:, :, None] == documents[:, None, :]
    causal = torch.ones(length, length).tril().bool()
    seen = same & causal
    return torch.where(seen, 0.0, -torch.inf).double()[:, None]


def plain_losses(bench: Bench, *overrides: str) -> list[float]:
    recipe = load_recipe(str(bench.recipe), overrides)
    inputs = prepare_inputs(recipe, say=lambda _: None)
    batch_samples, steps = recipe.train.global_batch_samples, recipe.train.steps
    assert steps is not None
    stream = Stream(
        Path(inputs.data_directory), seed=recipe.seed, global_batch_samples=batch_samples
    )
    model = initial_model(
        recipe.model.settings, vocabulary=inputs.vocabulary_size, seed=recipe.seed
    )
    named = dict(model.named_parameters())
    decayed = [p for name, p in named.items() if "proj" in name]
    others = [p for name, p in named.items() if "proj" not in name]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for step in range(steps):
        arrays = stream.at(step, Share(0, batch_samples))
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        logits = model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=mask_of(batch["document_ids"]),
            use_cache=False,
        ).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(list(named.values()), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * rate(step, steps=steps, warmup=4)
        optimizer.step()
        losses.append(loss.item())
    return losses


def rate(step: int, *, steps: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / (warmup + 1)
    wave = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
    return 0.1 + 0.9 * wave


@pytest.mark.parametrize("packing", ["true", "false"])
def test_a_run_follows_a_plain_float64_loop(bench: Bench, packing: str) -> None:
    overrides = () if packing == "true" else (f"data.packing={packing}",)
    wanted = plain_losses(bench, *overrides)
    found = bench.run(*overrides).losses
    assert wanted[-1] < wanted[0] - 0.5, "the loop learns, so the comparison says something"
    assert largest_difference(found, wanted) < FLOAT32
