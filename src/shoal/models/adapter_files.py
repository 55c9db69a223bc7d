"""Adapters as peft keeps them in a folder: adapter_config.json and adapter_model.safetensors.

The names and the meaning of each key are those of peft 0.21 (peft/utils/save_and_load.py and
peft/tuners/lora/config.py): `base_model.model.PATH.lora_A.weight` [r, in], `.lora_B.weight`
[out, r], `.lora_magnitude_vector` [out], and parts trained whole under their own names.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from shoal.boxes import Box
from shoal.errors import ModelError
from shoal.models.adapter import AdapterSettings, Folded, is_adapter
from shoal.models.export import beside
from shoal.models.init import Source
from shoal.models.placement import is_transposed
from shoal.models.rounded_base import rounded
from shoal.untrusted import TensorInfo, open_plain, read_header

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_THEIRS = {
    "lora_a": "lora_A.weight",
    "lora_b": "lora_B.weight",
    "lora_magnitude": "lora_magnitude_vector",
}
_OURS = {theirs: ours for ours, theirs in _THEIRS.items()}
_TASKS = {
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
    "AutoModel": "FEATURE_EXTRACTION",
}
_MOST_CONFIG_BYTES = 1 << 20
_SAID = frozenset(
    (
        *("peft_type", "peft_version", "task_type", "base_model_name_or_path", "auto_mapping"),
        *("revision", "inference_mode", "r", "lora_alpha", "lora_dropout", "target_modules"),
        *("exclude_modules", "modules_to_save", "fan_in_fan_out", "use_dora", "init_lora_weights"),
        *("layers_pattern", "megatron_config", "megatron_core", "qalora_group_size"),
        *("eva_config", "runtime_config", "ensure_weight_tying"),
    )
)
"""Keys of peft that are read here, or that change nothing of what an adapter computes."""
_MOVED = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways of peft to begin that change the frozen weights too."""


def write_adapter(folder: Path, folded: Folded, *, base_name: str, auto_class: str) -> Path:
    """Write a folder that peft opens over the model `base_name`; returns it. It appears at once."""
    model, settings = folded.model, folded.settings
    tensors, modules, whole = dict[str, Tensor](), list[str](), list[str]()
    for name in folded.learned:
        path, _, leaf = name.rpartition(".")
        value = folded.trained.tensor(name)
        assert value is not None, "a shape is of a tensor"
        value = value.detach().to("cpu", torch.float32)
        if is_adapter(name):
            modules.append(path)
            if leaf == "lora_magnitude":
                value = value + _lengths(folded.before(f"{path}.weight"), path, model)
            tensors[f"{_PREFIX}{path}.{_THEIRS[leaf]}"] = value.contiguous()
        else:
            whole.append(path.split(".")[0])
            tensors[_PREFIX + name] = value.contiguous()
    paths = sorted(set(modules))
    alpha = settings.scale * settings.rank
    about = {
        "peft_type": "LORA",
        "task_type": _TASKS.get(auto_class),
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": settings.dropout,
        "target_modules": _short(paths, model),
        "modules_to_save": sorted(set(whole)) or None,
        "bias": "none",
        "fan_in_fan_out": any(is_transposed(model.get_submodule(path)) for path in paths),
        "use_dora": settings.has_magnitude,
    }
    with beside(folder) as partial:
        save_file(tensors, partial / TENSORS, metadata={"format": "pt"})
        (partial / CONFIG).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    return folder


def _lengths(weight: Tensor, path: str, model: nn.Module) -> Tensor:
    """Lengths of the rows of W [out, in]."""
    return weight.norm(dim=0 if is_transposed(model.get_submodule(path)) else 1)


def _short(paths: list[str], model: nn.Module) -> list[str]:
    """The last names of layers where those name no others, as people read them; else whole."""
    leaves = {path.rpartition(".")[2] for path in paths}
    meant = [path for path, _ in model.named_modules() if path.rpartition(".")[2] in leaves]
    return sorted(leaves) if sorted(meant) == paths else paths


