"""What a run is trained on, by content: hashes that checkpoints keep and a resume compares."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import xxhash

from shoal.config.locked import Difference
from shoal.config.recipe import Recipe
from shoal.data.prepare import Prepared
from shoal.data.tokenize import tokenizer_key
from shoal.engine.job import Inputs
from shoal.errors import RunError
from shoal.launch.object_store import newest_manifest

_WHOLE_BYTES = 1 << 26
_BLOCKS = 64
_MODEL_FILES = (".json", ".safetensors", ".txt", ".model")


def content_of(
    prepared: Prepared, *, tokenizer: Path | None, folders: Mapping[str, Path | None]
) -> dict[str, str]:
    """Hashes of the prepared data, the tokenizer and the folders, as far as there are any."""
    used = (*prepared.sources, *prepared.evaluated)
    data = json.dumps([[each.about["content"], each.weight] for each in used])
    found = {"data": xxhash.xxh3_128_hexdigest(data.encode())}
    if tokenizer is not None:
        found["tokenizer"] = tokenizer_key(tokenizer)
    return found | {name: _folder_hash(path) for name, path in folders.items() if path is not None}


def _folder_hash(folder: Path) -> str:
    """Of a model folder's files. Of a large one: its size and blocks spread over it.

    Training changes every block of the weights, and a start must not read all of them twice.
    """
    digest = xxhash.xxh3_128()
    for path in sorted(path for path in folder.iterdir() if path.suffix in _MODEL_FILES):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if size <= _WHOLE_BYTES:
                digest.update(file.read())
                continue
            for number in range(_BLOCKS):
                file.seek((size - (1 << 20)) * number // (_BLOCKS - 1))
                digest.update(file.read(1 << 20))
    return digest.hexdigest()


def saved_inputs(run: Path, recipe: Recipe) -> tuple[int, Inputs] | None:
    """The newest step saved whose manifest can be read, and what it was trained on."""
    manifest = newest_manifest(run, recipe)
    if manifest is None:
        return None
    try:
        return manifest.step, msgspec.convert(manifest.state["inputs"], type=Inputs)
    except (KeyError, msgspec.ValidationError) as error:
        raise RunError(f"{run}: the save of step {manifest.step} does not say: {error}") from None


def compare(
    run: Path,
    inputs: Inputs,
    *,
    found: tuple[int, Inputs] | None,
    data_changed: bool,
    trained: bool,
    say: Callable[[str], None],
) -> list[Difference]:
    """What differs in content from the newest save of `run` (`saved_inputs`), as far as it may.

    `data_changed`: the user says that the data may. `trained`: its tokenizer comes from the data.
    Raises RunError for other data without that, and for another tokenizer, model or set of tags.
    """
    if found is None:
        return []
    step, saved = found
    if not saved.content:
        say(
            f"step {step} was saved by an older version, without hashes of its data, tokenizer "
            "and model: they are taken to be what they were"
        )
        return []
    keys = [key for key, value in saved.content.items() if inputs.content.get(key) != value]
    if saved.task_settings != json.loads(json.dumps(inputs.task_settings)):
        keys.append("classes")
    own = {
        "model": "model folder",
        "adapter": "adapter folder",
        "companion": "teacher",
        "tokenizer": "tokenizer",
        "classes": "set of classes",
    }
    for key, name in own.items():
        if key in keys and not (key == "tokenizer" and trained and not data_changed):
            raise RunError(_refusal(run, inputs, what=name, step=step))
    if keys and not data_changed:
        counts = f" ({saved.train_samples:,} training samples then, {inputs.train_samples:,} now)"
        raise RunError(_refusal(run, inputs, what="data", step=step, counts=counts))
    for key in keys:
        say(f"changed: content of {key}; tokenizer and model stay")
    return [(f"content of {key}", saved.content[key], inputs.content[key]) for key in keys]


def _refusal(run: Path, inputs: Inputs, *, what: str, step: int, counts: str = "") -> str:
    """What is said of a run whose inputs are not those it was trained on, with the ways on."""
    keeps = " data.tokenizer.kind=model" if inputs.tokenizer_directory else ""
    text = (
        f"{run}: its {what} is not what step {step} was trained on{counts}; put back what was "
        f"there, or\n  start a new run from these weights:\n    shoal merge {run} --out MODEL\n"
        f"    shoal train {run / 'config.yaml'} model.path=MODEL{keeps}"
    )
    if what == "data":
        text += (
            "\n  or go on with the data as it is now, with the same tokenizer and model (the order "
            "of samples from here on and those held out to evaluate may differ):\n"
            f"    shoal resume {run} --data-changed"
        )
    return text
