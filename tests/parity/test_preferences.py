"""Learning from preferences, held against peft and the formulas of the papers in float64."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from shoal.config.load import load_recipe
from shoal.data.stream import Stream
from shoal.errors import ConfigError, DataError
from shoal.launch.prepare import prepare_inputs
from shoal.layout import Share
from tiny import Bench, largest_difference

RECIPE = (
    "data.packing=false",
    "data.sequence_tokens=64",
    "train.steps=8",
    "train.evaluate_every_steps=4",
    "train.global_batch_samples=4",
    "train.optimizer={kind: adamw, learning_rate: 0.01, weight_decay: 0.0}",
    "train.schedule={kind: constant, warmup_steps: 0}",
    "checkpoint.every_steps=4",
)
KINDS = {
    "dpo": "beta: 0.3",
    "smoothed, with sft": "beta: 0.3, label_smoothing: 0.1, sft_weight: 0.5",
    "simpo": "beta: 2.0, reference: none, length_normalised: true, margin: 0.5",
}


@pytest.fixture(scope="module")
def choices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sums with a right and a wrong answer, of unequal lengths."""
    draw, path = random.Random(0), tmp_path_factory.mktemp("choices") / "pairs.jsonl"
    lines = []
    for number in range(60):
        a, b = draw.randint(1, 9), draw.randint(1, 9)
        asked = [{"role": "user", "content": f"{a} and {b}?"}]
        right, wrong = f"It is {a + b}.", f"{a * b + 1}" + " or so" * (number % 3)
        good, bad = ([{"role": "assistant", "content": text}] for text in (right, wrong))
        shapes = [
            {"prompt": asked, "chosen": good, "rejected": bad},
            {"chosen": asked + good, "rejected": asked + bad},
            {"prompt": asked[0]["content"], "chosen": right, "rejected": wrong},
        ]
        lines.append(json.dumps(shapes[number % 3]) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def base(bench: Bench) -> Path:
    return bench.run("train.steps=4").path / "model"


def words(base: Path, choices: Path, options: str = KINDS["dpo"]) -> tuple[str, ...]:
    task = f"task={{kind: preference, {options}}}"
    model = f"model={{path: {base}, adapter: {{rank: 4}}}}"
    return (*RECIPE, task, model, f"data.source={choices}")


def documents(batch: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids [1, T] and labels [T] of chosen and rejected, pair by pair."""
    for row in range(len(batch["input_ids"])):
        for document in (0, 1):
            places = batch["document_ids"][row] == document
            yield batch["input_ids"][row][places][None].long(), batch["labels"][row][places].long()


def likelihoods(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-likelihood of each answer [2 x pairs], and its number of tokens."""
    sums, lengths = [], []
    for ids, labels in documents(batch):
        scores = model(input_ids=ids).logits[0].log_softmax(-1)
        targets = labels != -100
        sums.append(scores[targets].gather(1, labels[targets][:, None]).sum())
        lengths.append(targets.sum())
    return torch.stack(sums), torch.stack(lengths)


def loss_of(model: Any, batch: dict[str, Tensor], kind: str) -> Tensor:
    """Mean over pairs, as the papers write it."""
    own, lengths = likelihoods(model, batch)
    if kind == "simpo":
        own = own / lengths
        return -logsigmoid(2.0 * (own[::2] - own[1::2]) - 0.5).mean()
    with torch.no_grad(), model.disable_adapter():
        reference, _ = likelihoods(model, batch)
    inside = 0.3 * ((own - reference)[::2] - (own - reference)[1::2])
    if kind == "dpo":
        return -logsigmoid(inside).mean()
    smooth = -0.9 * logsigmoid(inside) - 0.1 * logsigmoid(-inside)
    return (smooth - 0.5 * own[::2] / lengths[::2]).mean()


@pytest.mark.quick(2)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_the_papers(bench: Bench, base: Path, choices: Path, kind: str) -> None:
    given = words(base, choices, KINDS[kind])
    run = bench.run(*given)
    inputs = prepare_inputs(load_recipe(str(bench.recipe), given), say=lambda text: None)
    stream = Stream(inputs.data_directory, seed=3, global_batch_samples=4)
    # step by step, from the adapter that shoal drew
    first = bench.run(*given, "train.optimizer.learning_rate=1.0e-12", "train.steps=1")
    trained = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").double()
    theirs = peft.PeftModel.from_pretrained(trained, first.path / "adapter", is_trainable=True)
    theirs.double()
    parameters = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0, betas=(0.9, 0.95))
    losses = []
    for step in range(8):
        batch = {k: torch.from_numpy(v) for k, v in stream.at(step, Share(0, 4)).items()}
        optimizer.zero_grad()
        loss = loss_of(theirs, batch, kind)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert largest_difference(run.losses, losses) < 1e-4
    assert losses[-1] < losses[0]


@pytest.mark.quick(1)
@pytest.mark.parametrize("layout", ["replicate: 2", "shard: 2", "tensor: 2"])
def test_a_layout_changes_nothing(bench: Bench, base: Path, choices: Path, layout: str) -> None:
    one = bench.run(*words(base, choices))
    two = bench.run(*words(base, choices), f"parallel={{{layout}}}")
    assert largest_difference(two.losses, one.losses) < 1e-5


def test_it_is_scored_by_pairs(bench: Bench, base: Path, choices: Path) -> None:
    run = bench.run(*words(base, choices))
    before, *_, after = run.evaluations
    assert before["evaluation_loss"] == pytest.approx(math.log(2), abs=1e-6), "the reference itself"
    assert after["accuracy"] > 0.9 > before["accuracy"]


def test_goes_on_as_if_it_had_not_stopped(bench: Bench, base: Path, choices: Path) -> None:
    straight = bench.run(*words(base, choices))
    halted = bench.train(*words(base, choices), "train.stop_after_steps=4")
    assert bench.resume(halted).losses == straight.losses


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"text": "a"}, "expected two answers to each prompt, got keys"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "line 2: `chosen` and `rejected` are"),
        (
            {
                "chosen": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
                "rejected": [
                    {"role": "user", "content": "z"},
                    {"role": "assistant", "content": "y"},
                ],
            },
            "line 2: `chosen` and `rejected` differ before their last message",
        ),
        (
            {"chosen": [{"role": "user", "content": "x"}], "rejected": "y"},
            "line 2: chosen: the conversation ends with a message of the user",
        ),
    ],
)
def test_lines_that_are_no_pairs(
    bench: Bench, base: Path, tmp_path: Path, line: dict[str, Any], said: str
) -> None:
    path = tmp_path / "pairs.jsonl"
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path.write_text(json.dumps(good) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(DataError, match=said):
        bench.train(*words(base, path))


def test_without_an_adapter_there_is_no_reference(bench: Bench, base: Path, choices: Path) -> None:
    with pytest.raises(ConfigError, match=r"task\.reference: adapter-off is the model without"):
        bench.train(*words(base, choices), f"model={{path: {base}}}")
