"""What a recipe leaves out: kinds stay in force, pretrained weights get fine-tuning's values."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.config.left_out import FINE_TUNING, FINE_TUNING_WARMUP
from shoal.config.load import load_recipe, recipe_text, resolve, shipped_recipes, to_yaml
from shoal.config.optimizers import SGD, AdamW, Linear, Muon
from shoal.config.recipe import DataSection, PretrainedModel, Recipe, TrainSection
from shoal.config.schema import Choice, choices
from shoal.config.statement import statements
from shoal.config.yaml_text import read_mapping
from shoal.errors import ConfigError

MINIMAL = "model: {kind: config, architecture: llama}\ndata: {source: a.txt}\ntrain: {steps: 200}\n"


def written(folder: Path, text: str = MINIMAL) -> str:
    path = folder / "own.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def own_keys(choice: Choice, kind: str) -> list[tuple[str, object]]:
    """Keys of a kind that a text can set, with their defaults."""
    fields = choice.kinds[kind].model_fields.items()
    plain = [(n, f.default) for n, f in fields if isinstance(f.default, int | float | str)]
    return [(name, default) for name, default in plain if name != "kind"]


KINDS = [(choice, kind) for choice in choices() for kind in choice.kinds if own_keys(choice, kind)]
WANTED = {"least": "1"}
OF_SERVERS = ("sync.consistency", "sync.optimizer")
NAMES = [f"{'.'.join(choice.path)}-{kind}" for choice, kind in KINDS]


def test_the_sections_of_several_kinds_are_found() -> None:
    found = {".".join(choice.path): choice.default for choice in choices()}
    assert (
        found.items()
        >= {
            "task": "causal-lm",
            "model": None,
            "train.optimizer": "adamw",
            "train.schedule": "cosine",
            "sync": "every-step",
        }.items()
    )


@pytest.mark.parametrize(("choice", "kind"), KINDS, ids=NAMES)
def test_an_override_inside_keeps_the_kind_that_is_stated(
    choice: Choice, kind: str, tmp_path: Path
) -> None:
    """In a file with the section, in one without it, and in one that names no kind."""
    path, (key, value) = ".".join(choice.path), own_keys(choice, kind)[0]
    needed = [n for n, field in choice.kinds[kind].model_fields.items() if field.is_required()]
    given = [f"kind: {kind}", *(f"{name}: {WANTED.get(name, 'x:y')}" for name in needed)]
    stated = f"{{{', '.join(given)}}}"
    outer = [f"{'.'.join(choice.path[:-1])}.kind=server"] if path in OF_SERVERS else []
    recipe = load_recipe(written(tmp_path), [*outer, f"{path}={stated}", f"{path}.{key}={value}"])
    section = recipe
    for part in choice.path:
        section = getattr(section, part)
    assert (section.kind, getattr(section, key)) == (kind, value)
    if kind == choice.default:
        bare = load_recipe(written(tmp_path), [*outer, f"{path}.{key}={value}"])
        unnamed = load_recipe(written(tmp_path), [*outer, f"{path}={{{key}: {value}}}"])
        assert bare == unnamed == recipe


def test_the_overrides_everyone_tries_first(tmp_path: Path) -> None:
    recipe = load_recipe(
        written(tmp_path),
        ["train.optimizer.learning_rate=3e-4", "train.schedule.warmup_steps=10"],
    )
    assert (recipe.train.optimizer.kind, recipe.train.optimizer.learning_rate) == ("adamw", 3e-4)
    assert (recipe.train.schedule.kind, recipe.train.schedule.warmup_steps) == ("cosine", 10)


def test_a_path_means_pretrained_in_a_file_too(tmp_path: Path) -> None:
    text = "model: {path: some/folder}\ndata: {source: a.txt}\ntrain: {epochs: 2}\n"
    recipe = load_recipe(written(tmp_path, text))
    assert recipe.model.kind == "pretrained"
    both = MINIMAL.replace("kind: config, ", "path: some/folder, ")
    with pytest.raises(ConfigError, match=r"model\.kind: required, and not given"):
        load_recipe(written(tmp_path, both))


def test_pretrained_weights_get_the_values_of_fine_tuning(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path), ["model.path=some/folder"])
    optimizer, schedule = recipe.train.optimizer, recipe.train.schedule
    assert (optimizer.kind, optimizer.learning_rate, optimizer.weight_decay) == (
        "adamw",
        2e-5,
        0.01,
    )
    assert (schedule.kind, schedule.warmup_fraction, schedule.warmup_steps) == ("cosine", 0.03, 0)
    assert load_recipe(written(tmp_path, to_yaml(recipe))) == recipe
    said = statements(recipe)["learning rate"]
    assert said.startswith("rises to 2e-05 (the default with pretrained weights) over 6 steps, ")
    of_epochs = load_recipe(written(tmp_path), ["model.path=x", "train={epochs: 2}"])
    assert (
        "over 3 % of the steps, then falls by half a cosine to 2e-06 at the last step"
        in (statements(of_epochs)["learning rate"])
    )


def test_a_recipe_made_in_python_gets_them_too() -> None:
    """What was set stays, in the kind that was set; the rest is filled in when it is trained."""
    model, data = PretrainedModel(path="x"), DataSection(source="a.txt")
    bare = resolve(Recipe(model=model, data=data, train=TrainSection(steps=3)))
    assert (bare.train.optimizer.learning_rate, bare.train.schedule.warmup_fraction) == (2e-5, 0.03)
    some = TrainSection(steps=3, optimizer=AdamW(weight_decay=0.2), schedule=Linear(warmup_steps=1))
    recipe = resolve(Recipe(model=model, data=data, train=some))
    assert (recipe.train.optimizer.learning_rate, recipe.train.optimizer.weight_decay) == (
        2e-5,
        0.2,
    )
    assert recipe.train.schedule == Linear(warmup_steps=1)
    muon = TrainSection(steps=3, optimizer=Muon(learning_rate=0.01))
    assert resolve(Recipe(model=model, data=data, train=muon)).train.optimizer == muon.optimizer


def test_another_optimizer_has_its_own_rate_unless_one_is_written(tmp_path: Path) -> None:
    path = written(tmp_path)
    changed = load_recipe(path, ["train.optimizer.kind=muon"]).train.optimizer
    assert changed == Muon(learning_rate=0.02)
    weights = load_recipe(path, ["model.path=some/folder"])
    assert weights.train.optimizer.learning_rate == 2e-5
    for made in (Muon(), SGD()):  # nobody wrote the 2e-5, nor the warm-up
        of_kind = resolve(weights, {"train.optimizer.kind": made.kind})
        assert of_kind.train.optimizer == made
    random = resolve(weights, {"model": {"kind": "config", "architecture": "llama"}})
    assert random == load_recipe(path)
    rate = "train.optimizer.learning_rate=3e-4"
    kept = load_recipe(path, [rate, "train.optimizer.kind=muon"])
    assert kept.train.optimizer == Muon(learning_rate=3e-4)
    said = statements(kept)["learning rate"]
    assert said.startswith("begins at 0.0003 (muon's default is 0.02) and falls")
    back = resolve(changed_to(Muon(learning_rate=0.02)), {"train.optimizer.kind": "adamw"})
    assert "0.02 (adamw's default is 0.001)" in statements(back)["learning rate"]
    assert "default" not in statements(load_recipe(path, [rate]))["learning rate"]


def changed_to(optimizer: Muon) -> Recipe:
    """A recipe in which a rate is written."""
    train = TrainSection(steps=3, optimizer=optimizer)
    return Recipe(
        model={"kind": "config", "architecture": "llama"}, data={"source": "a.txt"}, train=train
    )


def test_what_is_given_stays(tmp_path: Path) -> None:
    """With random weights, in overrides, in another optimizer, and in the shipped recipes."""
    random = load_recipe(written(tmp_path)).train
    assert (random.optimizer.learning_rate, random.optimizer.weight_decay) == (1e-3, 0.1)
    assert random.schedule.warmup_fraction == 0
    given = ["model.path=x", "train.optimizer.learning_rate=1e-4", "train.schedule.warmup_steps=0"]
    recipe = load_recipe(written(tmp_path), given)
    assert (recipe.train.optimizer.learning_rate, recipe.train.optimizer.weight_decay) == (
        1e-4,
        FINE_TUNING["weight_decay"],
    )
    assert recipe.train.schedule.warmup_fraction == 0
    sgd = load_recipe(written(tmp_path), ["model.path=x", "train.optimizer={kind: sgd}"])
    assert sgd.train.optimizer.learning_rate == 0.1
    assert sgd.train.schedule.warmup_fraction == FINE_TUNING_WARMUP


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_trains_as_it_states(name: str) -> None:
    """Also one with pretrained weights: its rate, weight decay and warm-up are its own."""
    stated = read_mapping(recipe_text(name)[0], source=name)["train"]
    train = load_recipe(name).train
    keys = {"kind", "learning_rate", "weight_decay"}
    assert keys <= stated["optimizer"].keys() and "warmup_steps" in stated["schedule"]
    assert stated["optimizer"].items() <= train.optimizer.model_dump().items()
    assert stated["schedule"].items() <= train.schedule.model_dump().items()
    assert train.schedule.warmup_fraction == 0


def test_a_rate_for_random_weights_is_called_high() -> None:
    said = statements(load_recipe("quickstart", ["model.path=x"]))["learning rate"]
    assert "rises to 0.0015 (high for pretrained weights, where 2e-05 is usual) over" in said
    assert "high" not in statements(load_recipe("ner"))["learning rate"]
    assert "high" not in statements(load_recipe("quickstart"))["learning rate"]


def test_a_warmup_is_given_once(tmp_path: Path) -> None:
    both = "train.schedule={warmup_steps: 3, warmup_fraction: 0.1}"
    with pytest.raises(ConfigError, match="give `warmup_steps` or `warmup_fraction`"):
        load_recipe(written(tmp_path), [both])


def test_weights_bring_their_own_tokenizer() -> None:
    """The recipe's goes with its model; one that is asked for beside weights is refused."""
    recipe = load_recipe("quickstart", ["model.path=some/folder"])
    assert recipe.data.tokenizer.kind == "auto"
    assert statements(recipe)["tokenizer"] == "that of the model"
    whole = load_recipe("quickstart", ["model={kind: pretrained, path: some/folder}"])
    assert whole.data.tokenizer.kind == "auto"
    for asked in ("data.tokenizer.kind=train", "data.tokenizer.vocabulary_size=300"):
        with pytest.raises(ConfigError) as error:
            load_recipe("quickstart", ["model.path=some/folder", asked])
        assert "data.tokenizer.kind: a tokenizer of its own does not fit" in str(error.value)
        assert "leave it out: the model's own is used" in str(error.value)
    assert statements(load_recipe("quickstart"))["tokenizer"] == "trained on the data, 2,048 tokens"
    kept = load_recipe("quickstart", ["model.path=x", "data.tokenizer={kind: folder, path: y}"])
    assert statements(kept)["tokenizer"] == "that of y"
