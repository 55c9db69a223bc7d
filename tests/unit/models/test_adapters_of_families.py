"""Adapters of every family, in this process, held against peft's forward and backward."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from shoal.models.adapter import AdapterSettings, attach
from shoal.models.anatomy import (
    anatomy_of,
    canonical_parameters,
    example_of,
    hidden_of,
    logits_of,
)
from shoal.models.huggingface import build_reference
from shoal.models.init import materialise, record
from unit.models.tiny_models import SETTINGS, auto_class_of, config_of, meta_model

KINDS = ("lora", "dora")


def adapted(family: str, kind: str) -> tuple[nn.Module, list[str]]:
    """shoal's model with nothing at zero, and the layers that have adapters."""
    model = meta_model(family)
    anatomy = anatomy_of(model)
    names, begins = attach(
        model,
        settings=AdapterSettings(kind, 3, 2.0, ("all-linear",)),
        blocks=(anatomy.blocks, *anatomy.more_blocks),
        seed=0,
        dropout="off",
        record=record(model),
    )
    materialise(model, record=begins, seed=0)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith(("lora_b", "lora_magnitude")):
            nn.init.normal_(parameter, std=0.1)
    return model.eval(), sorted({name.rpartition(".")[0] for name in names})


def theirs(family: str, kind: str, ours: nn.Module, paths: list[str]) -> Any:
    """peft's model with the same numbers."""
    model = build_reference(config_of(family), auto_class=auto_class_of(family))
    values = {name: each.detach() for name, each in canonical_parameters(ours).items()}
    with torch.no_grad():
        for name, parameter in canonical_parameters(model).items():
            parameter.copy_(values[name])
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=paths,
        use_dora=kind == "dora",
        fan_in_fan_out=family == "gpt2",
    )
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for path in paths:
            layer = wrapped.base_model.model.get_submodule(path)
            layer.lora_A["default"].weight.copy_(values[f"{path}.lora_a"])
            layer.lora_B["default"].weight.copy_(values[f"{path}.lora_b"])
            if kind == "dora":
                vector = layer.lora_magnitude_vector["default"].weight
                vector.add_(values[f"{path}.lora_magnitude"])
    return wrapped.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", [name for name in SETTINGS if name != "t5"])
def test_every_family_computes_what_peft_does(family: str, kind: str) -> None:
    ours, paths = adapted(family, kind)
    assert len(paths) >= 2
    other = theirs(family, kind, ours, paths)
    batch = example_of(ours)
    if "input_ids" in batch:
        batch["input_ids"] = batch["input_ids"] + 5  # none that pads, after which roberta counts
    found: Tensor = logits_of(ours)(hidden_of(ours, batch))
    wanted = other(**{k: v for k, v in batch.items() if k in ("input_ids", "pixel_values")}).logits
    scale = float(wanted.detach().abs().max())
    assert float((found - wanted).detach().abs().max()) < 1e-5 * max(scale, 1.0)
    found.square().sum().backward()
    wanted.square().sum().backward()
    for path in paths:
        layer = other.base_model.model.get_submodule(path)
        own: Any = ours.get_submodule(path)
        pairs = [(own.lora_a, layer.lora_A["default"].weight)]
        pairs.append((own.lora_b, layer.lora_B["default"].weight))
        if kind == "dora":
            pairs.append((own.lora_magnitude, layer.lora_magnitude_vector["default"].weight))
        for mine, its in pairs:
            size = float(its.grad.norm()) + 1e-6
            assert float((mine.grad - its.grad).norm()) < 1e-3 * size, path
