"""Weights of a local Hugging Face folder, by canonical name and box, reading only those bytes.

Names in a file may differ from the model's: stored with or without the base model's prefix, with
the old names of layer norms, or under names that transformers keeps for folders of a family.
Families whose stored tensors are not the model's (experts to be stacked, projections to be split)
are read whole by transformers, then cut.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from shoal.boxes import Box
from shoal.errors import ModelError
from shoal.models import packed
from shoal.models.adapter import is_adapter
from shoal.models.anatomy import canonical_parameters, ties_of
from shoal.models.experts import keep_corrections
from shoal.models.huggingface import UNQUANTISED, build_meta, read_config
from shoal.models.stored import Form
from shoal.untrusted import (
    LARGEST_HEADER_BYTES,
    TensorInfo,
    is_plain_name,
    open_plain,
    read_header,
)

_OLD_NAMES = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))

_NOT_PARAMETERS = re.compile(
    r"(\.|^)(position_ids|token_type_ids|masked_bias|rotary_emb\.inv_freq|attn\.bias)$"
)
"""Buffers that old files carry and models now compute."""

_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.ckpt", "tf_model.h5")


class PretrainedWeights:
    """A folder's weights, matched to a model. A `Source` for `init.materialise`.

    `missing`: the model's parameters that the folder lacks (drawn by the initialisation instead).
    `unused`: tensors of the folder that the model has no place for.
    """

    def __init__(self, path: str | Path, *, model: nn.Module) -> None:
        """Match names and shapes; reads headers only.

        Raises ModelError: no safetensors file, a damaged one, or weights whose shapes are not the
        model's (a head of another size counts as missing: it belongs to another task).
        """
        self._folder = Path(path)
        self._files = _files_of(self._folder)
        self._shapes = _shapes_of(self._files)
        self._scaled: set[str] = set()
        """Weights that are stored as whole numbers with scales."""
        self._scheme = self._unfold_packed()
        parameters = {n: p for n, p in canonical_parameters(model).items() if not is_adapter(n)}
        groups = {group[0]: group for group in ties_of(model)}
        head = getattr(model, "get_output_embeddings", lambda: None)()
        self._is_untied = not groups and head is not None
        self._whole: dict[str, Tensor] | None = None
        names = {name: name for name in _every_name(model)}
        if _is_converted(model):
            form = Form(model)
            if form.is_renamed:
                stored = {name: each.weight for name, each in form.tensors.items() if each.weight}
                names = {**stored, **names}
            else:
                self._whole = _read_by_transformers(self._folder, model)
                self._shapes = {name: tuple(each.shape) for name, each in self._whole.items()}
        base = str(getattr(model, "base_model_prefix", ""))
        by_model_name = _renamed(self._shapes, names, base)
        self._stored: dict[str, str] = {}
        self._shortened: dict[str, tuple[int, int]] = {}
        """Positions that the model has, and that the folder has, of tables of which it has less."""
        for name, parameter in parameters.items():
            found = next(
                (
                    by_model_name[each]
                    for each in groups.get(name, (name,))
                    if each in by_model_name
                ),
                None,
            )
            if found is not None and self._fits(name, found, tuple(parameter.shape), base):
                self._stored[name] = found
        self.missing = tuple(name for name in parameters if name not in self._stored)
        placed = set(by_model_name.values())
        self.unused = tuple(
            name for name in self._shapes if name not in placed and not _NOT_PARAMETERS.search(name)
        )
        if len(self.missing) == len(parameters):
            raise ModelError(
                f"{self._folder}: none of its tensors belongs to a {type(model).__name__}\n"
                "    use the folder's own architecture, or remove model.path"
            )

    def tensor(self, name: str, *, box: Box | None = None) -> Tensor | None:
        """A parameter, or a box of it, float32 on the CPU; None when the folder lacks it."""
        key = self._stored.get(name)
        if key is None:
            return None
        cut = None if box is None else box.slices
        if self._whole is not None:
            whole = self._whole[key]
            return (whole if cut is None else whole[cut]).to(torch.float32)
        if key in self._scaled:
            part = self._unpacked(key)[cut or ...]
        else:
            with safe_open(str(self._files[key]), framework="pt") as file:
                part = file.get_tensor(key) if not cut else file.get_slice(key)[cut]
        if not part.is_floating_point():
            raise ModelError(
                f"{self._folder}: {key} holds {part.dtype} numbers, which are no weights to train: "
                f"the folder is quantised\n    {UNQUANTISED}"
            )
        if name in self._shortened and not cut:
            part = part[: self._shortened[name][0]]
        result: Tensor = part.to(torch.float32)
        if not bool(result.isfinite().all()):
            raise ModelError(
                f"{self._folder}: {key} holds values that are not finite (NaN or infinite)\n"
                "    fetch the model again, or use the weights of before the run that made it"
            )
        return result

    def _unfold_packed(self) -> packed.Scheme | None:
        """Name quantised weights as what they stand for; how they are stored, where any are."""
        scaled = [n.removesuffix(packed.SCALE) for n in self._shapes if n.endswith(packed.SCALE)]
        names = [n.removesuffix(packed.PACKED) for n in self._shapes if n.endswith(packed.PACKED)]
        if not names and not scaled:
            return None
        config = self._folder / "config.json"
        said = json.loads(config.read_text(encoding="utf-8")).get("quantization_config", {})
        scheme = packed.scheme_of(said, where=str(config))
        if scheme.dynamic:
            for name in scaled:
                if f"{name}.weight" not in self._shapes:
                    raise ModelError(
                        f"{self._folder}: it lacks {name}.weight\n    fetch the model again"
                    )
                del self._shapes[f"{name}{packed.SCALE}"]
                self._scaled.add(f"{name}.weight")
            return scheme
        for name in names:
            whole = [f"{name}{leaf}" for leaf in (packed.PACKED, *packed.BESIDE)]
            lost = [each for each in whole if each not in self._files]
            if lost:
                raise ModelError(f"{self._folder}: it lacks {lost[0]}\n    fetch the model again")
            shape = self._stored_tensor(whole[-1])
            self._shapes[f"{name}.weight"] = (int(shape[0]), int(shape[1]))
            for each in whole:
                del self._shapes[each]
            self._scaled.add(f"{name}.weight")
        return scheme

    def _unpacked(self, key: str) -> Tensor:
        name = key.removesuffix(".weight")
        assert self._scheme is not None, "it has scales"
        scales = self._stored_tensor(f"{name}{packed.SCALE}")
        dynamic = self._scheme.dynamic
        stored = self._stored_tensor(f"{name}{'.weight' if dynamic else packed.PACKED}")
        try:
            if dynamic:
                return stored.float() * scales.float().view(len(stored), 1)
            return packed.weight_of(stored, scales, bits=self._scheme.bits, shape=self._shapes[key])
        except (ValueError, RuntimeError, ZeroDivisionError) as error:
            raise ModelError(
                f"{self._folder}: {name} does not fit its scales and shape: {error}"
                "\n    fetch the model again"
            ) from None

    def _stored_tensor(self, key: str) -> Tensor:
        with safe_open(str(self._files[key]), framework="pt") as file:
            found: Tensor = file.get_tensor(key)
        return found

    def refuse_missing(self) -> None:
        """For who uses a model instead of training it. Raises ModelError for `missing` weights."""
        if self.missing:
            raise ModelError(
                f"{self._folder}: it lacks {_listed(self.missing)}, which only training may draw "
                "at random\n    use a folder trained for this task, or fetch the model again"
            )

    def notes(self) -> list[str]:
        """What the user should know: parameters drawn afresh, tensors left aside, ties undone."""
        lines = []
        said = read_config(path=self._folder).get_text_config() if self._is_untied else None
        if getattr(said, "tie_word_embeddings", False):
            lines.append(
                f"{self._folder.name}: embeddings and head are tied in config.json, but the file "
                "has other values for each: trained and written untied, as transformers loads it"
            )
        for name, (used, stored) in self._shortened.items():
            lines.append(f"{name}: the first {used:,} of {stored:,} positions are used")
        if self.missing:
            lines.append(f"not in {self._folder.name}, drawn afresh: {_listed(self.missing)}")
        if self.unused:
            lines.append(f"in {self._folder.name}, not used: {_listed(self.unused)}")
        return lines

    def _fits(self, name: str, key: str, shape: tuple[int, ...], base: str) -> bool:
        stored = self._shapes[key]
        if stored == shape:
            return True
        if "position" in name and stored[0] > shape[0] and stored[1:] == shape[1:]:
            self._shortened[name] = shape[0], stored[0]
            return True
        if base and not name.startswith(base + "."):
            return False
        raise ModelError(
            f"{self._folder}: {key} has shape {stored}, but the model's {name} has {shape}\n"
            "    the configuration does not describe these weights: remove the keys under model "
            "that change sizes"
        )


def folder_config(
    folder: str | Path, *, auto_class: str, settings: Mapping[str, Any] | None = None
) -> Any:
    """The configuration of a folder, untied where its file has a head of its own. ModelError."""
    config = read_config(settings=settings, path=folder)
    text = config.get_text_config()
    if getattr(text, "tie_word_embeddings", False) and has_own_head(
        folder, model=build_meta(config, auto_class=auto_class)
    ):
        config.tie_word_embeddings = text.tie_word_embeddings = False
    return config


def has_own_head(folder: str | Path, *, model: nn.Module) -> bool:
    """Whether the file has other values for names that the configuration ties to one another.

    transformers then loads them untied. Reads the values of tied names only, and only where more
    than one of them is stored. Raises ModelError for a folder that cannot be read.
    """
    files = _files_of(Path(folder))
    shapes = _shapes_of(files)
    names = {name: name for name in _every_name(model)}
    stored = _renamed(shapes, names, str(getattr(model, "base_model_prefix", "")))
    for group in ties_of(model):
        there = [stored[name] for name in group if name in stored]
        tensors = []
        for key in there if len(there) > 1 else ():
            with safe_open(str(files[key]), framework="pt") as file:
                tensors.append(file.get_tensor(key))
        if any(not torch.equal(each, tensors[0]) for each in tensors[1:]):
            return True
    return False


def _files_of(folder: Path) -> dict[str, Path]:
    """Name of each stored tensor -> its file."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.is_file():
        listed = _weight_map(index)
        return {name: _inside(folder, file, of=index) for name, file in listed.items()}
    if single.is_file():
        file = _inside(folder, single.name, of=folder)
        return dict.fromkeys(_header_of(file), file)
    pickled = [name for name in _PICKLED if (folder / name).exists()]
    if pickled:
        raise ModelError(
            f"{folder}: its weights are in {pickled[0]}, a format that can run code when it is read"
            "\n    expected model.safetensors. If you trust the file, convert it once:\n"
            '    python -c "from transformers import AutoModel as A; '
            f"A.from_pretrained('{folder}').save_pretrained('{folder}-safe')\""
        )
    raise ModelError(
        f"{folder}: expected model.safetensors or model.safetensors.index.json, found neither\n"
        "    fetch the model again, or train from a configuration (model.kind: config)"
    )


