"""Writes a compressed model: a Hugging Face folder, its layers on a grid packed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from shoal.models import packed
from shoal.models.anatomy import canonical_parameters
from shoal.models.export import beside, export
from shoal.models.grid import Coded
from shoal.models.placement import is_transposed
from shoal.models.stored import Form


def can_pack(model: nn.Module, coded: Mapping[str, Coded]) -> bool:
    """Whether compressed-tensors has a form for these layers: linear ones, stored as they are."""
    stored = {each.weight for each in Form(model).tensors.values()}
    return bool(coded) and all(
        f"{path}.weight" in stored and not is_transposed(model.get_submodule(path))
        for path in coded
    )


def write(
    model: nn.Module,
    *,
    auto_class: str,
    source: Path,
    out: Path,
    coded: Mapping[str, Coded],
    dynamic: bool = False,
) -> Path:
    """Write `model` to `out`; `source` is the folder it was, whose tokenizer and settings go too.

    `coded`: layers by path that are stored packed, where `can_pack`; `dynamic`: with inputs rounded
    by token. The folder appears in one rename. Raises ModelError.
    """
    generation = source / "generation_config.json"
    told = json.loads(generation.read_text(encoding="utf-8")) if generation.is_file() else None
    with beside(out) as partial:
        dense = export(
            tensors=canonical_parameters(model),
            config=model.config,
            auto_class=auto_class,
            out=partial / "dense",
            tokenizer_directory=source,
            generation=told,
        )
        if can_pack(model, coded):
            _pack_files(dense, model, coded, dynamic=dynamic)
        dense.rename(out)
    return out


def _pack_files(
    folder: Path, model: nn.Module, coded: Mapping[str, Coded], *, dynamic: bool
) -> None:
    canonical = {name: each.weight for name, each in Form(model).tensors.items()}
    weights: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = {}
        with safe_open(str(file), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                path = str(canonical.get(name)).removesuffix(".weight")
                if path not in coded:
                    tensors[name] = opened.get_tensor(name)
                    continue
                each, inside = coded[path], name.removesuffix(".weight")
                tensors[f"{inside}{packed.SCALE}"] = each.scales.contiguous()
                if dynamic:
                    tensors[name] = each.codes.contiguous()
                    continue
                tensors[f"{inside}{packed.PACKED}"] = packed.pack(each.codes, bits=each.grid.bits)
                tensors[f"{inside}.weight_shape"] = torch.tensor(each.codes.shape)
        file.write_bytes(save(tensors, metadata={"format": "pt"}))
        weights |= dict.fromkeys(tensors, file.name)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        told = json.loads(index.read_text(encoding="utf-8"))
        told["weight_map"] = weights
        index.write_text(json.dumps(told, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _describe(folder / "config.json", model, coded, dynamic=dynamic)


def _describe(file: Path, model: nn.Module, coded: Mapping[str, Coded], *, dynamic: bool) -> None:
    grid = next(iter(coded.values())).grid
    linear = [path for path, each in model.named_modules() if type(each) is nn.Linear]
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    config["quantization_config"] = packed.settings(
        bits=grid.bits,
        group=grid.group,
        ignore=[path for path in linear if path not in coded],
        dynamic=dynamic,
    )
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def bytes_of(folder: Path) -> int:
    """Bytes of a folder's weights."""
    files = [*folder.glob("*.safetensors"), *folder.glob("*.gguf")]
    return sum(file.stat().st_size for file in files)
