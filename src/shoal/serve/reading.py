"""A model folder read for use, by the reader that training has: the same folders are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from shoal.errors import ModelError, nearest

Kind = Literal["generate", "classify", "embed"]


def model_directory(path: Path) -> Path:
    """The model folder that `path` is, or holds (a run). Raises ModelError."""
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file() and list(folder.glob("*.safetensors")):
            return folder
    names = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    hint = nearest(path.name, names) if not path.exists() else "a run gets one at its end"
    raise ModelError(f"{path}: expected a model folder (config.json and safetensors); {hint}")


def kind_of(folder: Path) -> Kind:
    """What a folder's model does, by the architecture that its config.json names. ModelError."""
    try:
        said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        names = said.get("architectures") or [""]
        name = str(names[0])
    except (OSError, ValueError, AttributeError, LookupError, RecursionError) as error:
        raise ModelError(f"{folder / 'config.json'}: cannot be read: {error}") from None
    if name.endswith("ForSequenceClassification"):
        return "classify"
    return "embed" if name.endswith("Model") and not name.endswith("HeadModel") else "generate"


def read_model(folder: Path, *, auto_class: str, kernel: str = "eager") -> Any:
    """The transformers model of a folder, in float32 on the CPU, ready to evaluate.

    Its weights are read by `models/pretrained.py`, so code, pickles, links and names that lead out
    of the folder are refused, and attention is `kernel` (transformers' own; the engine takes
    shoal's), whatever config.json asks for.
    Raises ModelError; also for a folder that lacks a weight, which training would draw at random.
    """
    from shoal.models.huggingface import build_meta
    from shoal.models.init import materialise, record
    from shoal.models.pretrained import PretrainedWeights, folder_config

    config = folder_config(folder, auto_class=auto_class)
    model: Any = build_meta(config, auto_class=auto_class, kernel=kernel)
    weights = PretrainedWeights(folder, model=model)
    weights.refuse_missing()
    materialise(model, record=record(model), seed=0, source=weights).eval()
    model.config.use_cache = True
    return model