def _weight_map(index: Path) -> dict[str, str]:
    """The index's map from tensor to file. Raises ModelError."""
    try:
        if index.stat().st_size > LARGEST_HEADER_BYTES:
            raise ValueError(f"it is larger than {LARGEST_HEADER_BYTES} bytes")
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(listed, dict) or not all(isinstance(f, str) for f in listed.values()):
            raise ValueError("weight_map is not a map from names to files")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise ModelError(
            f"{index}: not the index of a model: {reason}\n    fetch the model again"
        ) from None
    return listed


def _inside(folder: Path, name: str, *, of: Path) -> Path:
    """The file `name` of `folder`. Raises ModelError for a name or a link that leads elsewhere.

    The hub's cache keeps a snapshot as links into the `blobs` folder beside it: that is inside.
    """
    home = folder.resolve()
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")
    path = home / name
    plain = is_plain_name(name) and name.endswith(".safetensors") and path.is_file()
    if not plain or not any(path.resolve().is_relative_to(each) for each in homes):
        raise ModelError(
            f"{of}: it names {name[:80]!r}, which is not a file of this folder\n"
            "    fetch the model again; if it came like this, do not use it"
        )
    return path.resolve()


def _header_of(file: Path) -> dict[str, TensorInfo]:
    """What a safetensors file holds, checked against its size. Raises ModelError."""
    try:
        with open_plain(file) as opened:
            return read_header(opened)
    except (ValueError, OSError) as error:
        raise ModelError(
            f"{file}: damaged or not a safetensors file: {error}\n    fetch the model again"
        ) from error


