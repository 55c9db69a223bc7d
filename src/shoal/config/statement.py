"""The effective statement of a recipe: what will happen, in numbers and plain words."""

from __future__ import annotations

from shoal.config.left_out import usual_rate
from shoal.config.optimizers import AdamW, Constant, Cosine, Muon, WarmupStableDecay
from shoal.config.recipe import PretrainedModel, Recipe, Until
from shoal.config.tasks import has_tokens
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
        f"{recipe.checkpoint.keep}{_best(recipe)}",
        "evaluates": _evaluation(recipe),
    }
    if has_tokens(recipe.task):
        found["tokenizer"] = _tokenizer(recipe)
    if recipe.train.exact:
        found["exact"] = (
            "the same bits in any replicate degree and kind of worker; slower: one thread a "
            "worker, gradients added in one fixed tree"
        )
    if recipe.train.stop_after_steps is not None:
        after = recipe.train.stop_after_steps
        found["stops early"] = f"after step {after}, saved; shoal resume goes on"
    if recipe.train.until is not None:
        found["ends early"] = _until(recipe.train.until)
    return found


def _batch(recipe: Recipe) -> str:
    samples, tokens = recipe.train.global_batch_samples, recipe.data.sequence_tokens
    if not has_tokens(recipe.task):
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
    if not has_tokens(recipe.task):
        return text
    most = "" if recipe.data.packing else "at most "
    return f"{text}, {most}{format_count(samples * recipe.data.sequence_tokens)} tokens"


def _schedule(recipe: Recipe) -> str:
    schedule, optimizer = recipe.train.schedule, recipe.train.optimizer
    peak, steps = optimizer.learning_rate, recipe.train.steps
    last = "the last step" if steps is None else f"step {steps}"
    over = f"{100 * schedule.warmup_fraction:.3g} % of the steps"
    if schedule.warmup_steps or steps is not None:
        over = f"{schedule.num_warmup_steps(steps=steps or 0)} steps"
    begins = f"rises to {peak:g}{_usual(recipe)} over {over}, then "
    if not (schedule.warmup_steps or schedule.warmup_fraction):
        begins = f"begins at {peak:g}{_usual(recipe)} and "
    if isinstance(schedule, Constant):
        return f"{begins}stays, to {last}"
    floor = f"{schedule.final_fraction * peak:g} at {last}"
    if isinstance(schedule, WarmupStableDecay):
        return f"{begins}stays; over the last {schedule.decay_steps} steps falls to {floor}"
    shape = "by half a cosine" if isinstance(schedule, Cosine) else "in a straight line"
    return f"{begins}falls {shape} to {floor}"


_HIGH = 25
"""Times the default of fine-tuning: from here a rate looks like one for random weights."""
_FAR = 5
"""Times a kind's default, or a fraction: such a rate may have been written for another kind."""


def _usual(recipe: Recipe) -> str:
    """Whether the rate is usual for weights that exist, or looks like one of another kind."""
    optimizer, adapted = recipe.train.optimizer, recipe.model.adapter is not None
    usual, what = usual_rate(adapted=adapted), "adapters" if adapted else "pretrained weights"
    if not isinstance(recipe.model, PretrainedModel) or not isinstance(optimizer, AdamW):
        default = type(optimizer).model_fields["learning_rate"].default
        near = default / _FAR < optimizer.learning_rate < default * _FAR
        return "" if near else f" ({optimizer.kind}'s default is {default:g})"
    if optimizer.learning_rate == usual:
        return f" (the default with {what})"
    high = optimizer.learning_rate >= _HIGH * usual
    return f" (high for {what}, where {usual:g} is usual)" if high else ""


def _tokenizer(recipe: Recipe) -> str:
    chosen, pretrained = recipe.data.tokenizer, isinstance(recipe.model, PretrainedModel)
    if chosen.kind == "folder":
        return f"that of {chosen.path}"
    if chosen.kind == "model" or (chosen.kind == "auto" and pretrained):
        return "that of the model"
    return f"trained on the data, {chosen.vocabulary_size:,} tokens"


def _optimizer(recipe: Recipe) -> str:
    optimizer, limit = recipe.train.optimizer, recipe.train.max_gradient_norm
    kind: str = optimizer.kind
    if isinstance(optimizer, Muon):
        kind = (
            f"muon for matrices of the blocks, adamw (peak {optimizer.adamw_learning_rate:g}) else"
        )
    clipped = "not clipped" if limit is None else f"clipped at {limit:g}"
    text = (
        f"{kind}; weight decay {optimizer.weight_decay:g} (not on norms, biases, embeddings); "
        f"global gradient norm {clipped}"
    )
    frozen, adapter = recipe.train.freeze, recipe.model.adapter
    if adapter is not None:
        about = f"from {adapter.path}" if adapter.path else f"rank {adapter.rank}, scale "
        about += "" if adapter.path else f"{adapter.scale:g}, beside {', '.join(adapter.targets)}"
        text += f"; trained: {adapter.kind} adapters ({about}) and a new head, else frozen"
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
    share = share or (
        f"all of {', '.join(held.sources)}" if held.source else f"the split {held.split}"
    )
    return (
        f"before the first step and {_every(recipe.train.evaluate_every_steps)}, on {which} "
        f"validation samples ({share})"
    )


def _best(recipe: Recipe) -> str:
    kept = recipe.checkpoint.keep_best and recipe.train.evaluate_every_steps
    return " and the best by evaluation loss" if kept else ""


def _until(until: Until) -> str:
    ways = []
    if until.evaluation_loss is not None:
        ways.append(f"at an evaluation loss of {until.evaluation_loss:g} or less")
    if until.patience is not None:
        ways.append(f"after {until.patience} evaluations without a better one")
    return " or ".join(ways)


def _every(steps: int) -> str:
    return f"every {steps} steps and at the end" if steps else "at the end and when stopped"
