"""Config becomes objects: the one place where a recipe's sections meet the parts they describe."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from shoal.checkpoint.store import Store
from shoal.comm.group import Group
from shoal.config.recipe import CausalLM, Muon, Recipe
from shoal.data.stream import Evaluation, Stream
from shoal.data.tokenize import load_tokenizer
from shoal.engine import state as flat
from shoal.engine.evaluate import complete, evaluate
from shoal.engine.model import model_config
from shoal.engine.state import FlatState, Progress
from shoal.engine.step import Batch, ForwardBackward, StepSettings
from shoal.engine.update import Update
from shoal.layout import Share
from shoal.models import init
from shoal.models.anatomy import (
    Anatomy,
    anatomy_of,
    canonical_parameters,
    check_logits,
    weight_decay_names,
)
from shoal.models.dropout import apply_keyed, wants_dropout
from shoal.models.huggingface import build_meta
from shoal.models.pretrained import PretrainedWeights
from shoal.models.probe import probe_keyed_dropout, probe_packing
from shoal.observe.events import Report
from shoal.parallel.precision import check_compute
from shoal.runtime import Place
from shoal.sync.every_step import EveryStep
from shoal.tasks.kinds import create
from shoal.tasks.outcome import Task

if TYPE_CHECKING:
    from shoal.engine.trainer import Job


@dataclass
class Training:
    """The objects of one rank's run."""

    job: Job
    group: Group
    device: torch.device
    model: nn.Module
    anatomy: Anatomy
    task: Task
    state: FlatState
    sync: EveryStep
    forward_backward: ForwardBackward
    update: Update
    store: Store
    stream: Stream
    evaluation: Evaluation
    dtype: torch.dtype
    steps: int
    progress: Progress = field(default_factory=Progress)
    peak_memory_bytes: int | None = None

    @property
    def config(self) -> Any:
        """The model's transformers configuration."""
        return self.model.config

    def batches(self, step: int, share: Share) -> Batch:
        """This rank's part of the global batch of `step`; reads nothing else."""
        return {name: torch.from_numpy(a) for name, a in self.stream.at(step, share).items()}

    def stream_state(self, step: int) -> dict[str, int]:
        """The data position: one integer per source."""
        return self.stream.state(step)

    def evaluate(self) -> dict[str, float]:
        """Scores on the fixed validation samples; the same on every rank."""
        return evaluate(self)

    def complete(self) -> list[tuple[str, str]]:
        """The recipe's prompts with what the model makes of them now."""
        task = self.job.recipe.task
        if not isinstance(task, CausalLM) or not task.prompts:
            return []
        tokenizer = load_tokenizer(self.job.inputs.tokenizer_directory)
        return complete(self, prompts=task.prompts, tokens=task.sample_tokens, tokenizer=tokenizer)

    def facts(self) -> dict[str, Any]:
        """What a rank that joins, or a run that is resumed, needs besides tensors."""
        return {"progress": vars(self.progress).copy(), "peak_memory_bytes": self.peak_memory_bytes}

    def update_progress(self, facts: dict[str, Any]) -> None:
        """Stand where `facts` say."""
        for name, value in facts["progress"].items():
            setattr(self.progress, name, value)
        self.peak_memory_bytes = facts.get("peak_memory_bytes") or self.peak_memory_bytes
        self.update.restore(self.progress.step, applied_steps=self.progress.applied_steps)

    def resident(self) -> list[torch.Tensor]:
        """Parameters, gradients and optimizer state that this rank keeps."""
        return [self.state.values, self.state.gradients, *self.state.moments.values()]


