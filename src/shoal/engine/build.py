"""Config becomes objects: the one place where a recipe's sections meet the parts they describe."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from shoal.checkpoint.store import Store
from shoal.comm.group import Group
from shoal.config.recipe import Recipe
from shoal.data.stream import Evaluation, Stream
from shoal.data.tokenize import load_tokenizer
from shoal.engine.evaluate import complete, evaluate
from shoal.engine.model import model_config
from shoal.engine.ranks import Ranks
from shoal.engine.replica import Replica, allocate, build_replica, check, cut, fill
from shoal.engine.state import FlatState, Progress
from shoal.engine.step import Batch, ForwardBackward, StepSettings
from shoal.engine.update import Update
from shoal.layout import Share
from shoal.models.anatomy import Anatomy
from shoal.models.pretrained import PretrainedWeights
from shoal.observe.events import Report
from shoal.parallel.precision import LossScale, check_compute
from shoal.runtime import Place
from shoal.sync.every_step import EveryStep
from shoal.tasks.kinds import create
from shoal.tasks.task import Task

if TYPE_CHECKING:
    from shoal.engine.trainer import Job


@dataclass
class Training:
    """The objects of one rank's run."""

    job: Job
    ranks: Ranks
    device: torch.device
    replica: Replica
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
    loss_scale: LossScale | None = None
    progress: Progress = field(default_factory=Progress)
    peak_memory_bytes: int | None = None

    @property
    def model(self) -> nn.Module:
        """The model as this rank has it."""
        return self.replica.model

    @property
    def anatomy(self) -> Anatomy:
        """Where its parts are."""
        return self.replica.anatomy

    @property
    def config(self) -> Any:
        """The model's transformers configuration."""
        return self.model.config

    def enter(self, ranks: Ranks) -> None:
        """Go on among other ranks, with the state as it is. Collective; raises PeersLost.

        A model that was cut is built and cut anew: its exchanges belong to the groups it met.
        """
        if self.replica.is_cut:
            recipe = self.job.recipe
            config = model_config(recipe, inputs=self.job.inputs, task=self.task)
            marked = getattr(self.model, "shoal_whole_logits", False)
            new = build_replica(recipe, config=config, auto_class=self.task.auto_class)
            new.model.shoal_whole_logits = marked  # type: ignore[assignment]
            cut(new, recipe, mesh=ranks.mesh, decision=self.job.decision)
            fill(new, self.state, seed=recipe.seed, draws=False)
            self.replica.model, self.replica.anatomy = new.model, new.anatomy
        ranks.attach(self.model)
        self.ranks, self.forward_backward.ranks, self.sync.group = ranks, ranks, ranks.replicas

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
        prompts, tokens = self.task.prompts()
        folder = self.job.inputs.tokenizer_directory
        if not prompts or folder is None:
            return []
        return complete(self, prompts=prompts, tokens=tokens, tokenizer=load_tokenizer(folder))

    def facts(self) -> dict[str, Any]:
        """What a rank that joins, or a run that is resumed, needs besides tensors."""
        facts = {
            "progress": vars(self.progress).copy(),
            "peak_memory_bytes": self.peak_memory_bytes,
        }
        return facts | ({"loss_scale": self.loss_scale.state()} if self.loss_scale else {})

    def update_progress(self, facts: dict[str, Any]) -> None:
        """Stand where `facts` say."""
        for name, value in facts["progress"].items():
            setattr(self.progress, name, value)
        self.peak_memory_bytes = facts.get("peak_memory_bytes") or self.peak_memory_bytes
        if self.loss_scale is not None and "loss_scale" in facts:
            self.loss_scale.restore(facts["loss_scale"])
        self.update.restore(self.progress.step, applied_steps=self.progress.applied_steps)

    def resident(self) -> list[torch.Tensor]:
        """Parameters, gradients and optimizer state that this rank keeps."""
        return [self.state.values, self.state.gradients, *self.state.moments.values()]


def build(job: Job, *, ranks: Ranks, place: Place, report: Report) -> Training:
    """Build one rank's objects. Raises the errors of the parts it builds.

    Collective inside a replica of several workers: raises PeersLost when one goes.
    """
    recipe = job.recipe
    task = create(recipe.task.kind, settings=job.inputs.task_settings, options=recipe.task)
    config = model_config(recipe, inputs=job.inputs, task=task)
    replica = build_replica(recipe, config=config, auto_class=task.auto_class)
    source = _pretrained(job, model=replica.model)
    cut(replica, recipe, mesh=ranks.mesh, decision=job.decision)
    state = _state(job, replica=replica, source=source, group=ranks.world)
    check(replica, recipe, config=config, auto_class=task.auto_class)
    ranks.attach(replica.model)
    if place.rank == 0:
        told = source.notes() if source is not None else []
        notes = [*(("model", note) for note in told), *(("dropout", n) for n in replica.notes)]
        for name, note in notes:
            report.say("event", name=name, fields={"text": note})
    decision = job.decision
    dtype = check_compute(decision.compute, device=place.device)
    loss_scale = LossScale.of(dtype)
    sync = EveryStep(
        ranks.replicas,
        global_batch_samples=recipe.train.global_batch_samples,
        grain_samples=decision.micro_batch_samples,
        bucket_bytes=recipe.sync.bucket_bytes,
        shard=ranks.shard,
        shards=ranks.cut.shard,
    )
    stream = Stream(
        Path(job.inputs.data_directory),
        seed=recipe.seed,
        global_batch_samples=recipe.train.global_batch_samples,
    )
    steps = num_steps(recipe, steps_per_epoch=stream.steps_per_epoch)
    return Training(
        job=job,
        ranks=ranks,
        device=place.device,
        replica=replica,
        task=task,
        state=state,
        sync=sync,
        forward_backward=ForwardBackward(
            replica,
            task=task,
            state=state,
            ranks=ranks,
            settings=StepSettings(
                micro_batch_samples=decision.micro_batch_samples,
                global_batch_samples=recipe.train.global_batch_samples,
                exact=recipe.train.exact,
                dtype=dtype,
                device=place.device,
                loss_scale=loss_scale,
                fault=job.fault,
            ),
        ),
        update=Update(
            state,
            sync=sync,
            cut_norm=replica.norm if replica.is_cut else None,
            optimizer=recipe.train.optimizer,
            schedule=recipe.train.schedule,
            steps=steps,
            max_gradient_norm=recipe.train.max_gradient_norm,
            loss_scale=loss_scale,
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
        loss_scale=loss_scale,
    )


def num_steps(recipe: Recipe, *, steps_per_epoch: float) -> int:
    """Optimizer steps of the whole run."""
    if recipe.train.steps is not None:
        return recipe.train.steps
    assert recipe.train.epochs is not None, "checked when the recipe was read"
    return max(1, round(recipe.train.epochs * steps_per_epoch))


def _state(
    job: Job, *, replica: Replica, source: PretrainedWeights | None, group: Group
) -> FlatState:
    """The state, and the model over it; where ranks share memory, rank 0 fills it for all."""
    recipe = job.recipe
    dtype = torch.float64 if job.double else torch.float32
    state = allocate(replica, recipe, group=group, dtype=dtype)
    first = not job.joining and (not group.computes_in_place or group.rank == 0)
    fill(replica, state, seed=recipe.seed, source=source, draws=first)
    if group.shares_memory:
        group.barrier()
    return state


def _pretrained(job: Job, *, model: nn.Module) -> PretrainedWeights | None:
    """Weights to begin with; a rank that joins gets its state from another."""
    folder = job.inputs.model_directory
    return None if folder is None or job.joining else PretrainedWeights(folder, model=model)
