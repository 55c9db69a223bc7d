"""`shoal parity`: right layouts are proven, planted mistakes are caught and named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from shoal.errors import ConfigError
from shoal.prove.certificate import Certificate
from shoal.prove.parity import prove
from tiny import Bench

GPT2 = (
    "model={kind: config, architecture: gpt2, n_embd: 64, n_layer: 2, n_head: 4, n_positions: 64,"
    " embd_pdrop: 0.2, resid_pdrop: 0.2, attn_pdrop: 0.2}",
)


def proof(bench: Bench, *overrides: str, mistake: str | None = None) -> Certificate:
    out = bench.new_path()
    found = prove(bench.recipe, overrides, out=out, mistake=mistake, pool=bench.pool, steps=2)
    assert json.loads((out / "certificate.json").read_text())["proven"] == found.proven
    assert (out / "certificate.txt").read_text().startswith(found.layout)
    return found


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "layout",
    [
        ("parallel.replicate=1", "parallel.shard=2", "parallel.tensor=2"),
        ("parallel.replicate=4", "launch.workers=threads"),
        pytest.param(
            ("parallel.tensor=2", "parallel.recompute=full", *GPT2), marks=pytest.mark.slow
        ),
        ("parallel.replicate=2", "parallel.tensor=2", "model.adapter={kind: dora, rank: 3}"),
    ],
    ids=["shard x tensor", "threads", "gpt2", "adapters"],
)
def test_a_right_layout_is_proven(bench: Bench, layout: tuple[str, ...]) -> None:
    found = proof(bench, *layout)
    assert found.proven, str(found)
    assert found.cause is None
    assert found.largest["loss"][0] < 1e-6
    compared = {"loss", "gradient", "norm", "parameter", "round trip"}
    if any("pdrop" in each for each in layout):  # transformers drops nothing where it is opened
        assert set(found.largest) == compared
    else:
        assert set(found.largest) == {*compared, "opened"}
        assert found.largest["opened"][0] < 1e-6
    # the tolerance says what rounding does, not what a mistake does
    assert max(found.tolerance.gradients.values()) < 1e-3
    assert found.tolerance.rounding is not None


@pytest.mark.slow
def test_a_pipeline_is_proven_with_as_many_micro_batches_as_the_recipe_has(bench: Bench) -> None:
    """Its order of work depends on them: zero bubble was once wrong with few only."""
    words = ("parallel.pipeline={degree: 2, schedule: 1f1b}",)
    for micro, samples in (("8", 2), ("1", 8), ("auto", 4)):
        out = bench.new_path()
        given = (*words, f"train.micro_batch_samples={micro}")
        found = prove(bench.recipe, given, out=out, pool=bench.pool, steps=2)
        assert found.proven, str(found)
        (text,) = {path.read_text() for path in out.glob("layout*/config.yaml")}
        assert yaml.safe_load(text)["train"]["global_batch_samples"] == samples


MISTAKES = [
    ("no-reduction", "parallel.replicate=2", "missing reduction"),
    pytest.param(
        "no-reduction", "parallel.tensor=2", "missing reduction over tensor", marks=pytest.mark.slow
    ),
    ("double-reduction", "parallel.replicate=2", "double reduction over replicate"),
    pytest.param(
        "double-reduction",
        "parallel.tensor=2",
        "double reduction over tensor",
        marks=pytest.mark.slow,
    ),
    ("mean-of-means", "parallel.replicate=2", "mean of means"),
    pytest.param("mean-of-means", "parallel.shard=2", "mean of means", marks=pytest.mark.slow),
    ("mean-for-sum", "parallel.replicate=2", "scale off by a mesh degree"),
    ("same-shards", "parallel.shard=2", "identical shards at the start"),
    pytest.param(
        "same-shards", "parallel.tensor=2", "identical shards at the start", marks=pytest.mark.slow
    ),
    pytest.param(
        "lost-tie",
        "parallel.replicate=2",
        "lost tie: only model.embed_tokens.weight",
        marks=pytest.mark.slow,
    ),
    ("lost-tie", "parallel.tensor=2", "lost tie: only model.embed_tokens.weight"),
    ("missing-partial", "parallel.tensor=2", "missing reduction over tensor"),
]


@pytest.mark.quick(3)
@pytest.mark.parametrize(("mistake", "layout", "cause"), MISTAKES)
def test_a_planted_mistake_is_caught_and_named(
    bench: Bench, mistake: str, layout: str, cause: str
) -> None:
    found = proof(bench, layout, mistake=mistake)
    assert not found.proven
    assert found.failures
    assert found.cause is not None
    assert cause in found.cause
    assert "DOES NOT EQUAL" in str(found)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("parallel.replicate=1",), "one worker is its own proof"),
        (("parallel.tensor=3",), "degrees that do: 1, 2"),
        (("parallel.shard=2", "launch.workers=threads"), "threads carry the replicate axis only"),
        (("parallel.replicate=2", "model.dropout=framework"), "framework dropout"),
        (("parallel.context=3",), "set data.sequence_tokens to 36"),
    ],
)
def test_what_cannot_be_proven_is_refused(
    bench: Bench, overrides: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        proof(bench, *overrides)


@pytest.mark.slow
def test_the_command(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "proof"
    words = ("parity", str(bench.recipe), "parallel.replicate=2", "--steps", "2")
    done = bench.command(*words, "--out", str(out), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["proven"] is True
    again = bench.command(*words, "--out", str(out))
    assert again.returncode == 2
    assert "exists and is not empty" in again.stderr
    unknown = bench.command(*words, "--plant", "mean-for-some")
    assert unknown.returncode == 2
    assert "did you mean 'mean-for-sum'" in unknown.stderr


@pytest.mark.slow
def test_the_command_with_a_mistake(bench: Bench) -> None:
    words = ("parity", str(bench.recipe), "parallel.replicate=2", "--steps", "2")
    planted = bench.command(*words, "--plant", "mean-for-sum")
    assert planted.returncode == 1
    assert "likely cause: scale off" in planted.stdout
