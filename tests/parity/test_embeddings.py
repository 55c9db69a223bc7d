"""Contrastive fine-tuning against plain torch and transformers in float64, and in other layouts."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel

from contrasted import plain
from shoal.config.load import load_recipe
from shoal.data.preview import previews
from shoal.data.stream import Stream
from shoal.data.tokenize import load_tokenizer
from shoal.launch.prepare import prepare_inputs
from shoal.layout import Share
from tiny import Bench, Run, largest_difference

THINGS = "lamp boat fox clock river key street apple train letter bridge chair map wall rain"
RECIPE = (
    "task={kind: embedding, query_tokens: 12, temperature: 0.1}",
    "data.packing=false",
    "data.sequence_tokens=64",
    "data.evaluation_samples=null",
    "train.steps=6",
    "train.evaluate_every_steps=3",
    "train.global_batch_samples=8",
    "train.optimizer={kind: adamw, learning_rate: 0.003, weight_decay: 0.0}",
    "train.schedule={kind: constant, warmup_steps: 0}",
    "checkpoint.every_steps=3",
)
BERT = (
    "model={kind: config, architecture: bert, hidden_size: 32, intermediate_size: 64, "
    "num_hidden_layers: 2, num_attention_heads: 4, max_position_embeddings: 64, dropout: {}}"
)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions and texts of unequal length: some share one, some have a negative, some neither."""
    draw, path = random.Random(0), tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    words = THINGS.split()
    rows = []
    for number in range(60):
        first, second, third = draw.sample(words, 3)
        text = f"the {first} and the {second} are near the {third}" + " again" * (number % 7)
        row = {"text": text, "query": f"where is the {first}"}
        if number % 5 == 0:
            row["negative"] = f"no {first}, but a {second}"
        if number % 9 == 8:
            del row["query"]
        rows.append(row)
        if number % 6 == 0:
            rows.append({"text": text, "query": f"what of the {second}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def words(pairs: Path, *, dropout: str = "off") -> tuple[str, ...]:
    return (*RECIPE, BERT.replace("{}", dropout), f"data.source={pairs}")


def vectors_of(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """As a user of transformers does it: one text at a time, without padding."""
    rows = []
    for ids, documents in zip(batch["input_ids"], batch["document_ids"]):
        for number in range(3):
            text = ids[documents == number][None]
            if text.numel():
                mask = torch.ones_like(text)
                states = model(input_ids=text, attention_mask=mask).last_hidden_state[0]
                rows.append(normalize(states.mean(dim=0), dim=0))
            else:
                rows.append(torch.zeros(32, dtype=torch.float64))
    return torch.stack(rows).unflatten(0, (len(batch["input_ids"]), 3))


def test_steps_are_those_of_plain_torch(bench: Bench, pairs: Path) -> None:
    """Micro batches of two against whole steps of eight, from the weights that shoal drew."""
    given = words(pairs)
    begun = bench.run(*given, "train.steps=1", "train.optimizer.learning_rate=1.0e-12")
    base = f"model={{path: {begun.path / 'model'}, dropout: off}}"
    given = (*given[:-2], base, f"data.source={pairs}", "train.micro_batch_samples=2")
    run = bench.run(*given)
    inputs = prepare_inputs(load_recipe(str(bench.recipe), given), say=lambda text: None)
    stream = Stream(inputs.data_directory, seed=3, global_batch_samples=8)
    model = AutoModel.from_pretrained(
        begun.path / "model", attn_implementation="eager", add_pooling_layer=False
    ).double()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003, weight_decay=0.0, betas=(0.9, 0.95))
    losses = []
    for step in range(6):
        batch = {k: torch.from_numpy(v) for k, v in stream.at(step, Share(0, 8)).items()}
        ids = batch["ids"][..., 0] * (1 << 31) + batch["ids"][..., 1]
        count = int(((ids[:, 0] != 0) & (ids[:, 1] != 0)).sum())
        loss = plain(vectors_of(model, batch), ids.tolist(), heat=0.1, symmetric=True) / count
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert largest_difference(run.losses, losses) < 1e-5
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "layout",
    [
        "{replicate: 2}",
        pytest.param("{replicate: 1, shard: 2}", marks=pytest.mark.slow),
        pytest.param("{replicate: 1, tensor: 2}", marks=pytest.mark.slow),
    ],
)
def test_a_layout_changes_nothing(bench: Bench, pairs: Path, layout: str) -> None:
    """With keyed dropout, which both forwards of a step have alike."""
    one = bench.run(*words(pairs, dropout="keyed"))
    two = bench.run(*words(pairs, dropout="keyed"), f"parallel={layout}")
    assert largest_difference(two.losses, one.losses) < 1e-5
    for name in ("evaluation_loss", "encoder_mrr"):
        found, wanted = ([row[name] for row in run.evaluations] for run in (two, one))
        assert largest_difference(found, wanted) < 1e-5


@pytest.mark.slow
def test_in_exact_mode_two_workers_give_the_bits_of_one(bench: Bench, pairs: Path) -> None:
    exact = (*words(pairs, dropout="keyed"), "train.exact=true", "train.micro_batch_samples=2")
    one = bench.run(*exact)
    assert bench.run(*exact, "parallel.replicate=2").losses == one.losses
    threads = ("parallel.replicate=2", "launch.workers=threads")
    assert bench.run(*exact, *threads).losses == one.losses


def test_goes_on_as_if_it_had_not_stopped(bench: Bench, pairs: Path) -> None:
    straight = bench.run(*words(pairs, dropout="keyed"))
    halted = bench.train(*words(pairs, dropout="keyed"), "train.stop_after_steps=3")
    assert bench.resume(halted).losses == straight.losses


def test_it_learns_and_is_opened_by_transformers(bench: Bench, pairs: Path) -> None:
    run: Run = bench.run(*words(pairs, dropout="keyed"))
    before, *_, after = run.evaluations
    assert after["evaluation_loss"] < before["evaluation_loss"]
    assert after["evaluation_targets"] == before["evaluation_targets"] > 4
    summary = json.loads((run.path / "summary.json").read_text(encoding="utf-8"))
    assert 0 < summary["baseline"]["bm25_recall_1"] <= 1 and (run.path / "retrieval.png").is_file()
    model = AutoModel.from_pretrained(run.path / "model", add_pooling_layer=False)
    assert model.config.architectures == ["BertModel"]


def test_a_preview_shows_the_texts_of_a_row(bench: Bench, pairs: Path) -> None:
    inputs = prepare_inputs(load_recipe(str(bench.recipe), words(pairs)), say=lambda text: None)
    assert inputs.tokenizer_directory is not None
    lines = list(
        previews(
            inputs.data_directory,
            count=8,
            seed=3,
            tokenizer=load_tokenizer(Path(inputs.tokenizer_directory)),
            shifted=False,
            labels={},
            plain=str,
            mark=str,
        )
    )
    text = "\n".join(line.replace("|", "") for line in lines)
    assert "document 1" in text and "where is the " in text and " are near the " in text
