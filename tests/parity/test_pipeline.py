"""One seed, one loss curve, when the blocks of a replica are divided into stages."""

from __future__ import annotations

from pathlib import Path

import pytest

from families import BLOCKS, FAMILIES, GRADIENT, LOSS, recipe_of, staged
from parity.test_checkpoints_across_layouts import assert_equal
from parity.test_proofs import proof
from parity.test_replicas import FROZEN, GPT2, PADDED, SHORT, assert_same_curve
from passing_on import newest, pass_on
from shoal.engine.decision import Decision, given_layout
from shoal.engine.job import Inputs, Job
from shoal.errors import UserError
from shoal.launch.local import resumed_recipe
from shoal.launch.pool import WorkerPool
from shoal.prove.matrix import Matrix
from tiny import Bench, largest_difference
from workers import run_workers

slow = pytest.mark.slow
FOUR = ("model.num_hidden_layers=4", "train.micro_batch_samples=2")


def pipeline(text: str) -> str:
    """Two ranks, with more of the section."""
    return f"parallel.pipeline={{degree: 2, {text}}}"


PIPELINES = {
    "1f1b": ("parallel.pipeline=2", "train.micro_batch_samples=4"),
    "zbv": (pipeline("schedule: zbv-zero-bubble"), *FOUR),
    "gpipe": (pipeline("schedule: gpipe"), "train.micro_batch_samples=8"),
    "interleaved": (pipeline("schedule: interleaved-1f1b"), *FOUR),
    "zero-bubble": (pipeline("schedule: interleaved-zero-bubble"), *FOUR),
    "four": ("parallel.pipeline=4", *FOUR),
    "by hand": (pipeline("split: [3, 1]"), *FOUR),
    "tensor": ("parallel.pipeline=2", "parallel.tensor=2", *FOUR),
    "shard": ("parallel.pipeline=2", "parallel.shard={degree: 2, level: optimizer}", *FOUR),
    "zbv shard": (
        pipeline("schedule: zbv-zero-bubble"),
        "parallel.shard={degree: 2, level: optimizer}",
        *FOUR,
    ),
    "zbv shard, few": (  # a stage's weights are asked for before it has computed any gradient
        pipeline("schedule: zbv-zero-bubble"),
        "parallel.shard={degree: 2, level: optimizer}",
        "model.num_hidden_layers=4",
        "train.micro_batch_samples=4",
    ),
    "looped shard": (pipeline("schedule: interleaved-1f1b"), "parallel.shard=2", *FOUR),
    "replicate": ("parallel.pipeline=2", "parallel.replicate=2", *FOUR),
    "recompute": ("parallel.pipeline=2", "parallel.recompute=full", *FOUR),
}


def model_of(overrides: tuple[str, ...]) -> list[str]:
    return [each for each in overrides if each.startswith("model.")]


@pytest.mark.quick(2)
@pytest.mark.parametrize("layout", PIPELINES.values(), ids=PIPELINES)
def test_stages_follow_one_worker(bench: Bench, layout: tuple[str, ...]) -> None:
    """The embedding is tied to the head: the first and the last stage hold it, and sum once."""
    assert_same_curve(bench.run(*layout, *SHORT), bench.run(*model_of(layout), *SHORT))


ADAPTER = ("model.adapter={kind: dora, rank: 3, dropout: 0.1}",)
MUON = ("train.optimizer={kind: muon}",)
CHANGES = {"gpt2": GPT2, "padded": PADDED, "frozen": FROZEN, "adapter": ADAPTER, "muon": MUON}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("layout", ["1f1b", "zbv"])
def test_other_recipes_in_stages(bench: Bench, layout: str, change: tuple[str, ...]) -> None:
    """Dropout, rows of unequal length, a first stage without gradients, adapters, Muon."""
    four = ("model.n_layer=4",) if change == GPT2 else ("model.num_hidden_layers=4",)
    change = (*SHORT, *change, *four)
    how = [each for each in PIPELINES[layout] if not each.startswith("model.")]
    assert_same_curve(bench.run(*how, *change), bench.run(*change))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "zbv-zero-bubble"])
def test_bfloat16_in_stages_is_that_of_one_worker(bench: Bench, schedule: str) -> None:
    """The products are the same ones; only an embedding's two gradients meet in float32 later."""
    change = ("train.steps=4", "train.evaluate_every_steps=4", "precision.compute=bfloat16", *FOUR)
    found = bench.run(*change, pipeline(f"schedule: {schedule}"))
    assert largest_difference(found.losses, bench.run(*change).losses) < 1e-5


@slow
def test_replicas_in_stages_step_alone_as_whole_ones_do(bench: Bench) -> None:
    change = ("train.steps=6", "train.evaluate_every_steps=6", "train.micro_batch_samples=4")
    change += ("sync={kind: local-sgd, every_steps: 2}", "launch.workers=processes")
    whole = bench.run(*change, "parallel={replicate: 2}")
    found = bench.run(*change, "parallel={replicate: 2, pipeline: 2}")
    assert largest_difference(found.losses, whole.losses) < 1e-5


EXACT = ("train.exact=true", "model.tie_word_embeddings=false", "train.steps=8", *FOUR)


@pytest.mark.quick(1)
@pytest.mark.parametrize("layout", ["parallel={pipeline: 2}", "parallel={pipeline: 4}"])
def test_exact_stages_are_one_workers_bits(bench: Bench, layout: str) -> None:
    """Nothing that is summed meets in another order: only the norm of clipping could, in its 16th
    digit, and here it does not clip."""
    change = (*EXACT, "train.max_gradient_norm=null")
    one, found = bench.run(*change), bench.run(*change, layout)
    assert found.losses == one.losses
    assert found.weights == one.weights


