"""Models of Hugging Face: read a configuration, build on the meta device, write the result."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shoal.models import attention


def read_config(
    *,
    architecture: str | None,
    settings: dict[str, Any],
    path: str | Path | None = None,
    vocabulary_size: int | None = None,
) -> Any:
    """A transformers configuration, from a recipe's keys or from a local folder."""
    from transformers import CONFIG_MAPPING, AutoConfig

    if path is not None:
        config = AutoConfig.from_pretrained(
            str(path), trust_remote_code=False, local_files_only=True
        )
    else:
        assert architecture is not None
        config = CONFIG_MAPPING[architecture](**settings)
    if vocabulary_size is not None:
        config.vocab_size = vocabulary_size
    config.use_cache = False
    return config


def build_meta(config: Any, *, auto_class: str, dropout: str = "off") -> nn.Module:
    """The model of `config` for a task's auto class: float32, meta device, attention `shoal`."""
    import transformers

    attention.register()
    factory = getattr(transformers, auto_class)
    config = copy.deepcopy(config)
    with torch.device("meta"):
        return factory.from_config(config, attn_implementation=attention.NAME, dtype=torch.float32)
