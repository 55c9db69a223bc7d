"""Models of Hugging Face: read and check a configuration, build the model on the meta device."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shoal.errors import ModelError, nearest
from shoal.models import attention, experts, packed
from shoal.models.anatomy import example_of, logits_in
from shoal.models.dropout import KINDS as DROPOUT_KINDS
from shoal.models.dropout import (
    mute_attention_dropout,
    mute_attention_modules,
    mute_dropout,
)
from shoal.models.routing import watch_routers

_ALSO_KNOWN = {
    *("num_labels", "rope_theta", "rope_scaling", "partial_rotary_factor"),
    "decoder_start_token_id",
}
"""Keys that configurations take besides their fields."""

_ALSO_READ = {"qwen3_moe": {"head_dim"}}
"""Keys that a family's code reads, and its files have, though its configuration has no field."""

_REMOTE_CODE = "auto_map"
"""The key by which a folder asks for classes of its own code: never followed."""

UNQUANTISED = (
    "use the model's unquantised weights, or save them as floats once (transformers: "
    "model.dequantize().save_pretrained(DIR))"
)

_building = threading.Lock()

_COUNTS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "max_position_embeddings",
    "head_dim",
)


def read_config(
    *,
    architecture: str | None = None,
    settings: Mapping[str, Any] | None = None,
    path: str | Path | None = None,
    vocabulary_size: int | None = None,
) -> Any:
    """A transformers configuration, from a recipe or from a local folder's config.json.

    `architecture` is a transformers model type (llama, gpt2, bert, ...); `settings` are keys of its
    configuration class, and override the folder's. `vocabulary_size` is the tokenizer's: the
    vocabulary when no setting gives one, else checked to fit. Code from a folder is never run.
    Raises ModelError: unknown architecture or key (with the nearest name), illegal values, a folder
    without config.json, a vocabulary that the tokenizer exceeds.
    """
    chosen = dict(settings or {})
    if path is not None:
        config = _from_folder(Path(path), chosen)
    elif architecture is not None:
        config = _from_settings(architecture, chosen, vocabulary_size)
    else:
        raise ModelError(
            "model: expected an architecture or a path, got neither\n"
            "    set model.architecture (llama, gpt2, bert, ...) or model.path"
        )
    size = getattr(config, "vocab_size", None)
    if vocabulary_size is not None and size is not None and vocabulary_size > size:
        raise ModelError(
            f"model: its vocabulary has {size} entries, but the tokenizer's has "
            f"{vocabulary_size}\n    use the tokenizer that belongs to the model, or train one of "
            f"at most {size} entries"
        )
    _check(config)
    return config


def config_from(tree: Mapping[str, Any]) -> Any:
    """The configuration that `config.to_dict()` gave `tree`. Names of code in it are left out."""
    from transformers import AutoConfig

    saved = {key: value for key, value in tree.items() if key != _REMOTE_CODE}
    return AutoConfig.for_model(saved.pop("model_type"), **saved)


def build_meta(
    config: Any, *, auto_class: str, dropout: str = "off", kernel: str = attention.NAME
) -> nn.Module:
    """The model of `config` for a task's auto class: float32, meta device, attention `kernel`.

    A family whose attention is its own code keeps it, and carries the mark `shoal_own_attention`.

    `dropout`: `off` sets all to 0; `keyed` sets that of attention probabilities to 0
    (`dropout.apply_keyed` then replaces the rest); `framework` leaves the model as it is. The
    model has a copy of the configuration. Raises ModelError when the auto class lacks the family.
    """
    if dropout not in DROPOUT_KINDS:
        raise ModelError(
            f"model.dropout: expected {', '.join(DROPOUT_KINDS)}; got {dropout!r}\n"
            f"    {nearest(dropout, DROPOUT_KINDS)}"
        )
    attention.register()
    experts.register()
    config = copy.deepcopy(config)
    config._experts_implementation = experts.NAME
    if dropout != "framework":
        mute_attention_dropout(config)
    if dropout == "off":
        mute_dropout(config)
    with torch.device("meta"):
        model = _built(config, auto_class=auto_class, attention_name=kernel)
        if kernel == attention.NAME and not _takes_kernels(model):
            model = _built(config, auto_class=auto_class, attention_name="eager")
            model.shoal_own_attention = True  # type: ignore[assignment]
    experts.keep_corrections(model)
    watch_routers(model)
    if dropout == "off":
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    if dropout != "framework":
        mute_attention_modules(model)
    for module in model.modules():
        module.framework_dropout = dropout == "framework"  # type: ignore[assignment]
    return model


