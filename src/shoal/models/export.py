"""Writes a Hugging Face folder that other tools open: weights, configuration, tokenizer."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shoal.errors import ModelError
from shoal.models.huggingface import build_meta, quietly
from shoal.models.stored import Form, InMemory, Weights, check_names
from shoal.models.writing import write_tensors

SHARD_SIZE = "2GB"
"""A larger model is written as several files with an index."""

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
)


def export(
    *,
    tensors: Mapping[str, Tensor] | Weights,
    config: Any,
    auto_class: str,
    out: str | Path,
    tokenizer_directory: str | Path | None = None,
    special_tokens: Mapping[str, Any] | None = None,
    generation: Mapping[str, Any] | None = None,
    files: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
    replace: bool = False,
    limit_bytes: int | None = None,
) -> Path:
    """Write `out`: config.json, generation settings, safetensors, tokenizer files. Returns it.

    `tensors`: every canonical parameter of the model, once. They are written piece by piece, of
    which at most `limit_bytes` (None: 1 GiB where that can be) are in memory at once. Names, ties
    and the stored form that other tools expect are transformers' own, and so is every byte. The
    folder appears in one rename.
    `special_tokens`: `eos_token_id` and others of a new tokenizer, for both configurations;
    `generation`: the generation_config.json that the model came with, kept but for those ids.
    Raises ModelError: names or shapes that are not the model's, a folder that already holds
    something (unless `replace`), a stored form that cannot be made within the limit.
    """
    out = Path(out)
    if out.exists() and not replace and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(
            f"{out}: it exists and is not empty; nothing was written\n    choose another --out"
        )
    model = build_meta(config, auto_class=auto_class)
    weights = InMemory(tensors) if isinstance(tensors, Mapping) else tensors
    check_names(model, weights)
    model.to(dtype)
    _prepare(model, config, special_tokens or {})
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        write_tensors(scratch, Form(model), weights, limit_bytes=limit_bytes, shard_size=SHARD_SIZE)
        with quietly():
            model.save_pretrained(scratch / "empty", state_dict={})  # type: ignore[operator]
        for file in (scratch / "empty").iterdir():
            if file.suffix == ".json":
                file.rename(scratch / file.name)
        shutil.rmtree(scratch / "empty")
        if generation is not None:
            text = json.dumps({**generation, **(special_tokens or {})}, indent=2)
            (scratch / "generation_config.json").write_text(text + "\n", encoding="utf-8")
        if tokenizer_directory is not None:
            _copy_tokenizer(Path(tokenizer_directory), scratch)
        for name, text in (files or {}).items():
            (scratch / name).write_text(text, encoding="utf-8")
        scratch.chmod(0o755)
        if out.exists():
            shutil.rmtree(out)
        os.replace(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return out


def _prepare(model: nn.Module, config: Any, special_tokens: Mapping[str, Any]) -> None:
    """The configuration as the user gave it (muted dropout and attention are ours alone)."""
    ours: Any = model.config
    for key, value in vars(config).items():
        if ("dropout" in key or "pdrop" in key) and not key.startswith("_"):
            setattr(ours, key, value)
    ours.use_cache = True
    ours.architectures = [type(model).__name__]
    ours.dtype = next(model.parameters()).dtype
    written = [ours.get_text_config()]
    if (generation := getattr(model, "generation_config", None)) is not None:
        generation.use_cache = True
        written.append(generation)
    for name, value in special_tokens.items():
        for each in written:
            setattr(each, name, value)


def _copy_tokenizer(source: Path, target: Path) -> None:
    copied = [name for name in _TOKENIZER_FILES if (source / name).is_file()]
    if not copied:
        raise ModelError(
            f"{source}: no tokenizer files there\n    expected tokenizer.json beside the others"
        )
    for name in copied:
        shutil.copyfile(source / name, target / name)
