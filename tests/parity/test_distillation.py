"""Distillation, held against transformers' models and the formula in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from shoal.config.load import load_recipe
from shoal.data.stream import Stream
from shoal.errors import ConfigError, ModelError
from shoal.launch.prepare import prepare_inputs
from shoal.layout import Share
from tiny import Bench, largest_difference

RECIPE = (
    "data.packing=false",
    "train.steps=8",
    "train.evaluate_every_steps=4",
    "train.optimizer={kind: adamw, learning_rate: 0.01, weight_decay: 0.0}",
    "train.schedule={kind: constant, warmup_steps: 0}",
    "checkpoint.every_steps=4",
)


@pytest.fixture(scope="module")
def base(bench: Bench) -> Path:
    return bench.run("train.steps=4").path / "model"


@pytest.fixture(scope="module")
def teacher(bench: Bench) -> Path:
    """The same recipe, trained for longer and wider."""
    return bench.run("train.steps=30", "model.hidden_size=48").path / "model"


def words(base: Path, teacher: Path) -> tuple[str, ...]:
    task = f"task={{kind: distillation, teacher: {teacher}, teacher_weight: 0.7, temperature: 3.0}}"
    return (*RECIPE, task, f"model={{path: {base}}}")


def mean_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Over targets, written out."""
    told = cross_entropy(student, labels)
    wanted = (teacher / 3.0).softmax(-1)
    apart = (wanted * (wanted.log() - (student / 3.0).log_softmax(-1))).sum(-1).mean()
    return 0.3 * told + 0.7 * 9.0 * apart


def test_steps_are_those_of_the_formula(bench: Bench, base: Path, teacher: Path) -> None:
    given = words(base, teacher)
    run = bench.run(*given)
    inputs = prepare_inputs(load_recipe(str(bench.recipe), given), say=lambda text: None)
    stream = Stream(inputs.data_directory, seed=3, global_batch_samples=16)
    student, wise = (
        AutoModelForCausalLM.from_pretrained(each, attn_implementation="eager").double()
        for each in (base, teacher)
    )
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=0.01, weight_decay=0.0, betas=(0.9, 0.95)
    )
    losses = []
    for step in range(8):
        batch = {k: torch.from_numpy(v) for k, v in stream.at(step, Share(0, 16)).items()}
        seen = batch["document_ids"] >= 0
        call = {"input_ids": batch["input_ids"].long(), "attention_mask": seen.long()}
        targets = batch["labels"] != -100
        with torch.no_grad():
            wanted = wise(**call).logits[targets]
        optimizer.zero_grad()
        loss = mean_loss(student(**call).logits[targets], wanted, batch["labels"][targets].long())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert largest_difference(run.losses, losses) < 1e-4


@pytest.mark.quick(1)
@pytest.mark.parametrize("layout", ["replicate: 2", "shard: 2", "context: 2"])
def test_a_layout_changes_nothing(bench: Bench, base: Path, teacher: Path, layout: str) -> None:
    one = bench.run(*words(base, teacher))
    two = bench.run(*words(base, teacher), f"parallel={{{layout}}}")
    assert largest_difference(two.losses, one.losses) < 1e-5


def test_evaluations_are_of_the_tokens_alone(bench: Bench, base: Path, teacher: Path) -> None:
    plain = bench.run(*RECIPE, f"model={{path: {base}}}")
    taught = bench.run(*words(base, teacher))
    assert taught.evaluations[0]["evaluation_loss"] == plain.evaluations[0]["evaluation_loss"]
    assert taught.evaluations[-1]["evaluation_loss"] < taught.evaluations[0]["evaluation_loss"]


def test_a_teacher_of_another_vocabulary(bench: Bench, base: Path, tmp_path: Path) -> None:
    other = bench.run("train.steps=2", "data.tokenizer.vocabulary_size=280").path / "model"
    with pytest.raises(ModelError, match="its vocabulary has 280 tokens"):
        bench.train(*words(base, other))


def test_a_head_that_is_cut_is_refused(bench: Bench, base: Path, teacher: Path) -> None:
    with pytest.raises(ConfigError, match="the model or the task needs whole rows of logits"):
        bench.train(*words(base, teacher), "parallel={tensor: 2}")