def _shapes_of(files: Mapping[str, Path]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(set(files.values())):
        header = _header_of(file)
        for name in (name for name, where in files.items() if where == file):
            if name not in header:
                raise ModelError(
                    f"{file}: the index says it holds {name}, but it does not\n"
                    "    fetch the model again"
                )
            shapes[name] = header[name].shape
    return shapes


def _every_name(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters(remove_duplicate=False)]


def _renamed(stored: Mapping[str, Any], names: Mapping[str, str], base: str) -> dict[str, str]:
    """Model's name -> stored name, over the spellings that files of one model have.

    `names`: the model's name of each name that it may have in a file.
    """
    result: dict[str, str] = {}
    for key in stored:
        name = key
        for old, new in _OLD_NAMES:
            name = name.replace(old, new)
        spellings = (name, f"{base}.{name}", name.removeprefix(f"{base}."))
        match = next((each for each in spellings if each in names), None)
        if match is not None:
            result.setdefault(names[match], key)
    return result


def _is_converted(model: nn.Module) -> bool:
    """Whether transformers stores this family's tensors in another form than the model has them."""
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    except ImportError:  # it moved, or is gone: the check of names and shapes still guards
        return False
    config: Any = model.config
    # a base model brings the conversions of its own class into every model around it (ViT)
    names = {type(module).__name__ for module in model.modules()} | {config.model_type}
    return any(get_checkpoint_conversion_mapping(each) is not None for each in names)


def _read_by_transformers(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    loaded = type(model).from_pretrained(  # type: ignore[attr-defined]
        str(folder),
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        dtype=torch.float32,
    )
    keep_corrections(loaded)
    return {name: each.detach() for name, each in loaded.named_parameters()}


def _listed(names: tuple[str, ...], *, most: int = 6) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
