"""Keys of different sections that cannot mean anything together."""

from __future__ import annotations

from collections.abc import Iterator

from shoal.config.optimizers import Muon
from shoal.config.recipe import PretrainedModel, Recipe
from shoal.config.server import Quorum
from shoal.config.sync import EveryStep, LocalSGD, Server, StreamingDiLoCo
from shoal.config.tasks import GRPO, Embedding, Preference
from shoal.errors import Problem
from shoal.layout import AXES


def _keep_zeros(recipe: Recipe) -> Iterator[Problem]:
    what = "holds where a weight without a gradient stays as it is, got "
    if recipe.train.optimizer.kind == "muon":
        hint = "set train.optimizer.kind to adamw"
        yield Problem("train.keep_zeros", what + "muon, which moves whole matrices", hint)
    if recipe.sync.kind == "server":
        hint = "set sync.kind to every-step"
        yield Problem("train.keep_zeros", what + "a server, which updates by itself", hint)
    if recipe.model.adapter is not None:
        hint = "set one of them only"
        yield Problem("train.keep_zeros", what + "an adapter, which begins at zero", hint)


def contradictions(recipe: Recipe) -> Iterator[Problem]:
    """What a recipe asks for that another of its keys rules out."""
    until, checkpoint = recipe.train.until, recipe.checkpoint
    if until is not None and until.evaluation_loss is None and until.patience is None:
        what = "expected evaluation_loss, patience or both; got neither"
        yield Problem("train.until", what, "set one, or train.until=null")
    hint = "set train.evaluate_every_steps above 0"
    if until is not None and not recipe.train.evaluate_every_steps:
        yield Problem("train.until", "is judged at evaluations, and there are none", hint)
    if checkpoint.model == "best" and not recipe.train.evaluate_every_steps:
        yield Problem("checkpoint.model", "best is judged at evaluations, and there are none", hint)
    if checkpoint.model == "best" and not checkpoint.keep_best:
        yield Problem("checkpoint.model", "best needs its save", "set checkpoint.keep_best=true")
    adapter = recipe.model.adapter
    if recipe.train.quantise is not None and adapter is not None:
        what = "rounds the weights that are trained, and beside an adapter none are"
        yield Problem("train.quantise", what, "set one of them only")
    if recipe.train.keep_zeros:
        yield from _keep_zeros(recipe)
    if isinstance(recipe.task, Preference) and recipe.task.reference != "none" and adapter is None:
        what = "adapter-off is the model without its adapter, and there is none"
        hint = "set model.adapter={kind: lora}, or task.reference=none"
        yield Problem("task.reference", what, hint)
    task = recipe.task
    if isinstance(task, GRPO) and task.kl_coefficient and adapter is None:
        what = "the divergence is from the model without its adapter, and there is none"
        hint = "set model.adapter={kind: lora}, or task.kl_coefficient=0"
        yield Problem("task.kl_coefficient", what, hint)
    if isinstance(task, GRPO) and recipe.train.global_batch_samples % task.group:
        what = f"{recipe.train.global_batch_samples} completions are no groups of {task.group}"
        yield Problem("train.global_batch_samples", what, "make it a multiple of task.group")
    yield from _sync(recipe)
    if recipe.launch.link is not None and recipe.launch.workers == "threads":
        what = "threads share their memory: nothing crosses a link"
        yield Problem("launch.link", what, "set launch.workers to processes, or the link to null")
    if recipe.launch.link is not None and recipe.sync.kind in ("server", "hogwild"):
        what = f"what {recipe.sync.kind} sends does not go over such a link"
        yield Problem("launch.link", what, "set it to null, or sync.kind to another")
    if isinstance(task, Embedding):
        if recipe.train.global_batch_samples == 1:
            what = "a pair is learned by telling it from the others of its step, and there are none"
            yield Problem("train.global_batch_samples", what, "set it to 2 at least, better to 64")
        if recipe.model.dropout == "framework":
            what = "texts are computed twice a step, and torch's dropout would draw anew"
            yield Problem("model.dropout", what, "set model.dropout=keyed, or off")
    if adapter is not None and adapter.path and not isinstance(recipe.model, PretrainedModel):
        what = "an adapter belongs to the weights that it was trained beside"
        yield Problem("model.adapter.path", what, "set model.path to their folder")
    if adapter is not None and adapter.base != "float32":
        yield from _rounded_base(recipe, adapter.base)


