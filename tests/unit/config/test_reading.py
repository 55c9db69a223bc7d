"""Recipes in and out: words, overrides, every problem at once, and the round trip."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.config.load import load_recipe, resolve, shipped_recipes, to_yaml
from shoal.config.locked import changed
from shoal.config.recipe import Recipe
from shoal.config.yaml_text import dump, parse, read_mapping
from shoal.errors import ConfigError, UserError

MINIMAL = "model: {kind: config, architecture: llama}\ndata: {source: a.txt}\ntrain: {steps: 3}\n"


def write(folder: Path, text: str) -> str:
    path = folder / "own.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def problems(*overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_recipe("quickstart", overrides)
    return str(error.value)


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_load_and_come_back(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert load_recipe(write(tmp_path, to_yaml(recipe))) == recipe


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("off", "off"),
        ("no", "no"),
        ("true", True),
        ("null", None),
        ("", None),
        ("1e-3", 1e-3),
        ("3", 3),
        ("010", 10),
        ("0x10", 16),
        ("1:30", "1:30"),
        ("2024-01-02", "2024-01-02"),
        (".inf", float("inf")),
    ],
)
def test_plain_words_mean_what_they_say(text: str, value: object) -> None:
    found = parse(f"key: {text}")["key"]
    assert (found, type(found)) == (value, type(value))


_scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]))
    | st.sampled_from(["off", "yes", "1e-3", "0o7", "010", "1:30", "~", "<<", "", "2024-01-02"])
)
_trees = st.recursive(
    _scalars,
    lambda inner: st.lists(inner) | st.dictionaries(st.text("abc_", min_size=1), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.text("abc_", min_size=1), _trees))
def test_any_tree_comes_back_from_text(tree: dict[str, object]) -> None:
    assert parse(dump(tree)) == tree


@pytest.mark.parametrize("text", ["\x85", "a\u2028b", "\u2029", "a\nb", "\ufeff", "off", "1:30"])
def test_awkward_text_comes_back(text: str) -> None:
    assert parse(dump({"key": [text]})) == {"key": [text]}


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "seed": st.integers(0, 2**63 - 1),
            "train.max_gradient_norm": st.none() | st.floats(1e-6, 1e6),
            "data.evaluation_samples": st.none() | st.integers(1, 500),
            "train.optimizer.learning_rate": st.floats(1e-12, 10),
            "model.dropout": st.sampled_from(["off", "keyed", "framework"]),
            "model.rms_norm_eps": st.floats(1e-12, 1e-3),
            "parallel.replicate": st.none() | st.integers(1, 64),
            "launch.threads_per_worker": st.just("auto") | st.integers(1, 64),
            "train.schedule.kind": st.sampled_from(["constant", "linear", "cosine"]),
            "train.freeze": st.lists(st.text(min_size=1, max_size=5)),
        },
    )
)
def test_a_recipe_comes_back_from_text(changes: dict[str, object]) -> None:
    tree = load_recipe("quickstart").model_dump(mode="json")
    for path, value in changes.items():
        *sections, key = path.split(".")
        here = tree
        for section in sections:
            here = here[section]
        if path == "train.schedule.kind":
            here.pop("final_fraction", None) if value == "constant" else None
        here[key] = value
    recipe = Recipe.model_validate(tree)
    assert Recipe.model_validate(parse(to_yaml(recipe))) == recipe


def test_overrides_are_dotted_and_typed() -> None:
    recipe = load_recipe(
        "quickstart",
        [
            "train.steps=5",
            "parallel.replicate=2",
            "train.optimizer={kind: muon}",
            "model.dropout=off",
        ],
    )
    assert recipe.train.steps == 5
    assert (recipe.parallel.auto, recipe.parallel.replicate) == (True, 2)
    assert recipe.train.optimizer.kind == "muon"
    assert recipe.model.dropout == "off"


def test_every_problem_is_said_once_and_all_at_once() -> None:
    said = problems(
        "trian.steps=3",
        "train.step=3",
        "seed=x",
        "data.source=[{source: a.txt, wieght: 3}]",
        "train.optimizer.learning_rate=.inf",
        "train.schedule.kind=cosin",
    )
    assert said.startswith("6 problems in recipe quickstart:")
    for line in (
        "trian: unknown key\n    did you mean 'train'?",
        "train.step: unknown key\n    did you mean 'steps'?",
        "seed: expected a whole number; got 'x'",
        "data.source.0.wieght: unknown key\n    did you mean 'weight'?",
        "train.optimizer.learning_rate: expected a finite number; got inf",
        "train.schedule.kind: expected one of constant, linear, cosine, warmup-stable-decay; "
        "got 'cosin'\n    did you mean 'cosine'?",
    ):
        assert line in said


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.source=3", "data.source: expected text or a list; got 3"),
        ("train.micro_batch_samples=x", "expected a whole number or 'auto'; got 'x'"),
        ("train.micro_batch_samples=0", "expected at least 1 or 'auto'; got 0"),
        ("train.micro_batch_samples=7", "7 does not divide global_batch_samples"),
        ("train.epochs=2", "give exactly one of `steps` and `epochs`"),
        ("parallel=3", "expected a section with keys of its own; got 3\n    auto, or degrees"),
        ("train=null", "train: expected a section with keys of its own; got nothing"),
        ("sync.kind=dilocco", "got 'dilocco'\n    did you mean 'diloco'?"),
        ("sync.codec.kind=int7", "got 'int7'\n    did you mean 'int8' or 'int4'?"),
        ("model={}", "model.kind: required, and not given\n    one of: config, pretrained"),
        ("data.tokenizer.kind=folder", "`path` goes with kind: folder"),
        ("data.validation_fraction=0.1", "it is data.validation={fraction: ...} now"),
        ("data.validation={}", "data.validation: give exactly one of `fraction`, `source` and"),
        ("data.validation={fraction: 0.1, split: dev}", "give exactly one of `fraction`, `sou"),
        ("data.validation.fraction=0.9", "data.validation.fraction: expected at most 0.5"),
        ("data.max_samples=0", "data.max_samples: expected at least 1; got 0"),
        ("observe.console=7", "observe.console: expected true or false; got 7"),
        ("seed", "seed: expected key=value, such as parallel.replicate=2"),
        ("seed=[1", "seed: '[1' is not a valid value"),
        ("seed=!!int abc", "not a valid value\n    line 1: 'abc' cannot be read as int"),
        ("seed=" + "9" * 5000, "line 1: '" + "9" * 40 + "' cannot be read as int"),
        ("seed=!!float x", "'x' cannot be read as float"),
        ("seed=!!timestamp x", "'x' cannot be read as timestamp"),
        ("seed=!!bool x", "'x' cannot be read as bool"),
        ("seed=!!python/name:os.system x", "is not a valid value"),
        ("seed=!!set {a}", "seed: expected a whole number; got {'a'}"),
        ("seed=" + "[" * 5000, "line 1: nested more than 64 deep"),
        ("model.note=&a [*a]", "model.note: '&a [*a]' is not a valid value"),
        ("seed=1e999", "seed: expected a finite number; got inf"),
        ("seed=" + "x" * 5000, "seed: expected a whole number; got 'xxx"),
        ("observe.wandb=3", "expected true or false or a section with keys of its own; got 3"),
        ("parallel.shard=x", "parallel.shard: expected a whole number or a section with keys of"),
    ],
)
def test_one_problem_one_line(override: str, said: str) -> None:
    text = problems(override)
    assert text.startswith("1 problem in") and said in text
    assert len(text) < 400, "a long value is cut"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nseed: 2\n", "line 2: the key 'seed' is given twice"),
        ("train: {steps: 1, steps: 2}", "line 1: the key 'steps' is given twice"),
        ("a: [1\nb: 2", "line 2: not valid YAML"),
        ("- a\n", "expected a mapping of sections"),
        ("", "got nothing"),
        ("? [a]\n: 1\n", "expected a word as key"),
        ("a: 1\nb: !!int abc\n", "line 2: 'abc' cannot be read as int"),
        ("a:\n" + "".join(" " * n + "a:\n" for n in range(1, 400)), "line 64: nested more than"),
        (
            "a: &a [x, x, x, x, x, x, x, x]\n"
            + "".join(
                f"{n}: &{n} [{', '.join(['*' + m] * 8)}]\n" for m, n in zip("abcdef", "bcdefg")
            ),
            "line 4: more than 20 aliases; write the values out",
        ),
    ],
)
def test_text_that_is_no_recipe(text: str, said: str) -> None:
    with pytest.raises(UserError, match=r"own\.yaml") as error:
        read_mapping(text, source="own.yaml")
    assert said in str(error.value)


def test_recipes_that_are_not_there(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL)
    for name, said in (
        ("quikstart", "no recipe named 'quikstart'; did you mean 'quickstart'?"),
        (str(tmp_path / "owm.yaml"), "no such recipe file; did you mean 'own.yaml'?"),
        (str(tmp_path), "expected a recipe, got a folder"),
    ):
        with pytest.raises(UserError) as error:
            load_recipe(name)
        assert said in str(error.value)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="expected a YAML text file, got binary data"):
        load_recipe(str(tmp_path / "binary.yaml"))


def test_locked_keys() -> None:
    saved = load_recipe("quickstart").model_dump(mode="json")
    free = load_recipe("quickstart", ["train.steps=9", "parallel.replicate=2"])
    assert changed(saved, free.model_dump(mode="json")) == []
    other = load_recipe("quickstart", ["seed=9", "model.hidden_size=8", "train.exact=true"])
    assert changed(saved, other.model_dump(mode="json")) == [
        "seed",
        "model.hidden_size",
        "train.exact",
    ]


@pytest.mark.parametrize(
    ("override", "where", "wanted"),
    [
        ("train.optimizer.learning_rate=3e-4", "optimizer", {"kind": "adamw"}),
        ("train.schedule.warmup_steps=2", "schedule", {"kind": "cosine", "warmup_steps": 2}),
    ],
)
def test_an_override_inside_a_section_keeps_the_kind_in_force(
    override: str, where: str, wanted: dict[str, object], tmp_path: Path
) -> None:
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    recipe = load_recipe(str(path), [override])
    section = getattr(recipe.train, where).model_dump()
    assert wanted.items() <= section.items()
    file = tmp_path / "muon.yaml"
    file.write_text(MINIMAL.replace("{steps: 3}", "{steps: 3, optimizer: {kind: muon}}"))
    assert load_recipe(str(file), [override]).train.optimizer.kind == "muon"
    assert load_recipe(str(path), ["sync.verify_every_steps=0"]).sync.kind == "every-step"


def test_a_mistake_inside_such_a_section_is_the_one_that_is_named(tmp_path: Path) -> None:
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    with pytest.raises(ConfigError, match=r"train\.optimizer\.lr: unknown key"):
        load_recipe(str(path), ["train.optimizer.lr=3"])


def test_aliases_may_be_used(tmp_path: Path) -> None:
    text = "model: {kind: config, architecture: llama, a: &a [1, 2], b: *a}\n"
    recipe = load_recipe(write(tmp_path, text + MINIMAL.partition("\n")[2]))
    assert recipe.model.settings == {"a": [1, 2], "b": [1, 2]}  # type: ignore[union-attr]
    assert load_recipe(write(tmp_path, to_yaml(recipe))) == recipe


def test_a_recipe_from_any_form(tmp_path: Path) -> None:
    """A name, a path, a dict and a Recipe; overrides as a dict, a list or one text always apply."""
    path = Path(write(tmp_path, MINIMAL))
    tree = {"model": {"architecture": "llama"}, "data": {"source": Path("a.txt")}}
    tree |= {"train": {"steps": 3}}
    note = "\N{CAT}\x85\u2028 off"
    found = [resolve(form, {"seed": 7, "model.note": note}) for form in (path, str(path), tree)]
    found.append(resolve(resolve(path), {"seed": 7, "model.note": note}))
    assert all(each == found[0] for each in found)
    assert (found[0].seed, found[0].model.settings) == (7, {"note": note})  # type: ignore[union-attr]
    assert resolve(tree, "seed=7").seed == resolve(resolve(tree), ["seed=7"]).seed == 7
    assert "seed" not in tree, "the caller's own is not changed"
    with pytest.raises(UserError, match=r"a dict or a shoal\.Recipe; got int"):
        resolve(3)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="a recipe is plain values"):
        resolve(tree, {"seed": object()})
    with pytest.raises(ConfigError, match="1 problem in the recipe:\n  train: required"):
        resolve({key: tree[key] for key in ("model", "data")})


def test_a_path_means_a_pretrained_model() -> None:
    recipe = load_recipe("quickstart", ["model.path=some/folder"])
    assert (recipe.model.kind, recipe.model.path) == ("pretrained", "some/folder")
    assert recipe.model.dropout == load_recipe("quickstart").model.dropout


def test_a_way_to_validate_takes_the_place_of_another(tmp_path: Path) -> None:
    assert load_recipe("quickstart").data.validation.fraction == 0.02
    held = load_recipe("quickstart", ["data.validation.source=held.txt"]).data.validation
    assert (held.fraction, held.source, held.split) == (None, "held.txt", None)
    path = write(tmp_path, MINIMAL)
    assert load_recipe(path).data.validation.fraction == 0.02
    held = load_recipe(path, ["data.validation.split=dev"]).data.validation
    assert (held.fraction, held.split) == (None, "dev")
    both = problems("data.validation.split=dev", "data.validation.source=held.txt")
    assert "data.validation: give exactly one of `fraction`, `source` and `split`" in both
