"""The effective statement of a recipe: what will happen, in numbers; "decided at start" where open."""

from __future__ import annotations

from shoal.config.recipe import Recipe
from shoal.units import format_count

_OPEN = "decided at start"


def statement(recipe: Recipe) -> list[str]:
    """Lines that say what the run will do: batch, steps, schedule, who reduces what, formats."""
    train, data = recipe.train, recipe.data
    batch_tokens = train.global_batch_samples * data.sequence_tokens
    upper = "" if data.packing else "at most "
    lines = [
        f"global batch: {train.global_batch_samples} samples = "
        f"{upper}{format_count(batch_tokens)} tokens, in any layout",
        f"optimizer steps: {_steps(recipe)}",
        f"schedule: {_schedule(recipe)}",
        f"workers: {_workers(recipe)}",
        f"micro batch: {_or_open(train.micro_batch_samples)} samples",
        f"gradients: {_reduction(recipe)}",
        f"computes in: {_or_open(recipe.precision.compute)}; weights, optimizer and reduction in "
        f"{recipe.precision.reduce}",
        f"saves: {_every(recipe.checkpoint.every_steps)}, keeping {recipe.checkpoint.keep}",
        f"evaluates: {_every(train.evaluate_every_steps, never=True)}",
    ]
    if train.exact:
        lines.append("exact: the same bits in any replicate degree and kind of worker")
    if train.stop_after_steps is not None:
        lines.append(f"stops early after step {train.stop_after_steps}; resumable, same schedule")
    return lines


def _or_open(value: object) -> str:
    return _OPEN if value in ("auto", None) else str(value)


def _steps(recipe: Recipe) -> str:
    train = recipe.train
    if train.steps is None:
        return f"{train.epochs} epochs ({_OPEN}: the data is counted first)"
    total = train.steps * train.global_batch_samples
    tokens = format_count(total * recipe.data.sequence_tokens)
    return f"{train.steps} ({total:,} samples, {tokens} tokens when rows are full)"


def _schedule(recipe: Recipe) -> str:
    schedule = recipe.train.schedule
    peak = recipe.train.optimizer.learning_rate
    length = recipe.train.steps or "all"
    return (
        f"{schedule.kind}, warm-up of {schedule.warmup_steps} steps to {peak:g}, "
        f"over {length} steps"
    )


def _workers(recipe: Recipe) -> str:
    parallel = recipe.parallel
    if parallel.auto and parallel.replicate is None:
        return f"{_OPEN} for this machine"
    count = 1
    for axis in ("replicate", "shard", "context", "tensor", "pipeline"):
        count *= getattr(parallel, axis) or 1
    kind = "workers" if recipe.launch.workers == "auto" else recipe.launch.workers
    return f"{count} {kind}"


def _reduction(recipe: Recipe) -> str:
    replicas = recipe.parallel.replicate
    if replicas is None and not recipe.parallel.auto:
        replicas = 1
    if replicas == 1:
        return "one replica, nothing to reduce"
    many = "all replicas" if replicas is None else f"{replicas} replicas"
    codec = recipe.sync.codec.kind
    sent = "as they are" if codec == "none" else f"by {codec}"
    return f"summed over {many} at {recipe.sync.kind.replace('-', ' ')}, sent {sent}"


def _every(steps: int, *, never: bool = False) -> str:
    if steps == 0:
        return "never" if never else "at the end"
    return f"every {steps} steps and at the end"