class AdapterFolder:
    """An adapter in peft's format. A `Source` of what it has; the rest is None.

    `settings`: what it says of itself, its layers by their whole paths.
    """

    def __init__(self, folder: str | Path) -> None:
        """Read the configuration and the header of the tensors.

        Raises ModelError: a file that is missing or damaged, or something that shoal does not
        compute, by name.
        """
        self._folder = Path(folder)
        about = _config_of(self._folder / CONFIG)
        self._header = _header_of(self._folder / TENSORS)
        self._names = dict[str, str]()
        for key in self._header:
            name = re.sub(r"\.(default|modules_to_save)(?=\.)", "", key.removeprefix(_PREFIX))
            for theirs, ours in _OURS.items():
                if name.endswith(f".{theirs}"):
                    name = f"{name.removesuffix(theirs)}{ours}"
            self._names[name] = key
        targets = sorted({n.rpartition(".")[0] for n in self._names if is_adapter(n)})
        if not targets:
            raise ModelError(f"{self._folder}: it has no lora_A and lora_B\n    {_EXPECTED}")
        rank = int(about["r"])
        self.settings = AdapterSettings(
            kind="dora" if about.get("use_dora") else "lora",
            rank=rank,
            scale=float(about.get("lora_alpha", 8)) / rank,
            targets=tuple(targets),
            dropout=float(about.get("lora_dropout", 0.0)),
        )

    def over(self, base: Source, *, model: nn.Module, kept_in: str = "float32") -> Source:
        """A source of the adapter's values, and of `base` for the rest (`model` as in `check`).

        `kept_in`: what the matrices of `base` are rounded to, from which lengths are then counted.
        """
        return _Over(self, base, model, kept_in)

    def check(self, model: nn.Module) -> None:
        """Raise ModelError for layers or shapes that `model` (with adapters, whole) has not."""
        parameters = dict(model.named_parameters())
        for name, key in self._names.items():
            shape, known = self._header[key].shape, parameters.get(name)
            if known is None or tuple(known.shape) != shape:
                has = "has none" if known is None else f"has {list(known.shape)}"
                raise ModelError(
                    f"{self._folder}: {key} {list(shape)}, where the model {has}\n"
                    "    use the model that the adapter was trained on"
                )

    def tensor(self, name: str) -> Tensor | None:
        """A value by canonical name, float32; of lora_magnitude the trained length itself."""
        key = self._names.get(name)
        if key is None:
            return None
        with safe_open(str(self._folder / TENSORS), framework="pt") as file:
            found: Tensor = file.get_tensor(key)
        return found.to(torch.float32)


class _Over:
    def __init__(
        self, adapter: AdapterFolder, base: Source, model: nn.Module, kept_in: str
    ) -> None:
        self._adapter, self._base, self._model, self._kept_in = adapter, base, model, kept_in

    def tensor(self, name: str, *, box: Box | None = None) -> Tensor | None:
        value = self._adapter.tensor(name)
        if value is None:
            return self._base.tensor(name, box=box)
        if name.endswith(".lora_magnitude"):
            path = name.rpartition(".")[0]
            weight = self._base.tensor(f"{path}.weight")
            assert weight is not None, "adapters stand beside weights"
            if self._kept_in != "float32":
                layer = self._model.get_submodule(path)
                weight = rounded(weight, self._kept_in, turned=is_transposed(layer))
            value = value - _lengths(weight, path, self._model)
        return value if box is None else value[box.slices]


_EXPECTED = f"expected a folder in peft's format: {CONFIG} and {TENSORS}"


def _config_of(path: Path) -> Mapping[str, Any]:
    try:
        with open_plain(path) as file:
            about = json.loads(file.read(_MOST_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read ({error})\n    {_EXPECTED}") from None
    if not isinstance(about, dict) or about.get("peft_type") != "LORA":
        kind = about.get("peft_type") if isinstance(about, dict) else None
        raise ModelError(f"{path}: peft_type is {kind!r}, expected 'LORA' (or DoRA's use_dora)")
    rank = about.get("r")
    if not isinstance(rank, int) or rank < 1:
        raise ModelError(f"{path}: r is {rank!r}, expected a whole number of at least 1")
    # every other key says how it computes otherwise: rank_pattern, use_rslora, ...
    odd = {k: v for k, v in about.items() if k not in _SAID and v and v != "none"}
    if str(about.get("init_lora_weights")).startswith(_MOVED):
        odd["init_lora_weights"] = about["init_lora_weights"]
    for key, value in odd.items():
        raise ModelError(
            f"{path}: {key} is {value!r}, which shoal does not compute\n"
            "    merge the adapter into its model with peft, and begin from that folder"
        )
    return about


def _header_of(path: Path) -> dict[str, TensorInfo]:
    try:
        with open_plain(path) as file:
            return read_header(file)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error})\n    {_EXPECTED}") from None
