"""Scores on a fixed validation part, and completions of fixed prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from shoal.comm.messages import gather_json
from shoal.data.tokenize import load_tokenizer
from shoal.engine.passes import Batch, Micro
from shoal.engine.training import Training
from shoal.tasks.task import Metrics, Pictured, Task, Vector


@torch.no_grad()
def evaluate(
    training: Training, *, progress: Callable[[float], None] = lambda done: None
) -> dict[str, float]:
    """The task's metrics over all validation samples, each counted once, whatever the layout.

    `progress` hears how much is done, 0 to 1. The same on every rank. A mixture
    also gets `evaluation_loss/SOURCE`. What the task's picture needs is in `training.shown`.
    Raises PeersLost.
    """
    ranks, evaluation, passes = training.ranks, training.evaluation, training.passes
    metrics = training.task.metrics_on(evaluation)
    by_source = torch.zeros(len(evaluation.names), 2, dtype=torch.float64)
    count = evaluation.num_batches(ranks.num_parts)
    for number in range(count):
        progress(number / count)
        read = evaluation.at(number, part=ranks.part, parts=ranks.num_parts)
        arrays = training.task.drawn(read, seed=0)
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        empty = int(batch["sample_ids"].max()) < 0
        if empty and not training.replica.is_cut:
            continue
        micro, predict = Micro(batch, number), metrics.needs_predictions
        found = training.task.scored(batch, training.play) or passes.score([micro], predict=predict)
        if empty or not ranks.speaks:
            continue  # what was computed only gave the other ranks of the replica their part
        for scores in found:
            metrics.add(batch=batch, scores=scores)
            _count(by_source, batch=batch, losses=scores.losses, task=training.task)
    vector = torch.from_numpy(metrics.vector())
    ranks.world.sum_(vector)
    result = metrics.result(vector.numpy())
    if training.task.picture is not None:
        training.shown = _shown(training, metrics, vector.numpy())
    if len(evaluation.names) > 1:
        ranks.world.sum_(by_source)
        for name, (loss, targets) in zip(evaluation.names, by_source.tolist()):
            result.setdefault(f"evaluation_loss/{name}", loss / targets if targets else math.nan)
    return result


def _shown(training: Training, metrics: Metrics, vector: Vector) -> dict[str, Any]:
    """What a picture is drawn of, the same on every rank and in any layout."""
    assert isinstance(metrics, Pictured), "a task with a picture has such metrics"
    parts = gather_json(training.ranks.world, list(metrics.examples))
    examples = sorted((each for part in parts for each in part), key=lambda each: each[:2])
    return metrics.shown(vector, examples)


def _count(by_source: Tensor, *, batch: Batch, losses: Tensor, task: Task) -> None:
    real = batch["sample_ids"] >= 0
    for source in range(len(by_source)):
        rows = real & (batch["source_ids"] == source)
        by_source[source, 0] += losses[rows].double().sum()
        by_source[source, 1] += task.count({name: each[rows] for name, each in batch.items()})


def complete_prompts(training: Training) -> list[tuple[str, str]]:
    """The recipe's prompts with what the model makes of them now. Raises PeersLost."""
    prompts, tokens = training.task.prompts()
    folder = training.job.inputs.tokenizer_directory
    if not prompts or folder is None:
        return []
    return complete(training, prompts=prompts, tokens=tokens, tokenizer=load_tokenizer(folder))


@torch.no_grad()
def complete(
    training: Training, *, prompts: Sequence[str], tokens: int, tokenizer: Any
) -> list[tuple[str, str]]:
    """Sample a continuation of each prompt (temperature 0.8, the 40 likeliest; seeded).

    The whole row is computed again for each token: short, exact, and no cache to keep. Of a model
    that was cut, all ranks do the same, and come to the same tokens.
    """
    generator = torch.Generator().manual_seed(training.job.recipe.seed)
    longest = int(getattr(training.model.config, "max_position_embeddings", 0) or 1 << 30)
    special = training.job.inputs.special_tokens
    ends, begin = special.get("end", ()), special.get("begin")
    results = []
    for prompt in prompts:
        ids = list(tokenizer.encode(prompt).ids)[-longest:]
        if begin is not None and ids[:2] == [begin, begin]:  # the template has written it too
            del ids[0]
        start = len(ids)
        while len(ids) < min(start + tokens, longest):
            row = torch.tensor([ids])
            batch = {"input_ids": row, "position_ids": torch.arange(len(ids))[None]}
            training.ranks.world.pulse.mark("complete")  # a text may take longer than the scores
            logits = training.passes.logits(batch)[0].cpu()
            values, indices = torch.topk(logits / 0.8, min(40, logits.numel()))
            pick = torch.multinomial(values.softmax(-1), 1, generator=generator)
            token = int(indices[pick])
            if token in ends:
                break
            ids.append(token)
        results.append((prompt, tokenizer.decode(ids[start:])))
    return results
