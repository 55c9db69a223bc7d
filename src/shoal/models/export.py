"""Writes a Hugging Face folder that other tools open: weights, configuration, tokenizer."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
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
    with beside(out) as partial:
        write_tensors(partial, Form(model), weights, limit_bytes=limit_bytes, shard_size=SHARD_SIZE)
        with quietly():
            model.save_pretrained(partial / "empty", state_dict={})  # type: ignore[operator]
        for file in (partial / "empty").iterdir():
            if file.suffix == ".json":
                file.rename(partial / file.name)
        shutil.rmtree(partial / "empty")
        if generation is not None:
            text = json.dumps({**generation, **(special_tokens or {})}, indent=2)
            (partial / "generation_config.json").write_text(text + "\n", encoding="utf-8")
        if tokenizer_directory is not None:
            _copy_tokenizer(Path(tokenizer_directory), partial)
        for name, text in (files or {}).items():
            (partial / name).write_text(text, encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        os.replace(partial, out)
    return out


@contextlib.contextmanager
def beside(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, to be renamed; what killed exports to `out` have left goes."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in out.parent.glob(f".{glob.escape(out.name)}-*.partial"):
        with contextlib.suppress(OSError), _locked(left):  # else another export writes it now
            shutil.rmtree(left)
    partial = out.parent / f".{out.name}-{secrets.token_hex(4)}.partial"
    partial.mkdir()  # with the rights that the user's umask leaves
    try:
        with _locked(partial):
            yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder; the lock ends with this process, however it ends. Raises OSError at once."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


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
