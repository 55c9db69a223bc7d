"""The effective statement of a recipe: what will happen, in numbers and plain words."""

from __future__ import annotations

from shoal.config.recipe import Constant, Cosine, Muon, Recipe, WarmupStableDecay
from shoal.units import format_count

_OPEN = "decided at start"


def statement(recipe: Recipe) -> list[str]:
    """Lines that say what the run will do; "decided at start" where the recipe leaves it open."""
    return [f"{name}: {text}" for name, text in statements(recipe).items()]


def statements(recipe: Recipe) -> dict[str, str]:
    """What the run will do, by subject."""
    found = {
        "global batch": _batch(recipe),
        "length": _length(recipe),
        "learning rate": _schedule(recipe),
        "optimizer": _optimizer(recipe),
        "workers": _workers(recipe),
        "micro batch": _micro(recipe),
        "gradients": _reduction(recipe),
        "numbers": _numbers(recipe),
        "saves": f"{_every(recipe.checkpoint.every_steps)}; keeps the last "
        f"{recipe.checkpoint.keep}",
        "evaluates": _evaluation(recipe),
    }
    if recipe.train.exact:
        found["exact"] = (
            "the same bits in any replicate degree and kind of worker; slower: one thread a "
            "worker, gradients added in one fixed tree"
        )
    if recipe.train.stop_after_steps is not None:
        after = recipe.train.stop_after_steps
        found["stops early"] = f"after step {after}, saved; shoal resume goes on"
    return found


def _has_tokens(recipe: Recipe) -> bool:
    return getattr(recipe.task, "has_tokens", True)


def _batch(recipe: Recipe) -> str:
    samples, tokens = recipe.train.global_batch_samples, recipe.data.sequence_tokens
    if not _has_tokens(recipe):
        return f"{samples} samples a step"
    if recipe.data.packing:
        return f"{samples} samples x {tokens} tokens = {samples * tokens:,} tokens a step"
    return f"{samples} samples of at most {tokens} tokens, up to {samples * tokens:,} a step"


def _length(recipe: Recipe) -> str:
    train = recipe.train
    if train.steps is None:
        return f"{train.epochs:g} epochs of the data; optimizer steps {_OPEN}"
    samples = train.steps * train.global_batch_samples
    text = f"{train.steps} optimizer steps = {samples:,} samples"
    if not _has_tokens(recipe):
        return text
    most = "" if recipe.data.packing else "at most "
    return f"{text}, {most}{format_count(samples * recipe.data.sequence_tokens)} tokens"


def _schedule(recipe: Recipe) -> str:
    schedule, optimizer = recipe.train.schedule, recipe.train.optimizer
    peak, last = optimizer.learning_rate, recipe.train.steps or "the last"
    begins = f"rises to {peak:g} over {schedule.warmup_steps} steps, then "
    if not schedule.warmup_steps:
        begins = f"begins at {peak:g} and "
    if isinstance(schedule, Constant):
        return f"{begins}stays, to step {last}"
    floor = f"{schedule.final_fraction * peak:g} at step {last}"
    if isinstance(schedule, WarmupStableDecay):
        return f"{begins}stays; over the last {schedule.decay_steps} steps falls to {floor}"
    shape = "by half a cosine" if isinstance(schedule, Cosine) else "in a straight line"
    return f"{begins}falls {shape} to {floor}"


def _optimizer(recipe: Recipe) -> str:
    optimizer, limit = recipe.train.optimizer, recipe.train.max_gradient_norm
    kind = "adamw"
    if isinstance(optimizer, Muon):
        kind = (
            f"muon for matrices of the blocks, adamw (peak {optimizer.adamw_learning_rate:g}) else"
        )
    clipped = "not clipped" if limit is None else f"clipped at {limit:g}"
    text = (
        f"{kind}; weight decay {optimizer.weight_decay:g} (not on norms, biases, embeddings); "
        f"global gradient norm {clipped}"
    )
    frozen = recipe.train.freeze
    return text + (f"; frozen: {', '.join(frozen)}" if frozen else "")


def _degree(recipe: Recipe) -> int | None:
    """Replicas, or None where they are decided at start."""
    given = recipe.parallel.replicas
    return given if given is not None else (None if recipe.parallel.auto else 1)


def _workers(recipe: Recipe) -> str:
    degree, kind = _degree(recipe), recipe.launch.workers
    if degree is None:
        asked = "" if kind == "auto" else f" ({kind})"
        return f"{_OPEN} for this machine{asked}: how many, and threads in each"
    per = recipe.train.global_batch_samples // degree
    threads = recipe.launch.threads_per_worker
    each = f"threads in each: {_OPEN if threads == 'auto' else threads}"
    if degree == 1:
        return f"one, rank 0, with the whole batch; {each}"
    what = {"auto": "workers", "threads": "threads of one process"}.get(kind, kind)
    return (
        f"{degree} {what}, ranks 0-{degree - 1}; each a whole replica, with {per} samples of the "
        f"batch; {each}"
    )


def _micro(recipe: Recipe) -> str:
    micro, degree = recipe.train.micro_batch_samples, _degree(recipe)
    if micro == "auto":
        return f"{_OPEN}; it does not change what is learned"
    text = f"{micro} samples"
    if degree is not None:
        text += (
            f", {recipe.train.global_batch_samples // degree // micro} of them a worker and step"
        )
    return text


def _reduction(recipe: Recipe) -> str:
    degree, codec = _degree(recipe), recipe.sync.codec.kind
    divided = "divided by the targets of the whole batch"
    if degree == 1:
        return f"one replica, nothing to reduce; {divided}"
    ranks = f"all replicas ({_OPEN})" if degree is None else f"ranks 0-{degree - 1}"
    sent = "sent as they are" if codec == "none" else f"sent by {codec}"
    when = recipe.sync.kind.replace("-", " ")
    return f"summed over {ranks} at {when} in {recipe.precision.reduce}, {sent}; {divided}"


def _numbers(recipe: Recipe) -> str:
    compute = recipe.precision.compute
    kept = "weights and optimizer state are kept in float32"
    if compute == "auto":
        return f"computes in bfloat16 where this machine is faster with it ({_OPEN}); {kept}"
    return f"computes in {compute}; {kept}"


def _evaluation(recipe: Recipe) -> str:
    if not recipe.train.evaluate_every_steps:
        return "never"
    samples = recipe.data.evaluation_samples
    which = "all" if samples is None else f"at most {samples}"
    held = recipe.data.validation
    share = f"{held.fraction:.0%} of the data is kept apart" if held.fraction else ""
    share = share or (f"all of {held.source}" if held.source else f"the split {held.split}")
    return (
        f"before the first step and {_every(recipe.train.evaluate_every_steps)}, on {which} "
        f"validation samples ({share})"
    )


def _every(steps: int) -> str:
    return f"every {steps} steps and at the end" if steps else "at the end and when stopped"