def _rounded_base(recipe: Recipe, base: str) -> Iterator[Problem]:
    if not isinstance(recipe.model, PretrainedModel):
        what = f"{base} is read from a folder at every start, and these weights are drawn"
        yield Problem("model.adapter.base", what, "set it to float32, or model.path")
    for axis in (*AXES[1:], "expert"):
        degree = getattr(recipe.parallel, axis)
        if degree is not None and degree > 1:
            what = f"{base} keeps whole matrices in each replica, got parallel.{axis}={degree}"
            yield Problem("model.adapter.base", what, f"set it to float32, or parallel.{axis}=1")


def _sync(recipe: Recipe) -> Iterator[Problem]:
    sync = recipe.sync
    if isinstance(sync, StreamingDiLoCo):
        between = sync.every_steps // sync.fragments
        if not between:
            what = f"{sync.fragments} meet one a step, which takes more than {sync.every_steps}"
            yield Problem("sync.fragments", what, f"set it to {sync.every_steps} at most")
        elif sync.overlap_steps > between:
            what = f"the next fragment leaves {between} steps later, got {sync.overlap_steps}"
            yield Problem("sync.overlap_steps", what, f"set it to {between} at most")
        if sync.codec.brake is not None:
            what = "a fragment is sent once; there is no second sum to compare it with"
            yield Problem("sync.codec.brake", what, "set it to null, or sync.kind to diloco")
    if isinstance(sync, StreamingDiLoCo | Server) and sync.codec.after_rounds:
        what = "messages have one form from the first on"
        yield Problem("sync.codec.after_rounds", what, "set it to 0, or sync.kind to diloco")
    within = sync.group_replicas if isinstance(sync, LocalSGD | EveryStep) else None
    replicas = recipe.parallel.replicas
    if within is not None and replicas is not None and (replicas % within or replicas == within):
        what = f"{replicas} replicas are no two or more groups of {within}"
        near = [n for n in range(2, replicas) if replicas % n == 0]
        hint = f"set it to {' or '.join(map(str, near))}" if near else "leave it out"
        yield Problem("sync.group_replicas", what, hint)
    if isinstance(sync, LocalSGD) and sync.every_steps == "end" and sync.shares == "measured":
        what = "replicas that meet at the end only never learn how fast the others are"
        yield Problem("sync.shares", what, "set it to equal, or sync.every_steps to a number")
    if isinstance(sync, Server) and isinstance(sync.consistency, Quorum):
        replicas, least = recipe.parallel.replicas, sync.consistency.least
        if replicas is not None and least > replicas:
            what = f"no round would ever end: there are {replicas} replicas, got {least}"
            yield Problem("sync.consistency.least", what, f"set it to {replicas} at most")
    if isinstance(sync, Server) and sync.codec.brake is not None:
        what = "a push is sent once; there is no second one to compare it with"
        yield Problem("sync.codec.brake", what, "set it to null, or sync.kind to diloco")
    at_server = isinstance(sync, Server) and sync.optimizer.kind == "train"
    if at_server and isinstance(recipe.train.optimizer, Muon):
        what = "muon needs whole matrices, of which a server may hold a part"
        hint = "set train.optimizer.kind=adamw, or sync.push=deltas with a sync.optimizer"
        yield Problem("train.optimizer.kind", what, hint)
    if sync.codec.error_feedback and recipe.precision.compute == "float16":
        what = "what is left out would be added under another loss scale"
        hint = "set it to false, or precision.compute to bfloat16"
        yield Problem("sync.codec.error_feedback", what, hint)