@slow
def test_exact_stages_are_the_same_bits_at_any_replicate_degree(bench: Bench) -> None:
    one = bench.run(*EXACT, "parallel={pipeline: 2}")
    two = bench.run(*EXACT, "parallel={pipeline: 2, replicate: 2}")
    assert two.digits == one.digits
    assert two.weights == one.weights


LENGTH = ("train.steps=20", "train.evaluate_every_steps=5", "checkpoint.every_steps=5")


@pytest.mark.slow
def test_a_save_of_stages_goes_on_in_any_layout(bench: Bench) -> None:
    """And a save of any layout goes on in stages; prompts are completed by all of them."""
    length = (*LENGTH, "task={kind: causal-lm, prompts: ['The lamp'], sample_tokens: 6}")
    wanted = bench.run(*length)
    stages, tensor = "parallel={pipeline: 2}", "parallel={tensor: 2}"
    for first, second in ((stages, tensor), (tensor, stages)):
        run = bench.train(
            first, *length, "train.micro_batch_samples=4", "train.stop_after_steps=10"
        )
        bench.resume(run, second, "train.stop_after_steps=null")
        assert largest_difference(run.losses, wanted.losses) < 1e-5
        texts = [row["completions"] for row in run.evaluations]
        assert texts == [row["completions"] for row in wanted.evaluations]


PASSED = ["{pipeline: 2}", "{pipeline: {degree: 2, schedule: zbv-zero-bubble}}"]
MORE = ["{pipeline: 2, tensor: 2}", "{pipeline: 2, shard: 2}", "{pipeline: 4}", "{shard: 2}"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "layouts", [PASSED, pytest.param([*MORE, *PASSED], marks=slow)], ids=["two", "all"]
)
def test_passed_on_through_stages_without_a_step(bench: Bench, layouts: list[str]) -> None:
    """Each layout loads what the one before it saved, and nothing changes on the way."""
    half = bench.run("train.steps=4", "train.evaluate_every_steps=0", *FOUR)
    first = reader = newest(half)
    for text in layouts:
        words = (f"parallel={text}", "train.micro_batch_samples=2")
        reader = pass_on(half, reader, words, pool=bench.pool)
        assert_equal(reader, first)


def test_what_is_tied_stays_the_same_bits_at_both_ends(bench: Bench, tmp_path: Path) -> None:
    """Each end updates its own copy, from one sum: parameters and moments never part."""
    run = bench.run("train.steps=1", "model.hidden_size=40", "model.intermediate_size=70")
    recipe = resumed_recipe(run.path, ["parallel.pipeline=2", "train.micro_batch_samples=4"])
    decision = Decision(given_layout(recipe), "processes", 1, 4, "float32", "a test")
    inputs = Inputs.from_json(newest(run).state["inputs"])
    payload = {**Job(recipe, run.path, inputs, decision).to_json(), "out": str(tmp_path)}
    found = run_workers(bench.pool, "tied_ends:run", {**payload, "steps": 30}, size=2)
    first, last = sorted(found, key=lambda each: each["rank"])
    assert len(first["hashes"][0]) == 3, "parameter and two moments of the embedding"
    assert first["hashes"] == last["hashes"]
    assert len({each["parameter model.embed_tokens.weight"] for each in first["hashes"]}) == 30


GEMMA2 = (
    "model={kind: config, architecture: gemma2, hidden_size: 32, intermediate_size: 64,"
    " num_hidden_layers: 4, num_attention_heads: 4, num_key_value_heads: 2, head_dim: 8,"
    " sliding_window: 4, max_position_embeddings: 64,"
    " layer_types: [sliding_attention, sliding_attention, full_attention, sliding_attention]}"
)
PLANTED = [
    ("tie-summed-twice", (), "double reduction over pipeline: model.embed_tokens.weight"),
    ("swapped-stages", (), "wrong stage: model.layers.0"),
    ("wrong-layer-types", (GEMMA2,), "such as its type"),
    pytest.param("double-reduction", (), "double reduction over pipeline", marks=slow),
    pytest.param("no-reduction", (), "lost tie", marks=slow),
]


@pytest.mark.quick(1)
@pytest.mark.parametrize(("mistake", "model", "cause"), PLANTED)
def test_a_mistake_in_stages_is_caught_and_named(
    bench: Bench, mistake: str, model: tuple[str, ...], cause: str
) -> None:
    found = proof(bench, "parallel.pipeline=2", *model, mistake=mistake)
    assert not found.proven and found.cause is not None
    assert cause in found.cause, found.cause


def test_a_mistake_of_stages_needs_some(bench: Bench) -> None:
    with pytest.raises(UserError, match=r"parallel\.pipeline=2"):
        proof(bench, "parallel.replicate=2", mistake="swapped-stages")


@slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_by_every_schedule(family: str, pool: WorkerPool, tmp_path: Path) -> None:
    """Eight blocks on two and on four ranks, and mixes up to eight workers."""
    recipe = recipe_of(family, tmp_path, blocks=BLOCKS)
    proofs = Matrix(recipe, out=tmp_path / "runs", pool=pool)
    for case in staged(family):
        found = proofs.compare(case.overrides)
        assert found.begins_equal, (case, found)
        assert found.loss < LOSS and found.gradient < GRADIENT, (case, found)
