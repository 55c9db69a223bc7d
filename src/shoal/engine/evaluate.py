"""Scores on a fixed validation part, and completions of fixed prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shoal.parallel.precision import compute_context
from shoal.tasks.task import Scores, Task

if TYPE_CHECKING:
    from shoal.engine.build import Training


@torch.no_grad()
def evaluate(training: Training) -> dict[str, float]:
    """The task's metrics over all validation samples, each counted once, whatever the layout.

    A mixture also gets `evaluation_loss/SOURCE`.
    """
    ranks, evaluation = training.ranks, training.evaluation
    metrics = training.task.metrics()
    by_source = torch.zeros(len(evaluation.names), 2, dtype=torch.float64)
    training.model.eval()
    try:
        for number in range(evaluation.num_batches(ranks.num_parts)):
            arrays = evaluation.at(number, part=ranks.part, parts=ranks.num_parts)
            batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
            empty = int(batch["sample_ids"].max()) < 0
            if empty and not training.replica.is_cut:
                continue
            scores = _scores(training, batch, predict=metrics.needs_predictions)
            if empty or not ranks.counts:
                continue  # what was computed only gave the other ranks of the replica their part
            metrics.add(batch=batch, scores=scores)
            _count(by_source, batch=batch, losses=scores.losses, task=training.task)
    finally:
        training.model.train()
    vector = torch.from_numpy(metrics.vector())
    ranks.world.sum_(vector)
    result = metrics.result(vector.numpy())
    if len(evaluation.names) > 1:
        ranks.world.sum_(by_source)
        for name, (loss, targets) in zip(evaluation.names, by_source.tolist()):
            result[f"evaluation_loss/{name}"] = loss / targets if targets else math.nan
    return result


def _scores(training: Training, batch: dict[str, Tensor], *, predict: bool) -> Scores:
    moved = {name: tensor.to(training.device) for name, tensor in batch.items()}
    replica, kept = training.replica, []

    def compute() -> Tensor:
        output = training.task.output(replica.model, replica.anatomy, moved)
        scores = output.each(vocabulary=replica.vocabulary, predict=predict)
        kept.append(scores)
        return scores.losses

    with compute_context(training.dtype, device=training.device):
        replica.forward(compute)
    (found,) = kept
    guesses = found.predictions
    return Scores(found.losses.cpu(), None if guesses is None else guesses.cpu())


def _count(by_source: Tensor, *, batch: dict[str, Tensor], losses: Tensor, task: Task) -> None:
    real = batch["sample_ids"] >= 0
    for source in range(len(by_source)):
        rows = real & (batch["source_ids"] == source)
        by_source[source, 0] += losses[rows].double().sum()
        by_source[source, 1] += task.count({name: each[rows] for name, each in batch.items()})


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
    end = tokenizer.token_to_id("<|end|>")
    training.model.eval()
    results = []
    try:
        for prompt in prompts:
            ids = list(tokenizer.encode(prompt).ids)[-longest:]
            start = len(ids)
            while len(ids) < min(start + tokens, longest):
                logits = _next_logits(training, ids)
                values, indices = torch.topk(logits / 0.8, min(40, logits.numel()))
                pick = torch.multinomial(values.softmax(-1), 1, generator=generator)
                token = int(indices[pick])
                if token == end:
                    break
                ids.append(token)
            results.append((prompt, tokenizer.decode(ids[start:])))
    finally:
        training.model.train()
    return results


def _next_logits(training: Training, ids: list[int]) -> Tensor:
    row = torch.tensor([ids], device=training.device)
    batch = {"input_ids": row, "position_ids": torch.arange(len(ids), device=row.device)[None]}
    with compute_context(training.dtype, device=training.device):
        return training.replica.logits(batch)[0, -1].float().cpu()