def build_reference(config: Any, *, auto_class: str) -> nn.Module:
    """The model as transformers builds it for its users: eager attention, its own initial weights.

    On the CPU, float32, without dropout. Raises ModelError when the auto class lacks the family.
    """
    config = copy.deepcopy(config)
    mute_attention_dropout(config)
    mute_dropout(config)
    if config._experts_implementation == experts.NAME:  # of a model of shoal's
        config._experts_implementation = None
    return _built(config, auto_class=auto_class, attention_name="eager").eval()


def open_folder(folder: str | Path, *, auto_class: str) -> nn.Module:
    """A folder as transformers opens it for its users: eager attention, float32, eval mode."""
    import transformers

    with quietly():
        model: nn.Module = getattr(transformers, auto_class).from_pretrained(
            str(folder),
            attn_implementation="eager",
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    return model.eval()


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' own progress bar, which would break into shoal's."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _built(config: Any, *, auto_class: str, attention_name: str) -> nn.Module:
    import transformers

    factory = getattr(transformers, auto_class)
    try:
        # transformers patches torch while it builds: one thread at a time
        with _building:
            model: nn.Module = factory.from_config(
                config,
                attn_implementation=attention_name,
                dtype=torch.float32,
                trust_remote_code=False,
            )
    except KeyError:
        if attention_name == "eager":
            raise
        # a table of attention classes by name, which knows transformers' own only
        return _built(config, auto_class=auto_class, attention_name="eager")
    except ValueError as error:
        raise ModelError(
            f"model: transformers cannot build a {config.model_type!r} as {auto_class}: {error}\n"
            "    use an architecture that has this task, or another task.kind"
        ) from error
    if auto_class == "AutoModel" and getattr(model, "pooler", None) is not None:
        model.pooler = None  # type: ignore[assignment]  # it makes no states, so nothing would train it
    return model


def _takes_kernels(model: nn.Module) -> bool:
    """Whether attention and masks of its modules are looked up by name, and so can be shoal's.

    A file that looks up attention alone makes masks of its own of the mask that users give.
    """
    files = {sys.modules[type(module).__module__] for module in model.modules()}
    named = {name for file in files for name in vars(file)}
    masks = any(re.fullmatch("create_.*mask", name) for name in named)
    has_none = getattr(model, "main_input_name", "") == "pixel_values"
    return "ALL_ATTENTION_FUNCTIONS" in named and (masks or has_none)


@torch.no_grad()
def fingerprint(model: nn.Module, *, num_values: int = 32) -> list[float]:
    """Logits of a fixed sample, float32: `num_values` of the last position, evenly spread.

    The same weights give the same list (within rounding of the kernels used): merge compares.
    """
    sample = fingerprint_sample(model)
    training = model.training
    model.eval()
    try:
        whole = logits_in(model(**sample))[0].float()
        logits = whole if whole.dim() == 1 else whole[-1]
    finally:
        model.train(training)
    return fingerprint_values(logits, num_values=num_values)


def fingerprint_sample(model: nn.Module, *, num_tokens: int = 16) -> dict[str, Tensor]:
    """The sample that the fingerprint is taken of."""
    config: Any = model.config
    sample = example_of(model, num_tokens=num_tokens)
    sample.pop("position_ids", None)
    if "input_ids" in sample:
        # a stride coprime to most sizes, so that the tokens differ and stay in the vocabulary
        positions = torch.arange(num_tokens, device=sample["input_ids"].device)
        sample["input_ids"] = ((positions * 7919 + 11) % config.vocab_size)[None]
    return sample


def fingerprint_values(logits: Tensor, *, num_values: int = 32) -> list[float]:
    """The fingerprint from the logits [V] of the sample's last position."""
    chosen = torch.linspace(0, len(logits) - 1, min(num_values, len(logits))).round().long()
    return [float(each) for each in logits.float()[chosen.to(logits.device)]]


def _from_folder(folder: Path, settings: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(
            f"model.path: {folder} has no config.json\n"
            "    expected a folder in Hugging Face format, as save_pretrained writes it"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: not valid JSON: {error}\n    fetch the model again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: expected a JSON object of settings\n    fetch the model again")
    if not isinstance(content.get("model_type"), str):
        raise ModelError(f"{file}: it names no model_type\n    add it, for example llama")
    refuse_unknown(content["model_type"], settings)
    config = _guarded(
        lambda: AutoConfig.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True, **settings
        ),
        where=str(file),
    )
    quantised = content.get("quantization_config")
    if isinstance(quantised, dict) and quantised.get("quant_method") == packed.METHOD:
        packed.scheme_of(quantised, where=str(file))
        vars(config).pop("quantization_config", None)  # they are read as the numbers they stand for
    elif quantised:
        kind = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise ModelError(
            f"{file}: its weights are quantised ({kind or 'quantization_config'}), and shoal "
            f"trains floating point weights\n    {UNQUANTISED}"
        )
    vars(config).pop(_REMOTE_CODE, None)  # nor is it handed on to who reads what we export
    return config


def _from_settings(architecture: str, settings: dict[str, Any], vocabulary: int | None) -> Any:
    from transformers import CONFIG_MAPPING

    refuse_unknown(architecture, settings)
    if vocabulary is not None:
        settings.setdefault("vocab_size", vocabulary)
    # the default special tokens are those of the published model, whose vocabulary is not this one
    default = CONFIG_MAPPING[architecture]()
    size = settings.get("vocab_size")
    types = {each.name: str(each.type) for each in dataclasses.fields(default)}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(default, key, None)
        if isinstance(size, int) and isinstance(value, int) and value >= size:
            # a few classes want a number: the first, which tokenizers give a special token
            settings.setdefault(key, None if "None" in types.get(key, "None") else 0)
    return _guarded(lambda: CONFIG_MAPPING[architecture](**settings), where="model")


def refuse_unknown(architecture: str, settings: Iterable[str]) -> None:
    """Raise ModelError for a model type, or keys of its configuration, that nobody knows."""
    from transformers import CONFIG_MAPPING

    if architecture not in CONFIG_MAPPING:
        hint = nearest(architecture, CONFIG_MAPPING.keys())
        raise ModelError(
            f"model.architecture: transformers knows no {architecture!r}\n    "
            f"{hint if hint.startswith('did') else 'examples: llama, qwen3, gpt2, bert'}"
        )
    known = known_settings(architecture)
    unknown = [key for key in settings if key not in known]
    if unknown:
        lines = [f"    model.{key}: {nearest(key, known)}" for key in unknown]
        raise ModelError(
            f"model: {architecture} has no setting {', '.join(map(repr, unknown))}\n"
            + "\n".join(lines)
        )


def known_settings(architecture: str) -> set[str]:
    """Keys that the configuration class of a model type takes; files of folders carry others."""
    from transformers import CONFIG_MAPPING

    default = CONFIG_MAPPING[architecture]()
    known = {key for key in default.to_dict() if not key.startswith("_")} | _ALSO_KNOWN
    return known | set(default.attribute_map) | _ALSO_READ.get(architecture, set())


def _guarded(make: Callable[[], Any], *, where: str) -> Any:
    """Run a configuration class; what its own checks refuse becomes a ModelError."""
    try:
        return make()
    except Exception as error:  # its checks raise classes of their own, by version
        reason = str(error).replace("\n", " ")
        raise ModelError(
            f"{where}: transformers refuses this configuration: {reason}\n"
            "    correct the value it names"
        ) from error


def setting_of(config: Any, key: str) -> Any:
    """A value of a configuration; None where it has none, or another for each layer."""
    try:
        return getattr(config, key, None)
    except Exception:  # its class refuses to name one value for all layers
        return None


def _check(config: Any) -> None:
    """Values that transformers accepts, but that cannot be run."""
    problems = []
    for key in _COUNTS:
        value = setting_of(config, key)
        each = value if isinstance(value, (list, tuple)) else [value]  # some have one per layer
        if value is not None and any(type(size) is not int or size < 1 for size in each):
            problems.append(f"{key}: expected a positive integer, got {value!r}")
    hidden, heads = setting_of(config, "hidden_size"), setting_of(config, "num_attention_heads")
    key_heads = setting_of(config, "num_key_value_heads")
    sizes = (hidden, heads, key_heads or 1)
    if not problems and all(isinstance(size, int) for size in sizes):
        if not setting_of(config, "head_dim") and hidden % heads:
            problems.append(f"hidden_size {hidden} is not a multiple of {heads} attention heads")
        if key_heads and heads % key_heads:
            problems.append(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {key_heads}"
            )
    if problems:
        raise ModelError(
            f"model: this {config.model_type} cannot be built: {'; '.join(problems)}\n"
            "    change the sizes so that heads divide the hidden size and key heads divide heads"
        )