def build(job: Job, *, group: Group, place: Place, report: Report) -> Training:
    """Build one rank's objects. Raises the errors of the parts it builds."""
    recipe = job.recipe
    task = create(recipe.task.kind, settings=job.inputs.task_settings)
    config = model_config(recipe, inputs=job.inputs, task=task)
    model = build_meta(config, auto_class=task.auto_class, dropout=recipe.model.dropout)
    keyed = recipe.model.dropout == "keyed"
    state, told = _weights(job, model=model, group=group, device=place.device)
    notes = apply_keyed(model, seed=recipe.seed, asked=config) if keyed else []
    anatomy = check_logits(model, anatomy_of(model))
    if recipe.data.packing:
        probe_packing(model)
    if keyed and wants_dropout(config):
        probe_keyed_dropout(model)
    model.train()
    if place.rank == 0:
        for name, note in [*(("model", n) for n in told), *(("dropout", n) for n in notes)]:
            report.say("event", name=name, fields={"text": note})
    decision = job.decision
    dtype = check_compute(decision.compute, device=place.device)
    sync = EveryStep(
        group,
        global_batch_samples=recipe.train.global_batch_samples,
        grain_samples=decision.micro_batch_samples,
        bucket_bytes=recipe.sync.bucket_bytes,
    )
    stream = Stream(
        Path(job.inputs.data_directory),
        seed=recipe.seed,
        global_batch_samples=recipe.train.global_batch_samples,
    )
    steps = num_steps(recipe, steps_per_epoch=stream.steps_per_epoch)
    return Training(
        job=job,
        group=group,
        device=place.device,
        model=model,
        anatomy=anatomy,
        task=task,
        state=state,
        sync=sync,
        forward_backward=ForwardBackward(
            model,
            anatomy=anatomy,
            forward=task.forward,
            state=state,
            sync=sync,
            settings=StepSettings(
                micro_batch_samples=decision.micro_batch_samples,
                global_batch_samples=recipe.train.global_batch_samples,
                exact=recipe.train.exact,
                dtype=dtype,
                device=place.device,
                fault=job.fault,
            ),
        ),
        update=Update(
            state,
            sync=sync,
            optimizer=recipe.train.optimizer,
            schedule=recipe.train.schedule,
            steps=steps,
            max_gradient_norm=recipe.train.max_gradient_norm,
        ),
        store=Store(job.run / "checkpoints"),
        stream=stream,
        evaluation=Evaluation(
            Path(job.inputs.data_directory),
            batch_samples=decision.micro_batch_samples,
            samples=recipe.data.evaluation_samples,
        ),
        dtype=dtype,
        steps=steps,
    )


def num_steps(recipe: Recipe, *, steps_per_epoch: float) -> int:
    """Optimizer steps of the whole run."""
    if recipe.train.steps is not None:
        return recipe.train.steps
    assert recipe.train.epochs is not None, "checked when the recipe was read"
    return max(1, round(recipe.train.epochs * steps_per_epoch))


def _weights(
    job: Job, *, model: nn.Module, group: Group, device: torch.device
) -> tuple[FlatState, list[str]]:
    """Materialise the model; where ranks share memory, rank 0 does it once for all.

    Returns the state, and what a person should know about pretrained weights.
    """
    recipe = job.recipe
    parameters = canonical_parameters(model)
    regions = flat.regions_of(
        parameters,
        decayed=weight_decay_names(model),
        matrices=_muon_names(recipe, model=model),
        frozen=flat.frozen_names(parameters, patterns=recipe.train.freeze),
    )
    state = flat.allocate(regions, group=group, optimizer=recipe.train.optimizer, device=device)
    record = init.record(model)
    first = not job.joining and (not group.computes_in_place or group.rank == 0)
    notes: list[str] = []
    if first:
        source = _pretrained(job, model=model)
        init.materialise(model, record=record, seed=recipe.seed, source=source)
        notes = source.notes() if source is not None else []
        flat.fill(state, canonical_parameters(model))
    group.barrier()
    if not first:
        shared = flat.StateSource(state)
        init.materialise(model, record=record, seed=recipe.seed, source=shared)
    model.to(device)
    flat.adopt(state, canonical_parameters(model))
    group.barrier()
    return state, notes


def _pretrained(job: Job, *, model: nn.Module) -> PretrainedWeights | None:
    folder = job.inputs.model_directory
    return None if folder is None else PretrainedWeights(folder, model=model)


def _muon_names(recipe: Recipe, *, model: nn.Module) -> set[str]:
    """Matrices of the blocks: what Muon is for."""
    if not isinstance(recipe.train.optimizer, Muon):
        return set()
    blocks = anatomy_of(model).blocks + "."
    named = canonical_parameters(model)
    return {name for name, p in named.items() if name.startswith(blocks) and p.dim() == 2}
